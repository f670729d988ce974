"""The steps of a search: screen, race, refine, accept, compare. Each is kept in the journal and counted in its phase.

:class:`Steps` holds what they share; the order in which they run, and what follows from them, is ``search.py``'s.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from laser_callback.compare.measure import Lab, Table, Values
from laser_callback.data.sets import ExampleSets
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.reduction import Reduction
from laser_callback.plans.targets import Target
from laser_callback.reports.search_terminal import leaders
from laser_callback.results.candidates import Candidate
from laser_callback.results.comparison import LaserResult
from laser_callback.results.examples import ORIGINAL
from laser_callback.results.search import Phase
from laser_callback.search.candidates import Score, in_parts
from laser_callback.search.race import Objective, Rung, choose, order, paired, schedule
from laser_callback.search.screen import GradientScreen, LossFn
from laser_callback.search.setup import FLUENCY
from laser_callback.spectra.store import Spectra
from laser_callback.stats.paired import ALPHA, adjust
from laser_callback.support.journal import Journal, Step
from laser_callback.support.progress import PhaseProgress

FLUENCY_WINDOWS = 12
"""At most so many windows of text rank the finalists' fluency; the guard set has others, and more."""

SCREEN_BATCHES = 5
"""The screen set in at least so many, between which its gradients are seen to vary."""

ARMS = 64
"""So many candidates run in one evaluation loop, and are one step of the journal."""

Refine = Callable[[str, dict[str, Candidate], Table, Sequence[Sequence[int]], int], dict[str, Candidate]]
"""From a step's name, the candidates in a race, their values (which it adds to), the examples that they have seen in
each rung, and how many may go on, to those that do, the best first."""

Screen = Callable[[Sequence[Target], Sequence[float], DataLoader[Any]], Mapping[Reduction, Score]]


@dataclass
class Steps:
    """What the steps of one search share.

    Attributes:
        keys: metrics that candidates are measured by: those of the objective, and of constraints on the same examples.
        phases: time and passes so far.
    """

    lab: Lab
    sets: ExampleSets
    journal: Journal
    progress: PhaseProgress
    objective: Objective
    keys: tuple[str, ...]
    phases: dict[str, Phase] = field(default_factory=dict)

    def timed(
        self, name: str, phase: str, description: str, compute: Callable[[], Step], passes: int, whole: float
    ) -> Step:
        """A journal step that counts its time, and its passes, in ``phase``."""

        def run() -> Step:
            begin = time.perf_counter()
            with self.progress.phase(description, total=whole):
                data, tensors = compute()
            seconds = time.perf_counter() - begin
            return {"data": data, "seconds": seconds, "passes": passes, "whole_passes": whole}, tensors

        data, tensors = self.journal.step(name, run)
        total = self.phases.setdefault(phase, Phase(phase))
        total.seconds += data["seconds"]
        total.passes += data["passes"]
        total.whole_passes += data["whole_passes"]
        return data["data"], tensors

    def screen(
        self, number: int, found: Sequence[Target], rhos: Sequence[float], base: Sequence[Reduction], screen: Screen
    ) -> dict[str, tuple[float, float]]:
        """Each candidate's estimated change of the loss and its standard error, by its text."""
        loader = self.sets.loader("screen", batches=SCREEN_BATCHES)

        def compute() -> Step:
            with self.lab.base(base):
                scores = screen(found, rhos, loader)
            return {str(r): score if isinstance(score, tuple) else (score, 0.0) for r, score in scores.items()}, {}

        examples = self.sets.sizes["screen"]
        what = f"screen: {len(found)} targets at {len(rhos)} rhos, one backward pass on {examples} examples"
        data, _ = self.timed(f"{number}-screen", "screen", what, compute, examples, 3.0 * examples)
        return {name: (math.nan if score is None else score, error) for name, (score, error) in data.items()}

    def gradient_screen(self, spectra: Spectra, loss: LossFn | None) -> Screen:
        """The screen by a backward pass; ``loss`` as for :class:`GradientScreen`.

        Where the spectra of all targets are more than can be kept from one batch to the next, part of the model after
        part is screened: passes over a hundred examples are cheaper than to factorise again for every batch.
        """

        def screen(found: Sequence[Target], rhos: Sequence[float], loader: DataLoader[Any]) -> dict[Reduction, Score]:
            scores: dict[Reduction, Score] = {}
            for part in in_parts(found, spectra.capacity) if len(loader) > 1 else [found]:
                gradient = GradientScreen(part, rhos, spectra, loss=loss, key=self.objective.loss or "loss")
                self.lab.validate(loader, gradient, inference_mode=False)
                # Few batches tell nothing about their variance.
                errors = gradient.errors if len(loader) >= SCREEN_BATCHES else {}
                scores |= {cut: (score, errors.get(cut, 0.0)) for cut, score in gradient.scores.items()}
            return scores

        return screen

    def measure(
        self,
        name: str,
        phase: str,
        reductions: Iterable[Reduction],
        loader: DataLoader[Any],
        base: Sequence[Reduction] = (),
        what: str = "",
    ) -> Table:
        """Values of all keys for the base and for each reduction added to it."""
        plans = {str(reduction): LaserPlan([reduction]) for reduction in reductions}
        examples = _length(loader)
        whole = examples * (1 + sum(self.lab.share(plan) for plan in plans.values()))
        per_batch = examples / max(len(loader), 1)
        self.lab.on_arm = lambda share: self.progress.advance(share * per_batch)

        def compute() -> Step:
            table = self.lab.measure(plans, loader, self.keys, base)
            return _to_step(table)

        what = what or f"{phase}: {len(plans)} candidates on {examples} examples"
        data, tensors = self.timed(name, phase, what, compute, examples * (1 + len(plans)), whole)
        return _to_table(data, tensors)

    def fluency(self, step: str, plans: Sequence[LaserPlan], loader: DataLoader[Any]) -> Table:
        """Perplexity of the original and of each whole plan, by its text, on a few windows of running text."""
        by_name = {str(plan): plan for plan in plans}
        windows = _length(loader)
        few = Subset(loader.dataset, range(0, windows, math.ceil(windows / FLUENCY_WINDOWS)))
        loader = DataLoader(few, loader.batch_size, collate_fn=loader.collate_fn)
        whole = len(few) * (1 + sum(self.lab.share(plan) for plan in plans))
        self.lab.on_arm = lambda share: self.progress.advance(share * len(few) / len(loader))

        def compute() -> Step:
            table = self.lab.measure(by_name, loader, (FLUENCY,))
            return _to_step(table)

        what = f"fluency: {len(plans)} finalists on {len(few)} windows of text"
        data, tensors = self.timed(f"{step}-fluency", "fluency", what, compute, len(few) * (1 + len(plans)), whole)
        return _to_table(data, tensors)

    def race(
        self,
        step: str,
        candidates: Sequence[Candidate],
        base: Sequence[Reduction],
        positions: Sequence[int],
        rungs: Sequence[Rung],
        refine: Refine | None = None,
    ) -> tuple[Table, list[Candidate]]:
        """Successive halving. Writes into the candidates how far each came.

        Args:
            step: its name in the journal.
            candidates: at the start.
            base: reductions in place.
            positions: race examples, in the order in which they are used.
            rungs: how many examples, and how many go on.
            refine: what lets others in ahead of the last rung.

        Returns:
            The finalists' values, and the finalists.
        """
        alive = {str(candidate.reduction): candidate for candidate in candidates}
        table: Table = {}
        seen: list[Sequence[int]] = []
        begin = 0
        for number_of_rung, rung in enumerate(rungs):
            seen.append(positions[begin : begin + rung.examples])
            loader = self.sets.loader("race", seen[-1])
            begin += rung.examples
            fresh: Table = {}
            names = list(alive)
            for chunk, first in enumerate(range(0, len(names), ARMS)):
                reductions = [alive[name].reduction for name in names[first : first + ARMS]]
                fresh |= self.measure(f"{step}-race-{number_of_rung}-{chunk}", "race", reductions, loader, base)
            table = joined(table, fresh)
            ranked = order(self.objective, table, names)
            for name, candidate in alive.items():
                candidate.examples = begin
                candidate.gain, candidate.loss = self.objective.estimates(table, name)
            # Right and wrong alone are often the same for models that differ.
            twins = _twins(table, ranked) if self.objective.loss is not None else {}
            for name, twin in twins.items():
                alive[name].status, alive[name].reason = "dropped", f"does the same as {twin}"
            ranked = [name for name in ranked if name not in twins]
            for place, name in enumerate(ranked):
                alive[name].status = "dropped" if place >= rung.keep else "finalist"
                if place >= rung.keep:
                    alive[name].reason = f"place {place + 1} of {len(ranked)} after {begin} examples"
            alive = {name: alive[name] for name in ranked[: rung.keep]}
            table = {arm: values for arm, values in table.items() if arm == ORIGINAL or arm in alive}
            self.progress.show(leaders([*alive.values()], self.objective.keys, self.objective.loss))
            if refine is not None and number_of_rung == max(len(rungs) - 2, 0):
                alive = refine(step, alive, table, seen, rung.keep)
        return table, list(alive.values())

    def affordable(
        self, step: str, ranked: Sequence[Candidate], examples: int, finalists: int, passes: float, near: int
    ) -> tuple[int, float]:
        """How many of the ranked candidates can race and the winner be confirmed, and the passes that takes.

        Args:
            step: its name in the journal. That there is time for none is not kept: a resumed search may have more.
            ranked: in the order in which they would race.
            examples: race examples.
            finalists: candidates that see all of them.
            passes: of one example through the whole model, for which there is time.
            near: candidates that enter ahead of the last rung, about.
        """
        needed = math.inf

        def compute() -> Step:
            nonlocal needed
            for many in range(len(ranked), 0, -1):
                share = sum(self.lab.share(c.plan) for c in ranked[:many]) / many
                needed, alive = 4.0 * self.sets.sizes["confirm"], many  # the original, the plan and its two controls
                needed += near * share * examples / 2
                for rung in schedule(examples, many, finalists):
                    needed += rung.examples * (1 + share * alive)
                    alive = rung.keep
                if needed <= passes:
                    return {"count": many}, {}
            raise _NoTimeError

        try:
            data, _ = self.journal.step(f"{step}-budget", compute)
        except _NoTimeError:
            return 0, needed
        return int(data["count"]), needed

    def accept(
        self,
        number: int,
        finalists: Sequence[Candidate],
        base: Sequence[Reduction],
        positions: Sequence[int],
        table: Table,
    ) -> Candidate | None:
        """The finalist that improves on the base also on fresh examples, Holm-corrected for all finalists; or none.

        Tested is the loss where there is one, since it decides on fewer examples; the gain over all examples must then
        not be negative.
        """
        loader = self.sets.loader("race", positions)
        fresh = self.measure(f"{number}-accept", "accept", [c.reduction for c in finalists], loader, base)
        rows = []
        for candidate in finalists:
            name = str(candidate.reduction)
            change = self.objective.loss_change(fresh, name)
            rows.append(replace(paired(change or self.objective.gain(fresh, name)), metric=name))
        better = -1 if self.objective.loss else 1
        accepted = []
        for row in adjust(rows, None):
            whole = joined({arm: table[arm] for arm in (ORIGINAL, row.metric)}, fresh)
            gain, _ = self.objective.estimates(whole, row.metric)
            significant = row.p_adjusted is not None and row.p_adjusted <= ALPHA and row.delta * better > 0
            if significant and gain.delta >= 0:
                accepted.append(row.metric)
        for candidate in finalists:
            if str(candidate.reduction) not in accepted:
                candidate.status, candidate.reason = (
                    "rejected",
                    f"no better than without it on {len(positions)} fresh examples",
                )
        if not accepted:
            return None
        chosen = choose(self.objective, table, accepted)
        return next(candidate for candidate in finalists if str(candidate.reduction) == chosen)

    def compare(
        self,
        name: str,
        plan: LaserPlan,
        loaders: Sequence[DataLoader[Any]],
        primary: str | None,
        *,
        controls: bool,
        seed: int,
        folder: str | Path | None,
    ) -> LaserResult:
        """The original against ``plan`` with all statistics; each example's outcomes are also kept in ``folder``."""
        live: list[LaserResult] = []

        def compute() -> Step:
            live.append(self.lab.compare(plan, list(loaders), primary=primary, controls=controls, seed=seed))
            return live[0].to_dict(), {}

        examples = sum(map(_length, loaders))
        arms = 2 + 2 * controls
        what = f"{name}: {plan} on {examples} examples"
        data, _ = self.timed(name, name, what, compute, examples * arms, examples * (1 + self.lab.share(plan)))
        result = LaserResult.from_dict(data)
        if live:
            result.examples = live[0].examples
            if folder is not None:
                result.examples.write(Path(folder) / f"{name}.examples.jsonl")
        return result


class _NoTimeError(Exception):
    """There is no time for even one candidate."""


def _twins(table: Table, ranked: Sequence[str]) -> dict[str, str]:
    """Arms with the very values of one that ranks higher: zero queries or zero keys, say, make the same model."""
    first: dict[tuple[bytes, ...], str] = {}
    twins = {}
    for name in ranked:
        values = tuple(v.values.numpy().tobytes() for v in table[name].values())
        if values in first:
            twins[name] = first[values]
        first.setdefault(values, name)
    return twins


def joined(seen: Table, fresh: Table) -> Table:
    """The values of the arms of ``seen``, and then those of ``fresh``; all of ``fresh`` where nothing was seen."""
    if not seen:
        return fresh
    return {
        arm: {key: Values.join([seen[arm][key], fresh[arm][key]]) for key in seen[arm]} for arm in fresh if arm in seen
    }


def _to_step(table: Table) -> Step:
    first = next(iter(table.values()))
    keys = list(first)
    tensors = {f"values/{key}": torch.stack([arm[key].values for arm in table.values()]) for key in keys}
    data = {"arms": list(table), "kinds": {key: first[key].kind for key in keys}}
    return data, tensors | {f"weights/{key}": torch.stack([arm[key].weights for arm in table.values()]) for key in keys}


def _to_table(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Table:
    return {
        arm: {
            k: Values(tensors[f"values/{k}"][i], tensors[f"weights/{k}"][i], kind) for k, kind in data["kinds"].items()
        }
        for i, arm in enumerate(data["arms"])
    }


def _length(loader: DataLoader[Any]) -> int:
    return len(loader.dataset)  # type: ignore[arg-type]  # a map-style dataset has a length
