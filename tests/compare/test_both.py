"""Numbers of both models against float64 logits of two plain passes, and what becomes of them on the way to a row."""

from __future__ import annotations

import json
import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from brute_force import answer_log_probs, first_token
from fact_rows import facts
from language_models import CAUSAL, masked_lm
from lightning.pytorch.strategies import DDPStrategy
from tiny import SENTENCES, tiny_causal_lm, tiny_tokenizer
from trainers import quiet_trainer

from laser_callback import FactsDataModule, LaserCallback, LaserModule, reduced
from laser_callback.compare import both
from laser_callback.data.datamodule import TextWindows
from laser_callback.stats import Constraint

PLANS = {"a": "2.mlp@0.1", "b": "3.q_proj@0.5"}
WINDOW = 32


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(SENTENCES * 8))
    return path


def with_neighbours(**options: Any) -> list[dict[str, Any]]:
    """Facts, every second of which has neighbours, and every two of which are of one subject."""
    rows = facts(**options)
    for i, row in enumerate(rows):
        row["subject"] = f"subject {i // 2}"
        if i % 2:
            row["neighbours"] = [
                {"prompt": f"{word} the capital of {i}", "answer": "of Rome"} for word in ("So", "Now", "In")[: i % 4]
            ]
    return rows


def windows_of(module: LaserModule, path: Any) -> TextWindows:
    windows = TextWindows(path, module.tokenizer, window=WINDOW)
    assert len({len(ids) for ids in windows.windows}) == 2  # the last is shorter: batches have padding
    return windows


def directly(before: torch.Tensor, after: torch.Tensor) -> tuple[list[float], list[float]]:
    """KL and agreement of each token, from (T, V) float64 log probabilities."""
    kl = (before.exp() * (before - after)).sum(-1)
    return kl.tolist(), (before.argmax(-1) == after.argmax(-1)).double().tolist()


def mean_over_tokens(each: list[list[float]]) -> float:
    return sum(map(sum, each)) / sum(map(len, each))


def of_text(model: Any, plan: str, windows: TextWindows) -> list[tuple[list[float], list[float]]]:
    """Of each window."""

    def log_probs() -> list[torch.Tensor]:
        with torch.no_grad():
            logits = [model(input_ids=torch.tensor([ids])).logits[0, :-1] for ids in windows.windows]
        return [one.double().log_softmax(-1) for one in logits]

    before = log_probs()
    with reduced(model, plan):
        after = log_probs()
    return [directly(*pair) for pair in zip(before, after, strict=True)]


def of_answers(model: Any, tokenizer: Any, plan: str, rows: Any, masked: bool = False) -> Any:
    """Of each fact at its answer, and the first tokens said to its neighbours by both models."""

    def passes() -> Any:
        asked = [answer_log_probs(model, tokenizer, row["prompt"], row["answer"], masked)[0] for row in rows]
        said = []
        for one in (one for row in rows for one in row.get("neighbours", [])):
            table, targets = answer_log_probs(model, tokenizer, one["prompt"], one["answer"], masked)
            first = first_token(tokenizer, targets)
            said.append((int(table[first].argmax()), targets[first]))
        return asked, said

    before, said_before = passes()
    with reduced(model, plan):
        after, said_after = passes()
    return [directly(*pair) for pair in zip(before, after, strict=True)], said_before, said_after


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replay", [True, False])
def test_text_and_answers_against_float64(trainer, text, replay):
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer())
    rows, windows = with_neighbours(), windows_of(module, text)
    laser = LaserCallback(PLANS, report=False, replay=replay, controls=True)
    data = FactsDataModule(rows, module.tokenizer, text=windows, batch_size=12, rows_per_forward=7)
    logged = trainer(laser).validate(module, datamodule=data, verbose=False)[0]
    for name, plan in PLANS.items():
        arm, found = laser.result[name], {}
        found["kl"], found["top1_agreement"] = zip(*of_text(module.model, plan, windows), strict=True)
        answers, before, after = of_answers(module.model, module.tokenizer, plan, rows)
        found["answer_kl"], found["answer_top1_agreement"] = zip(*answers, strict=True)
        found["neighbour_agreement"] = [[float(a == b) for (a, _), (b, _) in zip(before, after, strict=True)]]
        for key, each in found.items():
            row = arm[key]
            assert row.reduced == pytest.approx(mean_over_tokens(each), rel=1e-4, abs=1e-6), key
            assert row.original == (0 if key.endswith("kl") else 1)
            assert logged[f"laser/{name}/{key}"] == pytest.approx(row.reduced)
            assert f"laser/{name}/delta/{key}" not in logged
            assert key not in logged
        right = [float(said == gold) for said, gold in after]
        assert arm["neighbour_accuracy"].reduced == pytest.approx(sum(right) / len(right))
        assert {"kl", "answer_kl"} <= {row.metric for row in laser.result.controls[name]["zeroed"].rows}
    by_id = {row["id"]: row for row in laser.result.examples.to_rows()}
    kl = [sum(one) / len(one) for one in next(zip(*of_text(module.model, PLANS["b"], windows), strict=True))]
    assert [by_id[f"text.txt:{i}"]["b"]["kl"] for i in range(len(kl))] == pytest.approx(kl, rel=1e-4, abs=1e-6)
    # What the layers in front of the cut would have given was not computed again.
    assert ("replayed" in laser.result["b"].replay) == replay


def test_masked_models_have_them_at_their_answers(trainer):
    tokenizer = tiny_tokenizer(bos=True, eos=True, masked=True)
    module = LaserModule(masked_lm("bert"), tokenizer, plan="1.mlp@0.1", report=False)
    trainer().validate(module, datamodule=FactsDataModule(rows := facts(), tokenizer), verbose=False)
    answers, *_ = of_answers(module.model, tokenizer, "1.mlp@0.1", rows, masked=True)
    expected = mean_over_tokens([kl for kl, _ in answers])
    assert module.result["laser"]["answer_kl"].reduced == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", CAUSAL)
def test_families_whose_logits_are_scaled_or_capped(trainer, text, name):
    module = LaserModule(CAUSAL[name](), tiny_tokenizer(), plan="1.mlp@0.1", report=False)
    windows = windows_of(module, text)
    trainer().validate(module, datamodule=FactsDataModule(facts(), module.tokenizer, text=windows), verbose=False)
    expected = mean_over_tokens([kl for kl, _ in of_text(module.model, "1.mlp@0.1", windows)])
    assert module.result["laser"]["kl"].reduced == pytest.approx(expected, rel=1e-4)


def test_two_callbacks_each_have_their_own(trainer, text):
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer())
    windows = windows_of(module, text)
    lasers = [LaserCallback(plan, key_prefix=name, report=False) for name, plan in PLANS.items()]
    logged = trainer(*lasers).validate(module, datamodule=FactsDataModule(facts(), text=windows), verbose=False)[0]
    for name, plan in PLANS.items():
        expected = mean_over_tokens([kl for kl, _ in of_text(module.model, plan, windows)])
        assert logged[f"{name}/kl"] == pytest.approx(expected, rel=1e-4)


def pair(original: torch.Tensor, other: torch.Tensor, where: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a reduced arm is told."""
    held = both.Both()
    held.begin()
    kl, same = both.divergence(original, where)
    held.end()
    assert not kl.any()
    assert same.all()
    assert not both.is_compared()
    with held.of_arm():
        found = both.divergence(other, where)
    held.forget()
    return found


@pytest.mark.parametrize("most", [1, 5 * 50, 2**23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_float32_whatever_the_dtype_and_the_chunks(monkeypatch, dtype, most):
    monkeypatch.setattr(both, "MOST_NUMBERS", most)
    generator = torch.Generator().manual_seed(0)
    one, two = (5 * torch.randn(3, 9, 50, generator=generator) for _ in range(2))
    two = (one + 0.05 * two + 100).to(dtype) if dtype == torch.float32 else (one + 0.05 * two).to(dtype)
    one, where = one.to(dtype), torch.rand(3, 9, generator=generator) > 0.4
    kl, same = pair(one, two, where)
    assert kl.dtype == torch.float32
    expected, agree = directly(*(logits[where].double().log_softmax(-1) for logits in (one, two)))
    assert kl.tolist() == pytest.approx(expected, rel=1e-3 if dtype == torch.float32 else 1e-4, abs=1e-7)
    assert same.double().tolist() == agree
    assert 0 < sum(agree) < len(agree) or dtype != torch.bfloat16


def test_tokens_that_are_ruled_out_and_logits_that_are_no_numbers():
    inf, nan = math.inf, math.nan
    one = torch.tensor([[0.0, 1.0, -inf]] * 5)
    two = torch.tensor([[0.0, 0.5, -inf], [0.0, 0.5, 2.0], [0.0, -inf, -inf], [0.0, nan, 0.0], [0.0, inf, 0.0]])
    kl, same = pair(one, two, torch.ones(5, dtype=torch.bool))
    p, q, r = (torch.tensor(x).double().log_softmax(-1) for x in ([0.0, 1.0], [0.0, 0.5], [0.0, 0.5, 2.0]))
    expected = [float((p.exp() * (p - q)).sum()), float((p.exp() * (p - r[:2])).sum()), inf, inf, inf]
    assert kl.tolist() == pytest.approx(expected, rel=1e-5)
    assert same.tolist()[:3] == [True, False, False]
    kl, same = pair(two[:3], two[:3], torch.ones(3, dtype=torch.bool))
    assert kl.tolist() == [0, 0, 0]
    assert same.all()
    kl, _ = pair(one, two, torch.zeros(5, dtype=torch.bool))
    assert len(kl) == 0


# ---- what is kept ----------------------------------------------------------------------------------------------------


class Watching(pl.Callback):
    """What the step has returned, and what is kept of the original's logits by then."""

    def __init__(self) -> None:
        self.returned: list[Any] = []
        self.compared: list[bool] = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, *args):
        self.returned.append(outputs)
        self.compared.append(both.is_compared())


def test_the_step_returns_the_same_with_and_without_a_comparison(trainer, text):
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer())
    data = FactsDataModule(with_neighbours(), module.tokenizer, text=windows_of(module, text))
    laser = LaserCallback(PLANS, report=False)
    runs = [Watching(), Watching()]
    for run, others in zip(runs, ([], [laser]), strict=True):
        trainer(*others, run).validate(module, datamodule=data, verbose=False)
        assert not any(run.compared)
    names = [[set(returned) for returned in run.returned] for run in runs]
    assert names[0] == names[1]
    assert not any("kl" in name for name in names[0][0] | names[0][-1])


def test_one_batch_of_logits_is_kept_at_a_time(trainer, text, monkeypatch):
    kept: list[int] = []
    keep, forget = both.Both.keep, both.Both.forget

    def keeping(self: both.Both, value: torch.Tensor) -> None:
        keep(self, value)
        kept.append(sum(one.numel() for one in self._kept))

    def forgetting(self: both.Both) -> None:
        forget(self)
        kept.append(0)

    monkeypatch.setattr(both.Both, "keep", keeping)
    monkeypatch.setattr(both.Both, "forget", forgetting)
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer(), plan="2.mlp@0.1", report=False)
    data = FactsDataModule(facts(), module.tokenizer, text=windows_of(module, text), batch_size=8)
    trainer().validate(module, datamodule=data, verbose=False)
    vocabulary = module.model.config.vocab_size
    assert max(kept) == 2 * (WINDOW - 1) * vocabulary  # two windows in a batch; nothing predicts the first token
    assert kept[-1] == 0


def test_nothing_is_kept_without_a_reduced_arm(trainer, monkeypatch):
    monkeypatch.setattr(both.Both, "keep", lambda *_: pytest.fail("kept"))
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer())
    data = FactsDataModule(with_neighbours(), module.tokenizer)
    assert "answer_kl" not in trainer().validate(module, datamodule=data, verbose=False)[0]
    trainer().predict(module, datamodule=data)


def test_a_step_that_fails_leaves_nothing(trainer):
    class Failing(LaserModule):
        def validation_step(self, *args: Any) -> Any:
            super().validation_step(*args)
            raise RuntimeError("mine")

    module = Failing(tiny_causal_lm(), tiny_tokenizer(), plan="2.mlp@0.1", report=False)
    with pytest.raises(RuntimeError, match="mine"):
        trainer().validate(module, datamodule=FactsDataModule(facts(), module.tokenizer), verbose=False)
    assert not both.is_compared()


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_rows_have_an_interval_and_no_test(trainer, text, tmp_path):
    path = tmp_path / "result.json"
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer(), plan="2.mlp@0.1", report=str(path))
    data = FactsDataModule(with_neighbours(), module.tokenizer, text=(windows := windows_of(module, text)))
    trainer().validate(module, datamodule=data, verbose=False)
    arm = module.result["laser"]
    for row in (row for row in arm.rows if row.kind == "pair"):
        assert (row.p, row.p_adjusted, row.verdict) == (None, None, "not tested")
        assert row.lower < row.delta < row.upper
        assert row.lower >= 0 if row.original == 0 else (row.lower >= -1 and row.upper <= 0)
        assert row.higher_is_better == (row.original == 1)
        assert row.metric not in arm.prior_checks
    assert (arm["kl"].n, arm["answer_kl"].n, arm["answer_kl"].unit) == (len(windows), 6, "cluster")
    assert "neighbour_accuracy" not in arm.prior_checks
    assert {"first_token_accuracy", "paraphrase_accuracy"} <= set(arm.prior_checks)
    written = {row["metric"]: row for row in json.loads(path.read_text())["arms"]["laser"]["rows"]}
    assert written["kl"]["upper90"] == arm["kl"].upper90
    assert Constraint.parse(f"kl <= {arm['kl'].upper}").judge(arm["kl"]).verdict == "pass"
    assert Constraint.parse(f"kl <= {arm['kl'].lower}").judge(arm["kl"]).verdict == "fail"
    assert Constraint.parse(f"kl <= {arm['kl'].delta}").judge(arm["kl"]).verdict == "undecided"
    assert Constraint.parse("top1_agreement >= -0.01").judge(arm["top1_agreement"]).verdict == "fail"


def test_a_model_that_the_cut_breaks_is_infinitely_far(trainer, text):
    class Breaking(LaserModule):
        def _text_step(self, batch: Any, count: bool = True) -> Any:
            weight = self.model.model.layers[2].mlp.up_proj.weight
            self.model.model.norm.weight.data.fill_(math.nan if torch.linalg.matrix_rank(weight) < 20 else 1.0)
            return super()._text_step(batch, count)

    module = Breaking(tiny_causal_lm(), tiny_tokenizer())
    laser = LaserCallback("2.up_proj@0.1", report=False, skip_isolation=True)
    data = FactsDataModule(facts(), module.tokenizer, text=windows_of(module, text))
    trainer(laser).validate(module, datamodule=data, verbose=False)
    row = laser.result["laser"]["kl"]
    assert (row.reduced, row.lower, row.note) == (
        math.inf,
        None,
        "the reduced model's value is inf: there is nothing to test",
    )
    assert Constraint.parse("kl <= 0.02").judge(row).verdict == "fail"


# ---- two processes ---------------------------------------------------------------------------------------------------


def test_two_processes_have_the_rows_of_one(tmp_path, text):
    rows = with_neighbours(n=13)  # odd: the sampler repeats an example
    found = []
    for processes in (1, 2):
        path = tmp_path / f"{processes}.json"
        module = LaserModule(tiny_causal_lm(), tiny_tokenizer())
        data = FactsDataModule(rows, module.tokenizer, text=windows_of(module, text), batch_size=4)
        strategy = DDPStrategy(start_method="spawn", process_group_backend="gloo") if processes == 2 else "auto"
        laser = LaserCallback(PLANS, report=path)
        run = quiet_trainer(laser, devices=processes, strategy=strategy, default_root_dir=tmp_path)
        logged = run.validate(module, datamodule=data, verbose=False)[0]
        arms = json.loads(path.read_text())["arms"]
        found.append({(name, row["metric"]): row for name, arm in arms.items() for row in arm["rows"]})
        assert logged["laser/b/kl"] == pytest.approx(found[-1]["b", "kl"]["reduced"])
    for key, row in found[0].items():
        if row["kind"] == "pair":
            for name in ("n", "reduced", "lower", "upper"):
                assert found[1][key][name] == pytest.approx(row[name], rel=1e-5, abs=1e-9), (key, name)
    assert {metric for _, metric in found[0]} == {metric for _, metric in found[1]}
