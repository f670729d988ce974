"""The numbers that go with a shipped plan: what was confirmed of it, how, on how many examples of which seed.

Contract: whatever a comparison or a search returns, or has written as JSON, becomes one small dictionary of plain data
about one plan. Numbers of another plan are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.short import brief
from laser_callback.results.comparison import ORIGINAL_AND_REDUCED, LaserResult
from laser_callback.results.search import SearchResult, result_of


def numbers_of(
    result: LaserResult | SearchResult | Mapping[str, Any] | None, plan: LaserPlan, base: str | None = None
) -> dict[str, Any]:
    """What ``result`` shows of ``plan``.

    Args:
        result: of a comparison or a search, or its dictionary form; ``None`` for no numbers.
        plan: that is shipped.
        base: in delta mode, the digest of the base that it is cut against.

    Returns:
        Nothing without ``result``; else ``comparison``, the dictionary form of a :class:`LaserResult` with one arm,
        and, of a search, ``verdict``, ``judgements``, ``sets``, ``seed``, ``warnings``.

    Raises:
        ValueError: if ``result`` has confirmed nothing, is about another plan, or is no result.
    """
    if result is None:
        return {}
    data = (result_of(result) if isinstance(result, Mapping) else result).to_dict()
    searched = "confirmed" in data
    if searched and data["confirmed"] is None:
        raise ValueError(f"`result` is of a search that has confirmed nothing: {data['reason']}")
    if searched and plan.cuts_delta and data["base"] != base:
        raise ValueError(f"`result` is about cuts against the base {data['base']}, not {base}: give the same base")
    comparison = data["confirmed"] if searched else data
    if tuple(comparison["names"]) != ORIGINAL_AND_REDUCED:
        raise ValueError(f"`result` must be about the plan {brief(plan)}, got one of two finished runs")
    arms = {name: arm for name, arm in comparison["arms"].items() if LaserPlan.parse(arm["plan"]) == plan}
    if not arms:
        about = "; ".join(brief(arm["plan"]) for arm in comparison["arms"].values())
        raise ValueError(f"`result` must be about the plan {brief(plan)}, got one about {about}")
    name, arm = next(iter(arms.items()))
    # The spectra are for pictures, and larger than all the rest; of controls the rows are told, and how far the plan is
    # ahead of them by the metric that is claimed.
    claimed = comparison["primary"]
    comparison = {
        **comparison,
        "arms": {name: {**arm, "spectra": []}},
        "controls": {
            name: {
                kind: {
                    **one,
                    "spectra": [],
                    "prior_checks": {},
                    "passes": [],
                    "ahead": [row for row in one["ahead"] if claimed in (None, row["metric"])],
                }
                for kind, one in comparison["controls"].get(name, {}).items()
            }
        },
    }
    if not searched:
        return {"comparison": comparison}
    recommended = data["plan"] is not None
    return {
        "comparison": comparison,
        "verdict": f"{'recommended' if recommended else 'not recommended'}: {data['reason']}",
        "judgements": data["judgements"],
        "sets": data["sets"],
        "seed": data["settings"].get("seed"),
        "warnings": data["warnings"],
    }
