"""The steps of a search: screen, propose, race, refine, accept, compare.

Each is kept in the journal and counted in its phase.

:class:`Steps` holds what they share; the order in which they run, and what follows from them, is ``course.py``'s.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Subset

from laser_callback.compare.controls import control_plans
from laser_callback.compare.measure import Lab, Table
from laser_callback.data.scoring import OF_TEXT
from laser_callback.data.sets import ExampleSets
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.short import brief
from laser_callback.plans.target import Target
from laser_callback.reports.search_terminal import leaders
from laser_callback.results.candidates import Candidate
from laser_callback.results.comparison import LaserResult
from laser_callback.results.examples import ORIGINAL
from laser_callback.results.search import Phase
from laser_callback.search.moments import input_directions_of
from laser_callback.search.proposals import checked
from laser_callback.search.race import Objective, Rung, choose, improved, order
from laser_callback.search.screen import LossFn, sense
from laser_callback.search.sensitivities import Sensitivities, Views
from laser_callback.search.strategies.base import ENOUGH_BATCHES, Context, Strategy
from laser_callback.search.tables import joined, to_step, to_table, twins_of
from laser_callback.spectra.directions import InputDirections
from laser_callback.support.journal import Journal, Step
from laser_callback.support.progress import PhaseProgress
from laser_callback.support.reading import Seconds, typed

FLUENCY_WINDOWS = 12
"""At most so many windows of text rank the finalists' fluency; the guard set has others, and more."""

ARMS = 64
"""So many candidates run in one evaluation loop, and are one step of the journal."""

Refine = Callable[[str, dict[str, Candidate], Table, Sequence[Sequence[int]], int], dict[str, Candidate]]
"""From a step's name, the candidates in a race, their values (which it adds to), the examples that they have seen in
each rung, and how many may go on, to those that do, the best first."""


@dataclass(frozen=True)
class _Timed:
    """A step, with what it took."""

    data: Any
    seconds: Seconds
    passes: int
    whole_passes: float


@dataclass
class Steps:
    """What the steps of one search share.

    Attributes:
        keys: metrics that candidates are measured by: those of the objective, and of constraints on the same examples.
        seed: of the random controls.
        folder: where each example's outcomes are kept, if anywhere.
        base: the plan in place, which candidates are added to.
        by_loss: whether a race goes by the loss alone, and the objective is measured in its last rung only.
        phases: time and passes so far.
    """

    lab: Lab
    sets: ExampleSets
    journal: Journal
    progress: PhaseProgress
    objective: Objective
    keys: tuple[str, ...]
    seed: int = 0
    folder: str | Path | None = None
    base: LaserPlan | None = None
    by_loss: bool = False
    phases: dict[str, Phase] = field(default_factory=dict)

    def timed(
        self,
        name: str,
        phase: str,
        description: str,
        compute: Callable[[], Step],
        passes: int,
        whole: float,
        make: Callable[[Any], Any],
    ) -> tuple[Any, dict[str, Tensor]]:
        """A journal step that counts its time, and its passes, in ``phase``; ``make`` as for :meth:`Journal.step`."""

        def run() -> Step:
            begin = time.perf_counter()
            with self.progress.phase(description, total=whole):
                data, tensors = compute()
            seconds = time.perf_counter() - begin
            return {"data": data, "seconds": seconds, "passes": passes, "whole_passes": whole}, tensors

        def read(data: Any) -> _Timed:
            found = typed(_Timed, data)
            return replace(found, data=make(found.data))

        found, tensors = self.journal.step(name, run, read)
        total = self.phases.setdefault(phase, Phase(phase))
        total.seconds += found.seconds
        total.passes += found.passes
        total.whole_passes += found.whole_passes
        return found.data, tensors

    def screen(self, number: int, wanted: Views, loss: LossFn | None) -> Sensitivities:
        """One backward pass over the screen set; ``loss`` as for :class:`~laser_callback.search.GradientScreen`."""
        loader = self.sets.loader("screen", batches=ENOUGH_BATCHES)

        def compute() -> Step:
            with self.lab.base(self.base):
                return sense(self.lab, wanted, loader, loss=loss, key=self.objective.loss or "loss").to_step()

        examples, matrices = self.sets.sizes["screen"], {m.name for of_view in wanted.values() for m in of_view}
        what = f"screen: {len(matrices)} matrices, one backward pass on {examples} examples"
        make = partial(typed, dict[str, Any])
        kept = self.timed(f"{number}-screen", "screen", what, compute, examples, 3.0 * examples, make)
        return Sensitivities.from_step(*kept)

    def see_inputs(self, targets: Sequence[Target]) -> None:
        """Let the spectra know the directions of the targets in the metric of their inputs on the screen set.

        They are as large as the model, and not kept in the journal: a search that goes on makes them again.
        """
        begin, loader = time.perf_counter(), self.sets.loader("screen")
        with (
            self.progress.phase(f"inputs: {len(targets)} targets", total=float(_length(loader))),
            self.lab.base(self.base),
        ):
            found = input_directions_of(self.lab, targets, loader)
        known = self.lab.spectra.directions
        self.lab.spectra = self.lab.spectra.bringing(
            found.joined(known) if isinstance(known, InputDirections) else found
        )
        phase = self.phases.setdefault("inputs", Phase("inputs"))
        phase.seconds += time.perf_counter() - begin
        phase.passes += _length(loader)
        phase.whole_passes += _length(loader)

    def propose(self, number: int, context: Context, strategies: Sequence[Strategy]) -> list[Candidate]:
        """What the strategies propose."""

        def compute() -> Step:
            with self.lab.base(self.base):
                return {
                    s.name: [c.to_dict() for c, _ in checked(s, s.propose(context), context)] for s in strategies
                }, {}

        what = f"propose: {', '.join(strategy.name for strategy in strategies)}"
        make = partial(typed, dict[str, list[Candidate]])
        phase = "screen" if context.sensitivities.views else "propose"
        found, _ = self.timed(f"{number}-propose", phase, what, compute, 0, 0.0, make)
        return [candidate for of_strategy in found.values() for candidate in of_strategy]

    def measure(self, name: str, phase: str, plans: Iterable[LaserPlan], loader: DataLoader[Any]) -> Table:
        """Values of all keys for the base and for each plan added to it."""
        by_text = {str(plan): plan for plan in plans}
        what = f"{phase}: {len(by_text)} candidate{'s' * (len(by_text) != 1)} on {_length(loader)} examples"
        return self._measure(name, phase, what, by_text, loader, self.keys, self.base)

    def fluency(self, step: str, plans: Sequence[LaserPlan], loader: DataLoader[Any]) -> Table:
        """What the original and each whole plan, by its text, have on a few windows of running text."""
        windows = _length(loader)
        few = Subset(loader.dataset, range(0, windows, math.ceil(windows / FLUENCY_WINDOWS)))
        loader = DataLoader(few, loader.batch_size, collate_fn=loader.collate_fn)
        what = f"fluency: {len(plans)} finalists on {len(few)} windows of text"
        by_text = {str(plan): plan for plan in plans}
        return self._measure(f"{step}-fluency", "fluency", what, by_text, loader, OF_TEXT, None)

    def _measure(
        self,
        name: str,
        phase: str,
        what: str,
        plans: Mapping[str, LaserPlan],
        loader: DataLoader[Any],
        keys: Sequence[str],
        base: LaserPlan | None,
    ) -> Table:
        examples = _length(loader)
        whole = examples * (1 + sum(map(self.lab.share, plans.values())))
        per_batch = examples / max(len(loader), 1)
        self.lab.on_arm = lambda share: self.progress.advance(share * per_batch)

        def compute() -> Step:
            data, tensors = to_step(self.lab.measure(plans, loader, keys, base))
            return {**data, "failed": {plan: why for plan, why in self.lab.failed.items() if plan in plans}}, tensors

        make = partial(typed, dict[str, Any])
        data, tensors = self.timed(name, phase, what, compute, examples * (1 + len(plans)), whole, make)
        self.lab.failed |= typed(dict[str, str], data.get("failed", {}))
        return to_table(data, tensors)

    def race(
        self,
        step: str,
        candidates: Sequence[Candidate],
        positions: Sequence[int],
        rungs: Sequence[Rung],
        refine: Refine | None = None,
    ) -> tuple[Table, list[Candidate]]:
        """Successive halving. Writes into the candidates how far each came.

        Args:
            step: its name in the journal.
            candidates: at the start.
            positions: race examples, in the order in which they are used.
            rungs: how many examples, and how many go on.
            refine: what lets others in ahead of the last rung.

        Returns:
            The finalists' values, and the finalists.
        """
        alive = {str(candidate.plan): candidate for candidate in candidates}
        table: Table = {}
        seen: list[Sequence[int]] = []
        begin = 0
        for number_of_rung, rung in enumerate(rungs):
            seen.append(positions[begin : begin + rung.examples])
            by_loss = self.by_loss and number_of_rung < len(rungs) - 1
            objective = self.objective.by_loss if by_loss else self.objective
            loader = self.sets.loader("race", seen[-1], writes=not by_loss)
            begin += rung.examples
            fresh: Table = {}
            names = list(alive)
            for chunk, first in enumerate(range(0, len(names), ARMS)):
                plans = [alive[name].plan for name in names[first : first + ARMS]]
                fresh |= self.measure(f"{step}-race-{number_of_rung}-{chunk}", "race", plans, loader)
            table = joined(table, fresh)
            ranked = order(objective, table, names)
            found = {name: objective.estimates(table, name) for name in alive}
            for name, candidate in alive.items():
                candidate.examples = begin
                candidate.gain, candidate.loss = None if by_loss else found[name][0], found[name][1]
            # Right and wrong alone are often the same for models that differ.
            twins = twins_of(table, ranked) if self.objective.loss is not None else {}
            for name, twin in twins.items():
                alive[name].status, alive[name].reason = "dropped out", f"does the same as {brief(twin)}"
            ranked = [name for name in ranked if name not in twins]
            for name in [name for name in ranked if math.isnan(found[name][0].delta)]:
                ranked.remove(name)
                why = self.lab.failed.get(name, "it gives values that are not finite, where the original's are")
                alive[name].status, alive[name].reason = "dropped out", why
            for place, name in enumerate(ranked):
                alive[name].status = "dropped out" if place >= rung.keep else "finalist"
                if place >= rung.keep:
                    alive[name].reason = f"place {place + 1} of {len(ranked)} after {begin} examples"
            alive = {name: alive[name] for name in ranked[: rung.keep]}
            table = {arm: values for arm, values in table.items() if arm == ORIGINAL or arm in alive}
            self.progress.show(leaders([*alive.values()], self.objective.keys, self.objective.loss))
            if not alive:
                break
            if refine is not None and number_of_rung == max(len(rungs) - 2, 0):
                alive = refine(step, alive, table, seen, rung.keep)
        return table, list(alive.values())

    def accept(
        self, number: int, finalists: Sequence[Candidate], positions: Sequence[int], table: Table
    ) -> Candidate | None:
        """The best of the finalists that improve on the base also on fresh examples (:func:`improved`); or none."""
        loader = self.sets.loader("race", positions)
        fresh = self.measure(f"{number}-accept", "accept", [c.plan for c in finalists], loader)
        by_text = {str(candidate.plan): candidate for candidate in finalists}
        accepted = improved(self.objective, table, fresh, list(by_text))
        for text, candidate in by_text.items():
            if text not in accepted:
                candidate.status = "rejected"
                candidate.reason = f"no better than without it on {len(positions)} fresh examples"
        return by_text[choose(self.objective, table, accepted)] if accepted else None

    def compare(
        self, name: str, plan: LaserPlan, loaders: Sequence[DataLoader[Any]], primary: str | None, controls: bool
    ) -> LaserResult:
        """The original against ``plan`` with all statistics; each example's outcomes are also kept in the folder."""
        live: list[LaserResult] = []

        def compute() -> Step:
            live.append(self.lab.compare(plan, list(loaders), primary=primary, controls=controls, seed=self.seed))
            if self.folder is not None:  # ahead of the step, which is finished only with them
                live[0].examples.write(Path(self.folder) / f"{name}.examples.jsonl")
            return live[0].to_dict(), {}

        examples, arms = sum(map(_length, loaders)), [plan]
        if controls:
            arms += control_plans(self.lab.module, plan, self.seed, self.lab.spectra.base).values()
        what = f"{name}: {brief(plan)} on {examples} examples"
        whole = examples * (1 + sum(map(self.lab.share, arms)))
        result, _ = self.timed(name, name, what, compute, examples * (1 + len(arms)), whole, LaserResult.from_dict)
        if live:
            result.examples = live[0].examples
        return result


def _length(loader: DataLoader[Any]) -> int:
    return len(loader.dataset)  # type: ignore[arg-type]  # a map-style dataset has a length
