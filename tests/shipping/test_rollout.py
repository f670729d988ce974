"""Gates and staged rollout on a model with a planted effect: one cut heals it, another breaks it."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from benchmarks.planted import plant
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from recall import QUIET, Recall
from tiny import tiny_causal_lm, tiny_tokenizer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MaxMetric
from weights import same, weights

from laser_callback import FactsDataModule, LaserModule, LaserPlan, ProbesDataModule, StagedRollout, reduced
from laser_callback.cli.commands import main
from laser_callback.shipping.gates import read_gates
from laser_callback.shipping.rollout import in_steps

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]
GAIN = "val_acc: gain"
GUARD = "val_loss: delta < 0.3"


@pytest.fixture(scope="module")
def planted():
    return plant(layers=2, subjects=16, steps=150)


@pytest.fixture
def recall(planted):
    return Recall(planted.module.model).eval(), DataLoader(TensorDataset(*planted.race), batch_size=50)


@pytest.fixture
def heals(planted) -> str:
    """The cut that takes the planted tail away."""
    (matrix,) = planted.target.matrices
    return str(planted.target.at(planted.rank / matrix.max_rank))


def breaks(heals: str) -> str:
    """A cut of the MLPs that the model needs."""
    return f"{heals}, *.fc_out@0"


# ---- stages ----------------------------------------------------------------------------------------------------------


def test_a_plan_that_helps_is_accepted_and_the_model_left_alone(recall, heals):
    module, loader = recall
    before = weights(module)
    result = StagedRollout(module, heals, [GAIN, GUARD], loader, **QUIET).run()
    assert result.complete
    assert result.plan == LaserPlan.parse(heals)
    gain, guard = result.stages[0].verdict.judgements
    assert (gain.verdict, guard.verdict) == ("pass", "pass")
    assert gain.p < 0.05
    assert gain.change > 0
    assert result.log == [
        f"stage 1 of 1, {heals}: kept {heals}: {result.stages[0].verdict.reason}",
        f"use {heals}: every stage passed",
    ]
    assert "'val_loss <= +0.3' pass" in result.log[0]
    assert same(module, before)


def test_it_goes_back_to_the_last_good_stage_and_tries_nothing_after_it(recall, heals):
    module, loader = recall
    before = weights(module)
    stages = [heals, breaks(heals), f"{breaks(heals)}, *.fc_in@0"]
    rollout = StagedRollout(module, stages, [GAIN, GUARD], loader, apply=True, **QUIET)
    result = rollout.run()
    assert [stage.outcome for stage in result.stages] == ["kept", "went back"]
    assert result.plan == LaserPlan.parse(heals)
    assert not result.complete
    assert "went back to " + heals in result.log[1]
    assert "'val_loss <= +0.3' fail" in result.log[1]
    assert result.log[2] == f"use {heals}, a part of the plan: stage 2 of 3 did not pass, 1 not tried"
    # `apply` leaves what was kept, and only that.
    assert not same(module, before)
    applied = weights(module)
    rollout.undo()
    assert same(module, before)
    with reduced(module, heals):
        assert same(module, applied)


@pytest.mark.parametrize("bumps", [True, False], ids=["in place", "behind autograd"])
def test_undo_overwrites_no_training(recall, heals, bumps):
    module, loader = recall
    before = weights(module)
    rollout = StagedRollout(module, heals, [GAIN], loader, apply=True, **QUIET)
    rollout.run()
    (matrix, _), *_ = LaserPlan.parse(heals).resolve(module)
    with torch.no_grad():
        (matrix.parameter if bumps else matrix.parameter.data).mul_(1.01)
    trained = weights(module)
    with pytest.raises(RuntimeError, match=f"`{matrix.name}` changed since the rollout has cut them"):
        rollout.undo()
    with pytest.raises(RuntimeError, match="would overwrite that"):
        rollout.run()
    assert same(module, trained)
    rollout.undo(overwrite=True)
    assert same(module, before)
    rollout.undo()


def test_a_harmful_plan_keeps_the_original(recall, heals):
    module, loader = recall
    before = weights(module)
    rollout = StagedRollout(module, breaks(heals), [GAIN, GUARD], loader, apply=True, **QUIET)
    result = rollout.run()
    assert result.plan is None
    assert result.log[-1] == "keep the original: stage 1 of 1 did not pass"
    assert same(module, before)
    rollout.undo()
    assert same(module, before)


def test_a_stage_whose_passes_fail_goes_back_with_the_reason(recall, heals):
    class Refuses(Recall):
        def validation_step(self, batch, batch_idx):
            output = super().validation_step(batch, batch_idx)
            if batch_idx and not self.model.model.layers[1].mlp.gate_proj.weight.any():
                raise ValueError("Input contains NaN")
            return output

    module, loader = Refuses(recall[0].model).eval(), recall[1]
    result = StagedRollout(module, [heals, f"{heals}, 1.fc_in@0"], [GAIN], loader, **QUIET).run()
    assert [stage.outcome for stage in result.stages] == ["kept", "went back"]
    assert "Input contains NaN" in result.log[1]
    assert result.plan == LaserPlan.parse(heals)
    assert not result.stages[1].verdict.accepted


def test_two_rollouts_are_undone_the_last_first(recall, heals):
    module, loader = recall
    before = weights(module)
    first, second = (StagedRollout(module, heals, [GUARD], loader, apply=True, **QUIET) for _ in range(2))
    first.run()
    second.run()
    with pytest.raises(RuntimeError, match="by a later cut, which is to be undone first"):
        first.undo()
    second.undo()
    first.undo()
    assert same(module, before)


def test_what_is_undecided_does_not_ship(recall, heals, planted):
    module, _ = recall
    few = DataLoader(TensorDataset(*(part[:5] for part in planted.race)), batch_size=5)  # p is 0.06 at best
    result = StagedRollout(module, heals, {"val_acc": "gain"}, few, **QUIET).run()
    (judgement,) = result.stages[0].verdict.judgements
    assert judgement.verdict == "undecided"
    assert result.plan is None
    assert "'val_acc: gain' is undecided" in result.log[0]


def test_gains_may_be_demanded_of_the_last_stage_only(recall, heals, planted):
    module, loader = recall
    steps = in_steps(heals, [0.99])  # next to nothing is cut: no gain yet, and no harm
    each = StagedRollout(module, steps, [GAIN, GUARD], loader, **QUIET).run()
    assert [stage.outcome for stage in each.stages] == ["went back"]
    last = StagedRollout(module, steps, [GAIN, GUARD], loader, gain_at="last", **QUIET).run()
    assert [stage.outcome for stage in last.stages] == ["went on", "kept"]
    assert last.complete
    # A constraint that is broken on the way stops it, whatever the gain is.
    stopped = StagedRollout(module, [breaks(heals), heals], [GAIN, GUARD], loader, gain_at="last", **QUIET).run()
    assert [stage.outcome for stage in stopped.stages] == ["went back"]
    assert stopped.plan is None


# ---- what can be wrong is said before the work -----------------------------------------------------------------------


class Odd(Recall):
    """Logs a score that its batches do not add up to, too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.largest = MaxMetric()
        self.steps = 0

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        self.steps += 1
        self.largest(self.model(input_ids=batch[0], logits_to_keep=1).logits)
        self.log("val_largest", self.largest)
        return super().validation_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gates": ["answer: gain"]}, r"'answer: gain' has no row.*there are val_largest, val_loss, val_acc"),
        ({"gates": ["perplexity: ratio < 1.02"]}, "running text"),
        ({"gates": ["val_loss: gain"]}, "'val_loss: gain, direction max' or"),
        ({"gates": ["val_largest: delta > -0.1"]}, "can never be decided: 'val_largest' is not an average"),
        ({"gates": ["val_loss: gain, direction min"], "others": "x"}, "`others` has x, which no gate names"),
        ({"gates": ["y/val_loss: delta < 1"], "others": "x"}, "there are .*x/val_loss"),
        ({"stages": "7.fc_in@0.1"}, "7.fc_in@0.1"),
    ],
)
def test_before_any_stage(recall, heals, options, message):
    module, loader = Odd(recall[0].model).eval(), recall[1]
    if "others" in options:
        options = {**options, "others": {options["others"]: loader}}
    rollout = StagedRollout(module, **{"stages": heals, "gates": [GUARD], "data": loader, **QUIET, **options})
    with pytest.raises(ValueError, match=message):
        rollout.run()
    assert module.steps <= 4  # the first batch of each loader, for both models
    assert rollout.result.stages == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": []}, "`stages` must hold at least one plan"),
        ({"gates": []}, "at least one gate"),
        ({"gates": ["val_acc better"]}, "a constraint is .*perplexity: ratio < 1.02"),
        ({"gates": 3}, "`gates` must be texts"),
        ({"gain_at": "first"}, "'each' or 'last'"),
        ({"gates": [GUARD], "gain_at": "last"}, "needs a gate that demands a gain"),
        ({"resume": True}, "`resume` needs the `folder`"),
    ],
)
def test_bad_arguments_are_named(recall, heals, options, message):
    module, loader = recall
    with pytest.raises(ValueError, match=message):
        StagedRollout(module, **{"stages": heals, "gates": [GAIN], "data": loader, **options})


def test_a_module_with_a_plan_of_its_own_is_refused():
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer(), plan="1.mlp@0.1")
    with pytest.raises(MisconfigurationException, match="no plan of its own"):
        StagedRollout(module, "1.mlp@0.1", [GAIN], [])


def test_gates_are_read_from_texts_mappings_and_files(tmp_path):
    texts = ["val_acc: gain, alpha 0.01", "perplexity <= +2 %", "robustness >= -0.02"]
    (tmp_path / "gates.yaml").write_text(
        "val_acc: gain, alpha 0.01  # the primary\nperplexity: ratio < 1.02\nrobustness: delta > -0.02\n"
    )
    (tmp_path / "list.yml").write_text(
        "- val_acc: gain, alpha 0.01\n- perplexity <= +2 %\n- robustness: delta > -0.02\n"
    )
    for gates in (texts, tmp_path / "gates.yaml", str(tmp_path / "list.yml"), [str(tmp_path / "gates.yaml")]):
        assert [str(gate) for gate in read_gates(gates)] == texts
    with pytest.raises(OSError, match=r"none\.yaml"):
        read_gates(tmp_path / "none.yaml")


# ---- interrupted and resumed -----------------------------------------------------------------------------------------


CALLS: list[int] = []  # of both arms: what a module, class or closure holds is kept apart


def test_an_interrupted_rollout_goes_on_where_it_stopped(recall, heals, tmp_path, monkeypatch):
    module, loader = recall
    before = weights(module)
    arguments = {"stages": [heals, breaks(heals)], "gates": [GAIN, GUARD], "data": loader, "folder": tmp_path / "run"}
    whole = StagedRollout(module, **{**arguments, "folder": tmp_path / "whole"}, **QUIET).run()

    def interrupt(self, batch, batch_idx, original=Recall.validation_step):
        CALLS.append(batch_idx)
        if stop and len(CALLS) > in_all - 3:  # in the second stage
            raise KeyboardInterrupt
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Recall, "validation_step", interrupt)
    stop = False
    StagedRollout(module, **{**arguments, "folder": None}, **QUIET).run()
    in_all = len(CALLS)
    CALLS.clear()

    stop = True
    rollout = StagedRollout(module, **arguments, **QUIET)
    with pytest.raises(KeyboardInterrupt):
        rollout.run()
    assert same(module, before)
    assert rollout.result.plan == LaserPlan.parse(heals)
    assert "interrupted, 1 not tried" in json.loads((tmp_path / "run/result.json").read_text())["verdict"]

    stop = False
    CALLS.clear()
    resumed = StagedRollout(module, **arguments, resume=True, **QUIET).run()
    assert len(CALLS) <= in_all / 2 + 2  # the try-out, and the second stage alone
    assert resumed.log == whole.log
    assert without_times(resumed.to_dict()) == without_times(whole.to_dict())

    with pytest.raises(FileExistsError, match="holds a run already"):
        StagedRollout(module, **arguments, **QUIET).run()
    with pytest.raises(ValueError, match=r"gates .*now"):
        StagedRollout(module, **{**arguments, "gates": [GAIN]}, resume=True, **QUIET).run()


def test_ctrl_c_while_it_prepares_is_ctrl_c(recall, heals, monkeypatch):
    module, loader = recall

    def interrupt(self, batch, batch_idx):
        raise KeyboardInterrupt

    monkeypatch.setattr(Recall, "validation_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        StagedRollout(module, heals, [GAIN], loader, **QUIET).run()


def without_times(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: without_times(value) for key, value in data.items() if "seconds" not in key}
    return [without_times(value) for value in data] if isinstance(data, list) else data


# ---- language models: facts, text, probes ----------------------------------------------------------------------------


def facts(count: int = 60) -> list[dict]:
    words = ["France", "Italy", "Japan", "Brazil", "yen", "Rome", "Paris", "claim"]
    return [
        {
            "id": str(i),
            "prompt": f"The {words[i % 8]} of {words[(3 * i + i // 8) % 8]} number {i} is",
            "answer": words[5 * i % 8],
            # Not in the first batch: what there is must be known all the same.
            **({"paraphrases": [f"Number {i} of {words[i % 8]} is"]} if i >= 40 else {}),
        }
        for i in range(count)
    ]


PROBES = [{"prompt": f"The capital of {i}", "should": "answer" if i >= 5 else "refuse"} for i in range(10)]


def test_each_gate_has_its_data(tmp_path):
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer())
    (tmp_path / "text.txt").write_text("The capital of France is Paris and the currency of Japan is the yen. " * 100)
    near = [{"prompt": "The yen is the currency of", "answer": "Japan"}]
    rows = [fact | {"neighbours": near} for fact in facts()]
    data = FactsDataModule(rows, module.tokenizer, text=tmp_path / "text.txt")
    others = {
        "trivia": FactsDataModule(facts(24), module.tokenizer),
        "safety": ProbesDataModule(PROBES, module.tokenizer, max_new_tokens=2, batch_size=3),
    }
    with pytest.raises(ValueError, match="'kl: gain' can never pass: the original has the best 'kl' by definition"):
        StagedRollout(module, "3.mlp@0.3", ["kl: gain"], data, **QUIET).run()
    gates = {
        "log_loss": "gain",
        "perplexity": "ratio < 1e9",
        "paraphrase_accuracy": "delta > -0.5",
        "kl": "< 1e9",
        "top1_agreement": "delta > -1",
        "neighbour_accuracy": "delta > -1",
        "trivia/log_loss": "delta < 1e9",
        "safety/answer_rate": "delta > -0.5",
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="`id` must be another")  # a fact with rows of two roles is one
        result = StagedRollout(module, "3.mlp@0.3", gates, data, others=others, controls=True, **QUIET).run()
    verdict = result.stages[0].verdict
    (kl,) = (judgement for judgement in verdict.judgements if judgement.key == "kl")
    assert kl.counted == f"{kl.n} windows of text"
    assert {judgement.key: judgement.n for judgement in verdict.judgements} == {
        "log_loss": 60,
        "perplexity": verdict.results[""]["laser"]["perplexity"].n,
        "paraphrase_accuracy": 60,
        "kl": verdict.results[""]["laser"]["perplexity"].n,
        "top1_agreement": verdict.results[""]["laser"]["perplexity"].n,
        "neighbour_accuracy": 60,
        "trivia/log_loss": 24,
        "safety/answer_rate": 5,
    }
    assert verdict.results[""].primary == "log_loss"
    assert set(verdict.results[""].controls["laser"]) == {"zeroed", "random", "noise"}
    assert verdict.results["trivia"].controls == {}
    loss = verdict.results["trivia"]["laser"]["log_loss"]
    assert next(j for j in verdict.judgements if j.key == "trivia/log_loss").change == loss.delta
    assert verdict.results["trivia"]["laser"]["log_loss"].original != verdict.results[""]["laser"]["log_loss"].original


@pytest.fixture
def folder(tmp_path):
    tiny_causal_lm().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, facts())))
    (tmp_path / "probes.jsonl").write_text("\n".join(map(json.dumps, PROBES)))
    return tmp_path


@pytest.mark.slow
def test_the_exit_code_is_the_verdict(folder, capsys):
    common = ["--model", str(folder / "model"), "--facts", str(folder / "facts.jsonl"), "--accelerator", "cpu"]
    common += ["--output", str(folder / "out.json")]
    passes = ["--gates", '["log_loss: delta < 1e9", "probes/answer_rate: delta > -1"]']
    probes = ["--probes", str(folder / "probes.jsonl")]
    assert main(["gate", "--plan", "3.mlp@0.5", *passes, *probes, *common]) == 0
    shown = capsys.readouterr().out
    assert "use 3.mlp@0.5: every stage passed" in shown
    assert "probes/answer_rate >= -1" in shown

    (folder / "gates.yaml").write_text("log_loss: delta < 1e9\nfirst_token_accuracy: gain\n")
    (folder / "plan.yaml").write_text(
        "reductions:\n- {layer: 3, matrix: mlp, rho: 0.1}\n- {layer: 2, matrix: mlp, rho: 0}\n"
    )
    arguments = ["--plan", str(folder / "plan.yaml"), "--gates", f'["{folder / "gates.yaml"}"]', *common]
    assert main(["rollout", *arguments, "--gain_at", "last", "--folder", str(folder / "run")]) == 3
    result = json.loads((folder / "out.json").read_text())
    assert result["declared"] == ["3.mlp@0.1", "3.mlp@0.1, 2.mlp@0"]
    assert [stage["outcome"] for stage in result["stages"]] == ["went on", "went back"]
    assert (folder / "run/1-data.examples.jsonl").exists()

    for wrong, message in (
        (["--plan", "9.mlp@0.5", *passes, *probes, *common], "9.mlp@0.5"),
        (["--plan", "3.mlp@0.5", *passes, *common], "probes/answer_rate"),
        (["--plan", "3.mlp@0.5", *passes, "--model", str(folder / "model")], "`--model` and `--facts`"),
        (["--plan", "3.mlp@0.5", *common], "gates"),
    ):
        capsys.readouterr()
        assert main(["gate", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_the_help_of_a_gate_has_the_options_of_a_rollout_but_its_stages(capsys):
    with pytest.raises(SystemExit):
        main(["gate", "--help"])
    shown = capsys.readouterr().out
    assert "--probes" in shown
    assert "--stages" not in shown
    assert "--folder" not in shown
