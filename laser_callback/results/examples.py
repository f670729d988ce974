"""What each arm did on each example: collected batch by batch, gathered over ranks, compared as pairs.

An evaluation step that returns a mapping gives one outcome per example for each metric it names: 1-D float or bool
tensors of batch length, or :class:`Outcomes`, under the name that the metric is logged under. Six names describe the
examples instead: ``id`` (duplicates of distributed samplers are removed by it), ``cluster`` (examples that are not
independent of each other share one), ``group``, ``answer`` and ``prediction`` (for the prior checks), and ``prompt``
(for readers of a report). Without such a mapping the pairs are the batches' logged means.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from laser_callback.stats.outcomes import Outcomes, PairedResult, as_float64, not_tested
from laser_callback.stats.paired import compare
from laser_callback.stats.priors import PriorChecks, prior_checks
from laser_callback.support.files import write_atomically
from laser_callback.support.plain_json import label, plain

ROUNDING = 1e-3
"""Relative: a logged value this close to a mean is that mean, in single or half precision. Tables show three digits."""
DESCRIPTIONS = ("id", "cluster", "group", "prompt", "answer", "prediction")
ORIGINAL = "original"


class Logged(NamedTuple):
    """One value that a run logged per epoch, under the key that the user sees."""

    value: Tensor
    name: str  # as in `self.log(name, ...)`
    dataloader_idx: int | None
    also: str | None  # the short form that Lightning adds to `callback_metrics`, for a key that ends in "_epoch"
    logger: bool
    prog_bar: bool
    higher_is_better: bool | None  # known where a torchmetrics object was logged


@dataclass
class _Batch:
    """One batch, all arms."""

    dataloader_idx: int | None
    size: int
    outcomes: dict[str, dict[str, Outcomes]]  # arm -> name -> one per example
    described: dict[str, dict[str, list[Hashable]]]  # arm -> description -> one per example


@dataclass
class PairedExamples:
    """The outcomes of one evaluation run, example by example."""

    batches: list[_Batch] = field(default_factory=list)
    means: list[dict[str, dict[str, tuple[float, float]]]] = field(default_factory=list)
    duplicates: int = 0

    def add(self, outputs: Mapping[str, Any], size: int, dataloader_idx: int | None) -> None:
        """Add what each arm's step returned for one batch of ``size`` examples."""
        outcomes = {arm: dict(_outcomes(output, size)) for arm, output in outputs.items()}
        described = {arm: dict(_descriptions(output, size)) for arm, output in outputs.items()}
        self.batches.append(_Batch(dataloader_idx, size, outcomes, described))

    def merge(self, ranks: Iterable[PairedExamples]) -> PairedExamples:
        """All ranks' examples, in rank order, each id (of a dataloader) once."""
        merged = PairedExamples()
        seen: set[tuple[int | None, Hashable]] = set()
        for rank in ranks:
            merged.means += rank.means
            for batch in rank.batches:
                ids = batch.described[ORIGINAL].get("id")
                fresh = []
                for position, example_id in enumerate(ids or ()):
                    if (batch.dataloader_idx, example_id) not in seen:
                        seen.add((batch.dataloader_idx, example_id))
                        fresh.append(position)
                if ids and len(fresh) < len(ids):
                    merged.duplicates += len(ids) - len(fresh)
                    batch = _subset(batch, fresh)
                merged.batches.append(batch)
        return merged

    def rows(self, arm: str, original: Mapping[str, Logged], reduced: Mapping[str, Logged]) -> list[PairedResult]:
        """One row per metric that both arms logged; its pairs are what the step returned under the metric's name."""
        rows = []
        for key in [key for key in original if key in reduced]:
            metric = original[key]
            selected = self._select(arm, metric.name, metric.dataloader_idx)
            if selected is not None:
                before, after, clusters = selected
                row = compare(key, before, after, clusters=clusters, higher_is_better=metric.higher_is_better)
                units = "examples" if clusters is None else "clusters"
                rows.append(_with_note(row, _unlike_logged(row, metric, reduced[key], units)))
            else:
                rows.append(self._row_of_means(arm, key, metric, reduced[key]))
        return rows

    def values(self, arm: str, key: str, metric: Logged) -> tuple[Outcomes, Outcomes] | None:
        """Original's and arm's outcomes of a metric, per example or else per batch; ``None`` if it is no mean."""
        selected = self._select(arm, metric.name, metric.dataloader_idx)
        return selected[:2] if selected is not None else self._means(arm, key)[0]

    def priors(self, arm: str) -> PriorChecks | None:
        """The prior checks, where the step returned answers and predictions; right is what equals the answer."""
        answers: list[str] = []
        predictions: tuple[list[str], list[str]] = ([], [])
        groups: list[str] = []
        for batch in self.batches:
            before, after = batch.described[ORIGINAL], batch.described.get(arm, {})
            if "answer" in before and "prediction" in before and "prediction" in after:
                answers += map(str, before["answer"])
                predictions[0].extend(map(str, before["prediction"]))
                predictions[1].extend(map(str, after["prediction"]))
                groups += map(str, before.get("group", [""] * batch.size))
        if not answers:
            return None
        before_right, after_right = ([p == a for p, a in zip(said, answers, strict=True)] for said in predictions)
        return prior_checks(answers, *predictions, before_right, after_right, groups)

    def to_rows(self) -> list[dict[str, Any]]:
        """One mapping per example, ready for strict JSON: its descriptions, and each arm's outcomes and prediction.

        A number that is not finite becomes ``None``.
        """
        rows = []
        for batch in self.batches:
            for i in range(batch.size):
                row: dict[str, Any] = {k: v[i] for k, v in batch.described[ORIGINAL].items() if k != "prediction"}
                for arm, outcomes in batch.outcomes.items():
                    row[arm] = {name: float(o.values[i]) for name, o in outcomes.items()}
                    if "prediction" in batch.described[arm]:
                        row[arm]["prediction"] = batch.described[arm]["prediction"][i]
                rows.append(plain(row))
        return rows

    def write(self, path: str | Path) -> None:
        """Write each of :meth:`to_rows` as one line of JSON."""
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in self.to_rows()]
        write_atomically(Path(path), "".join(lines))

    def _select(
        self, arm: str, name: str, dataloader_idx: int | None
    ) -> tuple[Outcomes, Outcomes, list[Hashable] | None] | None:
        batches = [
            batch
            for batch in self.batches
            if name in batch.outcomes[ORIGINAL]
            and name in batch.outcomes[arm]
            and dataloader_idx in (None, batch.dataloader_idx)
            and batch.size
        ]
        pairs = (
            [_concatenate([batch.outcomes[a][name] for batch in batches]) for a in (ORIGINAL, arm)] if batches else []
        )
        if not pairs or bool((torch.isnan(pairs[0].values) | torch.isnan(pairs[1].values)).all()):
            return None
        clustered = all("cluster" in batch.described[ORIGINAL] for batch in batches)
        clusters = [c for batch in batches for c in batch.described[ORIGINAL]["cluster"]] if clustered else None
        return pairs[0], pairs[1], clusters

    def _row_of_means(self, arm: str, key: str, original: Logged, reduced: Logged) -> PairedResult:
        outcomes, left_out = self._means(arm, key)
        values = float(original.value), float(reduced.value)
        if outcomes is None:
            note = "not an average over examples"
            return not_tested(key, *values, sum(b.size for b in self.batches), note, original.higher_is_better)
        row = compare(key, *outcomes, higher_is_better=original.higher_is_better)
        return _with_note(row, "; ".join(filter(None, [left_out, "unit: the batch"])))

    def _means(self, arm: str, key: str) -> tuple[tuple[Outcomes, Outcomes] | None, str]:
        """Each batch's mean of what is logged as ``key``, and which batches are left out; ``None`` if it is no mean."""
        absent = (0.0, 0.0)
        shares = [(batch[ORIGINAL].get(key, absent), batch[arm].get(key, absent)) for batch in self.means]
        shares = [(before, after) for before, after in shares if before[1] or after[1]]
        pairs = [(before, after) for before, after in shares if before[1] == after[1]]
        if not pairs:
            return None, ""
        weights = torch.tensor([before[1] for before, _ in pairs], dtype=torch.float64)
        sums = torch.tensor([[before[0], after[0]] for before, after in pairs], dtype=torch.float64)
        outcomes = Outcomes(sums[:, 0] / weights, weights, "mean"), Outcomes(sums[:, 1] / weights, weights, "mean")
        left_out = f"{len(shares) - len(pairs)} of {len(shares)} batches left out: logged in one arm only"
        return outcomes, left_out if len(pairs) < len(shares) else ""


# ---- reading a step's output -----------------------------------------------------------------------------------------


def _outcomes(output: Any, size: int) -> Iterator[tuple[str, Outcomes]]:
    if not isinstance(output, Mapping):
        return
    for name, value in output.items():
        if name in DESCRIPTIONS:
            continue
        if isinstance(value, Tensor) and value.ndim == 1 and (value.dtype == torch.bool or value.is_floating_point()):
            value = Outcomes.of(value.detach())
        if isinstance(value, Outcomes) and len(value.values) == size:
            # Copies: a step may go on using its tensors, and views would keep whole batches alive.
            values, weights = (
                None if v is None else torch.tensor(as_float64(v)) for v in (value.values, value.weights)
            )
            yield str(name), Outcomes(values, weights, value.kind)


def _descriptions(output: Any, size: int) -> Iterator[tuple[str, list[Hashable]]]:
    if not isinstance(output, Mapping):
        return
    for name in DESCRIPTIONS:
        values = _plain_list(output.get(name))
        if values is not None and len(values) == size:
            yield name, values


def _plain_list(values: Any) -> list[Hashable] | None:
    """A 1-D tensor, array or sequence as a list of labels: those compare by what they are."""
    if isinstance(values, (Tensor, np.ndarray)):
        values = values.tolist() if values.ndim == 1 else None
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes, bytearray)):
        return None
    return [label(value) for value in values]


def example_count(output: Any, batch: Any) -> int:
    """The number of examples of a batch: of the ids that the step returned, else of the batch's first tensor."""
    ids = _plain_list(output.get("id")) if isinstance(output, Mapping) else None
    if ids is not None:
        return len(ids)
    leaves = pytree.tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), 1)


def _subset(batch: _Batch, positions: list[int]) -> _Batch:
    index = torch.tensor(positions, dtype=torch.long)
    outcomes = {
        arm: {
            name: Outcomes(o.values[index], None if o.weights is None else o.weights[index], o.kind)
            for name, o in by_name.items()
        }
        for arm, by_name in batch.outcomes.items()
    }
    described = {
        arm: {name: [values[i] for i in positions] for name, values in by_name.items()}
        for arm, by_name in batch.described.items()
    }
    return _Batch(batch.dataloader_idx, len(positions), outcomes, described)


def _concatenate(parts: list[Outcomes]) -> Outcomes:
    weights = [part.weights for part in parts if part.weights is not None]
    return Outcomes(torch.cat([part.values for part in parts]), torch.cat(weights) if weights else None, parts[0].kind)


def _unlike_logged(row: PairedResult, original: Logged, reduced: Logged, units: str) -> str:
    """A note where the key was logged as something else than the row's means, such as a macro average."""
    logged, means = (float(original.value), float(reduced.value)), (row.original, row.reduced)
    if all(math.isclose(*pair, rel_tol=ROUNDING, abs_tol=1e-6) for pair in zip(logged, means, strict=True)):
        return ""
    return f"logged as {logged[0]:.4g} and {logged[1]:.4g} (reduced): not the mean over these {units}"


def _with_note(row: PairedResult, note: str) -> PairedResult:
    return replace(row, note="; ".join(filter(None, [row.note, note])))
