"""The parts of a page that show a comparison: table, prior checks, controls, spectra, examples, labels, provenance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from laser_callback.reports import terminal as report
from laser_callback.reports.charts import kept_text, label_chart, spectrum_chart, visible
from laser_callback.reports.markup import Markup, definitions, foreign, joined, table, tag
from laser_callback.reports.row_text import delta_text, interval_text, p_text, value_text
from laser_callback.results.comparison import LaserResult
from laser_callback.results.flips import Flip, Row, claim_row, flip_metric, flips, label_counts
from laser_callback.spectra.cut import CutSpectrum
from laser_callback.stats.paired import PairedResult
from laser_callback.stats.priors import PriorChecks

EXAMPLES = 1000
"""At most so many examples are listed."""
SPECTRA = 12
"""At most so many spectra are drawn."""
LABELS = 12
"""So many labels have bars."""
VERDICTS = dict.fromkeys(("better", "pass", "fixed"), "better") | dict.fromkeys(("worse", "fail", "broken"), "worse")
"""The style of a verdict; of all others it is ``unsure``."""


def verdict(text: str) -> Markup:
    """A verdict in its colour."""
    return tag("span", text, class_=VERDICTS.get(text, "unsure"))


def change(row: PairedResult) -> Markup:
    """The change of a metric with its interval."""
    interval = interval_text(row)
    return joined([delta_text(row, row.delta), interval and tag("span", f" [{interval}]", class_="interval")])


def claim_text(row: PairedResult) -> str:
    """What was found, in one line."""
    interval = f" [{interval_text(row)}]" if row.lower is not None else ""
    parts = [f"{value_text(row, row.original)} to {value_text(row, row.reduced)}"]
    parts += [f"{delta_text(row, row.delta)}{interval}"]
    parts += [f"p {p_text(row)}" if p_text(row).startswith("<") else f"p = {p_text(row)}"] if row.p is not None else []
    return f"{row.metric} {', '.join(parts)}, n = {row.n:,}: {row.verdict}"


def comparison_part(result: LaserResult, name: str) -> Markup:
    """The plan ``name`` against the original."""
    arm = result[name]
    heads = ["metric", "original", "reduced", "change [95 % interval]", "fixed / broken", "p", "n", "verdict"]
    rows = [_cells(row, row.metric == result.primary) for row in arm.rows]
    caption = joined(["Original against reduced, ", tag("code", arm.plan)])
    notes: dict[str, list[str]] = {}
    for row in arm.rows:
        if row.note:
            notes.setdefault(row.note, []).append(row.metric)
    return joined(
        [
            table(caption, heads, rows, numbers=heads[1:-1]),
            *(tag("p", f"{', '.join(metrics)}: {note}", class_="note") for note, metrics in notes.items()),
            _priors(arm.prior_checks) if arm.prior_checks is not None else None,
            _controls(result, name),
        ]
    )


def _cells(row: PairedResult, is_primary: bool) -> list[Any]:
    flipped = "" if row.fixed is None else f"{row.fixed:,} / {row.broken:,}"
    values = (value_text(row, row.original), value_text(row, row.reduced))
    name = tag("strong", foreign(row.metric), "*") if is_primary else foreign(row.metric)
    return [name, *values, change(row), flipped, p_text(row), f"{row.n:,}", verdict(row.verdict)]


def _priors(checks: PriorChecks) -> Markup:
    if checks.prior_shift:
        flag = tag("p", tag("strong", "The gain is not shown outside of the answers said most."), class_="warning")
    elif checks.delta > 0:
        flag = tag("p", "The gain holds outside of the answers said most.")
    else:
        flag = tag("p", "There is no gain to explain.")
    pairs: list[tuple[Any, Any]] = []
    rest, macro = checks.majority_excluded, checks.macro
    if rest is not None:
        values = f"{value_text(rest, rest.original)} to {value_text(rest, rest.reduced)}, "
        pairs.append(("without the answers said most", joined([values, change(rest), f", n = {rest.n:,}"])))
    if macro is not None:
        pairs.append((f"macro over {macro.answers} answers", f"{macro.original:.1%} to {macro.reduced:.1%}"))
    pairs.append(("best constant answer per group", f"{checks.constant_answer:.1%}"))
    for arm, top in checks.top_predictions.items():
        said = [joined([foreign(report.quoted(text)), f" {count:,}", "; "]) for text, count in top]
        pairs.append((f"{arm} says most", joined([*said, f"entropy {checks.entropy[arm]:.2f} nats"])))
    return joined([tag("h3", "Is it only a shift of what is said most?"), flag, definitions(pairs)])


def _controls(result: LaserResult, name: str) -> Markup | None:
    claim = claim_row(result, name)
    found = [
        (kind, control, row)
        for kind, control in result.controls.get(name, {}).items()
        for row in control.rows
        if claim is not None and row.metric == claim.metric
    ]
    if claim is None or not found:
        return None
    rows = [["this cut", tag("code", result[name].plan), value_text(claim, claim.reduced), change(claim)]]
    for kind, control, row in found:
        label = "same matrix zeroed" if kind == "zeroed" else "random matrix, same rho"
        rows.append([label, tag("code", control.plan), value_text(row, row.reduced), change(row)])
    heads = ["", "plan", claim.metric, "change [95 % interval]"]
    caption = "If a control gains as much, the gain is not in this cut"
    return joined([tag("h3", "Would another cut do as well?"), table(caption, heads, rows, numbers=heads[2:])])


def spectra_part(spectra: Sequence[CutSpectrum]) -> Markup:
    """The singular values of each cut matrix, and the cut."""
    figures = []
    for spectrum in spectra[:SPECTRA]:
        shape = " by ".join(f"{side:,}" for side in spectrum.shape)
        text = tag("figcaption", tag("code", spectrum.matrix), f", {shape}: {kept_text(spectrum)}")
        figures.append(tag("figure", text, spectrum_chart(spectrum)))
    more = len(spectra) - SPECTRA
    told = "Singular values from the largest to the smallest; what lies in the shaded part was removed."
    return joined(
        [
            tag("p", told, class_="note"),
            tag("div", *figures, class_="figures"),
            tag("p", f"{more:,} more are in the JSON file.", class_="note") if more > 0 else None,
        ]
    )


def examples_part(result: LaserResult, name: str, examples: Sequence[Row], number: int) -> Markup | None:
    """The examples that the plan has fixed and broken, with a filter; ``None`` if there are none to show."""
    row = flip_metric(result, name)
    found = flips(examples, name, row) if row is not None else []
    if row is None or not found:
        return None
    key = f"examples-{number}"
    fixed = sum(flip.fixed for flip in found)
    columns = _columns(found[:EXAMPLES])
    caption = f"By {row.metric}: {fixed:,} fixed, {len(found) - fixed:,} broken"
    if len(columns) == 1:
        return tag("p", f"{caption}. To see which, return ", tag("code", "id"), " from the step.", class_="note")
    listed = table(caption, columns, zip(*columns.values(), strict=True), id=key, class_="examples")
    more = f"The first {EXAMPLES:,} are listed; all are in the examples file." if len(found) > EXAMPLES else None
    return joined([_filter(key), listed, tag("p", more, class_="note") if more else None])


def _columns(found: Sequence[Flip]) -> dict[str, list[Markup]]:
    """By their heads; what the step has returned for no example is left out."""
    columns = {"outcome": [verdict("fixed" if flip.fixed else "broken") for flip in found]}
    said = {"answer": "right answer", "before": "original said", "after": "reduced said"}
    for name, head in {"prompt": "prompt", **said, "group": "group", "id": "id"}.items():
        texts = [getattr(flip, name) for flip in found]
        if any(texts):
            columns[head] = [foreign(visible(text) if text and name in said else text) for text in texts]
    return columns


def _filter(key: str) -> Markup:
    """Hidden until the script that serves it runs."""
    choices = [("", "all"), ("fixed", "fixed"), ("broken", "broken")]
    radios = [
        tag("label", tag("input", type="radio", name="outcome", value=value, checked=not value), f" {text}")
        for value, text in choices
    ]
    words = tag("label", "Search ", tag("input", type="search", name="words", autocomplete="off"))
    status = tag("output", class_="note", aria_live="polite")
    return tag(
        "form", words, *radios, status, class_="filter", data_table=key, hidden=True, aria_label="filter examples"
    )


def label_part(examples: Sequence[Row], name: str) -> Markup | None:
    """How often the labels are right and are said; ``None`` without predictions."""
    counts = label_counts(examples, name)
    if not counts:
        return None
    shown, rest = counts[:LABELS], counts[LABELS:]
    keys = (("gold", "right answer"), ("original", "said by the original"), ("reduced", "said by the reduced model"))
    legend = tag("ul", *(tag("li", tag("span", class_=f"swatch {style}"), text) for style, text in keys))
    more = f"; {len(rest):,} other labels are rarer" if rest else ""
    rows = [[foreign(visible(c.label)), f"{c.gold:,}", f"{c.original:,}", f"{c.reduced:,}"] for c in counts[:100]]
    heads = ["label", "right answer", "original", "reduced"]
    numbers = tag("details", tag("summary", "As numbers"), table("Counts of labels", heads, rows, numbers=heads[1:]))
    told = f"The {len(shown)} most frequent labels{more}."
    return joined([tag("p", told, class_="note"), tag("div", legend, class_="legend"), label_chart(shown), numbers])


def footnotes(result: LaserResult) -> Markup:
    """What a reader of the tables must know."""
    return joined(tag("p", line, class_="note") for line in report.footnotes(result))


def provenance_pairs(data: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Nested settings as flat lines."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield key, ", ".join(f"{name} {item}" for name, item in value.items())
        elif isinstance(value, list):
            yield key, ", ".join(map(str, value)) or "none"
        else:
            yield key, "none" if value is None else str(value)
