"""What each arm did on each example: collected batch by batch, gathered over ranks, compared as pairs.

What an evaluation step returns (see :mod:`laser_callback.results.returned`) gives one outcome per example for each
metric under whose name it is logged. Seven names describe the examples instead: ``id`` (what distributed samplers add
is removed by it), ``cluster`` (examples that are not independent of each other share one), ``group``, ``answer`` and
``prediction`` (for the prior checks; where metrics look at different answers, a mapping by metric), and, for readers of
a report, ``prompt`` and ``continuation`` (what a model has written). Where a metric is logged of which no outcomes are
returned, the pairs are the batches' logged means, or what they add to the states of a torchmetrics object; where
outcomes are returned and nothing is logged, they are compared as they are.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from laser_callback.results.returned import DESCRIPTIONS as DESCRIPTIONS
from laser_callback.results.returned import ORIGINAL as ORIGINAL
from laser_callback.results.returned import is_own, name_in, read_returned
from laser_callback.results.selected import (
    ROUNDING,
    Batch,
    Selected,
    clusters_of,
    joined,
    said_of,
    seen_twice,
    shares_right,
    subset,
    weights_of,
)
from laser_callback.stats.outcomes import Array, Kind, Outcomes, PairedResult, not_tested
from laser_callback.stats.paired import compare
from laser_callback.stats.priors import PriorChecks, prior_checks
from laser_callback.support.files import write_atomically
from laser_callback.support.plain_json import plain


class Logged(NamedTuple):
    """One value that a run logged per epoch, under the key that the user sees."""

    value: Array  # a tensor; a number where it is not logged but returned
    name: str  # as in `self.log(name, ...)`
    dataloader_idx: int | None
    also: str | None  # the short form that Lightning adds to `callback_metrics`, for a key that ends in "_epoch"
    logger: bool
    prog_bar: bool
    higher_is_better: bool | None  # known where a torchmetrics object was logged
    of_both: bool = False  # it is a number of both models, and was not logged


class Pooled(Protocol):
    """What knows the states of metrics that are no means."""

    def row(
        self, examples: PairedExamples, base: str, arm: str, key: str, metric: Logged, reduced: Logged
    ) -> PairedResult | str:
        """The row of ``key``, or why there is none."""


@dataclass
class PairedExamples:
    """The outcomes of one evaluation run, example by example.

    Attributes:
        duplicates: how many examples of a distributed sampler were removed.
        kept: of a run that is read from a file the rows of its examples, in place of batches.
    """

    batches: list[Batch] = field(default_factory=list)
    means: list[dict[str, dict[str, tuple[float, float]]]] = field(default_factory=list)
    duplicates: int = 0
    pooled: Pooled | None = field(default=None, repr=False)  # of metrics that are no means; while rows are made
    kept: list[dict[str, Any]] = field(default_factory=list)

    def add(self, outputs: Mapping[str, Any], batch: Any, dataloader_idx: int | None) -> None:
        """Add what each arm's step returned for one batch."""
        found = read_returned(outputs, batch)
        for name in DESCRIPTIONS:
            reason = found.unused.get(name)
            if reason and not any(name in earlier.unused for earlier in self.batches):
                _warn(f"`{name}`, as the step returns it, is not used: {reason}")
        self.batches.append(Batch(**vars(found), dataloader_idx=dataloader_idx))

    def merge(self, ranks: Iterable[PairedExamples]) -> PairedExamples:
        """All ranks' examples, in rank order, without what a distributed sampler has added to make their shares equal.

        That is at most one example less than there are ranks, and each of them is another rank's as well. Any other id
        that comes twice is told and removes nothing.
        """
        ranks = list(ranks)
        merged = PairedExamples(means=[means for rank in ranks for means in rank.means])
        padding = _padding(ranks)
        for number, rank in enumerate(ranks):
            for place, batch in enumerate(rank.batches):
                added = padding.get((number, place), ())
                if added:
                    merged.duplicates += len(added)
                    batch = subset(batch, [i for i in range(batch.size) if i not in added])
                merged.batches.append(batch)
        # What is one number in a batch of one example is an outcome where other batches have one per example.
        per_example = {name for batch in merged.batches for name in batch.outcomes.get(ORIGINAL, {})}
        for batch in merged.batches:
            for arm, single in batch.single.items():
                batch.outcomes[arm] |= {name: one for name, one in single.items() if name in per_example}
        return merged

    def returned(self, arm: str) -> dict[str, Logged]:
        """What the arm's step returned, as if its means had been logged: whatever is no whole number, as labels are."""
        found: dict[str, Logged] = {}
        labels = {name for batch in self.batches for name in batch.integers}
        loaders = {batch.dataloader_idx for batch in self.batches}
        for batch in self.batches:
            for name in batch.outcomes.get(arm, {}):
                key = name if len(loaders) == 1 else f"{name}/dataloader_idx_{batch.dataloader_idx}"
                if key in found or name in labels:
                    continue
                parts = [
                    b
                    for b in self.batches
                    if b.dataloader_idx == batch.dataloader_idx and name in b.outcomes.get(arm, {})
                ]
                kinds = {b.outcomes[arm][name].kind for b in parts}
                values = joined([b.outcomes[arm][name] for b in parts], kinds.pop() if len(kinds) == 1 else "mean")
                mean = compare(key, values, values).original
                found[key] = Logged(mean, name, batch.dataloader_idx, None, True, False, None)
        return found

    def with_both(self, arm: str, logged: Mapping[str, Logged]) -> dict[str, Logged]:
        """What an arm has logged, if anything, and numbers of both models as if it had: over all dataloaders."""
        found: dict[str, list[Outcomes]] = {}
        for name, outcomes in (item for batch in self.batches for item in batch.outcomes.get(arm, {}).items()):
            if outcomes.kind == "pair":
                found.setdefault(name, []).append(outcomes)
        means = {name: compare(name, *[joined(parts, "pair")] * 2).reduced for name, parts in found.items()}
        return dict(logged) and {
            **logged,
            **{k: Logged(v, k, None, None, True, False, None, of_both=True) for k, v in means.items()},
        }

    def rows(
        self, arm: str, original: Mapping[str, Logged], reduced: Mapping[str, Logged], base: str = ORIGINAL
    ) -> list[PairedResult]:
        """One row per metric that both arms logged; its pairs are what the step returned under the metric's name.

        Args:
            arm: its key.
            original: what ``base`` logged.
            reduced: what ``arm`` logged.
            base: the arm that it is compared with.
        """
        rows = []
        for key in [key for key in original if key in reduced]:
            metric = original[key]
            selected = self._select(arm, key, metric, base)
            values = float(metric.value), float(reduced[key].value)
            if math.isfinite(values[0]) and not math.isfinite(values[1]):
                n = sum(b.size for b in self.batches if metric.dataloader_idx in (None, b.dataloader_idx))
                note = f"the reduced model's value is {values[1]:g}: there is nothing to test"
                pair = self.values(arm, key, metric)
                kind = None if pair is None else pair[0].kind
                rows.append(not_tested(key, *values, n, note, metric.higher_is_better, kind))
            elif isinstance(selected, str):
                rows.append(_with_note(self._row_of_means(arm, key, metric, reduced[key], base), selected))
            else:
                before, after, clusters, doubt, _ = selected
                row = compare(key, before, after, clusters=clusters, higher_is_better=metric.higher_is_better)
                rows.append(_with_note(row, _unlike_logged(row, metric, reduced[key]), doubt))
        return rows

    def values(self, arm: str, key: str, metric: Logged) -> tuple[Outcomes, Outcomes] | None:
        """Original's and arm's outcomes of a metric, per example or else per batch; ``None`` if it is no mean."""
        selected = self._select(arm, key, metric)
        return self._means(arm, key)[0] if isinstance(selected, str) else selected[:2]

    def clusters(self, key: str, metric: Logged) -> list[Hashable] | None:
        """Each example's cluster, in the order of :meth:`values`; ``None`` where all are independent, as batches."""
        selected = self._select(ORIGINAL, key, metric)
        return None if isinstance(selected, str) else selected.clusters

    def priors(self, arm: str, original: Mapping[str, Logged], reduced: Mapping[str, Logged]) -> dict[str, PriorChecks]:
        """The prior checks of each metric of right and wrong for which the step returned answers and predictions.

        Of a metric of errors they are of the share that is right.
        """
        found = {}
        for key in [key for key in original if key in reduced]:
            selected = self._select(arm, key, original[key])
            if isinstance(selected, str) or selected.said is None:
                continue
            said = selected.said
            outcomes = shares_right((selected.before, selected.after), said, original[key].higher_is_better)
            if outcomes is not None:
                found[key] = prior_checks(
                    key, said.answers, (said.before, said.after), outcomes, said.groups, selected.clusters
                )
        return found

    def to_rows(self) -> list[dict[str, Any]]:
        """One mapping per example, ready for strict JSON: its descriptions, and each arm's outcomes and prediction.

        A number that is not finite becomes ``None``. Of several dataloaders each says its own, ``dataloader_idx``.
        """
        rows = list(self.kept)
        several = len({batch.dataloader_idx for batch in self.batches}) > 1
        for batch in self.batches:
            for i in range(batch.size):
                here = batch.outcomes.get(ORIGINAL, {})
                absent = {name for name, outcomes in here.items() if np.isnan(outcomes.values[i])}
                described = {
                    arm: {k: v[i] for k, v in by_name.items() if k.partition("/")[2] not in absent}
                    for arm, by_name in batch.described.items()
                }
                row: dict[str, Any] = {"dataloader_idx": batch.dataloader_idx} if several else {}
                row |= {k: v for k, v in described[ORIGINAL].items() if not is_own(k)}
                for arm, outcomes in batch.outcomes.items():
                    shown = {
                        name: o
                        for name, o in outcomes.items()
                        if name not in batch.integers
                        and (arm, o.kind) != (ORIGINAL, "pair")  # which is none of its own
                    }
                    row[arm] = {name: float(o.values[i]) for name, o in shown.items()}
                    row[arm] |= {k: v for k, v in described[arm].items() if is_own(k)}
                rows.append(plain(row))
        return rows

    def write(self, path: str | Path) -> None:
        """Write each of :meth:`to_rows` as one line of JSON."""
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in self.to_rows()]
        write_atomically(Path(path), "".join(lines))

    def _select(self, arm: str, key: str, metric: Logged, base: str = ORIGINAL) -> Selected | str:
        """The outcomes of both arms; or why there are none for each example, empty where the step returned none."""
        places = [i for i, b in enumerate(self.batches) if metric.dataloader_idx in (None, b.dataloader_idx) and b.size]
        batches = [self.batches[i] for i in places]
        names = dict.fromkeys(name for b in batches for name in (*b.outcomes[ORIGINAL], *b.unused))
        name = name_in(metric.name, list(names))
        used = [b for b in batches if all(name in b.outcomes.get(one, {}) for one in (base, arm))]
        reasons = [b.unused[name] for b in batches if b.unused.get(name)]
        reason = (
            f"what the step returns under this name is not one outcome per example: {reasons[0]}" if reasons else ""
        )
        if not used:
            return reason
        means = self.means if len(self.means) == len(self.batches) else [{}] * len(self.batches)
        without = [
            i
            for i, b in zip(places, batches, strict=True)
            if not all(name in b.outcomes.get(one, {}) for one in (base, arm))
            and (name in b.unused or means[i].get(ORIGINAL, {}).get(key, (0.0, 0.0))[1])
        ]
        if without:  # never some batches as examples, and others not
            share = f"{len(without)} of {len(without) + len(used)} batches came without one outcome per example"
            return "; ".join(filter(None, [share, reason]))
        kinds = {b.outcomes[a][name].kind for b in used for a in (base, arm)}
        if "log_ratio" in kinds and len(kinds) > 1:
            return f"the step returned outcomes of different kinds: {', '.join(sorted(kinds))}"
        # Two reduced arms' numbers of both models are numbers of one each: the original is the same.
        kind: Kind = kinds.pop() if len(kinds) == 1 and not (kinds == {"pair"} and base != ORIGINAL) else "mean"
        before, after = (joined([b.outcomes[a][name] for b in used], kind) for a in (base, arm))
        absent = np.isnan(before.values) | np.isnan(after.values)
        if absent.all():
            return ""
        if kind != "binary" and not np.array_equal(weights_of(before)[~absent], weights_of(after)[~absent]):
            return "the step returned other weights for the reduced model: they belong to the example"
        clusters, unclustered = clusters_of(used)
        clusters = clusters or seen_twice(used, before, after)
        for b in batches:
            b.integers.discard(name)  # no labels: they are logged
        said = said_of(used, arm, name)
        doubts = unclustered, next((b.doubt for b in used if b.doubt), "")
        return Selected(before, after, clusters, "; ".join(filter(None, doubts)), said)

    def _row_of_means(self, arm: str, key: str, original: Logged, reduced: Logged, base: str) -> PairedResult:
        outcomes, left_out = self._means(arm, key, base)
        values = float(original.value), float(reduced.value)
        if outcomes is None:
            found = "" if self.pooled is None else self.pooled.row(self, base, arm, key, original, reduced)
            if isinstance(found, PairedResult):
                return found
            note = "; ".join(filter(None, ["not an average over examples", found]))
            return not_tested(key, *values, sum(b.size for b in self.batches), note, original.higher_is_better)
        row = replace(compare(key, *outcomes, higher_is_better=original.higher_is_better), unit="batch")
        return _with_note(row, "; ".join(filter(None, [left_out, "unit: the batch"])))

    def _means(self, arm: str, key: str, base: str = ORIGINAL) -> tuple[tuple[Outcomes, Outcomes] | None, str]:
        """Each batch's mean of what is logged as ``key``, and which batches are left out; ``None`` if it is no mean."""
        absent = (0.0, 0.0)
        shares = [(batch.get(base, {}).get(key, absent), batch.get(arm, {}).get(key, absent)) for batch in self.means]
        shares = [(before, after) for before, after in shares if before[1] or after[1]]
        pairs = [(before, after) for before, after in shares if before[1] == after[1]]
        if not pairs:
            return None, ""
        weights = np.array([before[1] for before, _ in pairs], np.float64)
        sums = np.array([[before[0], after[0]] for before, after in pairs], np.float64)
        outcomes = Outcomes(sums[:, 0] / weights, weights, "mean"), Outcomes(sums[:, 1] / weights, weights, "mean")
        left_out = f"{len(shares) - len(pairs)} of {len(shares)} batches left out: logged in one arm only"
        return outcomes, left_out if len(pairs) < len(shares) else ""


# ---- batches ---------------------------------------------------------------------------------------------------------


def _padding(ranks: list[PairedExamples]) -> dict[tuple[int, int], set[int]]:
    """The positions, in each (rank, batch), of examples that a distributed sampler has added.

    Raises no error where an id means something else than one example, but tells it and adds none.
    """
    added: dict[int | None, list[tuple[int, int, int]]] = defaultdict(list)
    repeated: dict[int | None, Hashable] = {}
    owners: dict[tuple[int | None, Hashable], int] = {}
    for number, rank in enumerate(ranks):
        for place, batch in enumerate(rank.batches):
            loader = batch.dataloader_idx
            for position, example_id in enumerate(batch.described.get(ORIGINAL, {}).get("id", ())):
                if (loader, example_id) not in owners:
                    owners[loader, example_id] = number
                elif owners[loader, example_id] == number or len(added[loader]) == len(ranks) - 1:
                    repeated.setdefault(loader, example_id)
                else:
                    added[loader].append((number, place, position))
    found: dict[tuple[int, int], set[int]] = defaultdict(set)
    for loader, example_id in repeated.items():
        added.pop(loader, None)
        _warn(
            f"`id` must be another for each example{'' if loader is None else f' of dataloader {loader}'}, but "
            f"{str(example_id)[:60]!r} comes again in places that no distributed sampler repeats. Nothing is removed: "
            "every example counts. Examples that belong together share a `cluster`"
        )
    for number, place, position in (one for of_loader in added.values() for one in of_loader):
        found[number, place].add(position)
    return found


def _warn(message: str) -> None:
    """On the first rank only. Imported here: outcomes that were read from a file need no Lightning."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn

    rank_zero_warn(message)


def _unlike_logged(row: PairedResult, original: Logged, reduced: Logged) -> str:
    """A note where the key was logged as something else than the row's means, such as a macro average."""
    logged, means = (float(original.value), float(reduced.value)), (row.original, row.reduced)
    if all(math.isclose(*pair, rel_tol=ROUNDING, abs_tol=1e-6) for pair in zip(logged, means, strict=True)):
        return ""
    return f"logged as {logged[0]:.4g} and {logged[1]:.4g} (reduced): not the mean over these examples"


def _with_note(row: PairedResult, *notes: str) -> PairedResult:
    return replace(row, note="; ".join(filter(None, [row.note, *notes])))
