"""One page about a comparison or a search: the verdict first, then the evidence, then the way to it.

Contract: a page is one file that loads nothing, from the network or elsewhere; it reads well on paper, on a phone, in
the dark and without its script, which only filters examples and reads out the map. Its content policy allows the page's
own style and script and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from laser_callback.reports.markup import Markup, definitions, joined, tag
from laser_callback.reports.page_comparison import (
    claim_text,
    comparison_part,
    examples_part,
    footnotes,
    label_part,
    provenance_pairs,
    spectra_part,
)
from laser_callback.reports.page_search import constraints_part, map_part, race_part, time_part, trades_part
from laser_callback.results.comparison import LaserResult
from laser_callback.results.flips import claim_row
from laser_callback.results.search import SearchResult
from laser_callback.stats.paired import PairedResult
from laser_callback.support.files import write_atomically

Section = tuple[str, Markup | None]
"""A heading and what is below it; without content the section is left out."""


def save_page(
    result: LaserResult | SearchResult, path: str | Path, examples: Sequence[Mapping[str, Any]] | None = None
) -> None:
    """Write a page that shows everything, in one file that loads nothing.

    Args:
        result: of a comparison or a search.
        path: of the file, replaced atomically.
        examples: per-example outcomes, as in the lines that :meth:`PairedExamples.write` writes; by default those that
            the result holds.
    """
    page = search_page(result, examples) if isinstance(result, SearchResult) else comparison_page(result, examples)
    write_atomically(Path(path), page)


def comparison_page(result: LaserResult, examples: Sequence[Mapping[str, Any]] | None = None) -> str:
    """A comparison as a page; see :func:`save_page`."""
    rows = result.examples.to_rows() if examples is None else examples
    claims = {name: claim_row(result, name) for name in result.arms}
    head = [tag("h1", _headline(result, claims))]
    for name, row in claims.items():
        if row is not None:
            plan = joined([tag("code", result[name].plan), ": "]) if len(claims) > 1 else None
            head.append(tag("p", plan, claim_text(row), class_="lead"))
    sections: list[Section] = [
        ("Comparison", joined([*_per_arm(result, comparison_part), footnotes(result)])),
        *_evidence(result, rows),
        ("How to apply it", _apply([arm.plan for arm in result.arms.values()], result.base)),
        ("Provenance", _provenance(result)),
    ]
    return _page("LASER: original against reduced", head, sections)


def search_page(result: SearchResult, examples: Sequence[Mapping[str, Any]] | None = None) -> str:
    """A search as a page; see :func:`save_page`."""
    confirmed = result.confirmed
    rows = examples if examples is not None else confirmed.examples.to_rows() if confirmed is not None else []
    headline = "Keep the original" if result.plan is None else joined(["Use ", tag("code", str(result.plan))])
    head = [tag("h1", headline), tag("p", f"{result.reason[:1].upper()}{result.reason[1:]}.", class_="lead")]
    row = None if confirmed is None else claim_row(confirmed, next(iter(confirmed.arms)))
    if row is not None:
        head.append(tag("p", "Confirmed: ", claim_text(row)))
    head += [tag("p", warning, class_="warning") for warning in result.warnings]
    sections: list[Section] = [
        ("Confirmed on unseen examples", _confirmed(result)),
        ("Constraints", constraints_part(result) if result.judgements else None),
        ("Map of the search", map_part(result)),
        ("Race", race_part(result)),
        ("Gain against fluency", trades_part(result) if result.trades else None),
        *(_evidence(confirmed, rows) if confirmed is not None else []),
        (
            "How to apply it" if result.plan is not None else "How to try it nevertheless",
            None if result.found is None else _apply([str(result.found)], result.base),
        ),
        ("Time", time_part(result) if result.phases else None),
        ("Provenance", _search_provenance(result)),
    ]
    return _page("LASER: search", head, sections)


# ---- parts that both have --------------------------------------------------------------------------------------------


def _headline(result: LaserResult, claims: Mapping[str, PairedResult | None]) -> Any:
    if len(claims) > 1:
        counts = Counter(row.verdict for row in claims.values() if row is not None)
        told = [f"{counts[verdict]} {verdict}" for verdict in ("better", "worse") if counts[verdict]]
        rest = len(claims) - counts["better"] - counts["worse"]
        return f"{len(claims)} plans: {', '.join([*told, *[f'{rest} not shown to differ'] * bool(rest)])}"
    ((name, row),) = claims.items()
    plan, checks = tag("code", result[name].plan), result[name].prior_checks
    if row is None:
        return joined(["Nothing could be tested of ", plan])
    if row.verdict not in ("better", "worse", "higher", "lower"):
        return joined([f"No difference in {row.metric} is shown with ", plan])
    shift = ", but only in what is said most" if row.verdict == "better" and checks and checks.prior_shift else ""
    return joined([f"{row.metric} is {row.verdict} with ", plan, shift])


def _per_arm(result: LaserResult, part: Any) -> Iterable[Markup]:
    """A part for each plan, under its name if there are several."""
    for name in result.arms:
        content = part(result, name)
        if content is not None:
            yield joined([tag("h3", name) if len(result.arms) > 1 else None, content])


def _evidence(result: LaserResult, examples: Sequence[Mapping[str, Any]]) -> list[Section]:
    def section(part: Any) -> Markup | None:
        return joined(_per_arm(result, part)) or None

    number = {name: i for i, name in enumerate(result.arms)}
    return [
        ("Examples fixed and broken", section(lambda r, name: examples_part(r, name, examples, number[name]))),
        ("What is said", section(lambda r, name: label_part(examples, name))),
        (
            "Spectra of the cut matrices",
            section(lambda r, name: spectra_part(r[name].spectra) if r[name].spectra else None),
        ),
    ]


def _confirmed(result: SearchResult) -> Markup:
    if result.confirmed is None:
        why = "no plan came out of the race" if result.found is None else f"{result.found} was not run on it"
        return tag("p", f"Not confirmed: {why}. Nothing has seen the confirm set.")
    parts = _per_arm(result.confirmed, comparison_part)
    told = "Nothing before this comparison has seen these examples; only these numbers are a result."
    return joined([tag("p", told), *parts, footnotes(result.confirmed)])


def _apply(plans: Sequence[str], base: str | None) -> Markup:
    """Code that puts the plan into a model."""
    imports, spectra, note = "from laser_callback import reduced\n", "", ""
    if base is not None:
        imports += (
            "from laser_callback.spectra.delta import BaseWeights\nfrom laser_callback.spectra.store import Spectra\n"
        )
        spectra, note = ", Spectra(base=BaseWeights(base, model))", f"# of the difference to the base {base}\n"
    codes = (f"{imports}\n{note}with reduced(model, {plan!r}{spectra}):\n    ...  # here it is\n" for plan in plans)
    parts = [tag("pre", tag("code", code), tabindex="0") for code in codes]
    told = "The plan is the text in quotes. Judge it on data of your own before you ship it: "
    again = tag("code", f"LaserCallback({plans[0]!r})")
    more = " among a Trainer's callbacks compares both models on whatever it validates."
    return joined([*parts, tag("p", told, again, more)])


def _provenance(result: LaserResult) -> Markup:
    times = [("original", f"{result.original_seconds:.1f} s")]
    times += [
        (
            name if len(result.arms) > 1 else "reduced",
            f"{arm.seconds:.1f} s, and {arm.factorise_seconds:.2f} s to factorise; {arm.replay}",
        )
        for name, arm in result.arms.items()
    ]
    return definitions([*provenance_pairs(result.provenance), *((f"passes, {name}", told) for name, told in times)])


def _search_provenance(result: SearchResult) -> Markup:
    confirmed = result.confirmed
    pairs = [*provenance_pairs({"examples": result.sets, **result.settings})]
    known = {name for name, _ in pairs}
    if confirmed is not None:
        pairs += [(name, told) for name, told in provenance_pairs(confirmed.provenance) if name not in known]
    return definitions(pairs)


# ---- the page --------------------------------------------------------------------------------------------------------


def _page(title: str, head: Sequence[Markup], sections: Sequence[Section]) -> str:
    style, script = (
        files("laser_callback.reports").joinpath(name).read_text("utf-8") for name in ("report.css", "report.js")
    )
    shown = [(f"s{number}", title, content) for number, (title, content) in enumerate(sections) if content]
    links = tag("ul", *(tag("li", tag("a", title, href=f"#{key}")) for key, title, _ in shown))
    body = [
        tag("header", tag("p", "laser-callback", class_="kicker"), *head, tag("nav", links, aria_label="Sections")),
        *(tag("section", tag("h2", title, id=key), content, aria_labelledby=key) for key, title, content in shown),
    ]
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    page = tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=policy),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("title", title),
            tag("style", Markup(style)),
        ),
        tag("body", tag("main", *body), tag("script", Markup(script))),
        lang="en",
    )
    return f"<!doctype html>\n{page}\n"


def _hash(source: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"
