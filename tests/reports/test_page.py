"""The page: it says what the result says, loads nothing, trusts no text, and its script runs under its own policy."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from classifier import HOSTILE, LABELS, PLAN, RIGHT_TO_LEFT, Classifier, cleaned, compared, searched
from html_page import Page

from laser_callback.reports.drawing import labels, styled
from laser_callback.reports.page import page as page_of
from laser_callback.reports.page import save_page
from laser_callback.reports.page_columns import code, flip_tables, foreign
from laser_callback.reports.page_search import context_of
from laser_callback.reports.pictures import one
from laser_callback.reports.row_text import ahead_text, delta_text, interval_text, p_text
from laser_callback.reports.svg import inline
from laser_callback.reports.terminal import quoted
from laser_callback.results.comparison import ArmResult, LaserResult
from laser_callback.results.examples import PairedExamples
from laser_callback.results.flips import LabelCount, flip_metric, flips
from laser_callback.stats.outcomes import PairedResult


@pytest.fixture(scope="module")
def pages(result):
    several = compared({"a": PLAN, "b": "*.mlp@0.5"}, primary=None, controls=False)
    return {
        "one": page_of(result),
        "several": page_of(several),
        "search": page_of(searched(result)),
        "nothing": page_of(searched()),
        "cleanup": page_of(cleaned(result)),
    }


@pytest.fixture(params=["one", "several", "search", "nothing", "cleanup"])
def source(request, pages):
    return pages[request.param]


def test_a_page_loads_nothing_and_allows_only_itself(source):
    page = Page.of(source)
    assert not [
        name for name, _ in page.elements if name in ("link", "img", "iframe", "object", "base", "foreignobject")
    ]
    for _, attributes in page.elements:
        assert not {"src", "style", "action", "srcset"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in source
    assert "@import" not in source
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    for element in ("style", "script"):
        (content,) = page.text(element)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_answers_said_most_are_quoted(result, pages):
    listed = [text for name, text in Page.of(pages["one"]).texts if name == "bdi"]
    for said in result["laser"].prior(result.primary).top_predictions.values():
        assert said
        assert all(quoted(text) in listed for text, _ in said)


def test_text_of_others_stays_text(source):
    page = Page.of(source)
    assert len(page.all("script")) == 1
    assert page.all("img") == page.all("i") == page.all("b") == []
    assert "<script>alert" not in source
    # What is written from right to left, or may be, is kept in an element of its own.
    for name, text in page.texts:
        assert name == "bdi" or RIGHT_TO_LEFT not in text


def test_hostile_prompts_are_shown_as_they_are(pages, result):
    page = Page.of(pages["one"])
    found = flips(result.examples.to_rows(), "laser", flip_metric(result, "laser"))
    prompts = [text for text in page.text("bdi") if text.startswith(HOSTILE)]
    assert prompts == [flip.prompt for flip in found]
    assert {text.strip() for text in LABELS if text.strip()} <= set(page.text("bdi"))


def test_examples_without_a_name_are_counted_and_not_listed(result):
    named = result.examples.to_rows()
    arms = ("original", "laser")
    nameless = [{arm: {k: v for k, v in row[arm].items() if k != "prediction"} for arm in arms} for row in named]
    assert len(flip_tables(result, "laser", named)[0]["columns"]) > 1
    assert list(flip_tables(result, "laser", nameless)[0]["columns"]) == ["outcome"]
    page = Page.of(page_of(result, nameless))
    assert not [table for table in page.all("table") if table.get("id")]
    assert "id" in page.text("code")


def test_every_number_of_the_result_is_there(pages, result):
    row = result["laser"]["<i>acc</i>"]
    page = Page.of(pages["one"])
    cells = page.text("td", "span")
    for expected in (
        f"{row.original:.1%}",
        f"{row.reduced:.1%}",
        f"{row.fixed} / {row.broken}",
        p_text(row),
        str(row.n),
    ):
        assert expected in cells
    assert f" [{interval_text(row)}]" in cells
    assert any(f"{row.fixed} fixed, {row.broken} broken" in text for text in page.text("caption"))
    for control in result.controls["laser"].values():
        assert f" [{interval_text(control['<i>acc</i>'])}]" in cells
        assert control.plan.partition("; ")[0] in page.text("code")
        ahead = control.ahead_in("<i>acc</i>")
        assert f"{ahead_text(ahead)}: {delta_text(ahead, ahead.delta)}" in " ".join(cells)
        assert f" [{interval_text(ahead)}]" in cells
    assert "noise of the same size, 3 seeds" in page.text("th")
    assert {"fixed", "broken"} <= set(cells)
    assert result.provenance["versions"]["torch"] in " ".join(page.text("dd"))


def test_a_setting_that_was_left_open_is_what_it_came_to():
    search = searched(compared(PLAN))
    search.confirmed.provenance |= {"precision": "32-true"}
    search.settings |= {"precision": None, "minutes": None}
    told = dict(context_of(search)[1]["provenance"])
    assert (told["precision"], told["minutes"]) == ("32-true", "none")


def test_the_verdict_comes_first(pages):
    for source in pages.values():
        page = Page.of(source)
        order = [name for name, _ in page.elements]
        assert order.index("h1") < order.index("nav") < order.index("h2") < order.index("table")
    assert "No difference in <i>acc</i> is shown with " in Page.of(pages["one"]).text("h1")
    assert "Use " in Page.of(pages["search"]).text("h1")
    assert "2 plans: 1 worse, 1 not shown to differ" in Page.of(pages["several"]).text("h1")
    assert any("Nothing has seen the confirm set" in text for text in Page.of(pages["nothing"]).text("p"))


@pytest.mark.parametrize(
    ("verdict", "headline"),
    [
        ("in doubt", "With <code>1.mlp@0.1</code>, acc is higher, but it is the form"),
        ("exploratory", "Nothing is claimed of acc with"),
        ("not tested", ", acc could not be tested"),
        ("no difference shown", "No difference in acc is shown with"),
        ("higher", ", acc is higher"),
    ],
)
def test_the_headline_says_no_more_than_the_verdict(verdict, headline):
    role = "exploratory" if verdict == "exploratory" else "primary"
    numbers = {"p": 0.5 if verdict == "no difference shown" else 0.01, "lower": 0.1, "upper": 0.3, "role": role}
    row = PairedResult("acc", "binary", 40, 0.1, 0.3, 0.2, higher_is_better=True, test="exact McNemar", **numbers)
    row = replace(row, higher_is_better=None) if verdict == "higher" else row
    row = replace(row, doubt="it is the form") if verdict == "in doubt" else row
    row = replace(row, test="not tested") if verdict == "not tested" else row
    arms = {name: ArmResult("1.mlp@0.1", [row], {}, "off", 0.0, 0.0) for name in ("a", "b")}
    assert row.verdict == verdict
    assert headline in page_of(LaserResult({"a": arms["a"]}, {}, "acc", 0.0, {}, PairedExamples()))
    both = {"no difference shown": "not shown to differ", "exploratory": "without a claim"}.get(verdict, verdict)
    assert f"2 plans: 2 {both}" in page_of(LaserResult(arms, {}, "acc", 0.0, {}, PairedExamples()))


def test_tables_and_pictures_can_be_read_aloud(source):
    page = Page.of(source)
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(th.get("scope") in ("col", "row") for th in page.all("th"))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))
    assert len(page.all("h1")) == 1
    (html,) = page.all("html")
    assert html["lang"] == "en"
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page.all("a")} <= set(ids)
    assert {section["aria-labelledby"] for section in page.all("section")} <= set(ids)


def test_the_map_tells_each_candidate(pages):
    page = Page.of(pages["search"])
    search = searched()
    told = [text for text in page.text("title") if "@" in text]
    first = [candidate for candidate in search.candidates if not candidate.base]
    for candidate in first:
        line, *_ = [text for text in told if text.split(";")[0] == str(candidate.plan)]
        assert ("raced on 100 examples" in line) == bool(candidate.examples)
    (winner,) = {text for text in told if text.endswith("chosen")}
    assert winner == (
        "0.q_proj@0; screen -0.0005, rank 6 of 18; raced on 100 examples; gain +5 [+1, +9] points; "
        "loss -0.4 [-0.5, -0.3] nats; chosen"
    )
    cells = [path for path in page.all("path") if path.get("class") == "cell"]
    assert len(cells) == len(first)
    assert sum(path.get("fill-opacity") == "0" for path in cells) == 1  # the one whose score is no number
    assert {"var(--l-5)", "var(--l5)"} <= {path.get("fill") for path in cells}


def test_the_code_to_apply_it_runs(pages):
    (code,) = [text for text in Page.of(pages["one"]).text("code") if text.startswith("from laser_callback")]
    module = Classifier()
    said = []
    exec(code.replace("...", "said.append(model(model.x))"), {"model": module, "said": said})
    assert not torch.equal(said[0], module(module.x))


def test_the_same_result_gives_the_same_page(result):
    assert page_of(result) == page_of(result)


def test_writing(tmp_path, result):
    save_page(result, tmp_path / "sub" / "page.html")
    text = (tmp_path / "sub" / "page.html").read_text(encoding="utf-8")
    assert text == page_of(result)
    without = page_of(result, examples=[])
    assert "Examples fixed and broken" in text
    assert "Examples fixed and broken" not in without


def test_what_no_page_can_hold_is_replaced():
    assert str(foreign("a\x00\ud800<&\"'")) == "<bdi>a\ufffd\ufffd&lt;&amp;&#34;&#39;</bdi>"
    assert str(code("<b>")) == "<code>&lt;b&gt;</code>"


def test_a_chart_is_plain_and_follows_the_theme():
    with styled():
        figure = one(4, 2, labels, [LabelCount("a\x00<b> $x$", 3, 2, 1), LabelCount("b", 1, 2, 3)])
        drawn = str(inline(figure, "how often"))
    page = Page.of(drawn)
    assert {name for name, _ in page.elements} <= {"svg", "g", "path", "text"}
    assert not [attributes for _, attributes in page.elements if {"id", "style", "clip-path"} & set(attributes)]
    fills = {path.get("fill") for path in page.all("path")}
    assert {"var(--dim)", "var(--l3)", "var(--l-4)"} <= fills
    assert not [fill for fill in fills if fill and fill.startswith("#")]
    assert "a\ufffd<b> $x$" in page.text("text")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_script_runs_in_a_browser(tmp_path, result, pages):
    file = tmp_path / "page.html"
    file.write_text(pages["search"], encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(["chromium", *options, Path(file).as_uri()], capture_output=True, text=True, timeout=120)
    row = result["laser"]["<i>acc</i>"]
    shown = row.fixed + row.broken
    assert re.search(rf"<output[^>]*>{shown} of {shown} shown</output>", done.stdout)
    assert not re.search(r'<form[^>]* hidden=""', done.stdout)
    assert "Refused" not in done.stderr
