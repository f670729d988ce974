"""HTML and SVG by plain functions: what is not :class:`Markup` already is text, and text is escaped.

Contract: nothing that came from a fact, a plan or a metric's name can become an element, an attribute or a script,
leave its place by writing from right to left, or break the file's encoding.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_VOID = ("input", "meta", "br")


class Markup(str):
    """Text that is HTML."""

    __slots__ = ()


def escaped(value: Any) -> Markup:
    """``value`` as HTML: unchanged if it is, else as text; what no page can hold becomes U+FFFD."""
    return value if isinstance(value, Markup) else Markup(html.escape(_UNPRINTABLE.sub("\ufffd", str(value))))


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """The element ``name``.

    Args:
        name: of the element.
        children: its content, escaped unless it is Markup; ``None`` is left out.
        attributes: with a trailing underscore for ``class_`` and ``for_``, and hyphens for underscores; ``True`` is an
            attribute without a value, ``None`` and ``False`` are left out.

    >>> tag("p", "1 < 2", tag("b", "!"), class_="note")
    '<p class="note">1 &lt; 2<b>!</b></p>'
    """
    listed = []
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            listed.append(f" {key}")
        elif value is not None and value is not False:
            listed.append(f' {key}="{escaped(str(value))}"')
    opening = f"<{name}{''.join(listed)}>"
    return Markup(opening if name in _VOID else f"{opening}{joined(children)}</{name}>")


def joined(parts: Iterable[Any]) -> Markup:
    """The parts one after the other."""
    return Markup("".join(escaped(part) for part in parts if part is not None))


def foreign(text: str) -> Markup:
    """Text of somebody else, in whatever direction it is written, without effect on its surroundings."""
    return tag("bdi", text)


def table(
    caption: Any, heads: Iterable[str], rows: Iterable[Iterable[Any]], numbers: Iterable[str] = (), **attributes: Any
) -> Markup:
    """A table that scrolls by itself where the page is narrow; the first cell of a row is its header.

    Args:
        caption: what the table shows.
        heads: of the columns.
        rows: of cells.
        numbers: the heads of the columns that are aligned to the right.
        attributes: of the table.
    """
    heads, numbers = list(heads), set(numbers)
    style = ["number" if head in numbers else None for head in heads]
    head = tag("tr", *(tag("th", name, scope="col", class_=s) for name, s in zip(heads, style, strict=True)))
    body = []
    for row in rows:
        first, *rest = row
        cells = (tag("td", cell, class_=s) for cell, s in zip(rest, style[1:], strict=True))
        body.append(tag("tr", tag("th", first, scope="row"), *cells))
    whole = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body), **attributes)
    return tag("div", whole, class_="scroll", tabindex="0", role="group", aria_label="table, scrolls sideways")


def definitions(pairs: Iterable[tuple[Any, Any]]) -> Markup:
    """Names and what they stand for."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs))
