"""A figure of matplotlib as SVG, by itself or inside of a page.

Contract: what comes out loads nothing, has no style and no identifier of its own, and says in words what an artist was
:func:`told`. Inside of a page it follows that page's light and dark form where the figure has the palette's colours.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from laser_callback.support.settings import ignoring

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

PAPER, INK, DIM, LINE = "#fdfcfa", "#1c1d1f", "#5c6066", "#dedbd5"
BETTER, WORSE = "#0b5fa5", "#a34a00"
SHADES = (
    *("#0a4580", "#2e76b1", "#68a2cf", "#a6c9e4", "#d5e5f2"),
    "#eceae5",
    *("#fae4cd", "#f3c08d", "#e39250", "#bf661c", "#823f06"),
)
"""From much better over no change to much worse: told apart also by those who do not see red and green."""

_THEME = {PAPER: "paper", INK: "ink", DIM: "dim", LINE: "line", BETTER: "better", WORSE: "worse"}
_THEME |= {colour: f"l{level}" for level, colour in zip(range(-5, 6), SHADES, strict=True)}
_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_NUMBER = re.compile(r"-?\d+\.\d+")
_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def printable(text: object) -> str:
    """``text`` with U+FFFD for what no page and no XML can hold."""
    return _UNPRINTABLE.sub("\ufffd", str(text))


def told(artist: Artist, words: str | Sequence[str], **attributes: Any) -> None:
    """Let ``artist`` say ``words`` when it is pointed at, and have ``attributes`` in the page.

    Args:
        artist: one mark, or a collection of them.
        words: of the mark, or of each of a collection's.
        attributes: of a mark, or a sequence for each.
    """
    listed = [words] if isinstance(words, str) else words
    artist.set_gid(json.dumps([isinstance(words, str), [printable(one) for one in listed], attributes]))


def inline(figure: Figure, title: str, **attributes: str) -> Markup:
    """``figure`` as an ``svg`` element of a page.

    Args:
        figure: drawn with the palette above.
        title: what it shows, for those who do not see it.
        attributes: of the element.
    """
    return Markup(_svg(figure, _THEME, facecolor="none", role="img", **{"aria-label": title}, **attributes))


def standalone(figure: Figure) -> str:
    """``figure`` as the text of a file."""
    return _svg(figure, {}, facecolor=PAPER, xmlns="http://www.w3.org/2000/svg", **{"font-family": "sans-serif"})


def _svg(figure: Figure, theme: Mapping[str, str], facecolor: str, **attributes: str) -> str:
    file = io.StringIO()
    with ignoring("Glyph .* missing"):  # a page is set in its reader's fonts
        figure.savefig(file, format="svg", facecolor=facecolor, metadata=_METADATA)
    whole = ElementTree.fromstring(file.getvalue())
    markers = {path.get("id"): path for path in whole.iter(f"{_SVG}path")}
    for element in whole.iter():
        if element.tag == f"{_SVG}use":  # a copy instead: an identifier might stand elsewhere in the page, too
            place = f"translate({element.get('x')} {element.get('y')})"
            element.tag, shape = f"{_SVG}path", markers[element.get(_LINK, "")[1:]].get("d", "")
            element.attrib = {"d": shape, "transform": place, "style": element.get("style", "")}
    for parent in list(whole.iter()):
        for definitions in parent.findall(f"{_SVG}defs"):
            parent.remove(definitions)
    for element in whole.iter():
        _make_plain(element, theme)
    box = whole.get("viewBox", "")
    width, height = box.split()[2:]
    whole.attrib = {"viewBox": box, "width": width, "height": height, **attributes}
    return ElementTree.tostring(whole, encoding="unicode")


def _make_plain(element: ElementTree.Element, theme: Mapping[str, str]) -> None:
    """Attributes in place of style and identifier, the palette's names in place of its colours."""
    element.tag = element.tag.removeprefix(_SVG)
    name, style = element.attrib.pop("id", ""), element.attrib.pop("style", "")
    element.attrib.pop("clip-path", None)
    if name.startswith("["):
        alone, words, attributes = json.loads(name)
        marks = [element] if alone else list(element.iter(f"{_SVG}path"))
        for i, (mark, text) in enumerate(zip(marks, words, strict=True)):
            mark.attrib |= {key: str(value if alone else value[i]) for key, value in attributes.items()}
            title = ElementTree.Element("title")
            title.text = text
            mark.insert(0, title)
    for key in {"d", "transform", "x", "y"} & set(element.attrib):
        element.set(key, _NUMBER.sub(lambda number: f"{float(number[0]):.1f}", " ".join(element.attrib[key].split())))
    for declaration in filter(None, style.split("; ")):
        key, value = declaration.split(": ", 1)
        if key != "font-family":
            element.set(key, f"var(--{theme[value]})" if value in theme else value)
    element.text, element.tail = (text if text and text.strip() else None for text in (element.text, element.tail))
