"""The numbers of a row of a comparison as text, the same in every report, and what they show as a sentence.

Contract: a sentence can be repeated without claiming more than was shown. It says of what, how sure, how much at least
and at most; of what was not shown it says what is ruled out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from laser_callback.plans.short import brief
from laser_callback.results.comparison import ORIGINAL_AND_REDUCED, ArmResult, LaserResult
from laser_callback.results.flips import claim_row
from laser_callback.stats.outcomes import ALPHA, PairedResult
from laser_callback.stats.priors import PriorChecks
from laser_callback.support.suggest import clipped

_QUESTION = 20  # characters of a paragraph that may be one
CONTROLS = {"zeroed": "same matrix zeroed", "random": "random matrix, same rho", "noise": "noise of the same size"}
"""What each control is, in a list of them."""
_SAID = {"zeroed": "the same matrix zeroed", "random": "a random matrix at the same rho", "noise": CONTROLS["noise"]}
_ROLES = re.compile(r"\b(?:the )?(original|reduced)(?: model)?\b")
SHARES = ("accuracy", "exact_match", "robustness", "consistency", "agreement")
"""A mean from 0 to 1 whose name holds one of these is a share, shown in percent."""
NO_INTERVAL = "interval -: the same on every unit, which rules out nothing about others"
"""What the ``-`` of :func:`interval_text` means."""


def is_share(row: PairedResult) -> bool:
    """Whether the metric is a share."""
    beyond = any(value < 0 or value > 1 for value in (row.original, row.reduced))  # as one in percent already
    return row.kind == "binary" or (
        row.kind in ("mean", "pair", "pooled") and not beyond and any(word in row.metric for word in SHARES)
    )


def percent(value: float, sign: str = "") -> str:
    """A share in percent; what is no number is no percentage."""
    return f"{_hundredths(value, sign)}%" if math.isfinite(value) else f"{value:{sign}}"


def _hundredths(value: float, sign: str = "") -> str:
    number = 100 * value
    return f"{number:{sign}.1f}" if abs(number) < 1e6 else f"{number:{sign}.2e}"


def value_text(row: PairedResult, value: float) -> str:
    """A value of the metric."""
    return percent(value) if is_share(row) else f"{value:#.3g}"


def delta_text(row: PairedResult, value: float) -> str:
    """A change of the metric."""
    return _signed(percent(value, "+") if is_share(row) or row.kind == "log_ratio" else f"{value:+.2g}")


def interval_text(row: PairedResult) -> str:
    """The ends of the 95 % interval of the change; nothing if it was not tested, ``-`` if no unit has changed."""
    if row.lower is None or row.upper is None:
        return ""
    if without_variance(row):
        return "-"
    if is_share(row) or row.kind == "log_ratio":
        ends = _hundredths(row.lower, "+"), _hundredths(row.upper, "+")
    else:
        ends = f"{row.lower:+.2g}", f"{row.upper:+.2g}"
    return ", ".join(map(_signed, ends))


def without_variance(row: PairedResult) -> bool:
    """Whether a mean is the same on every unit: its interval is a point, which is no certainty about other units."""
    return row.lower is not None and row.lower == row.upper


def _signed(number: str) -> str:
    """A number that begins with its sign; zero has none."""
    return number if float(number.rstrip("%")) else number[1:]


def p_text(row: PairedResult) -> str:
    """The p value that the row claims by; nothing if it was not tested."""
    p = row.p_adjusted if row.role == "holm" else row.p
    if p is None:
        return ""
    return "<.0001" if p < 1e-4 else f"{p:.4f}".lstrip("0") if p < 1 else "1"


def is_adjusted(rows: Iterable[PairedResult]) -> bool:
    """Whether several rows share a level, so that their p is Holm's; of one it is its own."""
    return sum(row.role == "holm" for row in rows) > 1


def end_of(prompt: str, most: int) -> str:
    r"""The end of a prompt, where its question is: the last paragraph, or so many characters of it.

    >>> end_of("Question: 1 + 1? Answer: 2\n\nQuestion: 2 + 3? Answer:", 40)
    '...Question: 2 + 3? Answer:'
    """
    end = prompt.rstrip()[-most:]
    paragraph = end.rpartition("\n\n")[2]
    end = paragraph if len(paragraph) >= _QUESTION else end  # "Answer:" alone asks nothing
    return end if end == prompt.rstrip() else f"...{end}"


def cell_text(text: object) -> str:
    """Text for a cell of a table in Markdown, from which no markup is read."""
    return " ".join(str(text).translate({ord(mark): f"&#{ord(mark)};" for mark in r"\`*{}[]<>|#&"}).split())


def change_text(row: PairedResult) -> str:
    """The change of the metric with its interval."""
    interval = interval_text(row)
    return f"{delta_text(row, row.delta)}{f' [{interval}]' if interval else ''}"


def finding(row: PairedResult, of_several: bool = False) -> str:
    """What a row shows, as a sentence without its full stop: of what, how sure, how much, and what is ruled out.

    Args:
        row: the row.
        of_several: whether others share its level, if it has no level of its own.
    """
    values = f"{value_text(row, row.original)} to {value_text(row, row.reduced)}"
    if row.lower is None or row.upper is None or row.p is None:
        return (
            f"{row.metric} goes from {values} on {row.sample}, and is not tested{f': {row.note}' if row.note else ''}"
        )
    if row.verdict == "exploratory":
        return f"{row.metric} goes from {values} on {row.sample}: {change_text(row)}, of which nothing is claimed"
    p = f"p {p_text(row)}" if p_text(row).startswith("<") else f"p = {p_text(row)}"
    p += " after Holm" * (row.role == "holm" and (of_several or row.p_adjusted != row.p))
    if row.verdict == "no difference shown":
        return f"no change of {row.metric} is shown on {row.sample} ({p}): {_ruled_out(row, row.lower, row.upper)}"
    way = "rises" if row.delta > 0 else "falls"
    least, most = _sizes(row, *sorted((abs(row.lower), abs(row.upper))))
    size = f"by at least {least} and at most {most} at 95 % confidence"
    if row.lower <= 0 <= row.upper:  # a test of few clusters, and the interval, may disagree
        size = f"but its interval at 95 % confidence, [{interval_text(row)}], does not leave 0 out"
    return f"{row.metric} {way} from {values} on {row.sample} ({p}), {size}"


def in_names(text: str, names: tuple[str, str]) -> str:
    """A sentence of this package about "the original" and "the reduced model", with what they are called."""
    called = dict(zip(ORIGINAL_AND_REDUCED, names, strict=True))
    return text if names == ORIGINAL_AND_REDUCED else _ROLES.sub(lambda role: called[role[1]], text)


def heads(names: tuple[str, str], most: int = 28) -> tuple[str, str]:
    """Two names for the heads of columns: of paths and of models with an owner the last part that tells them apart."""
    parts = zip(*(reversed(name.rstrip("/").split("/")) for name in names), strict=False)
    first, second = (clipped(name, most) for name in next((pair for pair in parts if pair[0] != pair[1]), names))
    clash = first == second or {first, second} & {"metric", "label", "right answer", "p", "n", "verdict"}
    return (f"1: {first}", f"2: {second}") if clash else (first, second)


def noise_text(result: LaserResult, name: str) -> str:
    """How much of a claim's outcomes the original's own rerun answers otherwise; empty without a rerun."""
    row = claim_row(result, name)
    again = (
        None
        if result.rerun is None or row is None
        else next((one for one in result.rerun.rows if one.metric == row.metric), None)
    )
    if row is None or again is None:
        return ""
    original, reduced = (in_names(who, result.names) for who in ("the original", "the reduced model"))
    if again.fixed is None or again.broken is None or row.fixed is None or row.broken is None:
        return f"by arithmetic alone {row.metric} of {original} changes by {change_text(again)}"
    flips, ups = again.fixed + again.broken, f"{again.fixed:,} up, {again.broken:,} down"
    of = f"{flips:,} of {again.examples or again.n:,} outcomes of {original} flip ({ups})"
    return f"by arithmetic alone {of}, and {row.fixed + row.broken:,} differ in {reduced}"


def shown_priors(arm: ArmResult, metric: str | None) -> list[PriorChecks]:
    """The prior checks that are shown: those of ``metric``, or else the first, and of each gain that they doubt."""
    shown = [checks] if (checks := arm.prior(metric)) else []
    in_doubt = [row.metric for row in arm.rows if row.verdict == "in doubt" and row.metric in arm.prior_checks]
    return shown + [arm.prior_checks[name] for name in in_doubt if name not in [checks.metric for checks in shown]]


def prior_text(row: PairedResult, checks: PriorChecks, names: tuple[str, str] = ORIGINAL_AND_REDUCED) -> str:
    """What the prior check of a row's metric says: something only where a gain is shown."""
    if checks.delta <= 0:
        return "no gain to explain"
    p = row.p_adjusted if row.role == "holm" else row.p
    if p is None or p > ALPHA:
        return "no gain is shown, so that there is none to explain"
    return in_names(checks.doubt, names) or f"the gain holds {checks.where}"


def _ruled_out(row: PairedResult, lower: float, upper: float) -> str:
    """What is ruled out where no change is shown: a change beyond the ends of the interval."""
    if not lower <= 0 <= upper:
        return f"its own interval, which is not adjusted, is [{interval_text(row)}]"
    if without_variance(row):
        return "it is the same on every one of them, which rules out nothing about others"
    ends = {"fall" if row.higher_is_better is not False else "gain": -lower}
    ends["rise" if row.higher_is_better is not True else "gain"] = upper
    (first, one), (second, two) = sorted(ends.items(), key=lambda end: end[0] != "gain")
    sizes = _sizes(row, one, two)
    unit = sizes[1].partition(" ")[2]
    told = [
        f"a {way} above {size}" if end else f"any {way}"
        for way, size, end in (
            (first, f"{sizes[0]} {unit}".rstrip() if not two else sizes[0], one),
            (second, sizes[1], two),
        )
    ]
    return f"{' and '.join(told)} are ruled out at 95 % confidence"


def _sizes(row: PairedResult, one: float, two: float) -> tuple[str, str]:
    """The sizes of two changes, and behind the second their unit."""
    if row.kind != "log_ratio" and not is_share(row):
        return f"{one:.2g}", f"{two:.2g}"
    return _hundredths(one), f"{_hundredths(two)} {'%' if row.kind == 'log_ratio' else 'points'}"


def ahead_text(row: PairedResult) -> str:
    """What a row of :attr:`ArmResult.ahead` shows: whether the plan's cut is better than a control."""
    if row.p is None:
        return "whether the cut is better is not tested"
    if row.p > ALPHA:
        return "the cut is not shown to be better"
    if row.higher_is_better is None:
        return f"the cut is {'higher' if row.delta > 0 else 'lower'}"
    return f"the cut is {'better' if (row.delta > 0) == row.higher_is_better else 'worse'}"


def control_text(kind: str, control: ArmResult) -> str:
    """What a control is, in a list of them."""
    return CONTROLS[kind] + (f", {len(control.passes)} seeds" if control.passes else "")


def verdict(result: LaserResult, name: str) -> str:
    """What was shown of the plan ``name``, of what, how sure, what speaks against it, and what the controls do."""
    row, arm = claim_row(result, name), result[name]
    if row is None:
        return f"nothing could be tested of {brief(arm.plan)}"
    beside = f" in place of {result.names[0]}" if result.is_of_runs else ""
    family = [one for plan in result.arms.values() for one in plan.rows]
    text = f"with {brief(arm.plan)}{beside}, {finding(row, is_adjusted(family))}"
    checks = arm.prior_checks.get(row.metric)
    if row.doubt and row.verdict in ("in doubt", "higher", "lower"):
        text += f"; but {in_names(row.doubt, result.names)}"
    elif row.verdict == "better" and checks is not None and checks.worth_less:
        text += f"; of {' and '.join(f'{by}s' for by in checks.worth_less)} that are not among these much less is shown"
    if noise := noise_text(result, name):
        text += f"; {noise}"
    return "; ".join(filter(None, [text, controls_text(result, name)]))


def controls_text(result: LaserResult, name: str) -> str:
    """What the controls of the plan ``name`` do, and which of them gain as much as it; empty without controls."""
    row, told, as_much = claim_row(result, name), [], []
    for kind, control in result.controls.get(name, {}).items():
        for own in (own for own in control.rows if row is not None and own.metric == row.metric):
            change = delta_text(own, own.delta) if math.isfinite(own.delta) else f"gives {own.reduced:g}"
            ahead = control.ahead_in(own.metric) if kind == "noise" else None  # what the others leave open
            told.append(f"{_SAID[kind]} {change}{'' if ahead is None else f' ({ahead_text(ahead)})'}")
            if row is not None and row.verdict == "better" and ahead is None and abs(own.delta) >= abs(row.delta):
                as_much += [_SAID[kind]] * (own.delta * row.delta > 0)
    listed = f"controls: {', '.join(told)}" if told else ""
    return f"{listed}; as much is gained by {' and '.join(as_much)}" if as_much else listed
