"""Logged torchmetrics objects that are no means over examples: each has an interval and a p, or a reason why not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchmetrics import MaxMetric, MeanMetric, Metric, MetricCollection, SumMetric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassCohenKappa,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)
from torchmetrics.text import BLEUScore
from torchmetrics.wrappers import BootStrapper, ClasswiseWrapper, Running
from toy import CLASSES, PLAN, Toy, make_data, update_mean
from trainers import quiet_trainer

from laser_callback import LaserCallback, reduced
from laser_callback.compare import pooled
from laser_callback.passes import metric_states
from laser_callback.reports.row_text import finding
from laser_callback.results.comparison import LaserResult
from laser_callback.stats.outcomes import PairedResult

N, SIZE = 60, 4
TESTED = ("acc", "f1", "twice", "binned", "kappa", "bleu", "both", "weighted", "total")
MEMBERS = ("MulticlassAccuracy", "MulticlassPrecision", "MulticlassRecall")


def words(labels: Tensor) -> str:
    return " ".join(map(str, labels.tolist()))


class Counted(Toy):
    """Returns nothing, and counts in every way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.f1, self.twice = MulticlassF1Score(CLASSES), MulticlassF1Score(CLASSES)
        self.auroc, self.kappa = MulticlassAUROC(CLASSES), MulticlassCohenKappa(CLASSES)
        self.binned = MulticlassAUROC(CLASSES, thresholds=20)
        self.bleu = BLEUScore(n_gram=1)
        self.both = self.f1 + self.auroc  # CompositionalMetric
        members = [MulticlassAccuracy(CLASSES), MulticlassPrecision(CLASSES), MulticlassRecall(CLASSES)]
        self.logged, self.grouped = MetricCollection(members, prefix="val_"), MetricCollection(members, prefix="end_")
        self.by_class = ClasswiseWrapper(MulticlassAccuracy(CLASSES, average=None))
        self.weighted, self.total = MeanMetric(), SumMetric()
        self.seldom = MulticlassF1Score(CLASSES)
        self.largest, self.recent, self.latest = MaxMetric(), Running(SumMetric(), 3), MulticlassF1Score(CLASSES)

    def _evaluate(self, batch: Any) -> None:
        x, y = batch
        logits = self(x)
        self.acc(logits, y)
        self.f1(logits, y)
        for metric in (self.auroc, self.binned):
            metric.update(logits.softmax(1), y)
        self.twice.update(logits[:2], y[:2])
        self.twice(logits[2:], y[2:])  # as often as one likes
        self.bleu.update([words(logits.argmax(1))], [[words(y)]])
        for metric in (self.kappa, self.logged, self.grouped, self.by_class):
            metric.update(logits, y)
        self.weighted.update(logits[:, 0], weight=logits[:, 1].abs() + 0.1)
        for metric in (self.total, self.recent):
            metric.update(logits.sum())
        self.largest.update(logits.max())
        if y[0] == 0:
            self.seldom.update(logits, y)
        self.latest.reset()
        self.latest.update(logits, y)
        for name in (*TESTED, "auroc", "seldom", "largest", "recent", "latest"):
            self.log(name, getattr(self, name))
        self.log("again", self.auroc)
        self.log_dict(self.logged)

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.grouped.compute())
        self.log_dict({f"by/{k}": v for k, v in self.by_class.compute().items()})
        for metric in (self.grouped, self.by_class, self.largest):
            metric.reset()


def run(module: Any, data: Any = None, **options: Any) -> LaserResult:
    callback = LaserCallback(PLAN, report=False, **options)
    data = make_data(N, batch_size=SIZE) if data is None else data
    quiet_trainer(callback).validate(module, data, verbose=False)
    return callback.result


def rows_of(result: LaserResult) -> dict[str, PairedResult]:
    return {row.metric: row for row in result["laser"].rows}


@pytest.fixture(scope="module")
def rows() -> dict[str, PairedResult]:
    return rows_of(run(Counted()))


def passes(module: Counted) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each batch both models' logits and the labels, without the callback."""
    found = []
    with torch.no_grad():
        for x, y in make_data(N, batch_size=SIZE):
            before = module.eval()(x)
            with reduced(module, PLAN):
                found.append((before, module(x), y))
    return found


@pytest.mark.parametrize(
    ("key", "metric", "size"),
    [
        ("f1", MulticlassF1Score(CLASSES), SIZE),
        ("kappa", MulticlassCohenKappa(CLASSES), SIZE),
        ("auroc", MulticlassAUROC(CLASSES), 1),
    ],
)
def test_the_interval_is_that_of_metrics_updated_without_each_unit(rows, key: str, metric: Metric, size: int):
    """By metrics of one's own, which were never told of batches: each is updated with all examples but one unit's."""
    before, after, y = (torch.cat(parts) for parts in zip(*passes(Counted()), strict=True))
    scores = [logits.softmax(1) for logits in (before, after)]

    def delta(kept: Tensor) -> float:
        values = []
        for one in scores:
            metric.reset()
            metric.update(one[kept], y[kept])
            values.append(float(metric.compute()))
        return values[1] - values[0]

    everything, n = torch.arange(N), N // size
    whole = delta(everything)
    without = np.array([delta(everything[everything // size != unit]) for unit in range(n)])
    error = np.sqrt((n - 1) / n * ((without - whole) ** 2).sum())
    row = rows[key]
    assert row.delta == pytest.approx(whole, abs=1e-6)
    margin = stats.t.ppf(0.975, n - 1) * error
    ends = (whole - margin, whole + margin)
    expected = (min(ends[0], 0), max(ends[1], 0)) if row.p > 0.05 else ends
    assert (row.lower, row.upper) == pytest.approx(expected, abs=1e-5)
    assert (row.n, row.unit) == (n, "batch" if size > 1 else "example")


def test_p_is_that_of_metrics_updated_with_both_arms(rows):
    """A fresh metric sees all examples twice, once of each model, and one batch twice of the same."""
    parts = passes(Counted())
    metric, swaps = MulticlassF1Score(CLASSES), []
    for unit in range(len(parts)):
        values = []
        for arm in (0, 1):
            metric.reset()
            for i, (before, after, y) in enumerate(parts):
                for logits in ((before, after)[arm],) * 2 if i == unit else (before, after):
                    metric.update(logits, y)
            values.append(float(metric.compute()))
        swaps.append(values[1] - values[0])
    signs = 1 - 2 * np.random.default_rng(0).integers(0, 2, (9_999, len(swaps)), dtype=np.int8)
    share = (1 + (np.abs(signs @ np.array(swaps)) >= abs(sum(swaps)) - 1e-6).sum()) / 10_000
    assert rows["f1"].p == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(
    "key",
    [*TESTED, *(f"{prefix}_{name}" for prefix in ("val", "end") for name in MEMBERS), "by/multiclassaccuracy_1"],
)
def test_whatever_adds_up_over_batches_is_tested(rows, key: str):
    row = rows[key]
    assert (row.kind, row.unit, row.n, row.test) == ("pooled", "batch", N // SIZE, "paired permutation")
    assert row.lower <= row.delta <= row.upper
    assert row.lower < row.upper
    assert 0 < row.p <= 1
    assert row.role == "holm"
    assert row.verdict != "not tested"
    assert "not tested" not in finding(row)
    assert row.note == "unit: the batch; permutation test, interval by the jackknife"


def test_one_object_in_several_ways(rows):
    assert rows["twice"].p == rows["f1"].p  # updated twice in a batch
    assert (rows["again"].lower, rows["again"].p) == (rows["auroc"].lower, rows["auroc"].p)  # under two keys
    for name in MEMBERS:  # a compute group; logged, or computed at the end
        logged, computed = rows[f"val_{name}"], rows[f"end_{name}"]
        assert (logged.lower, logged.p) == (computed.lower, computed.p)
    assert rows["total"].delta == pytest.approx(rows["total"].reduced - rows["total"].original)
    assert rows["f1"].higher_is_better is True


def test_batches_without_an_update_do_not_count(rows):
    with_zero = sum(int(y[0] == 0) for _, y in make_data(N, batch_size=SIZE))
    assert 2 < with_zero < N // SIZE
    assert rows["seldom"].n == with_zero
    assert rows["seldom"].p is not None


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("largest", "its state `max_value` is no sum over batches"),
        ("recent", "Running keeps something else than what its batches add up to"),
        ("latest", "what its batches add up to is not what was logged: it was reset, or holds more than these"),
    ],
)
def test_what_batches_do_not_add_up_to_is_told(rows, key: str, why: str):
    row = rows[key]
    assert (row.kind, row.p, row.lower, row.verdict) == (None, None, None, "not tested")
    assert row.note == f"not an average over examples; {why}"


def test_it_can_be_left_out():
    for row in rows_of(run(Counted(), resample=False)).values():
        assert (row.p, row.note) == (None, "not an average over examples")


class Small(Toy):
    """One metric, logged; what a test does with it beside that is in ``around``."""

    def __init__(self, metric: Metric | None = None) -> None:
        super().__init__()
        self.metric = MulticlassF1Score(CLASSES) if metric is None else metric

    def _evaluate(self, batch: Any) -> Any:
        x, y = batch
        logits = self(x)
        self.metric.update(logits, y)
        self.log("f1", self.metric)
        return {"logits": logits}


def test_too_much_to_keep_is_told(monkeypatch):
    monkeypatch.setattr(metric_states, "MOST_BYTES", 2000)
    (row,) = rows_of(run(Small(MulticlassAUROC(CLASSES)))).values()
    assert row.note == "not an average over examples; the states of its batches need more than 0 MiB"
    assert row.p is None


def test_a_metric_that_computes_for_long_is_told(monkeypatch):
    monkeypatch.setattr(pooled, "SLOWEST", 0.0)
    (row,) = rows_of(run(Small())).values()
    assert row.note.endswith("and it would be computed some hundred times")
    assert row.p is None


def test_outcomes_of_examples_are_preferred():
    row = rows_of(run(Toy(), make_data(N, batch_size=SIZE)))["acc"]
    assert (row.kind, row.test, row.n) == ("binary", "exact McNemar", N)


def test_several_dataloaders_have_batches_of_their_own():
    class PerLoader(Small):
        def __init__(self) -> None:
            super().__init__()
            self.metrics = torch.nn.ModuleList(MulticlassF1Score(CLASSES) for _ in range(2))

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.metrics[dataloader_idx].update(self(batch[0]), batch[1])
            self.log("f1", self.metrics[dataloader_idx])

    loaders = [make_data(n, seed, SIZE) for n, seed in ((40, 1), (20, 2))]
    rows = rows_of(run(PerLoader(), loaders))
    first, second = rows["f1/dataloader_idx_0"], rows["f1/dataloader_idx_1"]
    assert (first.n, second.n) == (10, 5)
    assert first.p is not None
    assert second.note.endswith("5 batches: this test cannot show less than p = .062")
    assert second.lower <= 0 <= second.upper


def test_metrics_given_to_the_callback():
    metrics = MetricCollection({"f1": MulticlassF1Score(CLASSES), "recall": MulticlassRecall(CLASSES)})

    def update(collection: MetricCollection, outputs: Any, batch: Any) -> None:
        collection.update(outputs["logits"], batch[1])

    rows = rows_of(run(Small(), metrics={"own": MulticlassF1Score(CLASSES)}, update=update))
    assert (rows["own"].lower, rows["own"].upper, rows["own"].p) == (rows["f1"].lower, rows["f1"].upper, rows["f1"].p)

    class Unlogged(Small):
        def _evaluate(self, batch: Any) -> Any:
            return {"logits": self(batch[0])}

    found = rows_of(run(Unlogged(), metrics=metrics, update=update))
    assert found["f1"].p == rows["f1"].p
    assert found["recall"].n == N // SIZE
    weighted = rows_of(run(Small(), metrics=MeanMetric(), update=update_mean))["MeanMetric"]
    assert weighted.unit == "batch"
    assert weighted.p is not None


class Own(Metric):
    """States that torchmetrics lets its users add: reduced by a function, or by nothing."""

    def __init__(self, reduce: Any) -> None:
        super().__init__()
        self.add_state("seen", default=torch.tensor(0.0), dist_reduce_fx=reduce)

    def update(self, logits: Tensor, y: Tensor) -> None:
        self.seen = self.seen + logits.sum()

    def compute(self) -> Tensor:
        return self.seen


@pytest.mark.parametrize("reduce", [None, "mean", lambda stacked: stacked.amax(0)])
def test_states_that_are_reduced_in_another_way(reduce):
    (row,) = rows_of(run(Small(Own(reduce)))).values()
    assert row.note == "not an average over examples; its state `seen` is no sum over batches"


def test_a_metric_without_a_value():
    class NeedsAll(Own):
        def compute(self) -> Tensor:
            return self.seen if float(self.seen.abs()) > 1e9 else self.seen / 0 * 0

    (row,) = rows_of(run(Small(NeedsAll("sum")))).values()
    assert row.p is None
    assert row.verdict == "not tested"


def test_a_metric_that_refuses_a_part():
    class Refuses(Own):
        def compute(self) -> Tensor:
            if self.seen != self.seen.float():
                raise RuntimeError("no float32")
            return self.seen

    (row,) = rows_of(run(Small(Refuses("sum")))).values()
    told = "it cannot be computed without some batch (RuntimeError: no float32)"
    assert row.note == f"not an average over examples; {told}"
    assert row.p is None


def test_bootstrapped_and_lazy_metrics():
    class Wrapped(Small):
        def __init__(self) -> None:
            super().__init__()
            self.boot = BootStrapper(MulticlassF1Score(CLASSES), num_bootstraps=3)

        def _evaluate(self, batch: Any) -> None:
            if not hasattr(self, "late"):
                self.late = MulticlassF1Score(CLASSES)
            logits = self(batch[0])
            self.late.update(logits, batch[1])
            self.boot.update(logits, batch[1])
            self.log("late", self.late)

        def on_validation_epoch_end(self) -> None:
            self.log("boot", self.boot.compute()["mean"])

    rows = rows_of(run(Wrapped()))
    assert rows["late"].p == rows_of(run(Small()))["f1"].p
    assert rows["boot"].p is None


def test_one_batch_and_the_same_twice():
    first, second = (rows_of(run(Small(), data))["f1"] for data in [make_data(N, batch_size=SIZE)] * 2)
    assert (first.lower, first.p) == (second.lower, second.p)  # seeded
    one = rows_of(run(Small(), make_data(SIZE, batch_size=SIZE)))["f1"]
    assert (one.p, one.n, one.note) == (None, 1, "one batch has no variance")


def test_the_users_metrics_stay_as_they_are():
    with_, without = Counted(), Counted()
    results = run(with_)
    quiet_trainer().validate(without, make_data(N, batch_size=SIZE), verbose=False)
    assert results["laser"]["f1"].p is not None
    for mine, other in zip(with_.modules(), without.modules(), strict=True):
        if isinstance(mine, Metric):
            assert mine.update_count == other.update_count
            for name in mine._defaults:
                a, b = getattr(mine, name), getattr(other, name)
                assert type(a) is type(b)
                assert len(a) == len(b) if isinstance(a, list) else torch.equal(a, b)
    assert results.examples.pooled is None  # no states are kept


def test_a_state_that_is_a_list_at_times_only():
    class Joins(MulticlassAUROC):
        def update(self, preds: Tensor, target: Tensor) -> None:
            super().update(preds.softmax(1), target)
            self.preds = torch.cat(list(self.preds)) if len(self.preds) == 3 else self.preds

        def reset(self) -> None:
            self.preds: Any = []
            super().reset()

    class Once(Small):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx < 3:
                self.metric.update(self(batch[0]), batch[1])
            self.log("auroc", self.metric)

    (row,) = rows_of(run(Once(Joins(CLASSES)))).values()
    assert row.note == "not an average over examples; its state `preds` is a list at times only"
