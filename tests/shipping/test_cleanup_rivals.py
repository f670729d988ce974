"""Checkpoints of other epochs race with the cuts: what is confirmed, what is named, and that all is put back."""

from __future__ import annotations

import copy
import json
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from candidates import proposed
from classifier import PLAN, Classifier
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from noisy import AIM, Noisy, accuracy, examples, loader, pretrained, saved, tune

from laser_callback import LaserCleanup, LaserPlan
from laser_callback.compare.alone import paired
from laser_callback.compare.measure import Lab
from laser_callback.results.candidates import Estimate
from laser_callback.results.comparison import ArmResult, LaserResult
from laser_callback.results.examples import PairedExamples
from laser_callback.results.other_tasks import TARGET, OtherTask, four_parts
from laser_callback.results.search import SearchResult
from laser_callback.search.verdict import decide
from laser_callback.shipping import Gates
from laser_callback.shipping.contest import best_of_each_kind
from laser_callback.shipping.rivals import MOST, put_in, rivals_of
from laser_callback.spectra import BaseWeights, Spectra
from laser_callback.stats import Outcomes, compare
from laser_callback.stats.priors import prior_checks

pytestmark = pytest.mark.usefixtures("own_cache")
ONE_CUT: dict[str, Any] = {"strategies": "late-mlp", "rhos": [0.99], "within": "0.k_proj"}
"""A search that cannot find anything that helps much."""


class Kept(pl.Callback):
    """What the module is when training has ended."""

    def on_train_end(self, trainer, pl_module):
        self.weights = copy.deepcopy(pl_module.state_dict())


def noisy_cleanup(folder: Any, validation: Any = None, gates: Any = None, **options: Any) -> tuple[Any, ...]:
    """Three epochs on noisy labels, of which the first is by far the best."""
    module, kept = pretrained(), Kept()
    points = options.pop("saved", None) or saved(folder)
    search = {**AIM, **ONE_CUT, "candidates": 4, **options}
    cleanup = LaserCleanup(validation, gates=gates, folder=folder, **search)
    trainer = tune(folder, module, examples(400, 2, 0.3), kept, points, cleanup, max_epochs=3)
    return module, kept, points, cleanup.result, trainer


def test_an_earlier_epoch_is_named_and_nothing_is_written(tmp_path):
    module, kept, points, result, _ = noisy_cleanup(tmp_path, weights="last")
    assert result.plan is result.recipe is None
    assert str(result.checkpoint) == result.tried == points.best_model_path
    assert result.verdict.startswith(f"use the checkpoint {points.best_model_path}: on unseen examples")
    assert not list(tmp_path.rglob("*.cleaned.ckpt"))
    rows = [row for row in result.contenders if row.kind == "checkpoint"]
    assert [row.name for row in rows if row.confirmed] == [points.best_model_path]
    assert len(rows) == 2  # the last is what was cleaned

    # The confirmed numbers are those of both checkpoints, example by example.
    early = Noisy()
    early.load_state_dict(torch.load(points.best_model_path, weights_only=True)["state_dict"])
    row, fresh = result.confirmed["laser"]["val_acc"], examples(1000, 4)
    assert row.delta == pytest.approx(accuracy(early, fresh) - accuracy(module, fresh), abs=0.08)
    assert row.n == 240
    assert (row.fixed - row.broken) / row.n == pytest.approx(row.delta)
    assert all(torch.equal(value, kept.weights[name]) for name, value in module.state_dict().items())
    report = json.loads(result.report.read_text())
    assert report["plan"] is None
    assert report["checkpoint"] == points.best_model_path


def test_apply_puts_the_better_epoch_into_the_module(tmp_path):
    module, _, points, result, _ = noisy_cleanup(tmp_path, weights="last", apply=True)
    early = torch.load(points.best_model_path, weights_only=True)["state_dict"]
    assert str(result.checkpoint) == points.best_model_path
    assert all(torch.equal(value, early[name]) for name, value in module.state_dict().items())


def test_the_best_checkpoint_has_its_rivals_beside_it(tmp_path):
    module, kept, points, result, _ = noisy_cleanup(tmp_path, weights="best")
    assert result.source == points.best_model_path
    rows = [row for row in result.contenders if row.kind == "checkpoint"]
    assert len(rows) == 2
    assert all(row.gain < 0 and not row.confirmed for row in rows)
    assert result.checkpoint is None
    assert all(torch.equal(value, kept.weights[name]) for name, value in module.state_dict().items())


def test_what_validation_has_chosen_is_not_confirmed_by_it(tmp_path):
    points = saved(tmp_path, save_top_k=1)
    _, _, _, result, _ = noisy_cleanup(tmp_path, weights="last", saved=points)
    assert result.checkpoint is None
    assert result.tried != points.best_model_path
    (note,) = [note for note in result.notes if "the validation data have chosen it" in note]
    assert note.startswith(points.best_model_path)
    (row,) = [row for row in result.contenders if row.kind == "checkpoint"]
    assert row.gain > 0.05
    assert not row.confirmed


def test_with_data_of_its_own_it_is(tmp_path):
    points = saved(tmp_path, save_top_k=1)
    _, _, _, result, _ = noisy_cleanup(tmp_path, loader(examples(600, 8)), weights="last", saved=points)
    assert str(result.checkpoint) == points.best_model_path


def test_gates_judge_a_checkpoint_too(tmp_path):
    for demand, accepted in (("val_loss <= +5 %", True), ("val_loss <= -95 %", False)):
        gates = Gates([demand], loader(examples(300, 9)))
        _, _, points, result, _ = noisy_cleanup(tmp_path / str(accepted), gates=gates, weights="last")
        assert result.gates.plan is None
        assert result.gates.accepted == accepted
        assert (result.checkpoint is not None) == accepted
        assert (demand in result.verdict) != accepted
        assert result.tried == points.best_model_path


def test_constraints_judge_a_checkpoint_too(tmp_path):
    _, _, points, result, _ = noisy_cleanup(tmp_path, weights="last", constraints=["val_loss <= -95 %"], candidates=1)
    assert result.tried == points.best_model_path
    assert [judgement.verdict for judgement in result.judgements] == ["fail"]
    assert result.checkpoint is None


def test_without_time_for_a_cut_another_epoch_is_still_found(tmp_path):
    _, _, points, result, _ = noisy_cleanup(tmp_path, weights="last", minutes=1e-6)
    assert "is too short" in result.search.reason
    assert [row.kind for row in result.contenders] == ["as trained", "checkpoint", "checkpoint"]
    assert str(result.checkpoint) == points.best_model_path


def test_the_checkpoints_that_are_tried(tmp_path):
    module = pretrained()
    every = ModelCheckpoint(tmp_path / "all", filename="{epoch}", monitor="val_acc", mode="max", save_top_k=-1)
    few = ModelCheckpoint(tmp_path / "few", filename="{epoch}", monitor="val_loss", save_top_k=1, save_last=True)
    trainer = tune(tmp_path, module, examples(64, 2), every, few, max_epochs=MOST + 3)
    rivals, note = rivals_of(trainer, module, "last", own_data=False)
    assert len(rivals) == MOST
    assert note == "5 more checkpoints are not tried"  # of 11, one and the last
    scores = [float(every.best_k_models[rival.path]) for rival in rivals if rival.path in every.best_k_models]
    assert max(scores) == scores[0] == float(every.best_model_score)
    assert not any(rival.chosen for rival in rivals)
    rivals, _ = rivals_of(trainer, module, every.best_model_path, own_data=False)
    assert every.best_model_path not in [rival.path for rival in rivals]
    trainer.callbacks.remove(every)
    rivals, note = rivals_of(trainer, module, "last", own_data=False)
    assert {rival.path: rival.chosen for rival in rivals} == {few.last_model_path: False, few.best_model_path: True}
    assert not any(rival.chosen for rival in rivals_of(trainer, module, "last", own_data=True)[0])
    assert not any(rival.chosen for rival in rivals_of(trainer, module, few.best_model_path, own_data=False)[0])


def test_a_checkpoint_callback_that_does_not_know_what_it_kept_is_named(tmp_path):
    *_, result, _ = noisy_cleanup(tmp_path, saved=saved(tmp_path, monitor=None))
    assert result.source.endswith("epoch=2.ckpt")
    assert not [row for row in result.contenders if row.kind == "checkpoint"]
    assert result.notes == [
        "a ModelCheckpoint without `monitor` knows of its latest checkpoint only: no other is tried"
    ]


def test_without_a_best_checkpoint_there_is_no_training(tmp_path):
    points = saved(tmp_path, save_top_k=0)
    with pytest.raises(MisconfigurationException, match=r"needs a ModelCheckpoint that keeps a best one"):
        tune(tmp_path, pretrained(), examples(100, 2), points, LaserCleanup(strategies="laser", **AIM))


@pytest.mark.skipif(not hasattr(callbacks, "EMAWeightAveraging"), reason="Lightning before 2.6 has none")
def test_of_averaged_weights_the_average_is_cleaned_and_nothing_else_kept(tmp_path):
    base, points = pretrained(), saved(tmp_path)
    cleanup = LaserCleanup(base=base, strategies="delta", candidates=6, controls=False, **AIM)
    averaging = callbacks.EMAWeightAveraging(decay=0.5)
    tune(tmp_path, copy.deepcopy(base), examples(400, 2, 0.3), points, averaging, cleanup)
    result = cleanup.result
    assert result.plan is not None
    was, now = (torch.load(path, weights_only=True) for path in (result.source, result.checkpoint))
    assert "current_model_state" in was
    assert not {"current_model_state", "averaging_state", "optimizer_states"} & now.keys()
    assert torch.equal(
        was["state_dict"]["encoder.layers.0.norm1.weight"], now["state_dict"]["encoder.layers.0.norm1.weight"]
    )
    cleaned = Noisy()
    cleaned.load_state_dict(now["state_dict"])
    assert accuracy(cleaned, examples(1000, 4)) == pytest.approx(result.confirmed["laser"]["val_acc"].reduced, abs=0.08)


class OfTwo(Noisy):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        return super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("several", [list, lambda loaders: dict(zip("ab", loaders, strict=True))])
def test_of_several_validation_loaders_one_must_be_given(several, tmp_path):
    loaders = several([loader(examples(60, 3)), loader(examples(60, 4))])
    cleanup = LaserCleanup(weights="last", strategies="laser", **AIM)
    options = {"max_epochs": 1, "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = pl.Trainer(default_root_dir=tmp_path, accelerator="cpu", callbacks=[cleanup], **options)
    with pytest.raises(MisconfigurationException, match="has 2 validation dataloaders: give LaserCleanup one of them"):
        trainer.fit(OfTwo(), loader(examples(60, 2)), loaders)


@pytest.mark.parametrize("weights", ["last", "best"])
def test_validation_in_some_epochs_only_and_no_sanity_check(tmp_path, weights):
    """Ahead of the first epoch, which is not validated, Lightning has not set the validation data up."""
    cleanup = LaserCleanup(folder=tmp_path, weights=weights, **ONE_CUT, **AIM)
    tune(tmp_path, pretrained(), examples(100, 2), saved(tmp_path), cleanup, max_epochs=4, check_val_every_n_epoch=2)
    result = cleanup.result
    assert result.search.objective == ("val_acc",)
    assert result.search.sets["race"] == 180
    epochs = {str(tmp_path / "saved" / f"epoch={epoch}.ckpt") for epoch in (1, 3)}
    rivals = {row.name for row in result.contenders if row.kind == "checkpoint"}
    assert rivals == epochs - {result.source} if weights == "best" else rivals <= epochs
    assert rivals


def test_each_kind_of_cut_has_one_row_and_what_was_found_is_that_of_its_kind():
    raced = [  # plan, strategy, race examples, gain
        ("*.all@k1:cut=delta", "delta", 300, 0.05),
        ("*.all@k2:cut=delta", "delta", 300, 0.04),  # within a standard error of the first, and of a lower loss
        ("*.all@0:scale=0.5,cut=delta", "delta", 300, 0.03),
        ("*.all@0:scale=0.25,cut=delta", "delta", 100, 0.09),
        ("0-1.fc_in@0.1", "own", 300, 0.01),
        ("0-1.fc_out@0.1", "other", 100, 0.02),
    ]
    candidates = [proposed(plan, strategy, examples=n, gain=Estimate(gain)) for plan, strategy, n, gain in raced]
    rows = best_of_each_kind(candidates, candidates[1].plan)
    assert [(row.kind, row.name) for row in rows] == [
        ("joint rule", "*.all@k2:cut=delta"),
        ("WiSE-FT", "*.all@0:scale=0.5,cut=delta"),
        ("strategy", "0-1.fc_in@0.1"),
        ("strategy", "0-1.fc_out@0.1"),  # of another one
    ]
    assert best_of_each_kind(candidates, None)[0].name == "*.all@k1:cut=delta"


def test_put_in_puts_back_after_an_exception():
    module, other = pretrained(), Noisy(seed=1)
    before = copy.deepcopy(module.state_dict())
    inside: dict[str, torch.Tensor] = {}

    def fail() -> None:
        with put_in(module, other.state_dict()):
            inside.update(copy.deepcopy(module.state_dict()))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(torch.equal(value, inside[name]) for name, value in other.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


# ---- one model at a time ---------------------------------------------------------------------------------------------


def test_two_runs_are_compared_as_two_arms_of_one_are():
    module = Classifier()
    lab, plan, key = Lab(module, Spectra(), "cpu"), LaserPlan.parse(PLAN), "<i>acc</i>"
    before = lab.alone(module.rows())
    with lab.base(plan):
        after = lab.alone(module.rows())
    apart, together = (
        paired(before, after, str(plan), key),
        lab.compare(plan, module.rows(), primary=key, controls=False),
    )
    assert apart["laser"].rows == together["laser"].rows
    assert apart["laser"].rows[0].fixed
    assert apart["laser"].prior_checks == together["laser"].prior_checks


def test_runs_over_other_examples_are_refused():
    module = Classifier()
    lab = Lab(module, Spectra(), "cpu")
    rows = list(module.rows().dataset)
    one, other = (lab.alone(torch.utils.data.DataLoader(part, 16)) for part in (rows, rows[::-1]))
    with pytest.raises(ValueError, match="in the same order: shuffle none"):
        paired(one, other, "x")
    with pytest.raises(ValueError, match="over the same batches, got 64 and 32 examples"):
        paired(one, lab.alone(torch.utils.data.DataLoader(rows[:32], 16)), "x")


def test_the_base_has_norms_and_heads():
    base, module = pretrained(), Noisy(seed=1)
    with torch.no_grad():
        for mine, theirs in zip(module.parameters(), base.parameters(), strict=True):
            mine.copy_(theirs + 0.01)
    pairs = BaseWeights(base, module).parameters(module)
    assert {id(parameter) for parameter, _ in pairs} == set(map(id, module.parameters()))
    by_id = {id(parameter): name for name, parameter in module.named_parameters()}
    assert all(torch.equal(tensor, base.get_parameter(by_id[id(parameter)])) for parameter, tensor in pairs)


# ---- what is said ----------------------------------------------------------------------------------------------------


def task(name: str, base: list[int], tuned: list[int], cleaned: list[int] | None, sign: int = 1) -> OtherTask:
    outcomes = [None if values is None else Outcomes.of(np.array(values, bool)) for values in (base, tuned, cleaned)]
    cleaning = None if cleaned is None else compare("acc", outcomes[1], outcomes[2])
    return OtherTask(name, compare("acc", outcomes[0], outcomes[1]), cleaning, sign)


def right(count: int) -> list[int]:
    return [1] * count + [0] * (100 - count)


def test_four_parts():
    tasks = [
        task(TARGET, right(20), right(70), right(65)),
        task("lost much", right(80), right(40), right(70)),
        task("lost less", right(60), right(50), right(50)),
        task("won", right(10), right(30), right(25)),
        task("same", right(50), right(51), right(40)),
    ]
    found = four_parts(tasks)
    assert (found.damaged, found.improved, found.unchanged) == (["lost much", "lost less"], ["won"], ["same"])
    assert found.healed == pytest.approx(30 / 50)
    assert found.kept == pytest.approx(15 / 20)
    assert found.harmed == ["same"]
    assert found.retained == pytest.approx(45 / 50)
    # Of a metric that is better low, the same changes are the other way round.
    turned = four_parts([OtherTask(one.name, one.tuning, one.cleaning, -1) for one in tasks])
    assert (turned.damaged, turned.improved, turned.retained) == (["won"], ["lost much", "lost less"], None)
    assert four_parts([task("same", right(50), right(50), None)]).healed is None


def classified(
    gold: list[str], before: list[str], after: list[str], weights: dict[str, float] | None = None
) -> SearchResult:
    """A confirmed plan by what two models say; each class may have a weight."""
    steps = []
    for said in (before, after):
        acc: Any = torch.tensor([a == b for a, b in zip(gold, said, strict=True)])
        if weights is not None:
            acc = Outcomes(acc.float(), torch.tensor([weights[a] for a in gold]))
        steps.append({"acc": acc, "answer": gold, "prediction": said})
    found = PairedExamples()
    found.add({"original": steps[0], "laser": steps[1]}, torch.empty(len(gold)), None)
    logged = found.returned("original")
    arm = ArmResult("0.fc_in@0", found.rows("laser", logged, logged), found.priors("laser", logged, logged), "", 0, 0)
    confirmed = LaserResult({"laser": arm}, {}, "acc", 0.0, {}, found)
    return SearchResult(None, LaserPlan.parse("0.fc_in@0"), "", ("acc",), [], confirmed=confirmed)


@pytest.mark.parametrize("of_facts", [True, False])
def test_below_the_most_common_answer_no_classifier_is_recommended(of_facts):
    """Of 200 examples 160 are of one class: the cut model is right on 110, more than before, of all classes."""
    gold = ["a"] * 160 + ["b"] * 20 + ["c"] * 20
    before = ["x"] * 100 + ["a"] * 60 + ["x"] * 40
    after = ["x"] * 90 + ["a"] * 70 + ["b"] * 20 + ["c"] * 20
    result = classified(gold, before, after)
    checks = result.confirmed["laser"].prior_checks["acc"]
    assert checks.is_of_labels
    decide(result, 1, of_facts=of_facts)
    assert (result.plan is not None) == of_facts
    assert ("always given, would be right more often (80.0%)" in result.reason) != of_facts
    assert bool(result.warnings) == of_facts


def test_what_is_always_given_counts_as_the_metric_weighs_it():
    """Where all classes count the same together, the most common answer, always given, has a third and not 80 %."""
    gold, weights = ["a"] * 160 + ["b"] * 20 + ["c"] * 20, {"a": 1.0, "b": 8.0, "c": 8.0}
    before = ["x"] * 100 + ["a"] * 60 + ["x"] * 40
    after = ["x"] * 100 + ["a"] * 60 + ["b"] * 20 + ["c"] * 20
    result = classified(gold, before, after, weights)
    checks, row = result.confirmed["laser"].prior_checks["acc"], result.confirmed["laser"]["acc"]
    assert checks.is_of_labels
    assert checks.constant_answer == pytest.approx(1 / 3)
    assert checks.delta == pytest.approx(row.delta) == pytest.approx(320 / 480)
    decide(result, 1, of_facts=False)
    assert result.plan is not None


def test_to_say_the_heavier_class_always_is_no_gain_by_its_weight():
    """Fewer answers are right, and by their weights more: that is a shift to another answer, too."""
    gold = ["a"] * 160 + ["b"] * 40
    result = classified(gold, ["a"] * 200, ["b"] * 200, {"a": 1.0, "b": 8.0})
    assert result.confirmed["laser"]["acc"].delta > 0.3
    decide(result, 1, of_facts=False)
    assert result.plan is None
    assert "text for text" in result.reason or "exchanged at random" in result.reason


def test_answers_that_do_not_repeat_are_no_labels():
    answers = [f"city {i}" for i in range(40)] + ["Paris"] * 5
    right_or_wrong = Outcomes.of(np.ones(45, bool))
    assert not prior_checks("acc", answers, (answers, answers), (right_or_wrong, right_or_wrong)).is_of_labels
