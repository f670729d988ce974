"""The page of a search: what a reader must see is there, beside what it belongs to."""

from __future__ import annotations

from dataclasses import replace

from classifier import searched
from html_page import Page

from laser_callback.reports.page import page as page_of
from laser_callback.results.search import Trade


def heads_of(page: Page, caption: str) -> list[str]:
    """The heads of the table whose caption begins so."""
    texts = [(name, text) for name, text in page.texts if text.strip()]
    start = next(i for i, (name, text) in enumerate(texts) if name == "caption" and text.startswith(caption))
    heads = []
    for name, text in texts[start + 1 :]:
        if name != "th":
            break
        heads.append(text)
    return heads


def test_what_became_of_a_plan_stands_next_to_it(result):
    page = Page.of(page_of(searched(result)))
    assert heads_of(page, "7 of 20 candidates were run")[:2] == ["plan", "outcome"]


def test_each_cell_knows_its_head(result):
    page = Page.of(page_of(searched(result)))
    assert "gain [95 % interval], points" in heads_of(page, "7 of 20 candidates were run")
    told = [td.get("data-head") for td in page.all("td")]
    assert None not in told
    assert set(told) <= set(page.text("th")) | {""}


def test_fluency_that_was_not_measured_has_no_section():
    search = searched()
    assert "Gain against fluency" in Page.of(page_of(search)).text("h2")
    search.trades = [replace(trade, fluency=None) for trade in search.trades]
    assert "Gain against fluency" not in page_of(search)


def test_points_have_the_numbers_of_the_table_and_say_what_fills_them():
    search = searched()
    texts = Page.of(page_of(search)).text("text", "th")
    assert {"1", "2"} < set(texts)  # the third was not measured
    assert [text for text in texts if text in ("1. ", "2. ", "3. ")] == ["1. ", "2. ", "3. "]
    assert "Filled, unbeaten: no other finalist is better in gain or perplexity and at least" in page_of(search)
    search.trades = [replace(trade, kl=0.1) for trade in search.trades]
    assert "Filled, unbeaten: no other finalist is better in gain, perplexity or kl and at least" in page_of(search)


def test_long_plans_that_differ_in_one_cut_are_told_apart():
    search = searched()
    common = ", ".join(f"{layer}.fc_in@0.1" for layer in range(20))
    search.trades = [Trade(f"{common}, 20.fc_in@{rho}", rho, rho) for rho in (0.2, 0.3)]
    assert all(page_of(search).count(f", with 20.fc_in@{rho}</code>") == 1 for rho in (0.2, 0.3))
