"""A cleanup read back from its report, in the terminal and as a page."""

from __future__ import annotations

import re

import pytest
from classifier import cleaned
from html_page import Page

from laser_callback.cli.commands import main
from laser_callback.reports import save_page
from laser_callback.reports.page import page
from laser_callback.reports.pictures import figures
from laser_callback.results import CleanupResult
from laser_callback.support.files import write_json


@pytest.fixture
def written(tmp_path, result):
    path = tmp_path / "epoch=1.cleaned.json"
    write_json(path, cleaned(result).to_dict())
    return path


def test_a_cleanup_is_read_as_it_was_written(written, result):
    found = CleanupResult.from_json(written)
    assert found.to_dict() == cleaned(result).to_dict()
    assert (found.verdict, found.four_parts) == (cleaned(result).verdict, cleaned(result).four_parts)
    assert (found.report, found.gates.failure) == (written, "out of <i>time</i>")
    data = cleaned().to_dict()
    del data["others"][0]["sign"]
    with pytest.raises(ValueError, match=r"`others\[0\]`: `sign` is missing"):
        CleanupResult.from_dict(data)


def test_the_page_holds_what_the_terminal_does_and_the_way_to_it(tmp_path, result):
    save_page(cleaned(result), tmp_path / "page.html")
    shown = Page.of((tmp_path / "page.html").read_text(encoding="utf-8"))
    titles = ["Held against each other", "Confirmed on unseen examples", "Constraints", "Gates", "Other tasks"]
    assert shown.text("h2")[:5] == titles
    assert {"Map of the search", "Race", "Gain against fluency", "Provenance"} <= set(shown.text("h2"))
    cells = " | ".join(text for text in shown.text("td", "th", "bdi", "span"))
    assert re.search(r"laser \|.* 0\.9 \| 0\.4 \| 0\.85 \| went to confirmation \|", cells, re.DOTALL)
    assert all(text in shown.text("td") for text in ("0.85*", "0.7*"))
    assert "Healed 50% of what 1 damaged lost; target: 133% retained." in shown.text("p")
    assert "out of <i>time</i>" in shown.text("p")
    assert {"saved/epoch=1.cleaned.ckpt", "saved/epoch=1<b>.ckpt"} <= set(shown.text("code"))
    assert f"{result['laser']['<i>acc</i>'].fixed} / " in cells


def test_without_a_confirmation_nothing_is_claimed():
    outcome = cleaned()
    outcome.plan = outcome.checkpoint = outcome.tried = outcome.gates = None
    outcome.others, outcome.judgements = (), []
    shown = Page.of(page(outcome))
    assert shown.text("h1") == ["Keep the model as trained"]
    assert "Not confirmed: nothing was better in the race." in shown.text("p")
    assert not {"Constraints", "Gates", "Other tasks", "Examples fixed and broken"} & set(shown.text("h2"))


def test_the_command_shows_a_cleanup(written, result, capsys):
    main(["report", str(written)])
    told = capsys.readouterr().out
    assert "cleaned by 0.q_proj@0: it is right more often" in " ".join(told.split())
    assert "healed 50% of what 1 damaged lost" in " ".join(told.split())
    assert "original against reduced" in " ".join(told.split())
    main(["report", str(written), "--html", str(written.with_suffix(".html"))])
    assert "Held against each other" in written.with_suffix(".html").read_text(encoding="utf-8")
    assert {"map", "trades", "comparison"} <= set(figures(cleaned(result)))
