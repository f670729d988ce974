"""One page about a comparison, a search or a cleanup: the verdict first, then the evidence, then the way to it.

Contract: a page is one file that loads nothing, from the network or elsewhere; it reads well on paper, on a phone, in
the dark and without its script, which only filters examples and reads out the map. Its content policy allows the page's
own style and script and nothing else. Text that came from a fact, a plan or a metric's name stays text: the templates
escape it, and what may be written from right to left has an element of its own.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from laser_callback.plans.short import brief
from laser_callback.reports import page_columns, terminal
from laser_callback.reports.drawing import kept_text, labels, spectrum, styled, visible
from laser_callback.reports.page_columns import code, foreign
from laser_callback.reports.pictures import LABELS, SPECTRA, Result, one
from laser_callback.reports.row_text import (
    delta_text,
    heads,
    in_names,
    interval_text,
    noise_text,
    percent,
    prior_text,
    shown_priors,
    value_text,
    verdict,
)
from laser_callback.reports.svg import inline, printable
from laser_callback.results.comparison import ArmResult, LaserResult
from laser_callback.results.flips import Row, claim_row, label_counts
from laser_callback.spectra.cut import CutSpectrum
from laser_callback.stats.outcomes import PairedResult, Verdict
from laser_callback.support.files import write_atomically


def save_page(result: Result, path: str | Path, examples: Sequence[Row] | None = None) -> None:
    """Write a page that shows everything, in one file that loads nothing.

    Args:
        result: of a comparison, a search or a cleanup.
        path: of the file, replaced atomically.
        examples: per-example outcomes, as in the lines that :meth:`PairedExamples.write` writes; by default those that
            the result holds.
    """
    write_atomically(Path(path), page(result, examples))


def page(result: Result, examples: Sequence[Row] | None = None) -> str:
    """The text of what :func:`save_page` writes."""
    compared = result if isinstance(result, LaserResult) else result.confirmed
    if examples is None:
        examples = [] if compared is None else compared.examples.to_rows()
    with styled():
        if isinstance(result, LaserResult):
            name, own = "comparison.html", _comparison_context(result)
        else:
            from laser_callback.reports.page_search import context_of  # searches need torch, comparisons do not

            name, own = context_of(result)
        text = (
            _templates()
            .get_template(name)
            .render(examples=examples, style=_resource("page.css"), script=_resource("page.js"), **own)
        )
    return f"{text}\n"


def _comparison_context(result: LaserResult) -> dict[str, Any]:
    claims = {name: claim_row(result, name) for name in result.arms}
    times = [("original", f"{result.original_seconds:.1f} s")]
    times += [
        (
            name if len(result.arms) > 1 else "reduced",
            f"{arm.seconds:.1f} s, and {arm.factorise_seconds:.2f} s to factorise; {arm.replay}",
        )
        for name, arm in result.arms.items()
    ]
    passes = [(f"passes, {name}", told) for name, told in times]
    return {
        "result": result,
        "verdicts": [verdict(result, name) for name in result.arms],
        "headline": _headline(result, claims),
        "provenance": [*page_columns.flat(result.provenance), *([] if result.is_of_runs else passes)],
    }


_COUNTED: dict[Verdict, str] = {
    "better": "better",
    "in doubt": "in doubt",
    "worse": "worse",
    "higher": "higher",
    "lower": "lower",
    "no difference shown": "not shown to differ",
    "not tested": "not tested",
    "exploratory": "without a claim",
}


def _headline(result: LaserResult, claims: Mapping[str, PairedResult | None]) -> str:
    if len(claims) > 1:
        counts: Counter[Verdict] = Counter("not tested" if row is None else row.verdict for row in claims.values())
        shown = [f"{counts[verdict]} {text}" for verdict, text in _COUNTED.items() if counts[verdict]]
        return f"{len(claims)} plans: {', '.join(shown)}"
    ((name, row),) = claims.items()
    plan = code(brief(result[name].plan))
    if row is None:
        return Markup("Nothing could be tested of {}").format(plan)
    if row.doubt and row.verdict in ("in doubt", "higher", "lower"):
        way = "higher" if row.delta > 0 else "lower"
        doubt = in_names(row.doubt, result.names)
        return Markup("With {}, {} is {}, but {}").format(plan, row.metric, way, doubt)
    if row.verdict == "exploratory":
        return Markup("Nothing is claimed of {} with {}").format(row.metric, plan)
    if row.verdict == "not tested":
        return Markup("With {}, {} could not be tested").format(plan, row.metric)
    if row.verdict == "no difference shown":
        return Markup("No difference in {} is shown with {}").format(row.metric, plan)
    return Markup("With {}, {} is {}").format(plan, row.metric, row.verdict)


def spectrum_pictures(arm: ArmResult) -> list[tuple[CutSpectrum, str, Markup]]:
    """The spectra of a plan's matrices that can be drawn, the first of them."""
    drawn = [cut for cut in arm.spectra if any(value > 0 for value in cut.values)][:SPECTRA]
    return [
        (cut, kept_text(cut), inline(one(4, 2.3, spectrum, cut), f"singular values of {cut.matrix}, {kept_text(cut)}"))
        for cut in drawn
    ]


def label_picture(result: LaserResult, examples: Sequence[Row], name: str) -> dict[str, Any] | None:
    """How often labels are right and are said; ``None`` without predictions."""
    checks = result[name].prior(result.primary)
    counts = label_counts(examples, name, checks.metric if checks else "")
    if not counts:
        return None
    shown, rest = counts[:LABELS], len(counts) - LABELS
    title = f"how often each of {len(shown)} labels is right and is said"
    first, second = heads(result.names)
    listed = counts[:100]
    return {
        "told": f"The {len(shown)} most frequent labels{f'; {rest:,} other labels are rarer' if rest > 0 else ''}.",
        "picture": inline(one(5.5, 0.3 + 0.5 * len(shown), labels, shown), title),
        "columns": {
            "label": [foreign(visible(count.label)) for count in listed],
            "right answer": [f"{count.gold:,}" for count in listed],
            first: [f"{count.original:,}" for count in listed],
            second: [f"{count.reduced:,}" for count in listed],
        },
    }


# ---- templates -------------------------------------------------------------------------------------------------------


@cache
def _templates() -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("laser_callback.reports"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else printable(value),
    )
    found.filters |= {
        "delta": lambda row: delta_text(row, row.delta),
        "digest": _digest,
        "footnotes": terminal.footnotes,
        "interval": interval_text,
        "percent": percent,
        "quoted": terminal.quoted,
        "repr": repr,
        "thousands": "{:,}".format,
        "value": value_text,
    }
    found.globals |= {
        "brief": brief,
        "code": code,
        "foreign": foreign,
        "heads": heads,
        "in_names": in_names,
        "in_short": page_columns.in_short,
        "label_picture": label_picture,
        "needs_recipe": _needs_recipe,
        "noise_text": noise_text,
        "prior_text": prior_text,
        "shown_priors": shown_priors,
        "spectrum_pictures": spectrum_pictures,
        "zip": zip,
        **{name: getattr(page_columns, name) for name in page_columns.FOR_TEMPLATES},
    }
    return found


def _resource(name: str) -> Markup:
    return Markup((files("laser_callback.reports") / "templates" / name).read_text(encoding="utf-8"))


def _needs_recipe(plan: str) -> bool:
    from laser_callback.plans.plan import LaserPlan  # imports torch, which a page of finished runs does without

    try:
        return LaserPlan.parse(plan).needs_directions
    except ValueError:  # a file may say anything
        return False


def _digest(source: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"
