"""What a search has found, held against its rivals: confirmed, shown beside them, and tried on other tasks.

Contract: of all plans and checkpoints one goes to confirmation, chosen on race examples alone; its comparison with the
weights that were cleaned is the one that claims anything, at its own level. Whatever else is measured on the confirm
set is for information.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from laser_callback.compare.alone import ARM, Run, paired
from laser_callback.compare.measure import values_of
from laser_callback.compare.module import LaserModule
from laser_callback.passes.state import RandomState
from laser_callback.plans.plan import LaserPlan
from laser_callback.results.candidates import Candidate
from laser_callback.results.cleanup import CleanupResult, Contender, ContenderKind
from laser_callback.results.comparison import ArmResult, LaserResult
from laser_callback.results.examples import ORIGINAL
from laser_callback.results.other_tasks import TARGET, OtherTask
from laser_callback.search.course import Course
from laser_callback.search.verdict import judged
from laser_callback.shipping.gates import Gates
from laser_callback.shipping.rivals import Rival, differs, put_in, state_of
from laser_callback.shipping.same_outputs import short
from laser_callback.spectra.delta import BaseWeights
from laser_callback.stats.gates import judge_all
from laser_callback.support.interrupts import whole
from laser_callback.support.merging import merged

Model = Callable[[], AbstractContextManager[Any]]
"""Makes the context in which the module is one of the models that are compared."""


@dataclass
class Contest:
    """What is compared, and how.

    Attributes:
        trainer: that has fitted.
        module: with the weights that were searched.
        course: of the search, at its end.
        result: what is filled.
    """

    trainer: pl.Trainer
    module: pl.LightningModule
    course: Course
    result: CleanupResult
    _tuned: list[tuple[Any, Run]] = field(default_factory=list, init=False)  # the module as trained, by the data

    def __post_init__(self) -> None:
        self._random = RandomState.now()
        steps = self.course.steps
        self.lab, self.sets, self.objective = steps.lab, steps.sets, steps.objective
        self.key, self.sign = steps.objective.keys[0], steps.objective.signs[0]
        self.confirm_data = self.sets.loader("confirm")
        self.better = dict(zip(steps.objective.keys, (sign > 0 for sign in steps.objective.signs), strict=True))

    # ---- the models -------------------------------------------------------------------------------------------------

    def tuned(self) -> AbstractContextManager[Any]:
        """As trained."""
        return merged(self.module)

    @contextmanager
    def cut(self, plan: LaserPlan) -> Generator[None, None, None]:
        """Under a plan."""
        with merged(self.module), self.lab.base(plan):
            yield

    @contextmanager
    def other(self, rival: Rival) -> Generator[None, None, None]:
        """As another checkpoint holds it."""
        with put_in(self.module, state_of(self.trainer, self.module, rival)), merged(self.module):
            yield

    @contextmanager
    def before(self, base: BaseWeights) -> Generator[None, None, None]:
        """Before fine-tuning; what the base does not have stays as it is."""
        with merged(self.module), pointing(base.parameters(self.module)):
            yield

    def run(self, model: Model, data: Any) -> Run:
        """What a model does on data, which for all of them come in the same order: all draw the same numbers."""
        self._random.set()
        with model():
            return self.lab.alone(data)

    def trained(self, data: Any) -> Run:
        """What the model as trained does, once for the same data."""
        known = next((run for of, run in self._tuned if of is data), None)
        if known is None:
            known = self.run(self.tuned, data)
            self._tuned.append((data, known))
        return known

    def against_trained(self, model: Model, name: str, data: Any, primary: str | None = None, **_: Any) -> LaserResult:
        """A model compared with the one that was trained."""
        return paired(self.trained(data), self.run(model, data), name, primary).directed(self.better)

    # ---- the race ---------------------------------------------------------------------------------------------------

    def enter(self, rivals: Iterable[Rival]) -> Rival | None:
        """Race the checkpoints, and list them. Returns the best if it is better than the plan that was found."""
        positions = self.course.race_positions()
        loader = self.sets.loader("race", positions)
        best: tuple[float, Rival | None] = (max(0.0, self._gain_of_plan()), None)
        for rival in rivals:
            if not differs(self.module, state_of(self.trainer, self.module, rival)):
                continue
            gain = self._gain(self.trained(loader), self.run(partial(self.other, rival), loader))
            self.result.contenders.append(Contender("checkpoint", rival.path, gain=gain, examples=len(positions)))
            if rival.chosen and gain > best[0]:
                self.result.notes.append(
                    f"{rival.path} is not confirmed although it is better in the race: the validation data have chosen "
                    "it, and these are the examples here. Give LaserCleanup `data` of its own, clean weights='best', "
                    "or keep all epochs (save_top_k=-1)"
                )
            elif gain > best[0]:
                best = gain, rival
        return best[1]

    def _gain(self, tuned: Run, run: Run) -> float:
        """The change of the objective, in the better direction; that of broken weights is minus infinity."""
        examples = paired(tuned, run, "").examples
        table: dict[str, dict[str, Any]] = {ORIGINAL: {}, ARM: {}}
        for key in self.objective.keys:
            table[ORIGINAL][key], table[ARM][key] = values_of(examples, ARM, key, tuned.known[key])
        mean = replace(self.objective, loss=None).estimates(table, ARM)[0].delta
        return mean if math.isfinite(mean) else -math.inf

    def _gain_of_plan(self) -> float:
        found = self.result.search.found
        gains = [trade.gain for trade in self.result.search.trades if trade.plan == str(found)]
        return max(gains, default=0.0) if found is not None else 0.0

    # ---- confirmation -----------------------------------------------------------------------------------------------

    def take_search(self) -> bool:
        """Let the outcome be that of the search. Returns whether its plan is recommended."""
        search, result = self.result.search, self.result
        result.tried = None if search.found is None else str(search.found)
        result.confirmed, result.judgements, result.reason = search.confirmed, search.judgements, search.reason
        return search.plan is not None

    def confirm(self, rival: Rival) -> bool:
        """Hold a checkpoint against the trained weights. Returns whether it is recommended."""
        result, model = self.result, partial(self.other, rival)
        result.tried = rival.path
        result.confirmed = self.against_trained(model, rival.path, self.confirm_data, self.key)
        if self.course.bounds:
            text = self.sets.text("guard")
            loaders = [self.sets.loader("guard")] if self.sets.sizes.get("guard") else []
            guard = self.against_trained(model, rival.path, [*loaders, *([] if text is None else [text])])
            result.judgements = judge_all(self.course.bounds, guard[ARM].rows)
        arm = result.confirmed[ARM]
        shown, result.reason = judged(
            rival.path, arm, self.key, self.sign, result.judgements, of_facts=isinstance(self.module, LaserModule)
        )
        return shown

    def passes(self, gates: Gates, chosen: LaserPlan | Rival) -> bool:
        """Whether what was confirmed passes the gates; if not, that is the reason."""
        if isinstance(chosen, LaserPlan):
            with merged(self.module):
                verdict = gates.judge(chosen, partial(gates.measure, self.lab, chosen))
        else:
            compare = partial(self.against_trained, partial(self.other, chosen), chosen.path)
            verdict = gates.judge(None, partial(gates.measure_by, compare))
        self.result.gates = verdict
        if not verdict.accepted:
            self.result.reason = verdict.reason
        return verdict.accepted

    # ---- for information --------------------------------------------------------------------------------------------

    def show(self, rivals: Iterable[Rival]) -> None:
        """Give every contender its values on the confirm set."""
        result, source = self.result, self.trained(self.confirm_data)
        by_path = {rival.path: rival for rival in rivals}
        rows = [*best_of_each_kind(result.search.candidates, result.search.found), *result.contenders]
        shown = [self._shown(Contender("as trained", result.source), paired(source, source, result.source)[ARM])]
        for row in rows:
            if row.name == result.tried:
                confirmed = result.confirmed  # none, if a pass has failed
                shown.append(row if confirmed is None else self._shown(replace(row, confirmed=True), confirmed[ARM]))
                continue
            if row.kind == "checkpoint":
                model: Model = partial(self.other, by_path[row.name])
            else:
                model = partial(self.cut, LaserPlan.parse(row.name))
            shown.append(self._shown(row, paired(source, self.run(model, self.confirm_data), row.name)[ARM]))
        result.contenders = shown

    def _shown(self, row: Contender, arm: ArmResult) -> Contender:
        checks = arm.prior_checks.get(self.key)
        said = None if checks is None else checks.top_predictions["reduced"][0][1] / checks.n
        balanced = None if checks is None or checks.macro is None else checks.macro.reduced
        return replace(row, value=arm[self.key].reduced, said_most=said, balanced=balanced)

    def elsewhere(self, also: Mapping[str, Any], base: BaseWeights, chosen: LaserPlan | Rival | None) -> None:
        """Other tasks under the base, the trained model and what was confirmed."""
        cleaned: Model | None = None
        if chosen is not None:
            cleaned = partial(self.cut, chosen) if isinstance(chosen, LaserPlan) else partial(self.other, chosen)
        tasks = []
        for name, data in {TARGET: self.confirm_data, **also}.items():
            try:
                tasks.append(self._elsewhere(name, data, partial(self.before, base), cleaned))
            except Exception as error:  # of the user's step on other data: what decides nothing may cost nothing
                self.result.notes.append(f"`also[{name!r}]` is left out: {short(error)}")
        self.result.others = tasks

    def _elsewhere(self, name: str, data: Any, before: Model, cleaned: Model | None) -> OtherTask:
        tuned = self.trained(data)
        if self.key not in tuned.known:
            raise ValueError(f"{self.key!r} is not logged there, but {', '.join(tuned.known) or 'nothing'}")
        tuning = paired(self.run(before, data), tuned, "fine-tuned").directed(self.better)
        cleaning = None
        if cleaned is not None:
            cleaning = paired(tuned, self.run(cleaned, data), "cleaned").directed(self.better)[ARM][self.key]
        return OtherTask(name, tuning[ARM][self.key], cleaning, self.sign)


def best_of_each_kind(candidates: Iterable[Candidate], found: LaserPlan | None) -> list[Contender]:
    """Of the plans that raced one of each kind: the one that was found, of the others the one that came furthest.

    What was found need not have the highest gain of its kind: the loss decides between near-equals.
    """
    raced = [c for c in candidates if c.gain is not None and math.isfinite(c.gain.delta)]
    raced.sort(key=lambda c: (str(c.whole) != str(found), -c.examples, -c.gain.delta if c.gain else 0.0))
    best: dict[tuple[ContenderKind, str], Candidate] = {}
    for candidate in raced:
        kind = _kind(candidate)
        best.setdefault((kind, candidate.strategy if kind == "strategy" else ""), candidate)
    return [
        Contender(kind, str(c.whole), c.strategy, c.gain.delta if c.gain else None, c.examples)
        for (kind, _), c in best.items()
    ]


def _kind(candidate: Candidate) -> ContenderKind:
    first = next(iter(candidate.plan))
    if candidate.strategy in ("delta", "delta-all"):
        return "WiSE-FT" if first.rho == 0 and first.scale else "joint rule"
    return "single" if candidate.layer is not None and candidate.kind is not None else "strategy"


@whole
def pointing(pairs: Sequence[tuple[nn.Parameter, Tensor]]) -> Generator[None, None, None]:
    """Within: each parameter points at the tensor beside it; after: at its own storage."""
    own = [(parameter, parameter.data) for parameter, _ in pairs]
    try:
        for parameter, tensor in pairs:
            parameter.data = tensor
        yield
    finally:
        for parameter, data in own:
            parameter.data = data
