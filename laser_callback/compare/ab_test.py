"""A/B test in prediction: a share of the examples goes to the reduced model, the others to the original.

Contract: which model an example goes to depends on its id, the seed and the fraction alone, in any batch, on any rank,
on any day; with a larger fraction no example leaves the reduced model. Each example is computed once, by one model. A
batch is split by arm, so the two passes over its parts cost about what one pass over the whole does.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from laser_callback.data.facts import draw
from laser_callback.plans.plan import LaserPlan
from laser_callback.results.ab_test import ABResult
from laser_callback.results.examples import ORIGINAL
from laser_callback.stats.holm import adjust
from laser_callback.stats.outcomes import Kind, Outcomes
from laser_callback.stats.unpaired import compare_groups
from laser_callback.support.processes import gather
from laser_callback.surgery.swap import reduced

REDUCED = "reduced"
_One = tuple[float, float | None, Kind, Hashable]
_Seen = dict[str, dict[str, dict[Hashable, _One]]]
"""Arm -> metric -> value, weight, kind and cluster of each example that the arm has seen, by dataloader and id."""

_OF_ROWS = ("chunks", "row_fact", "row_role", "windows", "weights")  # what is per row, or holds what is per example


def arm_of(example_id: Hashable, fraction: float, seed: int) -> str:
    """The arm of an example: "reduced" for a ``fraction`` of all ids, else "original".

    >>> [arm_of(f"fact {i}", 0.5, seed=0) for i in range(4)]
    ['reduced', 'original', 'original', 'original']
    """
    share = int(draw(str(example_id), f"{seed}/ab")[:13], 16) / 16**13
    return REDUCED if share < fraction else ORIGINAL


@dataclass
class ABTest:
    """The A/B test of one prediction loop.

    Args:
        module: what is reduced.
        plan: how.
        fraction: share of the ids that go to the reduced model, in [0, 1].
        seed: of the routing.
    """

    module: LightningModule
    plan: LaserPlan
    fraction: float
    seed: int
    _cut: reduced | None = field(default=None, init=False)
    _seen: _Seen = field(default_factory=lambda: {ORIGINAL: {}, REDUCED: {}}, init=False)

    def step(
        self, run: Callable[[dict[str, Any]], dict[str, Any]], batch: dict[str, Any], dataloader_idx: int
    ) -> dict[str, Any]:
        """Run each part of a batch by its model.

        Args:
            run: the step: from a batch to what it found for each example, lists, tensors and :class:`Outcomes`.
                Examples with the same ``cluster`` are not taken as independent.
            batch: examples with an ``id`` each.
            dataloader_idx: where the batch comes from.

        Returns:
            The same of all examples in the batch's order, and ``arm``, a list of "original" and "reduced".
        """
        arms = [arm_of(example_id, self.fraction, self.seed) for example_id in batch["id"]]
        parts: list[dict[str, Any]] = []
        order: list[int] = []
        for arm in (ORIGINAL, REDUCED):
            positions = [i for i, chosen in enumerate(arms) if chosen == arm]
            if not positions:
                continue
            part = batch if len(positions) == len(arms) else part_of(batch, positions)
            if arm == ORIGINAL:
                found = run(part)
            else:
                with self._reduced():
                    found = run(part)
            self._add(arm, part["id"], found, dataloader_idx)
            parts.append(found)
            order += positions
        back = sorted(range(len(order)), key=order.__getitem__)
        joined = {name: _joined([part[name] for part in parts], back) for name in parts[0]}
        return {**joined, "arm": arms}

    def result(self, primary: str | None, higher_is_better: Mapping[str, bool | None]) -> ABResult:
        """Compare the arms, over all ranks.

        Args:
            primary: the metric whose own p value carries the claim, where it is there; others are Holm-adjusted.
            higher_is_better: direction by metric.
        """
        merged: _Seen = {ORIGINAL: {}, REDUCED: {}}
        for rank in gather(self._seen):
            for arm, by_metric in rank.items():
                for metric, values in by_metric.items():
                    merged[arm].setdefault(metric, {}).update(values)
        rows = []
        for metric in [name for name in merged[ORIGINAL] if name in merged[REDUCED]]:
            (before, one), (after, two) = (_outcomes(merged[arm][metric]) for arm in (ORIGINAL, REDUCED))
            if not bool(torch.isnan(torch.cat([before.values, after.values])).all()):
                clusters = None if one is None or two is None else (one, two)
                rows.append(compare_groups(metric, before, after, higher_is_better.get(metric), clusters=clusters))
        names = [row.metric for row in rows]
        examples = {arm: len({key for values in merged[arm].values() for key in values}) for arm in merged}
        rows = adjust(rows, primary if primary in names else None)
        return ABResult(str(self.plan), self.fraction, self.seed, examples, rows)

    def _reduced(self) -> reduced:
        if self._cut is None:  # at the first batch: until then a checkpoint may change the weights
            self._cut = reduced(self.module, self.plan)
        return self._cut

    def _add(self, arm: str, ids: Sequence[Hashable], found: Mapping[str, Any], dataloader_idx: int) -> None:
        for metric, value in found.items():
            if not isinstance(value, Outcomes):
                continue
            weights = [None] * len(ids) if value.weights is None else value.weights.tolist()
            seen = self._seen[arm].setdefault(metric, {})
            clusters = found.get("cluster", [None] * len(ids))
            for i, number, weight, cluster in zip(ids, value.values.tolist(), weights, clusters, strict=True):
                seen[dataloader_idx, i] = number, weight, value.kind, cluster


def part_of(batch: Mapping[str, Any], positions: Sequence[int]) -> dict[str, Any]:
    """Some examples of a batch of facts, text or probes, as a batch.

    Args:
        batch: as the collators of this package make it: what is a tensor or list has an entry per example, and in a
            batch of facts rows belong to facts, and windows to documents.
        positions: which examples, in ascending order.
    """
    part = {name: _taken(value, positions) for name, value in batch.items() if name not in _OF_ROWS}
    places = {position: i for i, position in enumerate(positions)}

    def of_rows(owner: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows are kept, by the examples that own them, and whose these are in the part."""
        numbers = torch.tensor([places.get(one, -1) for one in owner.tolist()], device=owner.device)
        return numbers >= 0, numbers[numbers >= 0]

    if "chunks" in batch:
        kept, part["row_fact"] = of_rows(batch["row_fact"])
        part["row_role"] = batch["row_role"][kept]
        masks = kept.split([len(chunk["input_ids"]) for chunk in batch["chunks"]])
        part["chunks"] = [
            {name: value[mask] for name, value in chunk.items()}
            for chunk, mask in zip(batch["chunks"], masks, strict=True)
            if bool(mask.any())
        ]
    if "windows" in batch:
        part["weights"] = {name: _taken(value, positions) for name, value in batch["weights"].items()}
        part["windows"] = []
        for rows in batch["windows"]:
            kept, owner = of_rows(rows["owner"])
            if bool(kept.any()):
                part["windows"].append({name: value[kept] for name, value in rows.items()} | {"owner": owner})
    if batch.get("asked"):  # of what is to be written the prompts are per fact, and the settings are not
        asked = batch["asked"].items()
        part["asked"] = {
            name: _taken(value, positions) if isinstance(value, Tensor) else value for name, value in asked
        }
    return part


def _taken(value: Any, positions: Sequence[int]) -> Any:
    if isinstance(value, Tensor):
        return value[torch.tensor(positions, device=value.device)]
    return [value[i] for i in positions] if isinstance(value, list) else value


def _joined(parts: Sequence[Any], back: Sequence[int]) -> Any:
    """What the parts found, in the order of the whole; of outcomes the values."""
    parts = [part.values if isinstance(part, Outcomes) else part for part in parts]
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))[torch.tensor(back, device=parts[0].device)]
    flat = [item for part in parts for item in part]
    return [flat[i] for i in back]


def _outcomes(seen: Mapping[Hashable, _One]) -> tuple[Outcomes, list[Hashable] | None]:
    """Of an arm's examples the outcomes, and the clusters where each has one."""
    values, weights, kinds, clusters = zip(*seen.values(), strict=True)
    weighted = weights[0] is not None
    outcomes = Outcomes(
        torch.tensor(values, dtype=torch.float64),
        torch.tensor(weights, dtype=torch.float64) if weighted else None,
        kinds[0],
    )
    return outcomes, None if None in clusters else list(clusters)
