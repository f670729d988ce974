"""Charts as inline SVG, drawn by hand: a heat map panel, points with intervals, a spectrum, counts of labels.

Contract: numbers in, markup out. All text is escaped; colours are classes of the page's style sheet, so that a chart
follows its light and dark form; every chart has a title that says what it shows, and its marks carry their numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from laser_callback.reports.heat_map import short_rho
from laser_callback.reports.markup import Markup, tag
from laser_callback.reports.panels import Panel, Shading
from laser_callback.results.candidates import Candidate
from laser_callback.results.flips import LabelCount
from laser_callback.spectra.cut import CutSpectrum


@dataclass(frozen=True)
class Point:
    """A mark of :func:`scatter`.

    Attributes:
        x, y: its place.
        low, high: ends of the interval of ``y``, if there is one.
        label: written beside it; empty for none.
        told: all about it, shown when it is pointed at.
        style: class of the mark: ``chosen``, ``efficient`` or ``other``.
    """

    x: float
    y: float
    low: float | None
    high: float | None
    label: str
    told: str
    style: str


def panel_chart(panel: Panel, shading: Shading, tell: Callable[[Candidate], str]) -> Markup:
    """One kind's heat map: rows are layers, columns rhos; what was run has a dot, what was chosen a ring.

    Args:
        panel: what to draw.
        shading: how a candidate is shaded.
        tell: all about a candidate, shown when its cell is pointed at or reached by arrow keys.
    """
    width, height = 13, min(13, max(4, 400 // len(panel.rows)))
    left, top = 8 + 6 * max(min(len(row), 16) for row in panel.rows), 26
    every = math.ceil(11 / height)  # so many rows from one label to the next, or they would overlap
    parts = [
        _text(left - 4, top + (i + 0.5) * height, _short(row, 16), "end", "tick")
        for i, row in enumerate(panel.rows)
        if i % every == 0
    ]
    parts += [
        _turned(left + (j + 0.5) * width, top - 5, -60, short_rho(rho), "start", "tick")
        for j, rho in enumerate(panel.rhos)
    ]
    marks = []
    for (i, row), (j, rho) in product(enumerate(panel.rows), enumerate(panel.rhos)):
        candidate = panel.cells.get((row, rho))
        if candidate is None:
            continue
        level = shading.level(candidate)
        x, y = left + j * width, top + i * height
        place = {"x": x, "y": y, "width": width, "height": height, "data_row": i, "data_column": j}
        shade = "cell unknown" if level is None else f"cell l{level}"
        parts.append(tag("rect", tag("title", tell(candidate)), class_=shade, **place))
        if candidate.examples:
            radius, style = (4.0, "ring") if candidate.status == "chosen" else (1.7, "dot")
            marks.append(_circle(x + width / 2, y + height / 2, radius, style))
    for row, lower, candidate in panel.between:
        middle = top + (panel.rows.index(row) + 0.5) * height
        radius, style = (4.0, "between ring") if candidate.status == "chosen" else (2.6, "between")
        marks.append(_circle(left + lower * width, middle, radius, style, tag("title", tell(candidate))))
    size = left + len(panel.rhos) * width + 8, top + len(panel.rows) * height + 4
    what = f"{panel.kind}: {len(panel.rows)} layers by {len(panel.rhos)} rhos; the arrow keys go from cell to cell"
    return _svg(size, [*parts, *marks], what, class_="map", tabindex="0")


def scatter(points: Sequence[Point], x_name: str, y_name: str) -> Markup:
    """Points with their intervals, both axes through their zeros."""
    width, height, left, right, top, bottom = 440, 300, 52, 16, 12, 42
    xs = [point.x for point in points]
    ys = [end for point in points for end in (point.y, point.low, point.high) if end is not None]
    x_ticks, y_ticks = ticks(min(0, *xs), max(0, *xs)), ticks(min(0, *ys), max(0, *ys))
    place_x = _axis(x_ticks, left, width - right)
    place_y = _axis(y_ticks, height - bottom, top)
    parts = []
    for tick, text in zip(x_ticks, tick_texts(x_ticks), strict=True):
        style = "zero" if tick == 0 else "grid"
        parts.append(_line(place_x(tick), top, place_x(tick), height - bottom, style))
        parts.append(_text(place_x(tick), height - bottom + 12, text, "middle", "tick"))
    for tick, text in zip(y_ticks, tick_texts(y_ticks), strict=True):
        style = "zero" if tick == 0 else "grid"
        parts.append(_line(left, place_y(tick), width - right, place_y(tick), style))
        parts.append(_text(left - 6, place_y(tick), text, "end", "tick"))
    parts.append(_text((left + width - right) / 2, height - 10, x_name, "middle", "name"))
    parts.append(_turned(13, (top + height - bottom) / 2, -90, y_name, "middle", "name"))
    for point in points:
        x, y = place_x(point.x), place_y(point.y)
        mark = [tag("title", point.told)]
        if point.low is not None and point.high is not None:
            mark.append(_line(x, place_y(point.low), x, place_y(point.high), "bar"))
        mark.append(_circle(x, y, 4 if point.style == "other" else 5.5, f"point {point.style}"))
        parts.append(tag("g", *mark))
    lowest = {"end": 0.0, "start": 0.0}  # labels on one side do not overlap
    for point in sorted((point for point in points if point.label), key=lambda point: place_y(point.y)):
        anchor, step = ("end", -9) if place_x(point.x) > 0.6 * width else ("start", 9)
        y = lowest[anchor] = max(place_y(point.y) - 9, lowest[anchor] + 13)
        parts.append(_text(place_x(point.x) + step, y, _short(point.label, 30), anchor, "label"))
    return _svg((width, height), parts, f"{y_name} against {x_name}, {len(points)} points")


def spectrum_chart(spectrum: CutSpectrum) -> Markup:
    """Singular values on a logarithmic axis, the removed ones pale."""
    width, height, left, right, top, bottom = 340, 190, 46, 12, 10, 36
    positive = [value for value in spectrum.values if value > 0]
    if not positive:
        return Markup()
    count = min(spectrum.shape)
    floor = max(positive[-1], positive[0] * 1e-6)  # what is below is rounding, and would flatten the rest
    low, high = math.floor(math.log10(floor)), math.ceil(math.log10(positive[0]) + 1e-9)
    place_y = _axis([low, high], height - bottom, top)
    place_x = _axis([0, count], left, width - right)
    parts = []
    for power in range(low, high + 1):
        parts.append(_line(left, place_y(power), width - right, place_y(power), "grid"))
        parts.append(_text(left - 6, place_y(power), f"{10.0**power:g}", "end", "tick"))
    for place in (0, count // 2, count):
        parts.append(_text(place_x(place), height - bottom + 12, f"{place:,}", "middle", "tick"))
    start, stop = spectrum.removed
    if start < stop:
        parts.append(_bar(place_x(start), top, place_x(stop) - place_x(start), height - bottom - top, "removed"))
        for edge in {start, stop} - {0, count}:
            parts.append(_line(place_x(edge), top, place_x(edge), height - bottom, "cut"))
    curve = zip(spectrum.places, spectrum.values, strict=True)
    points = (f"{place_x(place + 0.5):.1f},{place_y(math.log10(max(value, floor))):.1f}" for place, value in curve)
    parts.append(tag("polyline", class_="curve", points=" ".join(points)))
    parts.append(_text((left + width - right) / 2, height - 6, "number of the singular value", "middle", "name"))
    return _svg((width, height), parts, f"singular values of {spectrum.matrix}, {kept_text(spectrum)}")


def kept_text(spectrum: CutSpectrum) -> str:
    """How much of a cut matrix is kept."""
    start, stop = spectrum.removed
    count = min(spectrum.shape)
    return (
        f"{count - (stop - start):,} of {count:,} directions kept, {spectrum.energy:.1%} of the squared singular values"
    )


def label_chart(counts: Sequence[LabelCount]) -> Markup:
    """Three bars per label: how often it is right, said by the original, and said by the reduced model."""
    width, left, step = 440, 128, 40
    most = max((count for c in counts for count in (c.gold, c.original, c.reduced)), default=0) or 1
    parts = []
    for i, count in enumerate(counts):
        y = i * step + 6
        parts.append(_text(left - 8, y + 16, _short(visible(count.label), 18), "end", "label"))
        bars = (("gold", count.gold), ("original", count.original), ("reduced", count.reduced))
        for j, (style, value) in enumerate(bars):
            length = value / most * (width - left - 40)
            parts.append(_bar(left, y + 11 * j, length, 9, f"count {style}"))
            parts.append(_text(left + length + 4, y + 11 * j + 5, f"{value:,}", "start", "tick"))
    return _svg((width, len(counts) * step + 6), parts, f"how often each of {len(counts)} labels is right and is said")


def visible(label: str) -> str:
    """A label whose outer spaces can be seen, if they are all there is; else without them."""
    return label.strip() or repr(label)


def legend(shading: Shading) -> Markup:
    """The shades and what they mean."""
    sizes = [f"{threshold:.3g}" for threshold in shading.thresholds]
    better = [_swatch(f"l-{step}", f"-{size}") for step, size in enumerate(sizes, 1)]
    worse = [_swatch(f"l{step}", f"+{size}") for step, size in enumerate(sizes, 1)]
    items = [*better[::-1], _swatch("l0", "closer to 0"), *worse]
    unit = f" {shading.unit}" if shading.unit else ""
    marks = "dot: raced, between cells: at a rho between, ring: chosen"
    return tag("div", tag("ul", *items), tag("span", f"or more{unit}; negative is better; {marks}"), class_="legend")


def _swatch(style: str, text: str) -> Markup:
    return tag("li", tag("span", class_=f"swatch {style}"), text)


# ---- axes ------------------------------------------------------------------------------------------------------------


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers from at or below ``low`` to at or above ``high``."""
    span = (high - low) or 1.0
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def tick_texts(values: Sequence[float]) -> list[str]:
    """Ticks with a sign, and as many decimals as tell them apart."""
    step = values[1] - values[0]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return ["0" if value == 0 else f"{value:+,.{decimals}f}" for value in values]


def _axis(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    low, high = values[0], values[-1]
    return lambda value: start + (value - low) / (high - low) * (end - start)


# ---- elements --------------------------------------------------------------------------------------------------------


def _svg(size: tuple[float, float], parts: Iterable[Markup], title: str, **more: str) -> Markup:
    width, height = f"{size[0]:g}", f"{size[1]:g}"
    box = f"0 0 {width} {height}"
    return tag("svg", *parts, role="img", aria_label=title, viewBox=box, width=width, height=height, **more)


def _text(x: float, y: float, text: str, anchor: str, style: str) -> Markup:
    return tag("text", text, class_=style, x=f"{x:.1f}", y=f"{y:.1f}", dy=".35em", text_anchor=anchor)


def _turned(x: float, y: float, degrees: int, text: str, anchor: str, style: str) -> Markup:
    place = f"translate({x:.1f} {y:.1f}) rotate({degrees})"
    return tag("text", text, class_=style, transform=place, dy=".35em", text_anchor=anchor)


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    return tag("line", class_=style, x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}")


def _bar(x: float, y: float, width: float, height: float, style: str) -> Markup:
    return tag("rect", class_=style, x=f"{x:.1f}", y=f"{y:.1f}", width=f"{width:.1f}", height=f"{height:.1f}")


def _circle(x: float, y: float, radius: float, style: str, *content: Markup) -> Markup:
    return tag("circle", *content, class_=style, cx=f"{x:.1f}", cy=f"{y:.1f}", r=f"{radius:g}")


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
