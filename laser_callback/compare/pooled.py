"""Rows of logged torchmetrics objects: their value on any pool of batches, computed by themselves.

Contract: a row is only made where the states of all batches give the very value that was logged, in both arms; else it
is said why not. The user's metrics are neither called nor written to: shallow copies of them are.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from laser_callback.passes.metric_states import Kept, Recorder
from laser_callback.results.examples import ORIGINAL, Logged, PairedExamples
from laser_callback.results.selected import clusters_of
from laser_callback.stats.intervals import Floats
from laser_callback.stats.outcomes import PairedResult
from laser_callback.stats.paired import numbered
from laser_callback.stats.pooled import MOST_GROUPS, compare_pooled

MOST_ROWS = 10_000_000
"""Rows of lists, such as scores, that a metric is given once over in all groups together; of more, groups are fewer."""
FEWEST_GROUPS = 20
SLOWEST = 1.0
"""Seconds: a metric that computes longer is not computed some hundred times."""


class PooledStates:
    """What one evaluation's batches add to the states of metrics.

    Args:
        module: the user's.
        on: whether anything is kept.
        seed: of the exchanges that are drawn.

    Attributes:
        kept: of this process.
    """

    def __init__(self, module: nn.Module, on: bool, seed: int) -> None:
        self.kept = Kept(on)
        self._seed = seed
        self._original = Recorder(module, "", self.kept)
        self._own: dict[str, Recorder] = {}

    def begin(self) -> None:
        """Ahead of the original's first batch."""
        self._original.begin()

    def close(self) -> None:
        """Behind all that the original has done on the latest batch."""
        self.kept.batches[-1][ORIGINAL] |= self._original.added()

    def of_own(self, arm: str, metrics: MetricCollection) -> Recorder:
        """Ahead of an update of the metrics that the callback was given."""
        recorder = self._own.setdefault(arm, Recorder(metrics, "metrics.", self.kept))
        recorder.begin()
        return recorder

    def portable(self, logged: Mapping[str, Metric]) -> Kept:
        """What other processes are to know; ``logged`` are the metrics that the module has logged, by key."""
        named = dict(logged)
        for recorder in self._recorders():
            if isinstance(recorder.root, MetricCollection):
                named |= dict(recorder.root.items(copy_state=False))
        paths = {id(metric): path for one in self._recorders() for path, metric in one.metrics().items()}
        self.kept.paths = {key: paths.get(id(metric), "") for key, metric in named.items()}
        return self.kept.portable()

    def evidence(self, ranks: Iterable[Kept]) -> Evidence | None:
        """What the states of all ranks say."""
        if not self.kept.on:
            return None
        metrics = {path: metric for one in self._recorders() for path, metric in one.metrics().items()}
        paths = {key: path for one in self._recorders() for key, path in one.paths().items()}
        return Evidence(Kept.merge(ranks), metrics, paths, self._seed)

    def _recorders(self) -> list[Recorder]:
        return [self._original, *(one for arm, one in self._own.items() if arm == ORIGINAL)]


class Evidence:
    """What the states that were kept say of each key.

    Args:
        kept: of all ranks.
        metrics: of the module, and the callback's own, by path.
        paths: the path of the states of each, by its identity; members of a compute group share theirs.
        seed: of the exchanges that are drawn.
    """

    def __init__(self, kept: Kept, metrics: Mapping[str, Metric], paths: Mapping[int, str], seed: int) -> None:
        self._kept = kept
        self._metrics = metrics
        self._paths = paths
        self._seed = seed

    def row(
        self, examples: PairedExamples, base: str, arm: str, key: str, metric: Logged, reduced: Logged
    ) -> PairedResult | str:
        """The row of ``key``, or why there is none."""
        if not any(base in states and arm in states for states in self._kept.batches):
            return ""  # of the mean of several passes nothing is kept
        places = [
            i
            for i, (batch, states) in enumerate(zip(examples.batches, self._kept.batches, strict=False))
            if metric.dataloader_idx in (None, batch.dataloader_idx) and base in states and arm in states
        ]
        logged = float(metric.value), float(reduced.value)
        path = self._kept.paths.get(key)
        names = [path] if path is not None else sorted(self._metrics, key=lambda name: not _alike(name, key))
        for name in names:
            found: Pooled | str = "it was made after the first batch"
            if name in self._metrics:
                found = Pooled.of(self._metrics[name], self._paths, self._kept, examples, places, (base, arm))
            if isinstance(found, str):
                if path is not None:
                    return found
                continue
            try:
                parts = found.parts()
            except Exception as error:  # of the metric
                if path is not None:
                    return f"it cannot be computed from its states in float64 ({type(error).__name__}: {error})"
                continue
            for part, values in parts.items():
                if _equal(values, logged) and (path is not None or _alike(name, key) or not _is_whole(values)):
                    return self._tested(found, part, key, metric)
            if path is not None:
                return "what its batches add up to is not what was logged: it was reset, or holds more than these"
        return ""

    def _tested(self, pooled: Pooled, part: Any, key: str, metric: Logged) -> PairedResult | str:
        begin = time.perf_counter()
        pooled.value(part, pooled.all_, 0 * pooled.all_)
        if (seconds := time.perf_counter() - begin) > SLOWEST:
            return f"to compute it once takes {seconds:.1f} s, and it would be computed some hundred times"
        groups = min(max(MOST_ROWS // max(pooled.rows, 1), FEWEST_GROUPS), MOST_GROUPS)
        try:
            return compare_pooled(
                key,
                lambda original, reduced: pooled.value(part, original, reduced),
                pooled.labels,
                unit=pooled.unit,
                most=groups,
                seed=self._seed,
                higher_is_better=metric.higher_is_better,
            )
        except Exception as error:  # of the metric, whose author may not have thought of half a batch
            return f"it cannot be computed without some batch ({type(error).__name__}: {error})"


def _equal(values: tuple[float, float], logged: tuple[float, float]) -> bool:
    return all(math.isclose(*pair, rel_tol=1e-4, abs_tol=1e-6) for pair in zip(values, logged, strict=True))


def _is_whole(values: tuple[float, float]) -> bool:
    """Whether both are whole numbers, as 0 or 1, which another metric may have by chance."""
    return all(value == round(value) for value in values)


def _alike(path: str, key: str) -> bool:
    return path.rpartition(".")[2].lower() in key.lower()


class Pooled:
    """One metric's states, unit by unit, of two arms.

    Attributes:
        labels: shape (m,), the unit of each of the states that are counted.
        unit: "batch"; "example" or "cluster" where lists have one row for each example.
        rows: of lists, in both arms.
    """

    def __init__(self, metric: Metric) -> None:
        self._twin: Metric = _alone(metric, {})
        self._sums: list[tuple[Metric, str, Tensor, Tensor, Tensor]] = []
        self._lists: list[tuple[Metric, str, list[Any], list[Any], Any, Any]] = []
        self.labels = np.zeros(0, np.int64)
        self.unit: Any = "batch"
        self.rows = 0

    @property
    def all_(self) -> Floats:
        """Each state once."""
        return np.ones(len(self.labels))

    @classmethod
    def of(
        cls,
        metric: Metric,
        paths: Mapping[int, str],
        kept: Kept,
        examples: PairedExamples,
        places: Sequence[int],
        arms: tuple[str, str],
    ) -> Pooled | str:
        """The states of ``metric`` and of the metrics in it on the batches in ``places``; or why there are none."""
        leaves = [(leaf, paths.get(id(leaf), "")) for leaf in metric.modules() if isinstance(leaf, Metric)]
        for leaf, path in leaves:
            if path in kept.refused:
                return kept.refused[path] if leaf is metric else f"{type(leaf).__name__} in it: {kept.refused[path]}"
        used = [i for i in places if any(kept.batches[i][arm].get(path) for arm in arms for _, path in leaves)]
        if not used:
            return "it was not updated in any batch"
        found = cls(metric)
        found.labels = np.arange(len(used))
        twins = [leaf for leaf in found._twin.modules() if isinstance(leaf, Metric)]
        sides = [[kept.batches[i][arm] for i in used] for arm in arms]
        for (leaf, path), twin in zip(leaves, twins, strict=True):
            for name, default in leaf._defaults.items():
                before, after = ([added.get(path, {}).get(name) for added in side] for side in sides)
                if isinstance(default, list):
                    found._add_list(twin, name, before, after)
                else:
                    found._add_sum(twin, name, default, before, after)
        found._by_example([examples.batches[i] for i in used])
        return found

    def _add_sum(self, twin: Metric, name: str, default: Tensor, before: list[Any], after: list[Any]) -> None:
        start = default.detach().cpu().double()
        parts = [torch.zeros_like(start) if part is None else part for part in (*before, *after)]
        stacked = torch.stack(torch.broadcast_tensors(*parts))
        self._sums.append((twin, name, start, stacked[: len(before)], stacked[len(before) :]))

    def _add_list(self, twin: Metric, name: str, before: list[Any], after: list[Any]) -> None:
        sides = [[part or [] for part in side] for side in (before, after)]
        entries = [entry for side in sides for part in side for entry in part]
        owners = [np.repeat(np.arange(len(side)), [len(part) for part in side]) for side in sides]
        if entries and all(isinstance(e, Tensor) and e.ndim and e.shape[1:] == entries[0].shape[1:] for e in entries):
            # Rows of one shape: one tensor of each arm.
            sizes = [[len(entry) for part in side for entry in part] for side in sides]
            owners = [np.repeat(owner, size) for owner, size in zip(owners, sizes, strict=True)]
            joined: list[Any] = [torch.cat([e for part in side for e in part] or [entries[0][:0]]) for side in sides]
        else:
            joined = [[entry for part in side for entry in part] for side in sides]
        self.rows = max(self.rows, sum(map(len, joined)))
        self._lists.append((twin, name, joined[0], joined[1], owners[0], owners[1]))

    def _by_example(self, batches: Sequence[Any]) -> None:
        """Take examples for units, where all states are lists of one row for each, and one is the same in both arms."""
        owner = np.repeat(np.arange(len(batches)), [batch.size for batch in batches])
        pairs = [(mine, theirs) for *_, mine, theirs in self._lists]
        if self._sums or not all(np.array_equal(owner, one) for pair in pairs for one in pair):
            return
        if not any(isinstance(a, Tensor) and torch.equal(a, b) for _, _, a, b, *_ in self._lists):
            return
        clusters, _ = clusters_of(list(batches))
        self.labels = np.arange(len(owner)) if clusters is None else numbered(clusters)
        self.unit = "example" if clusters is None else "cluster"
        rows = np.arange(len(owner))
        self._lists = [(*one[:4], rows, rows) for one in self._lists]

    def parts(self) -> dict[Any, tuple[float, float]]:
        """Each number that the metric computes, on all batches: both arms' values."""
        none = 0 * self.all_
        before, after = (_numbers(self._compute(*weights)) for weights in ((self.all_, none), (none, self.all_)))
        return {part: (before[part], after[part]) for part in before if part in after}

    def value(self, part: Any, original: Floats, reduced: Floats) -> float:
        """The metric where the states count so often."""
        return _numbers(self._compute(original, reduced)).get(part, math.nan)

    def _compute(self, original: Floats, reduced: Floats) -> Any:
        weights = [torch.from_numpy(one) for one in (original, reduced)]
        device = self._twin.device
        kind = torch.float32 if device.type == "mps" else torch.float64
        for twin, name, start, before, after in self._sums:
            state = start + torch.tensordot(weights[0], before, 1) + torch.tensordot(weights[1], after, 1)
            setattr(twin, name, state.to(device, kind))
        # A row cannot count one half: in a pool of both arms all count twice as often.
        times = 1 if np.array_equal(np.rint(original), original) else 2
        counts = [np.rint(times * one).astype(np.int64) for one in (original, reduced)]
        for twin, name, old, new, of_old, of_new in self._lists:
            entries: list[Any] = []
            for held, owner, count in ((old, of_old, counts[0]), (new, of_new, counts[1])):
                index = np.repeat(np.arange(len(owner)), count[owner])
                if isinstance(held, Tensor):
                    entries += [held[torch.from_numpy(index)].to(device)] if len(index) else []
                else:
                    entries += [held[i].to(device) if isinstance(held[i], Tensor) else held[i] for i in index.tolist()]
            setattr(twin, name, entries)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a class that is not in a part of the batches
            return self._twin.compute()


def _alone(module: nn.Module, made: dict[int, nn.Module]) -> Any:
    """A copy that shares all but the states of the metrics in it, computes anew each time, and waits for no process."""
    if id(module) in made:
        return made[id(module)]
    twin = made[id(module)] = copy.copy(module)
    vars(twin)["_modules"] = {
        name: _alone(child, made)
        if child is not None and any(isinstance(m, Metric) for m in child.modules())
        else child
        for name, child in module._modules.items()
    }
    if isinstance(twin, Metric):
        twin._to_sync = twin._is_synced = twin.compute_with_cache = False
        twin._computed, twin._update_count = None, 1
    return twin


def _numbers(computed: Any, name: Any = None) -> dict[Any, float]:
    """The numbers among what a metric computes, by name."""
    if isinstance(computed, Mapping):
        return {k: v for key, value in computed.items() for k, v in _numbers(value, key).items()}
    if isinstance(computed, (Tensor, float, int)) and torch.as_tensor(computed).numel() == 1:
        return {name: float(computed)}
    return {}
