"""What a comparison found: the numbers behind the table, for programs and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from laser_callback.results.examples import PairedExamples
from laser_callback.spectra.cut import CutSpectrum
from laser_callback.stats.holm import adjust
from laser_callback.stats.outcomes import PairedResult, row_named
from laser_callback.stats.priors import PriorChecks
from laser_callback.support.files import write_json
from laser_callback.support.plain_json import plain
from laser_callback.support.reading import Seconds, built, read_plain, typed

ORIGINAL_AND_REDUCED = ("original", "reduced")
"""What the two models of a comparison are called, unless they are two finished runs."""


@dataclass
class ArmResult:
    """One reduced arm against the original.

    Attributes:
        plan: the plan's text.
        rows: one per compared metric.
        prior_checks: by metric, of those of right and wrong for which the step returned answers and predictions.
        replay: how many layer calls before the first cut were not computed again, and why others were.
        seconds: time of this arm's passes; ``factorise_seconds`` is apart from it.
        spectra: of the matrices that the plan cuts, for pictures.
        passes: of a control that is the mean of several, each of them.
        ahead: of a control, the plan against it, example by example: a row's ``original`` is the control's value,
            ``reduced`` the plan's, and ``delta`` what the plan has more. Rows claim nothing but what ``p`` says.

    Raises:
        ValueError: if prior checks are of another metric than they stand for.
    """

    plan: str
    rows: list[PairedResult]
    prior_checks: dict[str, PriorChecks]
    replay: str
    seconds: Seconds
    factorise_seconds: Seconds
    spectra: list[CutSpectrum] = field(default_factory=list, repr=False)
    passes: list[ArmResult] = field(default_factory=list, repr=False)
    ahead: list[PairedResult] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        for metric, checks in self.prior_checks.items():
            if checks.metric != metric:
                raise ValueError(f"`prior_checks` must be by metric, got those of {checks.metric!r} for {metric!r}")
        doubts = {metric: checks.doubt for metric, checks in self.prior_checks.items()}
        self.rows = [replace(row, doubt=doubts.get(row.metric, row.doubt)) for row in self.rows]

    def __getitem__(self, metric: str) -> PairedResult:
        return row_named(metric, self.rows)

    def ahead_in(self, metric: str | None) -> PairedResult | None:
        """Of a control: the plan against it in ``metric``, where both have a value."""
        return next((row for row in self.ahead if row.metric == metric), None)

    def prior(self, metric: str | None) -> PriorChecks | None:
        """The prior checks of ``metric``, or else of the first metric that has some and a row."""
        found = {row.metric: self.prior_checks[row.metric] for row in self.rows if row.metric in self.prior_checks}
        return found.get(metric or "", next(iter(found.values()), None))

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "plan": self.plan,
            "rows": [row.to_dict() for row in self.rows],
            "prior_checks": {metric: checks.to_dict() for metric, checks in self.prior_checks.items()},
            "replay": self.replay,
            "seconds": self.seconds,
            "factorise_seconds": self.factorise_seconds,
            "spectra": [asdict(spectrum) for spectrum in self.spectra],
            "passes": [one.to_dict() for one in self.passes],
            "ahead": [row.to_dict() for row in self.ahead],
        }


@dataclass
class LaserResult:
    """The outcome of one evaluation with :class:`~laser_callback.compare.LaserCallback`.

    Attributes:
        arms: by plan name; a single plan has the name ``"laser"``. ``result["a"]["accuracy"].p`` is a p value.
        controls: for each plan, by ``"zeroed"`` (the same matrices at rho = 0, where the plan is not that itself),
            ``"random"`` (other matrices at the same rho) and ``"noise"`` (the same matrices with noise of the size of
            what is removed, the mean of its ``passes``), where controls were asked for.
        primary: the metric that carries the claim, if one was declared and logged.
        original_seconds: time of the original's passes.
        not_compared: metrics of the original without a counterpart, and why.
        examples: per-example outcomes, gathered from all ranks.
        provenance: versions, model, device and seed.
        base: the digest of the base's weights where plans cut the difference to them (delta mode), else ``None``.
        names: what the two models are called. Of two finished runs, which are no plan and its original, their own.
        rerun: the original once more under other arithmetic, against the original: what it answers otherwise, it does
            by arithmetic alone.
    """

    arms: dict[str, ArmResult]
    controls: dict[str, dict[str, ArmResult]]
    primary: str | None
    original_seconds: Seconds
    not_compared: dict[str, str]
    examples: PairedExamples = field(repr=False)
    provenance: dict[str, Any] = field(default_factory=dict)
    base: str | None = None
    names: tuple[str, str] = ORIGINAL_AND_REDUCED
    rerun: ArmResult | None = None

    def __post_init__(self) -> None:
        if not self.arms:
            raise ValueError("`arms` must hold at least one plan, got none")

    def __getitem__(self, name: str) -> ArmResult:
        return self.arms[name]

    def directed(self, higher_is_better: Mapping[str, bool]) -> LaserResult:
        """The same, with the better direction of metrics as it was declared, whatever they were logged as."""

        def turned(arm: ArmResult) -> ArmResult:
            better = higher_is_better.get
            rows, ahead = (
                [r if (b := better(r.metric)) is None else r.directed(b) for r in listed]
                for listed in (arm.rows, arm.ahead)
            )
            return replace(arm, rows=rows, ahead=ahead, passes=list(map(turned, arm.passes)))

        arms = {name: turned(arm) for name, arm in self.arms.items()}
        controls = {name: {k: turned(arm) for k, arm in of.items()} for name, of in self.controls.items()}
        return replace(self, arms=arms, controls=controls, rerun=None if self.rerun is None else turned(self.rerun))

    @property
    def is_of_runs(self) -> bool:
        """Whether it compares two finished runs, and no plan with its original."""
        return self.names != ORIGINAL_AND_REDUCED

    @property
    def is_one_look_of_several(self) -> bool:
        """Whether a validation of ``fit`` has given it: then its p values are exploratory, one for each look."""
        return self.provenance.get("loop") == "fit"

    def to_dict(self) -> dict[str, Any]:
        """Ready for strict JSON; without the examples (see :meth:`PairedExamples.write`)."""
        data = {
            "arms": {name: arm.to_dict() for name, arm in self.arms.items()},
            "controls": {
                name: {kind: arm.to_dict() for kind, arm in controls.items()}
                for name, controls in self.controls.items()
            },
            "primary": self.primary,
            "is_one_look_of_several": self.is_one_look_of_several,
            "original_seconds": self.original_seconds,
            "not_compared": self.not_compared,
            "duplicates_removed": self.examples.duplicates,
            "base": self.base,
            "names": self.names,
            "rerun": None if self.rerun is None else self.rerun.to_dict(),
            "provenance": self.provenance,
        }
        return plain(data)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LaserResult:
        """The inverse of :meth:`to_dict`: all numbers, and no examples but the count of duplicates.

        Raises:
            ValueError: naming the place of what is missing, unknown or of another type.
        """
        fields = typed(dict[str, Any], data)
        counted = {"duplicates": fields.pop("duplicates_removed", None)}
        return built(cls, fields, examples=built(PairedExamples, counted))

    def to_json(self, path: str | Path) -> None:
        """Write :meth:`to_dict`, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def from_json(cls, path: str | Path) -> LaserResult:
        """Read what :meth:`to_json` has written; see :meth:`from_dict`."""
        return read_plain(path, "path", cls.from_dict)


def adjust_together(arms: Sequence[ArmResult], primary: str | None) -> None:
    """Give the rows of several plans their roles, as one family.

    With one plan, the primary keeps its own p. With several, their primaries are Holm-adjusted among each other, since
    the best of several plans is then picked. All other tested rows of all plans share another Holm adjustment.

    Raises:
        ValueError: if ``primary`` names no row, listing those there are.
    """
    if len(arms) == 1:
        arms[0].rows = adjust(arms[0].rows, primary)
        return
    for is_primary in (True, False):
        places = [(arm, i) for arm in arms for i, row in enumerate(arm.rows) if (row.metric == primary) == is_primary]
        if is_primary and primary is not None and not places:
            raise ValueError(
                f"`primary` must name a row, got {primary!r}; the rows are {[r.metric for r in arms[0].rows]}"
            )
        # Names tell the rows of one family apart; here they only need to be distinct.
        family = [replace(arm.rows[i], metric=str(number)) for number, (arm, i) in enumerate(places)]
        for (arm, i), row in zip(places, adjust(family, None), strict=True):
            arm.rows[i] = replace(row, metric=arm.rows[i].metric)
