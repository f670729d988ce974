"""Plain data from files that others may have written: read, checked against annotations, and refused with its place.

Contract: whatever a file holds, :func:`read_plain` gives what was asked for, or raises a ValueError of one line with
the file, the place in it and what was expected there. The work is linear in the size of the file.

>>> data = parse_plain('{"name": "screen", "seconds": null, "passes": "many"}')
>>> typed(dict[str, float | None], data)
Traceback (most recent call last):
...
laser_callback.support.reading.MisfitError: `name`: expected a number or null, got 'screen'
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import reprlib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from laser_callback.support.files import need_files

T = TypeVar("T")
Seconds = Annotated[float, "a number of seconds, 0 or more"]
"""How long something took. What is annotated so is read where it is no less than 0."""

_DEEPEST = 100
"""Levels of nesting: none of the package's files has a tenth of it, and recursion ends at a thousand."""

_OF_YAML = (LookupError, AttributeError, TypeError, OverflowError)
"""What PyYAML raises, too, for a value that is not of its tag, such as ``!!bool x``."""
_WORDS: dict[Any, str] = {
    float: "a number",
    int: "an integer",
    bool: "true or false",
    str: "text",
    types.NoneType: "null",
}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlevel = 2


class MisfitError(ValueError):
    """Plain data that is not what was expected; ``place`` holds the keys and positions that lead to it."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.place: list[Any] = []

    def __str__(self) -> str:
        steps = (
            f".{k}" if isinstance(k, str) and re.fullmatch(r"[\w-]{1,60}", k) else f"[{shown(k)}]" for k in self.place
        )
        return f"`{''.join(steps).removeprefix('.')}`: {self.args[0]}" if self.place else str(self.args[0])


def shown(value: Any) -> str:
    """``value`` for a message: a line at most, and never all of it just to cut it."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return f"a {type(value).__name__}"


def need_unicode(**texts: str) -> None:
    """Refuse text that no file and no tokenizer can hold, by the name of its field.

    Raises:
        ValueError: for half of a surrogate pair, as JSON's escapes can spell it.
    """
    for name, text in texts.items():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"`{name}` must be text in Unicode, got half of a surrogate pair at character {error.start + 1} of "
                f"{shown(text)}"
            ) from None


# ---- files -----------------------------------------------------------------------------------------------------------


def read_text(path: str | Path, option: str) -> str:
    """The text of the file that an option names.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not UTF-8.
    """
    need_files(**{option: path})
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # some editors begin with a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"`{option}`: {path} is no text in UTF-8: {error.reason} at byte {error.start}") from None


def read_plain(
    path: str | Path, option: str, make: Callable[[Any], Any] = lambda data: data, *, yaml_form: bool | None = None
) -> Any:
    """What is in the file that an option names.

    Args:
        path: of the file.
        option: that names it, for messages.
        make: makes of the plain data what is wanted, such as a ``from_dict``.
        yaml_form: whether it is YAML, or JSON; ``None`` takes ``.yaml`` and ``.yml`` for YAML, and the rest for JSON.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it holds something else, with the file, the place and what was expected.
    """
    text = read_text(path, option)
    as_yaml = Path(path).suffix in (".yaml", ".yml") if yaml_form is None else yaml_form
    with _named(f"`{option}`: {path}"):
        return made(make, parse_plain(text, yaml_form=as_yaml))


def read_json_lines(path: str | Path, option: str, make: Callable[[Any], Any] = lambda data: data) -> list[Any]:
    """As :func:`read_plain`, of each line that is not empty. A line ends in a line feed, and in nothing else."""
    found = []
    for number, line in enumerate(read_text(path, option).split("\n"), 1):
        if line.strip():
            with _named(f"`{option}`: {path}, line {number}"):
                found.append(made(make, parse_plain(line)))
    return found


def read_table(package: str, name: str) -> dict[str, Any]:
    """What is in the YAML file ``name`` that comes with a package, such as ``laser_callback.plans``."""
    fast = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # PyYAML may have been built without libyaml
    return yaml.load(files(package).joinpath(name).read_bytes(), fast)


def parse_plain(text: str, yaml_form: bool = False) -> Any:
    """Text of JSON or YAML as plain data.

    Raises:
        ValueError: if it is neither, is nested too deeply, or grows by YAML's aliases beyond what can be handled.
    """
    form = "YAML" if yaml_form else "JSON"
    try:
        data = yaml.safe_load(text) if yaml_form else json.loads(text)
        _refuse_unbounded(data, len(text))
    except RecursionError:
        raise ValueError(f"expected {form} of at most {_DEEPEST} nested levels") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        raise ValueError(f"expected {form}: {error.problem}{where}") from None
    except (ValueError, yaml.YAMLError, *_OF_YAML) as error:
        raise ValueError(
            f"expected {form}, got nothing" if not text.strip() else _line(f"expected {form}: {error}")
        ) from None
    return data


def _refuse_unbounded(data: Any, length: int) -> None:
    """Refuse what nests without end, as by an alias of itself, and what is far more than its text."""
    waiting, seen = [(data, 1)], 0
    while waiting:
        value, depth = waiting.pop()
        inside: Iterable[Any] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        waiting += [(item, depth + 1) for item in inside]
        seen += 1
        if depth > _DEEPEST:
            raise RecursionError
        if seen > 10 * length + 1000:
            raise ValueError("its aliases make it far larger than its text")


@contextmanager
def _named(source: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _line(text: str) -> str:
    return " ".join(text[:1000].split())[:300]


# ---- types -----------------------------------------------------------------------------------------------------------


def typed(kind: Any, data: Any) -> Any:
    """``data`` as a value of an annotated type.

    Known are what JSON has, ``Any``, ``Literal``, :data:`Seconds`, unions, lists, tuples and mappings of these,
    dataclasses, what has a ``from_dict``, and what has a ``parse`` and stands as its text. A number that is ``null`` is
    NaN, since JSON has no word for that.

    Raises:
        MisfitError: if it is none, with its place.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any or kind is object:
        return data
    if origin is Annotated:
        value = typed(inner[0], data)
        if value < 0:
            raise MisfitError(f"expected {inner[1]}, got {shown(data)}")
        return value
    if origin in (Union, types.UnionType):
        return _one_of(inner, data)
    if origin is Literal:
        if not any(data == word and type(data) is type(word) for word in inner):
            raise MisfitError(f"expected {_wanted(kind)}, got {shown(data)}")
        return data
    if origin in (list, tuple, Sequence):
        return _sequence(kind, origin, inner, data)
    if origin in (dict, Mapping):
        return {_at(key, inner[0], key): _at(key, inner[1], value) for key, value in _mapping(data).items()}
    if kind is float and data is None:
        return math.nan
    if kind is float and type(data) is int:
        return made(float, data)
    if kind in _WORDS:
        if type(data) is not kind:
            raise MisfitError(f"expected {_wanted(kind)}, got {shown(data)}")
        return data
    if hasattr(kind, "from_dict") and not isinstance(data, str):
        return made(kind.from_dict, data)
    if hasattr(kind, "parse"):
        return made(kind.parse, typed(str, data))
    return built(kind, data)


def built(kind: Callable[..., T], data: Any, **given: Any) -> T:
    """A dataclass from the mapping of its fields.

    Args:
        kind: the dataclass. What it has as a property follows from its fields, and is left out.
        data: the mapping.
        given: fields that are not to be read.

    Raises:
        MisfitError: if a field is missing, unknown, or not of its type, or if the dataclass refuses them together.
    """
    hints, fields = _hints(kind), {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    read = {key: value for key, value in _mapping(data).items() if not isinstance(getattr(kind, key, None), property)}
    if unknown := [key for key in read if key not in fields or key in given]:
        raise MisfitError(f"expected the keys {', '.join(fields)}; got {shown(unknown[0])}, too")
    without = dataclasses.MISSING
    needed = [n for n, f in fields.items() if f.default is without and f.default_factory is without]
    if missing := [name for name in needed if name not in read and name not in given]:
        raise MisfitError(f"{', '.join(f'`{name}`' for name in missing)} is missing")
    values = {key: _at(key, hints[key], value) for key, value in read.items()}
    return made(lambda values: kind(**values, **given), values)


def made(make: Callable[[Any], T], data: Any) -> T:
    """What ``make`` makes of ``data``.

    Raises:
        MisfitError: if it refuses them.
    """
    try:
        return make(data)
    except MisfitError:
        raise
    except (ValueError, TypeError, OverflowError) as error:
        raise MisfitError(_line(str(error))) from error


def _at(key: Any, kind: Any, data: Any) -> Any:
    try:
        return typed(kind, data)
    except MisfitError as error:
        error.place.insert(0, key)
        raise


def _one_of(kinds: Sequence[Any], data: Any) -> Any:
    if data is None and types.NoneType in kinds:
        return None
    rest = [kind for kind in kinds if kind is not types.NoneType]
    if len(rest) == 1 and not (rest[0] in _WORDS or get_origin(rest[0]) is Literal):
        return typed(rest[0], data)  # to say where in it something is wrong
    for kind in rest:
        try:
            return typed(kind, data)
        except MisfitError:
            continue
    raise MisfitError(f"expected {' or '.join(map(_wanted, kinds))}, got {shown(data)}")


def _sequence(kind: Any, origin: Any, inner: Sequence[Any], data: Any) -> Any:
    if not isinstance(data, (list, tuple)):
        raise MisfitError(f"expected a list, got {shown(data)}")
    fixed = origin is tuple and inner[-1] is not ...
    if fixed and len(data) != len(inner):
        raise MisfitError(f"expected {len(inner)} values, got {shown(data)}")
    kinds = inner if fixed else [inner[0]] * len(data)
    return (tuple if origin is tuple else list)(_at(i, kinds[i], item) for i, item in enumerate(data))


def _mapping(data: Any) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise MisfitError(f"expected a mapping of names, got {shown(data)}")
    for key in data:
        if not isinstance(key, str):
            raise MisfitError(f"expected names as keys, got {shown(key)}")
    return data


def _wanted(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    return _WORDS.get(kind) or str(getattr(kind, "__name__", kind))


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)
