"""Two finished runs compared as pairs, with all statistics, from their logs alone.

Contract: a pair is an example of one id in one task, which must be the same example in both runs; what only one of them
has is told with its number. No torch is imported.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from laser_callback.compare.alone import ARM
from laser_callback.finished.logged import FinishedRun, LoggedExample, LoggedTask
from laser_callback.results.comparison import ArmResult, LaserResult, adjust_together
from laser_callback.results.examples import ORIGINAL, Logged, PairedExamples
from laser_callback.stats.intervals import Floats
from laser_callback.stats.outcomes import Kind, Outcomes
from laser_callback.support.suggest import clipped, closest

MEAN = "mean over tasks"
"""The row of several tasks that carries the claim."""
AGAIN = "again"
"""The arm of another run of the original."""
Weights = Literal["size", "equal"]


def compare_runs(
    one: FinishedRun,
    other: FinishedRun,
    *,
    tasks: Sequence[str] = (),
    metric: str | None = None,
    weights: Weights = "size",
    again: FinishedRun | None = None,
) -> LaserResult:
    """Compare two finished runs; ``other`` is the arm ``"laser"``.

    Of one task there is a row for each metric. Of several there is a row for each task, Holm-adjusted together, and
    :data:`MEAN`, which carries the claim. That row takes the examples of all tasks as one sample of them: where the
    tasks differ in their changes, its interval is wider than one for just these tasks.

    Args:
        one: what is compared with.
        other: what is compared.
        tasks: what to compare; by default all tasks that both have.
        metric: of one task the metric that carries the claim, by default none: all share their level. Of several the
            metric of each, by default its first; the others are named in ``not_compared``.
        weights: of the tasks in their mean: by their numbers of examples, or all the same.
        again: another run of ``one``: what it answers otherwise, it does by arithmetic alone.

    Raises:
        ValueError: if the runs share no task, example or metric, if an example is not the same in both, or if the
            metrics of several tasks have no mean.
    """
    names, told, tasks = _distinct(one, other), dict[str, str](), list(dict.fromkeys(tasks))
    pairs = [_pairs(task, one, other, names, told) for task in _shared_tasks(one, other, tasks, names, told)]
    several = len(pairs) > 1
    runs = {ORIGINAL: one, ARM: other} | ({} if again is None else {AGAIN: again})
    better: dict[str, bool | None] = {}
    left: dict[tuple[str, str], list[str]] = {}
    for pair in pairs:
        if others := pair.choose(metric, several):
            left.setdefault((", ".join(others), pair.metrics[0]), []).append(pair.task)
        better |= {pair.key(name): pair.better(name) for name in pair.metrics}
    if metric is None:
        why = "of several tasks one metric each is compared, here"
        told |= {
            f"{others} of {', '.join(of)}": f"{why} {taken}; `metric` chooses" for (others, taken), of in left.items()
        }
    kind = _kind_of_mean(pairs, better, weights) if several else None
    if several:
        better[MEAN] = better[pairs[0].key(pairs[0].metrics[0])]
    is_share = several and all(pair.kind(pair.metrics[0]) == "binary" for pair in pairs)
    examples, checked = PairedExamples(), PairedExamples()  # for readers, and for the prior checks
    for pair in pairs:
        logs = {arm: run.tasks.get(pair.task, LoggedTask({})) for arm, run in runs.items()}
        for logged in logs.values():
            pair.check(logged, names)
        for held, meant in ((examples, False), (checked, True)):
            held.add({arm: pair.returned(of, kind, weights, meant) for arm, of in logs.items()}, None, None)

    def known(arm: str) -> dict[str, Logged]:
        return {k: v._replace(higher_is_better=better.get(k)) for k, v in examples.returned(arm).items()}

    def against(arm: str, name: str) -> ArmResult:
        both = known(ORIGINAL), known(arm)
        found = ArmResult(name, examples.rows(arm, *both), checked.priors(arm, *both), "off", 0.0, 0.0)
        return _with_share(found) if is_share else found

    primary = MEAN if several else metric
    found = against(ARM, names[1])
    adjust_together([found], primary)
    provenance: dict[str, Any] = {"runs": {name: run.source for name, run in zip(names, (one, other), strict=True)}}
    if several:
        provenance |= {"tasks": [pair.task for pair in pairs], "weights of the tasks": weights}
    return LaserResult(
        {ARM: found},
        {},
        primary,
        0.0,
        told,
        examples,
        provenance,
        names=names,
        rerun=None if again is None else against(AGAIN, again.source),
    )


def _distinct(one: FinishedRun, other: FinishedRun) -> tuple[str, str]:
    """Names that tell the runs apart: of one model run twice, and of models in long paths, what they were read from."""
    names, sources = (one.name, other.name), (one.source, other.source)
    in_paths = any(name.startswith(("/", "~", ".")) for name in names) and len("".join(sources)) < len("".join(names))
    names = sources if names[0] == names[1] or in_paths else names
    return names if names[0] != names[1] else (names[0], f"{names[1]} (again)")


def _shared_tasks(
    one: FinishedRun, other: FinishedRun, tasks: Sequence[str], names: tuple[str, str], told: dict[str, str]
) -> list[str]:
    for name, run in zip(names, (one, other), strict=True):
        if unknown := [task for task in tasks if task not in run.tasks]:
            near = closest(unknown[0], run.tasks) or f"; it has {', '.join(run.tasks)}"
            raise ValueError(f"`tasks` must be in both runs, but {name} has no {unknown[0]!r}{near}")
    shared = [task for task in (tasks or one.tasks) if task in other.tasks]
    if not shared:
        has = (f"{name} has {', '.join(map(repr, run.tasks))}" for name, run in zip(names, (one, other), strict=True))
        raise ValueError(f"both runs must be of the same task, but {' and '.join(has)}")
    for name, run in zip(names, (one, other), strict=True):
        told |= {f"the task {task}": f"only in {name}" for task in run.tasks if not tasks and task not in shared}
    return shared


# ---- one task --------------------------------------------------------------------------------------------------------


@dataclass
class _Pairs:
    """One task of both runs.

    Attributes:
        task: its name, empty where the logs name none.
        ids: of the examples that are in both.
        before, after: what each run did.
        metrics: that are in both; after :meth:`choose`, those that are compared.
        several: whether there are other tasks.
    """

    task: str
    ids: list[str]
    before: LoggedTask
    after: LoggedTask
    metrics: list[str]
    several: bool = False

    def key(self, metric: str) -> str:
        """A metric's row."""
        return f"{self.task}/{metric}" if self.several else metric

    def choose(self, metric: str | None, several: bool) -> list[str]:
        """Of several tasks keep one metric of each. Returns the others."""
        self.several = several
        if metric is not None and metric not in self.metrics:
            of = f" of the task {self.task}" if several else ""
            raise ValueError(f"`metric` must be one{of}, {', '.join(self.metrics)}, got {metric!r}")
        if not several:
            return []
        chosen = metric or self.metrics[0]
        others = [name for name in self.metrics if name != chosen]
        self.metrics = [chosen]
        return others

    def better(self, metric: str) -> bool | None:
        """Its better direction, as the log says it; ones are right."""
        return self.before.higher_is_better.get(metric, True if self.kind(metric) == "binary" else None)

    def kind(self, metric: str) -> Kind:
        """Right or wrong is what is 0 or 1 in both runs."""
        if (kind := self.before.kinds.get(metric)) is not None:
            return kind
        weighs = any(metric in self.before.examples[one].weights for one in self.ids)
        values = np.concatenate([self._values(logged, metric) for logged in (self.before, self.after)])
        return "binary" if not weighs and (np.isin(values, (0, 1)) | np.isnan(values)).all() else "mean"

    def inside(self, metric: str) -> bool:
        """Whether it is a share of each example."""
        values = np.concatenate([self._values(logged, metric) for logged in (self.before, self.after)])
        return bool(((values >= 0) & (values <= 1) | np.isnan(values)).all())

    def returned(self, logged: LoggedTask, of_mean: Kind | None, weights: Weights, meant: bool) -> dict[str, Any]:
        """What a step would return of this task in one run: outcomes, and whatever describes the examples.

        With ``meant``, predictions are those for the prior checks, and left out where no right answer is a common one:
        there one that is always given gains nothing, and a target may be a text of which the answer is a part.
        """
        examples = [logged.examples.get(one, LoggedExample(one)) for one in self.ids]
        originals = [self.before.examples[one] for one in self.ids]
        found: dict[str, Any] = {"id": [f"{self.task}/{one}" if self.several else one for one in self.ids]}
        for metric in self.metrics:
            values, kind = self._values(logged, metric), self.kind(metric)
            both = zip(originals, examples, strict=True)
            own = np.array([a.weights.get(metric, b.weights.get(metric, math.nan)) for a, b in both])
            weighed = None if np.isnan(own).all() else own
            texts = {
                "answer": [example.answers.get(metric) for example in originals],
                "prediction": [
                    ({**one.predictions, **one.meant} if meant else one.predictions).get(metric) for one in examples
                ],
            }
            keys = [self.key(metric), *([MEAN] if of_mean else [])]
            if of_mean is not None:
                each = np.ones(len(values)) if weighed is None else weighed
                shared = None if weights == "size" and weighed is None else each
                found[MEAN] = Outcomes(values, each / each.sum() if weights == "equal" else shared, of_mean)
            found[self.key(metric)] = Outcomes(values, weighed, kind)
            is_told = None not in texts["answer"] and None not in texts["prediction"]
            if is_told and (not meant or _repeats(texts["answer"])):
                found |= {f"{what}/{key}": listed for what, listed in texts.items() for key in keys}
        if any(example.cluster is not None for example in originals):
            found["cluster"] = [f"{self.task}/{one.id}" if one.cluster is None else one.cluster for one in originals]
        if self.several or any(example.group for example in originals):
            found["group"] = [example.group or self.task for example in originals]
        if any(example.prompt for example in originals):
            found["prompt"] = [example.prompt for example in originals]
        if any(example.continuation for example in logged.examples.values()):
            found["continuation"] = [example.continuation for example in examples]
        return found

    def check(self, logged: LoggedTask, names: tuple[str, str]) -> None:
        """Refuse examples that are not the same in both.

        Raises:
            ValueError: naming the first that differs.
        """
        for one in self.ids:
            before, after = self.before.examples[one], logged.examples.get(one)
            for what, value in before.same.items():
                if after is not None and after.same.get(what, value) != value:
                    of = f"the task {self.task}, " if self.task else ""
                    raise ValueError(
                        f"both runs must be asked the same, but of {of}example {one!r} the `{what}` differs: "
                        f"{clipped(value, 80)!r} in {names[0]}, {clipped(after.same[what], 80)!r} in {names[1]}"
                    )

    def _values(self, logged: LoggedTask, metric: str) -> Floats:
        nothing = LoggedExample("")
        return np.array([logged.examples.get(one, nothing).outcomes.get(metric, math.nan) for one in self.ids])


def _pairs(task: str, one: FinishedRun, other: FinishedRun, names: tuple[str, str], told: dict[str, str]) -> _Pairs:
    before, after = one.tasks[task], other.tasks[task]
    of = f" of {task}" if task else ""
    ids = [key for key in before.examples if key in after.examples]
    if not ids:
        first = [repr(next(iter(logged.examples))) for logged in (before, after)]
        raise ValueError(f"no `id`{of} is in both runs: {names[0]} begins with {first[0]}, {names[1]} with {first[1]}")
    for name, mine, theirs in ((names[0], before, after), (names[1], after, before)):
        alone = [key for key in mine.examples if key not in theirs.examples]
        if alone:
            told[f"{len(alone):,} of {len(mine.examples):,} examples{of} in {name}"] = (
                f"not in the other run, the first is {alone[0]!r}"
            )
    found = _Pairs(task, ids, before, after, [])
    in_both = []
    for name, logged in zip(names, (before, after), strict=True):
        told |= {f"{column}{of} in {name}": why for column, why in logged.unused.items()}
        present = ((m, v) for example in logged.examples.values() for m, v in example.outcomes.items())
        in_both.append(dict.fromkeys(metric for metric, value in present if not math.isnan(value)))
    found.metrics = [metric for metric in in_both[0] if metric in in_both[1]]
    told |= {f"{metric}{of}": f"only in {names[0]}" for metric in in_both[0] if metric not in in_both[1]}
    told |= {f"{metric}{of}": f"only in {names[1]}" for metric in in_both[1] if metric not in in_both[0]}
    if not found.metrics:
        unused = [[f"none ({column}: {why})" for column, why in logged.unused.items()] for logged in (before, after)]
        listed = [", ".join(metrics) or next(iter(of), "none") for metrics, of in zip(in_both, unused, strict=True)]
        has = [f"{name} has {metrics}" for name, metrics in zip(names, listed, strict=True)]
        raise ValueError(f"no metric{of} is in both runs: {' and '.join(has)}")
    return found


def _repeats(answers: Sequence[str | None]) -> bool:
    """Whether one of the right answers is common: at least five examples, or a tenth of them, have it."""
    _, most = Counter(answers).most_common(1)[0]
    return most > 1 and most >= min(5, len(answers) / 10)


def _with_share(arm: ArmResult) -> ArmResult:
    """With the mean of what is right and wrong as the share that it is, weighted or not."""
    rows = [replace(row, kind="binary") if row.metric == MEAN else row for row in arm.rows]
    checks = dict(arm.prior_checks)
    if MEAN in checks and (rest := checks[MEAN].majority_excluded) is not None:
        checks[MEAN] = replace(checks[MEAN], majority_excluded=replace(rest, kind="binary"))
    return replace(arm, rows=rows, prior_checks=checks)


def _kind_of_mean(pairs: Sequence[_Pairs], better: Mapping[str, bool | None], weights: Weights) -> Kind:
    """Of the mean over several tasks; with weights it is one of numbers, whatever they are.

    Raises:
        ValueError: if their metrics have none.
    """
    metrics = {pair.task: pair.metrics[0] for pair in pairs}
    kinds = {pair.kind(pair.metrics[0]) for pair in pairs}
    ways = {better[pair.key(pair.metrics[0])] for pair in pairs}
    one_scale = len(set(metrics.values())) == 1 or all(pair.inside(pair.metrics[0]) for pair in pairs)
    if ("log_ratio" in kinds and len(kinds) > 1) or len(ways) > 1 or not one_scale:
        listed = ", ".join(f"{metric} of {task}" for task, metric in metrics.items())
        raise ValueError(
            f"the metrics of several tasks must have one scale and one better direction to have a mean, got {listed}: "
            "choose by `metric`, or fewer `tasks`"
        )
    return "mean" if len(kinds) > 1 or (weights == "equal" and "binary" in kinds) else kinds.pop()
