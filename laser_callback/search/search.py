"""The search: which cut helps this model on this task, in minutes, with sound statistics.

Four steps on disjoint examples. *Screen*: one backward pass scores every (matrix, rho). *Race*: the best few dozen run
on more and more examples while the worse half drops out. *Compose*: the same again with the winner in place, accepted
only on fresh examples. *Confirm*: the plan against the original, once, on examples that nothing before has seen; only
this is a result. A plan is recommended if the confirmed gain is significant, is more than a shift of what is said most,
and every constraint holds on the guard set; else the original is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from laser_callback.compare.controls import random_plan
from laser_callback.compare.measure import Lab, Table
from laser_callback.compare.module import LaserModule
from laser_callback.data.facts import DEFAULT_SIZES
from laser_callback.data.sets import ExampleSets
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.reduction import Reduction
from laser_callback.plans.targets import RHOS, Target, targets
from laser_callback.results.candidates import Candidate
from laser_callback.results.search import SearchResult, Trade, mark_efficient
from laser_callback.search.candidates import DELTA_RHOS, REFERENCE_RHOS, grid, shortlist
from laser_callback.search.data_free import SCREENS
from laser_callback.search.race import Rung, choose, schedule
from laser_callback.search.refine import NEAR, Refinement
from laser_callback.search.screen import LossFn
from laser_callback.search.setup import (
    FLUENCY,
    constraints_of,
    fingerprints,
    from_original,
    keeps,
    objective_of,
    plain,
    power_warnings,
    probe_positions,
    row_of,
    rows_of,
)
from laser_callback.search.steps import Screen, Steps
from laser_callback.search.verdict import decide
from laser_callback.spectra.delta import BaseWeights, Source
from laser_callback.spectra.store import Spectra
from laser_callback.stats.constraints import Constraint, judge_all
from laser_callback.support.journal import Journal
from laser_callback.support.progress import PhaseProgress
from laser_callback.support.provenance import versions

_NOT_SETTINGS = ("module", "data", "base", "folder", "resume", "spectra", "progress", "minutes")
FINALISTS = 6
FRESH_SHARE = 0.2
"""Share of the race examples that each further reduction is accepted on."""
ROUNDS = 3
"""So often the screen's next candidates race, while every finalist breaks a constraint."""
PROBE = 32
"""Race examples that the arguments are tried on."""


class OutOfTimeError(ValueError):
    """``minutes`` do not suffice to race one candidate and confirm it."""


@dataclass
class LaserSearch:
    """Search a module for the cuts that improve an objective.

    Args:
        module: a :class:`LaserModule` (without a plan), or any LightningModule with a ``validation_step``.
        data: a :class:`FactsDataModule`, a LightningDataModule or DataLoader over a map-style dataset, which are split
            into the four sets; the sets as ``{"screen": loader, "race": ..., "confirm": ..., "guard": ...}``; or
            :class:`~laser_callback.data.ExampleSets`, where examples have groups or subjects.
        objective: one or more keys that ``validation_step`` logs. The mean of their changes is improved, and the first
            carries the claim. For a LaserModule by default ``first_token_accuracy``, and ``paraphrase_robustness``
            where facts have paraphrases.
        direction: ``"max"`` or ``"min"``, for all keys or by key; needed where what is logged does not say it (a
            torchmetrics object does).
        loss: a logged key, lower is better, that helps to tell candidates apart, and is what the screen differentiates.
            For a LaserModule ``soft_error`` where only first tokens are the objective (``log_loss`` then breaks ties);
            otherwise, and in the paper's procedure, ``log_loss``.
        constraints: how much worse a key may become on the guard set, as text: ``"perplexity <= +2 %"``,
            ``"log_loss <= +0.05"``. By default ``perplexity <= +5 %`` where there is text, and
            ``paraphrase_robustness >= -0.02`` where that is an objective.
        base: what the module was fine-tuned from, as :class:`~laser_callback.spectra.BaseWeights` takes it: then only
            the difference is cut (delta mode).
        within: where to look, as plan text without rho: ``"*.all"``, ``"20-29.mlp, *.q_proj"``.
        rhos: the grid.
        screen: ``"gradient"``; one that looks at no data, ``"gavish-donoho"``, ``"entropy"``, ``"laser-rmt-snr"``,
            ``"late-mlp"``, ``"random"``; or a function ``(targets, rhos, loader) -> {reduction: score}``, lower is
            better.
        screen_loss: ``f(module, batch)``, the loss of the gradient screen, where the step does not return it.
        candidates: how many of the screen's best race.
        max_reductions: stop composing at so many.
        sizes: of the sets, as shares or numbers; by default a tenth, three, four and two tenths of the examples.
        min_gain, power: warn before the work if a gain of ``min_gain`` would be confirmed with less than this
            probability.
        method: ``"exhaustive"`` runs all candidates on all race examples instead of screening.
        spectrum: ``"reference"`` cuts as the paper's code does (``torch.svd_lowrank``) and, with the exhaustive method,
            selects as it does: the first fifth of the examples, highest accuracy, then lowest log loss.
        controls: confirm beside the plan its matrices zeroed and random matrices cut at the same rho.
        minutes: race only as many candidates as fit into so much time.
        folder: keep each finished step here; with ``resume`` go on from them.
        spectra: the store of factorisations; by default on this machine's disk.
        accelerator, precision, devices: as in ``Trainer``, but "auto" takes CUDA or the CPU. It runs on one device.
        progress: show progress on standard error.
        seed: of the sets, the order of examples and the random control.

    Attributes:
        result: the outcome; after an interruption what there was by then.

    Raises:
        MisconfigurationException, ValueError: at once, or in :meth:`run` before the work, naming the argument.

    Example::

        module = LaserModule("HuggingFaceTB/SmolLM2-135M-Instruct")
        found = LaserSearch(module, FactsDataModule("facts.jsonl", module.tokenizer, text="text.txt")).run()
        found.plan, found.verdict
    """

    module: pl.LightningModule
    data: Any
    _: KW_ONLY
    objective: str | Sequence[str] | None = None
    direction: str | Mapping[str, str] | None = None
    loss: str | None = None
    constraints: Sequence[str] | None = None
    base: Source | None = None
    within: str = "*.all"
    rhos: Sequence[float] = RHOS
    screen: str | Screen = "gradient"
    screen_loss: LossFn | None = None
    candidates: int = 40
    max_reductions: int = 1
    sizes: Mapping[str, int | float] | None = None
    min_gain: float = 0.05
    power: float = 0.8
    method: Literal["screened", "exhaustive"] = "screened"
    spectrum: Literal["exact", "reference"] = "exact"
    controls: bool = True
    minutes: float | None = None
    folder: str | Path | None = None
    resume: bool = False
    spectra: Spectra | None = None
    accelerator: str = "auto"
    precision: Any = None
    devices: int | list[int] = 1
    progress: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        self.result = SearchResult(None, None, "the search has not run", (), [])
        if isinstance(self.module, LaserModule) and self.module.plan is not None:
            raise MisconfigurationException("`module` must have no plan of its own: the search finds one")
        for name in ("candidates", "max_reductions"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        for name, choices in (("method", ("screened", "exhaustive")), ("spectrum", ("exact", "reference"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if not callable(self.screen) and self.screen not in ("gradient", *SCREENS):
            known = ", ".join(("gradient", *SCREENS))
            raise ValueError(f"`screen` must be one of {known}, or a function, got {self.screen!r}")
        if not self.rhos or not all(0 <= rho <= 1 for rho in self.rhos):
            raise ValueError(f"`rhos` must be numbers in [0, 1], at least one, got {self.rhos!r}")
        if self.spectrum == "reference" and self.max_reductions > 1:
            raise ValueError(f"the paper's procedure finds one cut: got `max_reductions` {self.max_reductions}")
        if self.spectrum == "reference" and self.rhos is RHOS:
            self.rhos = REFERENCE_RHOS
        if self.base is not None:
            if self.spectrum == "reference" or self.spectra is not None:
                raise ValueError(
                    "`base` goes with spectrum='exact', and without `spectra`, which have their own `base`"
                )
            self.rhos = DELTA_RHOS if self.rhos is RHOS else self.rhos
        if self.folder is None and self.resume:
            raise ValueError("`resume` needs the `folder` of the search to go on with")
        for text in self.constraints or ():
            Constraint.parse(text)

    # ---- the run ----------------------------------------------------------------------------------------------------

    def run(self) -> SearchResult:
        """Search. The module is left as it was, bit by bit, whatever happens.

        Raises:
            MisconfigurationException: if a key is not logged or not a mean over examples, or a constraint has no data.
            ValueError: if there are too few examples, a value is not finite, or ``minutes`` is too short.
            KeyboardInterrupt: on Ctrl-C; :attr:`result`, and ``result.json`` in the folder, hold what there was.
        """
        self._start = time.perf_counter()
        try:
            steps = self._prepare()
        except SystemExit:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from None
        try:
            self._search(steps)
            self._confirm(steps)
        except (KeyboardInterrupt, SystemExit):  # Lightning turns the first into the second
            self.result.reason = f"interrupted; {self.result.reason}"
            self._finish(steps)
            raise KeyboardInterrupt from None
        return self._finish(steps)

    def _prepare(self) -> Steps:
        """Everything that can be wrong is found here, before the work."""
        reference = self.spectrum == "reference"
        if isinstance(self.data, ExampleSets):
            sets = self.data
        elif reference and self.method == "exhaustive":
            sets = ExampleSets.reference(self.data)
        else:
            sets = ExampleSets.of(self.data, sizes=self.sizes or DEFAULT_SIZES, seed=self.seed)
        spectra = self.spectra or (Spectra(method="reference") if reference else Spectra.default())
        if self.base is not None:
            spectra = Spectra.default(BaseWeights(self.base, self.module))
        lab = Lab(self.module, spectra, self.accelerator, self.precision, self.devices)
        if not (possible := self._targets(lab)):
            raise ValueError(f"`base` and the module do not differ in any matrix of `within` {self.within!r}")
        # One small batch, and one candidate, show what is logged and whether it can be compared.
        probe = {"probe": LaserPlan([possible[0].at(self.rhos[0])])}
        positions = probe_positions(self.module, sets, PROBE)
        few, loader = len(positions), sets.loader("race", positions)
        lab.measure(probe, loader, ())
        papers = self.spectrum == "reference" and isinstance(self.module, LaserModule)
        loss = self.loss or ("log_loss" if papers else None)
        objective = objective_of(self.module, self.objective, self.direction, loss, lab.logged)
        self._bounds = constraints_of(self.constraints, sets, objective, lab.logged)
        keys = tuple(dict.fromkeys([*objective.measured, *(b.key for b in self._bounds if b.key in lab.logged)]))
        begin = time.perf_counter()
        lab.measure(probe, loader, keys)
        self._pass_seconds = (time.perf_counter() - begin) / few / (1 + lab.share(probe["probe"]))
        self._objective = objective

        found = SearchResult(None, None, "no candidate has run yet", objective.keys, [], sets=dict(sets.sizes))
        found.warnings += [*sets.notes, *power_warnings(sets, self.min_gain, self.power)]
        if sets.text("guard") is None and isinstance(self.module, LaserModule):
            found.warnings.append("fluency is not checked: give the data `text=`, a file of running text")
        for warning in found.warnings:
            rank_zero_warn(warning)
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_SETTINGS}
        found.settings = {name: plain(value) for name, value in own.items()} | {"versions": versions()}
        found.settings |= {"objective": list(objective.keys), "loss": objective.loss, "sizes": dict(sets.sizes)}
        if self.folder is not None:
            found.settings["fingerprints"] = fingerprints(self.module, sets)
        if spectra.base is not None:
            found.base = found.settings["base"] = spectra.base.digest
        self.result = found
        journal = Journal(self.folder, found.settings, self.resume)
        return Steps(lab, sets, journal, PhaseProgress(self.progress), objective, keys)

    def _search(self, steps: Steps) -> None:
        """Screen, race and compose; leaves the plan to confirm in the result."""
        race, *fresh = self._race_parts(steps.sets)
        base: list[Reduction] = []
        # Of the reductions in place, each as estimated when it was added.
        self._base_gain, self._base_changes = 0.0, dict[str, float]()
        for number in range(1, self.max_reductions + 1):
            table, finalists = self._one_step(steps, number, base, race)
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
                accepted = steps.accept(number, finalists, base, fresh[number - 2], table)
                if accepted is None:
                    break
                winner = accepted
            winner.status, winner.reason = "chosen", ""
            self._base_gain += winner.gain.delta if winner.gain else 0.0
            for key, row in rows_of(steps.keys, table, str(winner.reduction)).items():
                self._base_changes[key] = self._base_changes.get(key, 0.0) + row.delta
            base = [*base, winner.reduction]
            self.result.found = LaserPlan(base)
            self.result.reason = f"{self.result.found} was the best in the race; it is not confirmed"
        mark_efficient(self.result.trades)
        for trade in self.result.trades:
            trade.chosen = self.result.found is not None and trade.plan == str(self.result.found)

    def _one_step(
        self, steps: Steps, number: int, base: list[Reduction], positions: list[int]
    ) -> tuple[Table, list[Candidate]]:
        """Screen, race and refine with ``base`` in place: the finalists and their values."""
        found = self._targets(steps.lab, base)
        if not found:
            return {}, []
        candidates = grid(found, self.rhos, base=", ".join(map(str, base)))
        self.result.candidates += candidates
        if self.method == "screened":
            scores = steps.screen(number, found, self.rhos, base, self._screen(steps))
            for candidate in candidates:
                candidate.score, candidate.error = scores.get(str(candidate.reduction), (None, 0.0))
            scored = [c for c in candidates if c.score is not None and not math.isnan(c.score)]
            ranked, rounds = shortlist(filter(steps.lab.alters, scored)), ROUNDS
        else:
            ranked, rounds = list(filter(steps.lab.alters, candidates)), 1
        refine = None
        if self.spectrum == "exact":
            refine = Refinement(steps, found, candidates, self.result.candidates, self.rhos, base)
        table: Table = {}
        finalists: list[Candidate] = []
        for round_ in range(rounds):
            step = f"{number}" if round_ == 0 else f"{number}.{round_ + 1}"
            racers = [c for c in ranked if not c.examples]  # what a round before raced, near its leaders too, is out
            if self.method == "screened":
                racers = self._affordable(steps, step, racers[: self.candidates], len(positions))
            if not racers:
                break
            rungs = [Rung(len(positions), FINALISTS)]
            if self.method == "screened":
                rungs = schedule(len(positions), len(racers), FINALISTS)
            table, finalists = steps.race(step, racers, base, positions, rungs, refine)
            finalists = self._fluent(steps, step, finalists, table)
            if finalists:
                break
        return table, finalists

    def _choose(self, table: Table, finalists: Sequence[Candidate]) -> Candidate:
        if self.spectrum == "reference":  # the original's rule
            return max(finalists, key=lambda c: (c.gain.delta if c.gain else 0.0, -(c.loss.delta if c.loss else 0.0)))
        by_name = {str(candidate.reduction): candidate for candidate in finalists}
        return by_name[choose(self._objective, table, list(by_name))]

    def _fluent(self, steps: Steps, step: str, finalists: list[Candidate], table: Table) -> list[Candidate]:
        """The finalists that keep the constraints as far as the race can tell; all enter the trade-off table."""
        text = steps.sets.text("race")
        fluency = steps.fluency(step, [c.plan for c in finalists], text) if text is not None and finalists else None
        kept = []
        for candidate in finalists:
            arm, plan = str(candidate.reduction), str(candidate.plan)
            rows = {
                key: from_original(row, self._base_changes.get(key, 0.0))
                for key, row in rows_of(steps.keys, table, arm).items()
            }
            if fluency is not None:
                rows[FLUENCY] = row_of(FLUENCY, fluency, plan)
            broken = [str(bound) for bound in self._bounds if bound.key in rows and not keeps(bound, rows[bound.key])]
            if broken:
                candidate.status, candidate.reason = "rejected", f"breaks {', '.join(broken)} on the race examples"
            else:
                kept.append(candidate)
            gain = self._base_gain + (candidate.gain.delta if candidate.gain else math.nan)
            self.result.trades.append(Trade(plan, gain, rows[FLUENCY].delta if FLUENCY in rows else None))
        if finalists and not kept:
            self.result.reason = "every finalist breaks a constraint in the race"
        return kept

    def _confirm(self, steps: Steps) -> None:
        """The found plan against the original on what nothing has seen; then the recommendation."""
        result, primary = self.result, self._objective.keys[0]
        if result.found is None:
            return
        options: dict[str, Any] = {"seed": self.seed, "folder": self.folder}
        confirm, controls = [steps.sets.loader("confirm")], self.controls
        if controls:
            try:
                weights = steps.lab.spectra.base
                random_plan(self.module, result.found, self.seed, weights.changed if weights else lambda matrix: True)
            except ValueError as error:
                controls = False
                result.warnings.append(f"without controls: {error}")
        result.confirmed = steps.compare("confirm", result.found, confirm, primary, controls=controls, **options)
        if self._bounds:
            text = steps.sets.text("guard")
            guard = [steps.sets.loader("guard")] if steps.sets.sizes.get("guard") else []
            guard += [] if text is None else [text]
            result.guard = steps.compare("guard", result.found, guard, None, controls=False, **options)
            result.judgements = judge_all(self._bounds, result.guard["laser"].rows)
        decide(result, self._objective.signs[0])

    def _finish(self, steps: Steps) -> SearchResult:
        self.result.phases = list(steps.phases.values())
        if self.folder is not None:
            self.result.to_json(Path(self.folder) / "result.json")
        return self.result

    def _check_positive(self, table: Table) -> None:
        """Say so where nothing is ever right, since then only the loss has chosen."""
        key = self._objective.keys[0]
        values = [arm[key].values for arm in table.values()]
        if self._objective.signs[0] > 0 and not any(bool((value > 0).any()) for value in values):
            note = f"{key} is 0 on all race examples for the original and every finalist: "
            cure = "give easier examples, or another objective"
            self.result.warnings.append(
                note + (f"only {self._objective.loss} told them apart; " if self._objective.loss else "") + cure
            )

    # ---- details ----------------------------------------------------------------------------------------------------

    def _targets(self, lab: Lab, without: Iterable[Reduction] = ()) -> list[Target]:
        """What may be cut; in delta mode only what fine-tuning has changed."""
        found, weights = targets(self.module, self.within, without), lab.spectra.base
        return found if weights is None else [t for t in found if any(map(weights.changed, t.matrices))]

    def _race_parts(self, sets: ExampleSets) -> list[list[int]]:
        """Positions to race on, and fresh ones for each further reduction."""
        if self.spectrum == "reference":
            return [list(range(sets.sizes["race"]))]
        fresh = [FRESH_SHARE] * (self.max_reductions - 1)
        if sum(fresh) > 0.6:
            fresh = [0.6 / len(fresh)] * len(fresh)
        return sets.deal("race", [1.0 - sum(fresh), *fresh])  # shares, not numbers

    def _affordable(self, steps: Steps, step: str, ranked: list[Candidate], examples: int) -> list[Candidate]:
        """Those of the ranked candidates for which there is time."""
        if not ranked:
            return ranked
        left = math.inf if self.minutes is None else 60 * self.minutes - (time.perf_counter() - self._start)
        near = NEAR if self.spectrum == "exact" else 0
        count, needed = steps.affordable(step, ranked, examples, FINALISTS, left / self._pass_seconds, near)
        if count == 0 and step == "1" and self.minutes is not None:
            raise OutOfTimeError(
                f"`minutes` = {self.minutes} is too short: to race one candidate and confirm it takes about "
                f"{self.minutes + (needed * self._pass_seconds - left) / 60:.1f}; give more time, or fewer examples"
            )
        if count < len(ranked):
            note = f"only {count} of {len(ranked)} candidates raced, to keep within the time given"
            self.result.warnings.append(note)
        return ranked[:count]

    def _screen(self, steps: Steps) -> Screen:
        if callable(self.screen):
            return self.screen
        exact = steps.lab.spectra if self.spectrum == "exact" else Spectra.default()
        if self.screen == "gradient":
            return steps.gradient_screen(exact, self.screen_loss)
        by_name = SCREENS[self.screen]
        return lambda found, rhos, _: by_name(found, rhos, exact, self.seed)
