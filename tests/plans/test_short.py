"""Plans in short: a line at most, never taken for the plan itself."""

from __future__ import annotations

import pytest

from laser_callback.plans import LaserPlan, brief
from laser_callback.plans.short import told_apart

PLACES = "places-1+4+9-12+30+41+77"
MANY = LaserPlan.parse(", ".join(f"{layer}.writes@{PLACES}:keep=tail,scale=0.8,cut=delta" for layer in range(200)))


@pytest.mark.parametrize(
    "text",
    ["27.fc_in@0.01", "27.fc_in@0.01, -1.fc_out@0.1:band=0.5", "3.fc_in@places-0-4+7:keep=tail", "*.writes@0:bias=cut"],
)
def test_a_short_plan_is_itself(text):
    assert brief(text) == brief(LaserPlan.parse(text)) == text


@pytest.mark.parametrize(
    ("plan", "shown"),
    [
        (MANY, "0.writes@places(9):keep=tail,scale=0.8,cut=delta, and 199 more"),
        (str(MANY), "0.writes@places(9):keep=tail,scale=0.8,cut=delta, and 199 more"),
        (MANY.reductions[0], "0.writes@places(9):keep=tail,scale=0.8,cut=delta"),
        (
            ", ".join(f"{layer}.fc_in@0.01" for layer in range(9)),
            "0.fc_in@0.01, 1.fc_in@0.01, 2.fc_in@0.01, 3.fc_in@0.01, and 5 more",
        ),
        (f"/{'|'.join(f'layers.{i}.q' for i in range(30))}/@k2", "/layers.0.q|layers ... .28.q|layers.29.q/@k2"),
    ],
)
def test_a_long_one_fits_into_a_line_and_is_no_plan(plan, shown):
    assert brief(plan) == shown
    assert len(shown) < 100
    with pytest.raises(ValueError, match=r"must be|cannot read"):
        LaserPlan.parse(shown)


def test_one_reduction_that_is_long_by_itself():
    long = LaserPlan.parse(f"a.{'b' * 400}.3.{'c.' * 200}d@0.1, 2.fc_in@0.1")
    assert len(brief(long)) < 100
    assert brief(long).endswith(", and 1 more")


def test_plans_that_are_the_same_in_short_are_told_apart():
    places = [f"0.fc_in@places-{'+'.join(map(str, range(first, 40, 2)))}:keep=tail" for first in (0, 1)]
    assert brief(places[0]) == brief(places[1])
    found = told_apart([MANY, *(f"{MANY}, {extra}" for extra in places), "1.fc_in@0.1", MANY])
    short = "0.fc_in@places(20):keep=tail"
    base = brief(MANY).replace("199", "200")
    assert found == [brief(MANY), f"{base}, with {short} (1)", f"{base}, with {short} (2)", "1.fc_in@0.1", brief(MANY)]
    assert told_apart(places) == [f"{short} (1)", f"{short} (2)"]
    assert told_apart([]) == []


def test_a_plan_is_seen_in_short():
    assert repr(LaserPlan.parse("27.fc_in@0.01")) == "LaserPlan('27.fc_in@0.01')"
    assert len(repr(MANY)) < 120
