"""LaserCleanup after noisy and clean labels: it helps, or says that there is nothing to gain; and what it shows."""

from __future__ import annotations

import copy
import io
import json
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from noisy import AIM, Noisy, accuracy, examples, loader, pretrained, saved, tune
from rich.console import Console
from tiny import tiny_causal_lm, tiny_tokenizer
from torch.utils.data import TensorDataset

from laser_callback import FactsDataModule, LaserCleanup, LaserModule, find_matrices
from laser_callback.reports.gate_terminal import print_cleanup
from laser_callback.results.cleanup import CleanupResult

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("own_cache")


def shown(result: CleanupResult) -> str:
    console = Console(file=io.StringIO(), width=160)
    print_cleanup(result, console)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def noisy_run(tmp_path_factory) -> tuple[Noisy, Noisy, LaserCleanup]:
    """Base, fine-tuned on labels of which 30 % are wrong, and what a cleanup made of the last weights."""
    folder, base = tmp_path_factory.mktemp("noisy"), pretrained()
    module = copy.deepcopy(base)
    also = {"near": loader(examples(300, 5, shift=0.1)), "far": loader(examples(300, 6, shift=1.0))}
    cleanup = LaserCleanup(
        base=base, strategies="delta", weights="last", folder=folder, also=also, candidates=20, **AIM
    )
    tune(folder, module, examples(400, 2, 0.3), cleanup, enable_checkpointing=False)
    return base, module, cleanup


def test_noisy_labels_are_cut_out_of_the_change(noisy_run):
    _, module, cleanup = noisy_run
    result, fresh = cleanup.result, examples(1000, 4)
    assert result.search.settings["strategies"] == ["delta(besides=False)"]
    cleaned = Noisy()
    cleaned.load_state_dict(torch.load(result.checkpoint, weights_only=True)["state_dict"])
    assert accuracy(cleaned, fresh) > accuracy(module, fresh) + 0.1
    assert result.plan == result.search.plan
    assert result.verdict.startswith(f"cleaned by {result.plan}: on unseen examples")
    # All joint rules have raced: none is left for want of room.
    rules = [c for c in result.search.candidates if not c.examples]
    assert all(c.reason for c in rules), [(str(c.plan), c.reason) for c in rules]


def test_the_rank_cut_helps_by_itself(noisy_run):
    _, module, cleanup = noisy_run
    rows = {row.kind: row for row in cleanup.result.contenders}
    assert rows["as trained"].value == pytest.approx(accuracy(module, examples(1000, 4)), abs=0.08)
    for kind in ("joint rule", "WiSE-FT"):
        assert rows[kind].gain > 0.1
        assert rows[kind].value > rows["as trained"].value + 0.1


def test_the_table_tells_the_confirmed_from_the_rest(noisy_run):
    _, _, cleanup = noisy_run
    result = cleanup.result
    (confirmed,) = [row for row in result.contenders if row.confirmed]
    assert confirmed.name == result.tried == str(result.search.found)
    row = result.confirmed["laser"]["val_acc"]
    assert confirmed.value == row.reduced
    assert result.contenders[0].value == pytest.approx(row.original)
    checks = result.confirmed["laser"].prior_checks["val_acc"]
    assert confirmed.balanced == checks.macro.reduced
    assert confirmed.said_most == checks.top_predictions["reduced"][0][1] / checks.n
    text = shown(result)
    assert all(word in text for word in ("says most", "balanced", "* exploratory"))
    (line,) = [line for line in text.splitlines() if str(result.plan) in line and "cleaned by" not in line]
    assert "*" not in line.replace(str(result.plan), "")
    assert line.count("%") == 4  # a share in every column of the table, as in the sentence
    assert f"searched: {result.source}\n" in text
    assert f"\ncleaned: {result.checkpoint}\n" in text
    report = json.loads(result.report.read_text())
    assert report["contenders"][0]["kind"] == "as trained"
    assert [row["confirmed"] for row in report["contenders"]].count(True) == 1


def test_other_tasks_are_measured_under_the_base_and_both_models(noisy_run):
    base, module, cleanup = noisy_run
    tasks = {task.name: task for task in cleanup.result.others}
    assert list(tasks) == ["target", "near", "far"]
    cleaned = Noisy()
    cleaned.load_state_dict(torch.load(cleanup.result.checkpoint, weights_only=True)["state_dict"])
    for name, data in (("near", examples(300, 5, shift=0.1)), ("far", examples(300, 6, shift=1.0))):
        task = tasks[name]
        of_base, of_tuned, of_cleaned = (accuracy(one, data) for one in (base, module, cleaned))
        assert (task.tuning.original, task.tuning.reduced) == pytest.approx((of_base, of_tuned))
        assert (task.cleaning.original, task.cleaning.reduced) == pytest.approx((of_tuned, of_cleaned))
        assert task.cleaning.fixed is not None  # a paired comparison
    confirmed = cleanup.result.confirmed["laser"]["val_acc"]
    assert (tasks["target"].cleaning.fixed, tasks["target"].cleaning.broken) == (confirmed.fixed, confirmed.broken)
    assert tasks["near"].effect == "damaged"
    report = json.loads(cleanup.result.report.read_text())
    assert "near" in report["four_parts"]["damaged"]
    lost = tasks["near"].tuning.delta
    if report["four_parts"]["damaged"] == ["near"]:
        assert report["four_parts"]["healed"] == pytest.approx(-tasks["near"].cleaning.delta / lost)
    assert "healed" in shown(cleanup.result)


def test_clean_labels_leave_nothing_to_gain(tmp_path):
    base = pretrained()
    module = copy.deepcopy(base)
    cleanup = LaserCleanup(base=base, strategies="delta", weights="last", folder=tmp_path, candidates=20, **AIM)
    tune(tmp_path, module, examples(400, 2), cleanup, enable_checkpointing=False)
    assert cleanup.result.checkpoint is cleanup.result.plan is None
    assert cleanup.result.verdict.startswith("keep the model as trained: ")
    assert not list(tmp_path.glob("*.ckpt"))
    text = shown(cleanup.result)
    assert "keep the model" in text
    assert "searched: last\n" in text
    assert "cleaned:" not in text


def test_the_default_strategies_race_joint_rules_first_when_time_is_short(tmp_path):
    base = pretrained()
    cleanup = LaserCleanup(base=base, weights="last", folder=tmp_path, candidates=3, **AIM)
    tune(tmp_path, copy.deepcopy(base), examples(400, 2, 0.3), cleanup, enable_checkpointing=False)
    result = cleanup.result
    assert result.search.settings["strategies"] == ["delta(besides=False)", "delta-matrices", "laser"]
    proposed = {c.strategy for c in result.search.candidates}
    assert proposed == {"delta", "delta-matrices", "laser"}
    first = [c for c in result.search.candidates if c.examples][:3]
    assert [c.strategy for c in first] == ["delta"] * 3


def test_other_tasks_that_fail_cost_nothing(tmp_path):
    """Labels that the head does not have, and no example at all: both are named, and all else is there."""
    base = pretrained()
    unknown = TensorDataset(torch.zeros(20, 3, 48), torch.full((20,), 9))
    none = TensorDataset(torch.zeros(0, 3, 48), torch.zeros(0, dtype=torch.long))
    also = {"unknown": loader(unknown), "none": loader(none), "near": loader(examples(100, 5, shift=0.1))}
    own = {"strategies": "delta", "weights": "last", "folder": tmp_path, "candidates": 4, "controls": False}
    cleanup = LaserCleanup(base=base, also=also, **own, **AIM)
    tune(tmp_path, copy.deepcopy(base), examples(400, 2, 0.3), cleanup, enable_checkpointing=False)
    result = cleanup.result
    assert result.plan is not None
    assert result.checkpoint.is_file()
    assert [task.name for task in result.others] == ["target", "near"]
    assert result.notes == [
        "`also['unknown']` is left out: Target 9 is out of bounds",
        "`also['none']` is left out: 'val_acc' is not logged there, but nothing",
    ]
    assert all(note in shown(result).replace("\n", " ") for note in result.notes)


class Adapted(Noisy):
    """With LoRA on what is not attention."""

    def __init__(self, base: Noisy) -> None:
        super().__init__()
        self.load_state_dict(base.state_dict())
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["linear1", "linear2"])
        peft.inject_adapter_in_model(config, self)
        self.head.requires_grad_(True)


def test_rules_that_keep_all_of_a_lora_say_why(tmp_path):
    module = Adapted(pretrained())
    before = {name: value.clone() for name, value in module.state_dict().items() if "base_layer" in name}
    cleanup = LaserCleanup(strategies="delta", weights="last", folder=tmp_path, candidates=20, **AIM)
    tune(tmp_path, module, examples(400, 2, 0.3), cleanup, enable_checkpointing=False, max_epochs=1)
    why = {next(iter(c.plan)).rho: c.reason for c in cleanup.result.search.candidates}
    for rule in ("gavish-donoho", "marchenko-pastur"):
        assert why[rule].startswith("it keeps everything: ")
        assert why[rule].endswith("`energy-0.9` cuts it")
    assert why["k8"] == "it keeps everything"
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())


def test_the_module_is_as_trained_whatever_was_tried(noisy_run, tmp_path):
    base, _, _ = noisy_run
    again = copy.deepcopy(base)
    second = LaserCleanup(base=base, strategies="delta", weights="last", folder=tmp_path, candidates=20, **AIM)
    kept: dict[str, torch.Tensor] = {}

    class Keep(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            kept.update({name: value.clone() for name, value in pl_module.state_dict().items()})

    tune(tmp_path, again, examples(400, 2, 0.3), Keep(), saved(tmp_path), second)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in kept.items())


def test_other_facts_of_a_language_model(tmp_path):
    """One of the data has text, whose windows are a second dataloader."""
    base = LaserModule(tiny_causal_lm(), tiny_tokenizer())
    module = copy.deepcopy(base)
    with torch.no_grad():
        for matrix in find_matrices(module):
            matrix.parameter.mul_(1.01)
    (tmp_path / "text.txt").write_text("a b c d e f g h i j " * 200)

    def facts(name: str, **options: Any) -> FactsDataModule:
        rows = [{"id": f"{name}{i}", "prompt": f"The {name} of land {i} is", "answer": "Rome"} for i in range(40)]
        return FactsDataModule(rows, base.tokenizer, **options)

    also = {"rivers": facts("river", text=tmp_path / "text.txt"), "capitals": facts("capital", text=None)}
    search = {"within": "1.mlp", "candidates": 4, "report": False, "constraints": [], "controls": False}
    cleanup = LaserCleanup(
        facts("town"), base=base, strategies="delta", weights="last", folder=tmp_path, also=also, **search
    )
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_epochs=1, limit_val_batches=0, **quiet)
    trainer.callbacks.append(cleanup)
    trainer.fit(module, datamodule=facts("lake"))
    result = cleanup.result
    assert result.checkpoint is None
    assert [task.name for task in result.others] == ["target", "rivers", "capitals"]
    assert all(task.tuning.metric == "first_token_accuracy" for task in result.others)
    assert [task.tuning.n for task in result.others[1:]] == [40, 40]
