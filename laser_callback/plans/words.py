"""What a plan does, in words: for those sorts of cuts that a newcomer cannot read off its text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.rank_rules import listed_places
from laser_callback.plans.reduction import Reduction

_DROPPED = {"writes": "", "out_proj": "the attention of ", "fc_out": "the MLP of "}


def in_words(plan: LaserPlan) -> str:
    """Which layers it drops, which single directions it edits, and whether it cuts a difference; empty for all else.

    >>> in_words(LaserPlan.parse("12.writes@0, 14.out_proj@0:bias=cut"))
    'it drops layer 12 and the attention of layer 14 (all that they write is cut to zero)'
    >>> in_words(LaserPlan.parse("3.fc_in@places-0-4+9:keep=tail"))
    'it takes out 6 directions, chosen one by one, of 1 matrix'
    >>> in_words(LaserPlan.parse("*.all@0:cut=delta,scale=0.5"))
    'it keeps 0.5 of what fine-tuning has changed: weight interpolation with the base (WiSE-FT)'
    """
    parts = [*_drops(plan), *_directions(plan)]
    share = _interpolates(plan)
    if share:
        wise = "weight interpolation with the base (WiSE-FT)"
        parts.append(f"keeps {share:g} of what fine-tuning has changed: {wise}")
    elif plan.cuts_delta:
        rest = ", and nothing else" if all(r.cut == "delta" for r in plan) else ", and other weights themselves"
        parts.append(f"cuts what fine-tuning has changed{rest}")
    return f"it {'; it '.join(parts)}" if parts else ""


def _interpolates(plan: LaserPlan) -> float:
    """The one factor that all that it cuts of a difference is made smaller by; else 0."""
    shares = {r.scale if r.is_scaling and r.cut == "delta" and r.noise is None else 0.0 for r in plan}
    return shares.pop() if len(shares) == 1 else 0.0


def _drops(plan: LaserPlan) -> Iterator[str]:
    found = [f"{_DROPPED[r.matrix]}{_layer(r)}" for r in plan if _is_drop(r)]
    if found:
        they = "all that it writes" if len(found) == 1 else "all that they write"
        yield f"drops {_listed(found)} ({they} is cut to zero)"


def _is_drop(r: Reduction) -> bool:
    whole = r.rho == 0 and r.is_scaling and r.scale == 0 and r.cut == "weight" and r.noise is None
    return whole and (r.matrix == "writes" or (r.matrix in _DROPPED and r.bias == "cut"))


def _layer(r: Reduction) -> str:
    stack = f"{r.stack}." if r.stack else ""
    return "every layer" if r.layer == "*" else f"layer{'s' * isinstance(r.layer, str)} {stack}{r.layer}"


def _directions(plan: LaserPlan) -> Iterator[str]:
    counts: dict[str, list[int]] = {}
    for r in plan:
        places = listed_places(r.rho)
        if places is not None:
            named = "takes out" if r.scale == 0 else f"multiplies by {r.scale:g}"
            what = named if r.keep == "tail" else f"{named} all but"
            counts.setdefault(what, []).append(sum(stop - start for start, stop in places))
    for what, of_each in counts.items():
        number = f"{sum(of_each):,} direction{'s' * (sum(of_each) != 1)}"
        matrices = f"{len(of_each):,} matri{'x' if len(of_each) == 1 else 'ces'}"
        yield f"{what} {number}, chosen one by one, of {matrices}"


def _listed(parts: Iterable[str]) -> str:
    *first, last = parts
    if len(first) > 5:
        return f"{', '.join(first[:4])} and {len(first) - 3} more"
    return f"{', '.join(first)} and {last}" if first else last
