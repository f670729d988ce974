"""The page of a search: what a reader must see is there, beside what it belongs to."""

from __future__ import annotations

from classifier import searched
from test_page import Page

from laser_callback.reports.page import page as page_of


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
