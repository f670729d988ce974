"""The map of a search cell by cell, and its rows."""

from __future__ import annotations

import io
import json
import math

from candidates import candidate
from rich.console import Console, Group

from laser_callback.reports.heat_map import heat_map, short_rho
from laser_callback.results.candidates import Estimate, to_rows


def test_map_cells():
    cells = [
        candidate(0, "q_proj", 0.0, -0.1),
        candidate(0, "q_proj", 0.05, -1.0),  # the best of its cell
        candidate(0, "q_proj", 0.9, 3.0),
        candidate(0, "fc_in", 0.01, -0.4),
        candidate(1, "q_proj", 0.01, -0.2, status="chosen"),
        candidate(1, "fc_in", 0.01, 0.2),
        candidate(2, "q_proj", 0.1, math.nan),
        candidate(2, "fc_in", 0.1, math.inf),
        candidate(3, "q_proj", 0.1, -math.inf),
        candidate(3, "q_proj", 0.0, 0.0),
        candidate(3, "fc_in", 0.1, 0.0),
        candidate(4, "q_proj", 0.1, 0.0),
        candidate(4, "fc_in", 0.1, 0.0),
        candidate(None, None, 0.2, -0.01),
    ]
    text = io.StringIO()
    Console(file=text, width=80, color_system=None).print(Group(*heat_map(cells, lambda c: c.score, "nats")))
    told = " ".join(text.getvalue().split())
    # Thresholds 0.4, 0.2 and 0.1, since the best is 1 nat.
    assert told.startswith(
        "layer q_proj fc_in other "
        "0 ██ .05 ██ .01 "
        "1 ▓▓ .01◂ · "
        "2 ? · "
        "3-4 · · "
        "none ░░ .2 "
        "░ lower ▒ by 0.1 ▓ by 0.2 █ by 0.4 nats or more (best 1), at the rho beside it;"
    )
    assert "? no number" in told
    assert "◂ a cut here was chosen" in told


def test_maps_without_anything_to_draw():
    assert heat_map([candidate(0, "fc_in", 0.1)], lambda c: c.score, "nats") == []
    for score in (0.0, 2.0, math.nan, math.inf, -math.inf):
        (line,) = heat_map([candidate(0, "fc_in", 0.1, score)], lambda c: c.score, "nats")
        assert str(line).startswith("nothing lowers it")
    for score in (-1e-9, -1e-300, -7e300):
        table, _ = heat_map([candidate(0, "fc_in", 0.1, score)], lambda c: c.score, "nats")
        assert table.row_count == 1
    assert [short_rho(rho) for rho in (0, 0.005, 0.0125, 0.5, 1.0)] == ["0", ".005", ".0125", ".5", "1"]


def test_rows():
    candidates = [
        candidate(0, "fc_in", 0.0, math.nan),
        candidate(0, "fc_in", 0.1, -0.5),
        candidate(1, "fc_in", 0.0, 0.25, examples=9, gain=Estimate(0.5, 0.25), loss=Estimate(math.inf), reason="late"),
        candidate(1, "fc_in", 0.1, -0.5),
        candidate(None, None, 0.1),
        candidate(1, "fc_in", 0.1, -math.inf, base="0.fc_in@0"),
        candidate(1, "fc_in", 0.2, 7.0, base="0.fc_in@0", status="chosen"),
    ]
    rows = to_rows(candidates)
    json.dumps(rows, allow_nan=False)
    assert [row["step"] for row in rows] == [1, 1, 1, 1, 1, 2, 2]
    assert [row["rank"] for row in rows] == [None, 1, 3, 2, None, None, 1]
    assert [row["score"] for row in rows] == [None, -0.5, 0.25, -0.5, None, None, 7.0]
    assert rows[2] == {
        "step": 1,
        "base": "",
        "plan": "1.fc_in@0",
        "strategy": "laser",
        "layer": 1,
        "kind": "fc_in",
        "rho": 0.0,
        "score": 0.25,
        "rank": 3,
        "examples": 9,
        "gain": 0.5,
        "gain_lower": 0.25,
        "gain_upper": None,
        "loss": None,
        "loss_lower": None,
        "loss_upper": None,
        "status": "screened out",
        "reason": "late",
    }
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    assert (rows[4]["layer"], rows[4]["kind"], rows[4]["plan"]) == (None, None, "/x.*/@0.1")
