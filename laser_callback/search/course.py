"""The course of one search up to the plan that is confirmed: screen, propose, race, compose.

Contract: it chooses, on screen and race examples, and claims nothing. What every step found is in the result as soon
as it is known, for an interruption to leave it there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from laser_callback.compare.measure import Table
from laser_callback.data.scoring import FLUENCY, OF_TEXT
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.short import brief
from laser_callback.results.candidates import Candidate
from laser_callback.results.search import SearchResult, Trade, mark_efficient
from laser_callback.search.budget import Budget, OutOfTimeError
from laser_callback.search.proposals import Proposals, views_for
from laser_callback.search.race import Rung, choose, schedule
from laser_callback.search.refine import NEAR, Refinement
from laser_callback.search.screen import LossFn
from laser_callback.search.steps import Steps
from laser_callback.search.strategies.base import Context, Strategy
from laser_callback.search.tables import from_original, keeps, row_of, rows_of
from laser_callback.stats.constraint import Constraint

FINALISTS = 6
FRESH_SHARE = 0.2
"""Share of the race examples that each further reduction is accepted on."""
FEW = 4
"""So many examples, about, show what a layer does: see :attr:`Context.run`."""
ROUNDS = 3
"""So often the screen's next candidates race, while every finalist breaks a constraint."""


@dataclass
class Course:
    """One search that runs.

    Attributes:
        steps: what it does, and on what.
        result: what it has found so far.
        bounds: constraints, which finalists must keep as far as the race can tell.
        budget: the time that there is.
        strategies: what proposes the candidates.
        screened: only the first of them race, by score where there is one; else all of them do, on all examples.
        paper: choose as the paper's code does, among the grid's candidates only.
        screen_loss, within, rhos, candidates, max_reductions: as of :class:`LaserSearch`.
    """

    steps: Steps
    result: SearchResult
    bounds: Sequence[Constraint]
    budget: Budget
    strategies: Sequence[Strategy]
    screened: bool
    paper: bool
    screen_loss: LossFn | None
    within: str
    rhos: Sequence[float]
    candidates: int
    max_reductions: int
    # Of what is in place, each part as estimated when it was added.
    _base_gain: float = field(default=0.0, init=False)
    _base_changes: dict[str, float] = field(default_factory=dict, init=False)

    def run(self) -> None:
        """Leave the plan to confirm in the result, or the reason why there is none."""
        race, *fresh = self._race_parts()
        for number in range(1, self.max_reductions + 1):
            table, finalists = self._one_step(number, race)
            if not finalists:
                break
            if number == 1:
                self._check_positive(table)
                better = [candidate for candidate in finalists if candidate.helps]
                if not better:
                    self.result.reason = "no candidate was better than the original in the race"
                    break
                winner = self._choose(table, better)
            else:
                accepted = self.steps.accept(number, finalists, fresh[number - 2], table)
                if accepted is None:
                    break
                winner = accepted
            self._put_in_place(winner, table)
        mark_efficient(self.result.trades)
        for trade in self.result.trades:
            trade.chosen = self.result.found is not None and trade.plan == str(self.result.found)

    def race_positions(self) -> list[int]:
        """Positions of the race examples that the first reduction is chosen by."""
        return self._race_parts()[0]

    def _race_parts(self) -> list[list[int]]:
        """Positions to race on, and fresh ones for each further reduction."""
        sets = self.steps.sets
        if self.paper:
            return [list(range(sets.sizes["race"]))]
        fresh = [FRESH_SHARE] * (self.max_reductions - 1)
        if sum(fresh) > 0.6:
            fresh = [0.6 / len(fresh)] * len(fresh)
        return sets.deal("race", [1.0 - sum(fresh), *fresh])  # shares, not numbers

    def _one_step(self, number: int, positions: list[int]) -> tuple[Table, list[Candidate]]:
        """Screen, race and refine with the base in place: the finalists and their values."""
        proposals = self._proposals(number)
        if proposals is None:
            return {}, []
        refine = None if self.paper else Refinement(self.steps, proposals)
        table: Table = {}
        finalists: list[Candidate] = []
        places = 0
        for round_ in range(ROUNDS if self.screened else 1):
            step = f"{number}" if round_ == 0 else f"{number}.{round_ + 1}"
            # What a round before raced, near its leaders too, is out.
            racers = [candidate for candidate in proposals.ranked if not candidate.examples]
            if self.screened and racers:
                racers = self._affordable(step, racers[: self.candidates], len(positions))
            if not racers:
                if number == 1 and not proposals.ranked:
                    self.result.reason = self._why_none()
                break
            if round_ > 0:
                self.steps.progress.say(
                    f"race again: {self.result.reason}, so that the next candidates have their turn"
                )
            places += len(racers)
            all_on_all = [Rung(len(positions), FINALISTS)]
            rungs = schedule(len(positions), len(racers), FINALISTS) if self.screened else all_on_all
            if self.steps.by_loss and len(rungs) == 1:  # the objective is for the finalists
                half = len(positions) // 2
                rungs = [Rung(len(positions) - half, FINALISTS), Rung(half, FINALISTS)]
            table, finalists = self.steps.race(step, racers, positions, rungs, refine)
            finalists = self._fluent(step, finalists, table)
            if finalists:
                break
        proposals.say_who_was_first(places)
        return table, finalists

    def _why_none(self) -> str:
        names = ", ".join(strategy.name for strategy in self.strategies)
        blind = not self.screened and any("gradient" in strategy.needs for strategy in self.strategies)
        why = "; without the screen of `method` 'screened' there is no gradient to choose by" if blind else ""
        return f"nothing that {names} would propose can race: there is no candidate, or none that alters the model{why}"

    def context(self) -> Context:
        """What strategies are told, ahead of all that is measured for them."""
        steps, lab = self.steps, self.steps.lab
        has_screen = "screen" in steps.sets.sizes
        few = steps.sets.loader("screen", batches=max(steps.sets.sizes["screen"] // FEW, 1)) if has_screen else None
        return Context(
            lab.module,
            lab.matrices,
            lab.targets(self.within, steps.base),
            self.rhos,
            "" if steps.base is None else str(steps.base),
            steps.seed,
            lab.spectra,
            partial(lab.validate, few, limit_batches=1) if has_screen else None,
        )

    def _proposals(self, number: int) -> Proposals | None:
        """The candidates of a step, which are then in the result; ``None`` where nothing is left to cut."""
        steps, lab = self.steps, self.steps.lab
        context = self.context()
        if not context.targets:
            return None
        if any("activations" in strategy.needs for strategy in self.strategies):
            steps.see_inputs(context.targets)
            context = replace(context, spectra=lab.spectra)
        wanted = views_for(self.strategies, context) if self.screened else {}
        if wanted:
            found = steps.screen(number, wanted, self.screen_loss)
            context = replace(context, sensitivities=found)
            if in_part := sum(map(len, found.heads.values())):
                note = f"screened by their leading directions alone, which are approximate: {in_part:,} wide matrices"
                self.result.warnings.append(note)
        candidates = steps.propose(number, context, self.strategies)
        self.result.candidates += candidates
        listed = self.result.candidates
        return Proposals(candidates, self.strategies, context, lab, steps.base, listed, in_order=not self.screened)

    def _affordable(self, step: str, ranked: list[Candidate], examples: int) -> list[Candidate]:
        """Those of the ranked candidates for which there is time."""
        try:
            count = self.budget.affordable(self.steps, step, ranked, examples, FINALISTS, NEAR)
        except OutOfTimeError:
            if step == "1":
                raise
            count = 0
        if count < len(ranked):
            note = f"only {count} of {len(ranked)} candidates raced, to keep within the time given"
            self.result.warnings.append(note)
        return ranked[:count]

    def _fluent(self, step: str, finalists: list[Candidate], table: Table) -> list[Candidate]:
        """The finalists that keep the constraints as far as the race can tell; all enter the trade-off table."""
        text, fluency = self.steps.sets.text("race"), None
        if text is not None and finalists:
            fluency = self.steps.fluency(step, [c.whole for c in finalists], text)
        kept = []
        for candidate in finalists:
            arm, plan = str(candidate.plan), str(candidate.whole)
            rows = {
                key: from_original(row, self._base_changes.get(key, 0.0))
                for key, row in rows_of(self.steps.keys, table, arm).items()
            }
            if fluency is not None:
                rows |= {key: row_of(key, fluency, plan) for key in OF_TEXT}
            broken = [str(bound) for bound in self.bounds if bound.key in rows and not keeps(bound, rows[bound.key])]
            if broken:
                candidate.status, candidate.reason = "rejected", f"breaks {', '.join(broken)} on the race examples"
            else:
                kept.append(candidate)
            gain = self._base_gain + (candidate.gain.delta if candidate.gain else math.nan)
            of_text = [rows[key].delta if key in rows else None for key in (FLUENCY, "kl")]
            self.result.trades.append(Trade(plan, gain, of_text[0], kl=of_text[1]))
        if finalists and not kept:
            self.result.reason = "every finalist breaks a constraint in the race"
        return kept

    def _choose(self, table: Table, finalists: Sequence[Candidate]) -> Candidate:
        if self.paper:
            return max(finalists, key=lambda c: (c.gain.delta if c.gain else 0.0, -(c.loss.delta if c.loss else 0.0)))
        by_name = {str(candidate.plan): candidate for candidate in finalists}
        return by_name[choose(self.steps.objective, table, list(by_name))]

    def _put_in_place(self, winner: Candidate, table: Table) -> None:
        """From here on candidates are added to the winner."""
        winner.status, winner.reason = "chosen", ""
        self._base_gain += winner.gain.delta if winner.gain else 0.0
        for key, row in rows_of(self.steps.keys, table, str(winner.plan)).items():
            self._base_changes[key] = from_original(row, self._base_changes.get(key, 0.0)).delta
        self.result.found = self.steps.base = LaserPlan([*(self.steps.base or ()), *winner.plan])
        self.result.reason = f"{brief(self.result.found)} was the best in the race; it is not confirmed"

    def _check_positive(self, table: Table) -> None:
        """Say so where nothing is ever right, since then only the loss has chosen."""
        objective = self.steps.objective
        key = objective.keys[0]
        values = [arm[key].values for arm in table.values()]
        if objective.signs[0] > 0 and not any(bool((value > 0).any()) for value in values):
            note = f"{key} is 0 on all race examples for the original and every finalist: "
            alone = f"only {objective.loss} told them apart; " if objective.loss else ""
            self.result.warnings.append(f"{note}{alone}give easier examples, or another objective")
