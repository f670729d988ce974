"""Result files with any one value taken out or changed: read as what they are, or refused with the place."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from classifier import compared, searched

from laser_callback.plans.plan import LaserPlan
from laser_callback.reports import search_terminal, terminal
from laser_callback.reports.loggers import tables
from laser_callback.reports.page import page
from laser_callback.results.evidence import numbers_of
from laser_callback.results.search import SearchResult, result_of

GONE = object()
VALUES = (GONE, None, 5, -1, 1.5, 10**400, math.nan, True, "x", "a|`\n[/red]", [], {}, [[1]], {"a": 1})
WRITTEN = compared()
RESULTS = {"comparison": WRITTEN, "search": searched()}


def places(data: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of every value, the first ones of each list."""
    yield place
    inside = data.items() if isinstance(data, dict) else enumerate(data[:1]) if isinstance(data, list) else ()
    for key, value in inside:
        yield from places(value, (*place, key))


def changed(data: Any, place: tuple[Any, ...], value: Any) -> Any:
    data = copy.deepcopy(data)
    inside = data
    for key in place[:-1]:
        inside = inside[key]
    if value is GONE:
        del inside[place[-1]]
    else:
        inside[place[-1]] = value
    return data


@pytest.mark.slow
@pytest.mark.parametrize("name", RESULTS)
def test_any_value_may_be_another(name):
    data = json.loads(json.dumps(RESULTS[name].to_dict()))
    read = 0
    for place in places(data):
        for value in VALUES if place else VALUES[1:]:
            try:
                found = result_of(changed(data, place, value) if place else value)
            except ValueError as error:
                told = str(error)
                assert "\n" not in told, (place, value, told)
                assert len(told) < 600, (place, value, told)
                continue
            read += 1
            plain = search_terminal.plain if isinstance(found, SearchResult) else terminal.plain
            try:
                assert plain(found, 80)
            except Exception as error:
                raise AssertionError((place, value)) from error
            tables(found)
            json.dumps(found.to_dict(), allow_nan=False)
    assert read > 100


@pytest.mark.slow
def test_a_page_is_made_of_whatever_is_read():
    data = json.loads(json.dumps(RESULTS["comparison"].to_dict()))
    arm = data["arms"]["laser"]
    data["controls"], arm["spectra"], arm["rows"] = {}, arm["spectra"][:1], arm["rows"][:1]
    for place in places(data):
        if place[-1:] in (("places",), ("values",), ("shape",), ("removed",)) or "spectra" in place or len(place) < 5:
            for value in (None, -1, math.nan, [], {}, "x"):
                try:
                    found = result_of(changed(data, place, value) if place else value)
                except ValueError:
                    continue
                assert "</html>" in page(found, []), (place, value)


@pytest.mark.parametrize("place", [("original_seconds",), ("arms", "laser", "seconds")])
def test_time_is_not_negative(place):
    data = changed(json.loads(json.dumps(WRITTEN.to_dict())), place, -5)
    with pytest.raises(ValueError, match=r"seconds`: expected a number of seconds, 0 or more, got -5"):
        result_of(data)


def test_numbers_of_a_file_that_is_no_result_are_refused():
    plan = LaserPlan.parse("1.fc_in@0.1")
    for data in ({}, {"arms": 5}, {"arms": {}}, {"confirmed": None}, {"candidates": [], "arms": {}}):
        with pytest.raises(ValueError, match=r"no result|is missing|expected|must hold"):
            numbers_of(data, plan)
