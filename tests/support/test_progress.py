"""Progress: bars with the leaders above them in a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import re

from candidates import proposed
from rich.console import Console

from laser_callback.reports.search_terminal import leaders
from laser_callback.results.candidates import Estimate
from laser_callback.support.progress import PhaseProgress


def table():
    candidates = [proposed(f"{layer}.fc_in@0.1", examples=38, gain=Estimate(0.05, 0.01, 0.09)) for layer in range(7)]
    candidates[1].loss = Estimate(-0.25, -0.5, -0.125)
    return leaders(candidates, ("first_token_accuracy",), "log_loss")


def run(terminal: bool) -> str:
    text = io.StringIO()
    progress = PhaseProgress(console=Console(file=text, force_terminal=terminal, width=100, color_system=None))
    progress.show(table())
    with progress.phase("race: [red] 48 candidates", total=10):
        progress.advance(5)
    return text.getvalue()


def test_the_best_so_far_stands_above_the_bar_and_goes_with_it():
    text = run(terminal=True)
    assert text.index("best so far") < text.index("0.fc_in@0.1") < text.index("left")
    assert "+5.0 [+1.0, +9.0]" in text
    assert "-0.25 [-0.50, -0.12]" in text
    assert "3.fc_in@0.1" not in text  # three lead
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).splitlines()[-1]
    assert re.fullmatch(r"race: \[red\] 48 candidates  0\.\d s", last.strip("\r"))


def test_without_a_terminal_there_are_only_lines():
    assert re.fullmatch(r"race: \[red\] 48 candidates  0\.\d s\n", run(terminal=False))


def test_nothing_where_it_is_off():
    text = io.StringIO()
    progress = PhaseProgress(enabled=False, console=Console(file=text, force_terminal=True))
    progress.show(table())
    with progress.phase("race"):
        progress.advance(1)
    assert text.getvalue() == ""
