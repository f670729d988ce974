"""The numbers of a row of a comparison as text, the same in every report, and what they show as a sentence.

Contract: a sentence can be repeated without claiming more than was shown. It says of what, how sure, how much at least
and at most; of what was not shown it says what is ruled out.
"""

from __future__ import annotations

import math

from laser_callback.plans.short import brief
from laser_callback.results.comparison import ArmResult, LaserResult
from laser_callback.results.flips import claim_row
from laser_callback.stats.outcomes import ALPHA, PairedResult
from laser_callback.stats.priors import PriorChecks

CONTROLS = {"zeroed": "same matrix zeroed", "random": "random matrix, same rho", "noise": "noise of the same size"}
"""What each control is, in a list of them."""
_SAID = {"zeroed": "the same matrix zeroed", "random": "a random matrix at the same rho", "noise": CONTROLS["noise"]}
SHARES = ("accuracy", "robustness", "consistency", "agreement")
"""A mean from 0 to 1 whose name holds one of these is a share, shown in percent."""


def is_share(row: PairedResult) -> bool:
    """Whether the metric is a share."""
    beyond = any(value < 0 or value > 1 for value in (row.original, row.reduced))  # as one in percent already
    return row.kind == "binary" or (
        row.kind in ("mean", "pair") and not beyond and any(word in row.metric for word in SHARES)
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
    """The ends of the 95 % interval of the change; nothing if it was not tested."""
    if row.lower is None or row.upper is None:
        return ""
    if is_share(row) or row.kind == "log_ratio":
        ends = _hundredths(row.lower, "+"), _hundredths(row.upper, "+")
    else:
        ends = f"{row.lower:+.2g}", f"{row.upper:+.2g}"
    return ", ".join(map(_signed, ends))


def _signed(number: str) -> str:
    """A number that begins with its sign; zero has none."""
    return number if float(number.rstrip("%")) else number[1:]


def p_text(row: PairedResult) -> str:
    """The p value that the row claims by; nothing if it was not tested."""
    p = row.p_adjusted if row.role == "holm" else row.p
    if p is None:
        return ""
    return "<.0001" if p < 1e-4 else f"{p:.4f}".lstrip("0") if p < 1 else "1"


def cell_text(text: object) -> str:
    """Text for a cell of a table in Markdown, from which no markup is read."""
    return " ".join(str(text).translate({ord(mark): f"&#{ord(mark)};" for mark in r"\`*{}[]<>|#&"}).split())


def change_text(row: PairedResult) -> str:
    """The change of the metric with its interval."""
    interval = interval_text(row)
    return f"{delta_text(row, row.delta)}{f' [{interval}]' if interval else ''}"


def finding(row: PairedResult) -> str:
    """What a row shows, as a sentence without its full stop: of what, how sure, how much, and what is ruled out."""
    values = f"{value_text(row, row.original)} to {value_text(row, row.reduced)}"
    if row.lower is None or row.upper is None or row.p is None:
        return (
            f"{row.metric} goes from {values} on {row.sample}, and is not tested{f': {row.note}' if row.note else ''}"
        )
    if row.verdict == "exploratory":
        return f"{row.metric} goes from {values} on {row.sample}: {change_text(row)}, of which nothing is claimed"
    p = f"p {p_text(row)}" if p_text(row).startswith("<") else f"p = {p_text(row)}"
    p += " after Holm" * (row.role == "holm")
    if row.verdict == "no difference shown":
        return f"no change of {row.metric} is shown on {row.sample} ({p}): {_possible(row, row.lower, row.upper)}"
    way = "rises" if row.delta > 0 else "falls"
    least, most = _sizes(row, *sorted((abs(row.lower), abs(row.upper))))
    size = f"by at least {least} and at most {most} at 95 % confidence"
    if row.lower <= 0 <= row.upper:  # a test of few clusters, and the interval, may disagree
        size = f"but its interval at 95 % confidence, [{interval_text(row)}], does not leave 0 out"
    return f"{row.metric} {way} from {values} on {row.sample} ({p}), {size}"


def prior_text(row: PairedResult, checks: PriorChecks) -> str:
    """What the prior check of a row's metric says: something only where a gain is shown."""
    if checks.delta <= 0:
        return "no gain to explain"
    p = row.p_adjusted if row.role == "holm" else row.p
    if p is None or p > ALPHA:
        return "no gain is shown, so that there is none to explain"
    return checks.doubt or "the gain holds outside of the answers said most"


def _possible(row: PairedResult, lower: float, upper: float) -> str:
    """What is not ruled out where no change is shown."""
    if not lower <= 0 <= upper:
        return f"its own interval, which is not adjusted, is [{interval_text(row)}]"
    if lower == upper:
        return "it is the same on every one of them, which rules out nothing about others"
    fall, rise = _sizes(row, abs(lower), upper)
    if not lower or not upper:
        way, most = ("risen", rise) if upper else ("fallen", f"{fall} {rise.partition(' ')[2]}".rstrip())
        return f"it may be as it was, or have {way} by up to {most}, and by no more at 95 % confidence"
    return f"it may have fallen by up to {fall} or risen by up to {rise}, and by no more at 95 % confidence"


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
    text = f"with {brief(arm.plan)}, {finding(row)}"
    checks = arm.prior_checks.get(row.metric)
    if row.doubt and row.verdict in ("in doubt", "higher", "lower"):
        text += f"; but {row.doubt}"
    elif row.verdict == "better" and checks is not None and checks.worth_less:
        text += f"; of {' and '.join(f'other {by}s' for by in checks.worth_less)} much less is shown"
    told = []
    for kind, control in result.controls.get(name, {}).items():
        for own in (own for own in control.rows if own.metric == row.metric):
            change = delta_text(own, own.delta) if math.isfinite(own.delta) else f"gives {own.reduced:g}"
            ahead = control.ahead_in(own.metric) if kind == "noise" else None  # what the others leave open
            told.append(f"{_SAID[kind]} {change}{'' if ahead is None else f' ({ahead_text(ahead)})'}")
    return f"{text}; controls: {', '.join(told)}" if told else text
