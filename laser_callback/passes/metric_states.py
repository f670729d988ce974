"""What each batch adds to the states of torchmetrics objects, read from outside and kept.

A sum is read ahead of a batch and behind it, and a list is looked at for what has become longer: so a metric may be
updated in any way and as often as its user likes. Contract: metrics are never called and never written to; of a list
the entries themselves are kept, and no copies. States that are reduced in another way, such as a maximum, are not what
batches add up to: why something is not kept is remembered by the metric's path.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities.data import dim_zero_sum
from torchmetrics.wrappers import BootStrapper, MetricTracker, MinMaxMetric, Running

MOST_BYTES = 2**30
"""So much is kept of all arms in one evaluation and process; of a metric that would need more, nothing is."""

Added: TypeAlias = dict[str, dict[str, Any]]
"""By the metric's path and the state's name: a sum ahead and behind, (2 tensors), or the new entries of a list."""


@dataclass
class Kept:
    """What is kept in one evaluation, batch by batch.

    Attributes:
        on: whether anything is.
        batches: by arm, what each batch has added.
        refused: why nothing is known of a metric, by its path.
        paths: of the metrics that were logged themselves, by key.
    """

    on: bool
    batches: list[dict[str, Added]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    nbytes: int = 0

    def keep(self, path: str, tensors: Iterable[Any]) -> bool:
        """Whether there is room for these of a metric's states."""
        self.nbytes += sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
        if self.nbytes > MOST_BYTES:
            self._forget(path)
            self.refused[path] = f"the states of its batches need more than {MOST_BYTES / 2**20:,.0f} MiB"
        return path not in self.refused

    def _forget(self, path: str) -> None:
        for batch in self.batches:
            for added in batch.values():
                for state in added.pop(path, {}).values():
                    behind = state[1:] if isinstance(state, tuple) else state
                    self.nbytes -= sum(tensor.nbytes for tensor in behind if isinstance(tensor, Tensor))

    def portable(self) -> Kept:
        """The same in numbers of the CPU, for other processes: sums as float64 differences."""
        batches = [
            {
                arm: {path: {name: _on_cpu(state) for name, state in states.items()} for path, states in added.items()}
                for arm, added in batch.items()
            }
            for batch in self.batches
        ]
        return Kept(self.on, batches, self.refused, self.paths)

    @classmethod
    def merge(cls, ranks: Iterable[Kept]) -> Kept:
        """That of all ranks, in their order."""
        merged = cls(True)
        for rank in ranks:
            merged.batches += rank.batches
            merged.refused |= rank.refused
            merged.paths |= rank.paths
        return merged


class Recorder:
    """Of one arm: what each batch adds to the states of all metrics inside of ``root``.

    Args:
        root: the module, or metrics that belong to no module; ``None`` for nothing.
        prefix: of their paths.
        kept: where what is refused is told.
    """

    def __init__(self, root: nn.Module | None, prefix: str, kept: Kept) -> None:
        self.root = root
        self._prefix = prefix
        self._kept = kept
        self._metrics: dict[str, Metric] | None = None
        self._held: dict[str, tuple[int, dict[str, Any]]] = {}
        self._passes = 0

    def begin(self) -> None:
        """Ahead of the first batch, after all hooks that come before it."""
        if self._metrics is None:
            self._metrics = self._find()
            self._held = {path: _held(metric) for path, metric in self._metrics.items() if self._is_kept(path, metric)}

    def added(self) -> Added:
        """What has been added since the latest call, or since :meth:`begin`."""
        if self._metrics is None:
            return {}
        self._passes += 1
        if self._passes == 1:  # the first pass may have made some
            self._metrics |= {path: metric for path, metric in self._find().items() if path not in self._metrics}
        found: Added = {}
        for path, metric in self._metrics.items():
            count, ahead = self._held.get(path) or (0, _defaults(metric))
            if metric._update_count == count or not self._is_kept(path, metric):
                continue
            if metric._update_count < count:
                self._kept.refused[path] = "it is reset between batches"
                continue
            self._held[path] = _, behind = _held(metric)
            if odd := [name for name, now in behind.items() if isinstance(now, int) != isinstance(ahead[name], int)]:
                self._kept.refused[path] = f"its state `{odd[0]}` is a list at times only"
                continue
            states = {
                name: getattr(metric, name)[ahead[name] :] if isinstance(now, int) else (ahead[name], now)
                for name, now in behind.items()
            }
            parts = [x for state in states.values() for x in (state[1:] if isinstance(state, tuple) else state)]
            if self._kept.keep(path, parts):
                found[path] = states
        return found

    def paths(self) -> dict[int, str]:
        """The path of each metric's states, by its identity: in a compute group the first one's, which is updated."""
        found = {id(metric): path for path, metric in self.metrics().items()}
        collections = [m for m in (self.root or nn.Module()).modules() if isinstance(m, MetricCollection)]
        for collection in collections if found else []:
            for first, *others in collection.compute_groups.values():
                leader = found.get(id(collection._modules[first]), "")  # `collection[first]` would write to states
                found |= {id(collection._modules[name]): leader for name in others}
        return found

    def metrics(self) -> Mapping[str, Metric]:
        """All metrics by their paths."""
        self.begin()  # where there was no batch
        return self._metrics or {}

    def _find(self) -> dict[str, Metric]:
        if not self._kept.on or self.root is None:
            return {}
        return {self._prefix + path: m for path, m in self.root.named_modules() if isinstance(m, Metric)}

    def _is_kept(self, path: str, metric: Metric) -> bool:
        if path not in self._held and path not in self._kept.refused and (why := _why_not(metric)):
            self._kept.refused[path] = why
        return path not in self._kept.refused


def _why_not(metric: Metric) -> str:
    """Why its states are not what batches add up to; empty where they are."""
    if isinstance(metric, (BootStrapper, MetricTracker, MinMaxMetric, Running)):
        return f"{type(metric).__name__} keeps something else than what its batches add up to"
    for name, default in metric._defaults.items():
        if not isinstance(default, list) and metric._reductions[name] is not dim_zero_sum:
            return f"its state `{name}` is no sum over batches"
    return ""


def _held(metric: Metric) -> tuple[int, dict[str, Any]]:
    """How often it was updated, its sums, and how long its lists are."""
    states = ((name, getattr(metric, name)) for name in metric._defaults)
    return metric._update_count, {n: len(s) if isinstance(s, list) else s.detach().clone() for n, s in states}


def _defaults(metric: Metric) -> dict[str, Any]:
    return {name: 0 if isinstance(default, list) else default for name, default in metric._defaults.items()}


def _on_cpu(state: Any) -> Any:
    if isinstance(state, tuple):
        ahead, behind = (tensor.detach().cpu().double() for tensor in state)
        return behind - ahead
    return [entry.detach().cpu() if isinstance(entry, Tensor) else entry for entry in state]
