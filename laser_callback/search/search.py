"""The search: which cut helps this model on this task, in minutes, with sound statistics.

Four steps on disjoint examples. *Screen*: strategies propose candidates, and one backward pass scores them. *Race*: the
best few dozen run on more and more examples while the worse half drops out. *Compose*: the same again with the winner
in place, accepted only on fresh examples. *Confirm*: the plan against the original, once, on examples that nothing
before has seen; only this is a result. A plan is recommended if the confirmed gain is significant, is more than a shift
of what is said most, and every constraint holds on the guard set; else the original is. Here are the arguments, and
what must be right before the work; its course is ``course.py``'s.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from laser_callback.compare.measure import Lab
from laser_callback.compare.module import LaserModule
from laser_callback.data.datamodule import FactsDataModule
from laser_callback.data.example_set import fingerprints
from laser_callback.data.sets import ExampleSets
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.target import RHOS
from laser_callback.results.examples import ORIGINAL
from laser_callback.results.search import SearchResult
from laser_callback.search.budget import Budget
from laser_callback.search.course import Course
from laser_callback.search.screen import LossFn
from laser_callback.search.setup import constraints_of, described, objective_of, plain, probe_positions, race_of
from laser_callback.search.sizes import by_batches, confirm_warnings, guard_warnings, is_share_right
from laser_callback.search.steps import Steps
from laser_callback.search.strategies.base import Strategy
from laser_callback.search.strategies.registry import strategies_of
from laser_callback.search.verdict import confirm
from laser_callback.spectra.delta import BaseSource, BaseWeights
from laser_callback.spectra.store import Spectra
from laser_callback.stats.constraint import Constraint
from laser_callback.support.journal import Journal
from laser_callback.support.progress import PhaseProgress
from laser_callback.support.provenance import versions

Method = Literal["screened", "exhaustive", "paper"]

_NOT_SETTINGS = ("module", "data", "base", "folder", "resume", "spectra", "progress", "minutes")
PROBE, PROBE_WRITTEN = 32, 8
"""Race examples that the arguments are tried on; so many where answers are written."""


@dataclass
class LaserSearch:
    """Search a module for the cuts that improve an objective.

    Args:
        module: a :class:`LaserModule` (without a plan), or any LightningModule with a ``validation_step``.
        data: a :class:`FactsDataModule`, a LightningDataModule or DataLoader over a map-style dataset, which are split
            into the four sets, a tenth, three, four and two tenths of the examples; the sets as ``{"screen": loader,
            "race": ..., "confirm": ..., "guard": ...}``; or, where examples have groups or subjects, or for sets of
            other sizes, ``ExampleSets.of(data, sizes={"race": 300, "confirm": 0.5})``, of
            :class:`~laser_callback.data.ExampleSets`.
        objective: one or more keys that ``validation_step`` logs. The mean of their changes is improved, and the first
            carries the claim. By default the metric of a :class:`~laser_callback.data.TaskDataModule`'s task; of other
            facts ``first_token_accuracy``, and ``paraphrase_robustness`` where they have paraphrases.
        direction: ``"max"`` or ``"min"``, for all keys or by key; needed where what is logged does not say it (a
            torchmetrics object does).
        loss: a logged key, lower is better, that helps to tell candidates apart, and is what the screen differentiates.
            For a LaserModule ``soft_error`` where only first tokens are the objective (``log_loss`` then breaks ties);
            otherwise, and in the paper's procedure, ``log_loss``.
        race: the key by which candidates race ahead of the last round: the loss, or the first of the objective, which
            the loss then helps. Where answers are written it is by default the loss, that of the answers that should
            be written: so only the finalists write, on the examples of the last round, and then what is confirmed.
        constraints: how much worse a key may become on the guard set, as text: ``"perplexity <= +2 %"``,
            ``"log_loss <= +0.05"``, ``"kl <= 0.02"``. By default ``perplexity <= +5 %`` where there is text, and
            ``paraphrase_robustness >= -0.02`` where that is an objective.
        base: what the module was fine-tuned from, as :class:`~laser_callback.spectra.BaseWeights` takes it, for
            strategies that edit the difference to it.
        within: where to look, as plan text without rho: ``"*.all"``, ``"20-29.mlp, *.q_proj"``.
        rhos: the grid of single matrices.
        strategies: what proposes candidates: names between commas or in a list, or objects of your own
            (:class:`Strategy`). By default ``"laser"``, every matrix at every rho; ``"components"``, directions of a
            matrix by whose removal the loss falls; and ``"drop"``, layers and their halves left out; with a ``base``
            also ``"delta"``, what fine-tuning has changed as a whole under one rule.
            The others are in ``STRATEGIES`` of :mod:`laser_callback.search.strategies`.
        screen_loss: ``f(module, batch)``, the loss that the screen differentiates, where the step does not return it.
        candidates: how many of those that are proposed race.
        max_reductions: stop composing at so many candidates.
        min_gain: warn before the work if a gain of this size would be confirmed with less than 80 % probability.
        method: ``"exhaustive"`` runs all candidates of the strategies on all race examples instead of screening;
            ``"paper"`` does so as the paper's code does: its nine rates, cut by ``torch.svd_lowrank``, on the first
            fifth of the examples, of which the best objective, then the lowest log loss selects.
        controls: confirm beside the plan its matrices zeroed, random matrices cut at the same rho, and noise.
        minutes: race only as many candidates as fit into so much time.
        folder: keep each finished step here; with ``resume`` go on from them.
        spectra: the store of factorisations; by default on this machine's disk.
        accelerator, precision: as in ``Trainer``, but "auto" takes CUDA or the CPU, and "cuda:1" names the device: it
            runs on one.
        progress: show progress on standard error.
        seed: of the sets, if they are made here, the order of examples, and the random controls.

    Attributes:
        result: the outcome; after an interruption what there was by then.
        course: what the search works with, once it has begun.

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
    race: str | None = None
    constraints: Sequence[str] | None = None
    base: BaseSource | None = None
    within: str = "*.all"
    rhos: Sequence[float] = RHOS
    strategies: str | Sequence[str | Strategy] | None = None
    screen_loss: LossFn | None = None
    candidates: int = 40
    max_reductions: int = 1
    min_gain: float = 0.05
    method: Method = "screened"
    controls: bool = True
    minutes: float | None = None
    folder: str | Path | None = None
    resume: bool = False
    spectra: Spectra | None = None
    accelerator: str = "auto"
    precision: Any = None
    progress: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        self.result = SearchResult(None, None, "the search has not run", (), [])
        self.course: Course | None = None
        if isinstance(self.module, LaserModule) and self.module.plan is not None:
            raise MisconfigurationException("`module` must have no plan of its own: the search finds one")
        for name in ("candidates", "max_reductions"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be an integer, at least 1, got {getattr(self, name)!r}")
        if self.method not in get_args(Method):
            raise ValueError(f"`method` must be one of {', '.join(get_args(Method))}, got {self.method!r}")
        self._strategies = strategies_of(self._default if self.strategies is None else self.strategies)
        if self.method == "paper" and [strategy.name for strategy in self._strategies] != ["reference"]:
            names = ", ".join(strategy.name for strategy in self._strategies)
            raise ValueError(f"the paper's procedure tries what `strategies` 'reference' proposes, got {names}")
        if not len(self.rhos) or not all(isinstance(rho, (int, float)) and 0 <= rho <= 1 for rho in self.rhos):
            raise ValueError(f"`rhos` must be numbers in [0, 1], at least one, got {self.rhos!r}")
        if self.method == "paper" and self.max_reductions > 1:
            raise ValueError(f"the paper's procedure finds one cut: got `max_reductions` {self.max_reductions}")
        if self.base is not None and self.spectra is not None:
            raise ValueError("`spectra` have their own `base`: give one of them")
        if self.folder is None and self.resume:
            raise ValueError("`resume` needs the `folder` of the search to go on with")
        for text in self.constraints or ():
            Constraint.parse(text)

    @property
    def _default(self) -> tuple[str, ...]:
        """The strategies of a search that names none."""
        if self.method != "screened":
            return ("reference",) if self.method == "paper" else ("laser",)
        has_base = self.base is not None or (self.spectra is not None and self.spectra.base is not None)
        return ("laser", "components", "drop", "delta") if has_base else ("laser", "components", "drop")

    def run(self) -> SearchResult:
        """Search. The module is left as it was, bit by bit, whatever happens.

        Raises:
            MisconfigurationException: if a key is not logged or not a mean over examples, or a constraint has no data.
            ValueError: if there are too few examples, a value is not finite, or ``minutes`` is too short.
            KeyboardInterrupt: on Ctrl-C; :attr:`result`, and ``result.json`` in the folder, hold what there was.
        """
        course = self.course = self._prepare(time.perf_counter())
        try:
            course.run()
            confirm(course.steps, self.result, course.bounds, self.controls)
            if self.result.plan is not None:  # they were enough
                self.result.warnings = [told for told in self.result.warnings if told not in self._too_few]
        except KeyboardInterrupt:
            self.result.reason = f"interrupted; {self.result.reason}"
            self._finish(course.steps)
            raise
        return self._finish(course.steps)

    def _prepare(self, start: float) -> Course:
        """Everything that can be wrong is found here, before the work."""
        sets, spectra, paper = self._sets(), self._spectra(), self.method == "paper"
        self._check_needs(sets, spectra)
        lab = Lab(self.module, spectra, self.accelerator, self.precision)
        possible = lab.targets(self.within)
        if spectra.base is not None:
            matrices = [matrix for target in possible for matrix in target.matrices]
            if not any(map(spectra.base.changed, [*matrices, *(m for m in lab.matrices if m.kind is None)])):
                raise ValueError(
                    f"`base` and the module do not differ in any matrix of `within` {self.within!r}, so there is no "
                    "change to cut: leave out `base`, and name strategies that need none, such as 'laser'"
                )
        # One small batch, and one candidate, show what is logged and whether it can be compared.
        probe = {"probe": LaserPlan([possible[0].at(self.rhos[0])])}
        positions = probe_positions(self.module, sets, PROBE_WRITTEN if sets.writes else PROBE)
        loader = sets.loader("race", positions)
        lab.measure(probe, loader, ())
        loss = self.loss or ("log_loss" if paper and isinstance(self.module, LaserModule) else None)
        objective = objective_of(self.module, self.objective, self.direction, loss, lab.logged, sets.metric)
        bounds = constraints_of(self.constraints, sets, objective, lab.logged)
        keys = tuple(dict.fromkeys([*objective.measured, *(b.key for b in bounds if b.key in lab.logged)]))
        by_loss, told = race_of(self.race, objective, writes=sets.writes, paper=paper)
        passes = len(positions) * (1 + lab.share(probe["probe"]))
        begin = time.perf_counter()
        values = lab.measure(probe, loader, keys)[ORIGINAL]
        pass_seconds = written_seconds = (time.perf_counter() - begin) / passes
        if by_loss:  # what races is not what is written
            begin = time.perf_counter()
            lab.measure(probe, sets.loader("race", positions, writes=False), keys)
            pass_seconds = (time.perf_counter() - begin) / passes

        found = SearchResult(
            None, None, "no candidate has run yet", objective.keys, [], sets=dict(sets.sizes), race=told
        )
        first = values[objective.keys[0]]
        found.warnings += sets.notes
        share = is_share_right(first, objective.signs[0])
        self._too_few = confirm_warnings(sets, self.min_gain, by_batches(first, loader)) if share else []
        found.warnings += self._too_few
        found.warnings += guard_warnings(sets, bounds, values)
        if sets.text("guard") is None and isinstance(self.module, LaserModule):
            found.warnings.append("fluency is not checked: give the data `text=`, a file of running text")
        for warning in found.warnings:
            rank_zero_warn(warning)
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_SETTINGS}
        own["strategies"] = list(map(described, self._strategies))
        found.settings = {name: plain(value) for name, value in own.items()} | {"versions": versions()}
        found.settings |= {"objective": list(objective.keys), "loss": objective.loss, "sizes": dict(sets.sizes)}
        if self.folder is not None:
            parts = {name: [sets.loader(name)] for name in sets.sizes}
            found.settings["fingerprints"] = fingerprints(self.module, parts)
        if spectra.base is not None:
            found.base = found.settings["base"] = spectra.base.digest
        self.result = found
        journal = Journal(self.folder, found.settings, self.resume)
        found.settings = {**found.settings, **getattr(self.data, "provenance", {})}  # told only
        progress = PhaseProgress(self.progress)
        steps = Steps(lab, sets, journal, progress, objective, keys, self.seed, self.folder, by_loss=by_loss)
        course = Course(
            steps,
            found,
            bounds,
            Budget(self.minutes, start, pass_seconds, self.controls, written_seconds),
            self._strategies,
            screened=self.method == "screened",
            paper=paper,
            screen_loss=self.screen_loss,
            within=self.within,
            rhos=self.rhos,
            candidates=self.candidates,
            max_reductions=self.max_reductions,
        )
        self._leave_out_what_cannot(course)
        return course

    def _leave_out_what_cannot(self, course: Course) -> None:
        """Strategies that have nothing to propose for this model: an error where they were asked for by name."""
        context = course.context()
        for strategy in list(course.strategies):
            reason = strategy.refusal(context) if hasattr(strategy, "refusal") else ""
            if reason and self.strategies is not None:
                raise MisconfigurationException(f"the strategy {strategy.name!r} has nothing to propose: {reason}")
            if reason:
                course.strategies = [other for other in course.strategies if other is not strategy]
                course.result.warnings.append(f"without the strategy {strategy.name!r}: {reason}")
                rank_zero_warn(course.result.warnings[-1])

    def _sets(self) -> ExampleSets:
        if isinstance(self.data, ExampleSets):
            return self.data
        if isinstance(self.data, FactsDataModule) and isinstance(self.module, LaserModule):
            self.data.context = self.module.context  # no trainer is there to tell it
        return ExampleSets.reference(self.data) if self.method == "paper" else ExampleSets.of(self.data, seed=self.seed)

    def _spectra(self) -> Spectra:
        if self.base is not None:
            return Spectra.default(BaseWeights(self.base, self.module))
        return self.spectra or Spectra.default()

    def _check_needs(self, sets: ExampleSets, spectra: Spectra) -> None:
        """Whether there is what the strategies cannot do without."""
        of_examples = {"activations", "gradient"} if self.method == "screened" else {"activations"}
        for strategy in self._strategies:
            if "base" in strategy.needs and spectra.base is None:
                raise MisconfigurationException(
                    f"the strategy {strategy.name!r} needs `base`, what the module was fine-tuned from: a folder, hub "
                    "name, checkpoint or model"
                )
            if of_examples & strategy.needs and "screen" not in sets.sizes:
                raise MisconfigurationException(
                    f"the strategy {strategy.name!r} needs examples to run the module on: give the data a set `screen`"
                )

    def _finish(self, steps: Steps) -> SearchResult:
        self.result.phases = list(steps.phases.values())
        if self.folder is not None:
            self.result.to_json(Path(self.folder) / "result.json")
        return self.result
