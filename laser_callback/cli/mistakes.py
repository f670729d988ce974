"""A user's mistakes, told in a line or two.

jsonargparse wraps a mistake once for each nested key and each type of a union that it tried, and the text of every
wrapping repeats all below it: a misspelt parameter of a class takes eight lines, in which nothing says what was meant.
Contract: :func:`told_plainly` follows the chain of these exceptions to the innermost, and raises it anew with the path
of keys that led there.
"""

from __future__ import annotations

import pkgutil
import re
import sys
from argparse import ArgumentError
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from traceback import walk_tb

import yaml
from jsonargparse import ArgumentParser

from laser_callback.cli.command import is_mistake
from laser_callback.support.suggest import clipped, closest

_KEY = re.compile(r'Parser key "([^"]+)"')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_TYPES = re.compile(r"\s*Does not validate against any of the Union subtypes\nSubtypes: \[(.*)\]\n")
_UNKNOWN = re.compile(r"unrecognized arguments: --([\w.]+)|(?:Subcommand .* o|O)ption '([^']+)'")
_MISSING = re.compile(r"No (\S+) attribute (\w+)")
_VALUE = re.compile(r"Expected an? (.+?)\. Got value: (.*)", re.DOTALL)


@contextmanager
def told_plainly(parser: ArgumentParser) -> Iterator[None]:
    """Within: what ``parser`` does not accept is an ArgumentError that names the key, what is wrong, and the cure."""
    try:
        yield
    except yaml.YAMLError as error:
        raise ArgumentError(None, f"expected YAML: {clipped(error)}") from error
    except (ArgumentError, TypeError, ValueError) as error:
        if not _by_jsonargparse(error):
            raise
        innermost, told = _tell(error, [action.dest for action in parser._actions])
        found = not isinstance(innermost, (ImportError, AttributeError))  # the class that is named
        if found and not _by_jsonargparse(innermost) and not is_mistake(innermost):
            raise innermost from None  # a bug in it
        raise ArgumentError(None, told + _config_of(error)) from error


def readable_types(text: str) -> str:
    """A type in a text of jsonargparse as a person writes it.

    >>> readable_types("Union[list[<class 'pathlib.Path'>], <class 'int'>, <class 'NoneType'>]")
    'list[Path] | int | null'
    >>> readable_types("Optional[Literal['max', 'min']]")
    "one of ['max', 'min'] | null"
    """
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text).replace("NoneType", "null").replace("Literal[", "one of [")
    text = re.sub(r"\b(?:[a-z_]\w*\.)+(?=\w)", "", text)  # modules
    if union := re.fullmatch(r"Union\[(.*)\]", text):
        return " | ".join(re.split(r", (?![^\[]*\])", union[1]))  # at commas outside of brackets
    optional = re.fullmatch(r"Optional\[(.*)\]", text)
    return f"{optional[1]} | null" if optional else text


def _tell(error: BaseException, options: Collection[str]) -> tuple[BaseException, str]:
    """The innermost cause, and a sentence about it."""
    path: list[str] = []
    inner, owner, types = True, None, None
    while True:
        text = str(error)
        if inner and (key := _KEY.match(text)):
            path, inner = [*path, key[1]], False
        elif found := _CLASS.match(text):
            owner, inner, types = found[1], True, None
        elif union := _TYPES.match(text):
            types = f"Union[{union[1]}]"
        if error.__cause__ is None or not _by_jsonargparse(error):
            break
        error = error.__cause__
    if unknown := _UNKNOWN.match(text):
        name = unknown[1] or unknown[2]
        if owner is None:
            inside = [option for option in options if option.endswith(f".{name}")]  # of a block, as laser.plan
            hint = f", did you mean `{inside[0]}`?" if len(inside) == 1 else closest(name, options)
            return error, f"`{name}` is not an option{hint or '; --help lists them'}"
        known = _parameters(owner)
        hint = closest(name, known) or (f"; it has {', '.join(known)}" if known else "")
        return error, f"`{'.'.join([*path, name])}` is no parameter of {owner}{hint}"
    if missing := _MISSING.fullmatch(text):
        text += closest(missing[2], dir(sys.modules.get(missing[1])))
    if value := _VALUE.fullmatch(text):
        text = f"expected {readable_types(types or value[1])}, got {value[2]}"
    text = _KEY.sub("", text).lstrip(": ") if path else text
    return error, f"`{'.'.join(path)}`: {text}" if path else text


def _parameters(class_path: str) -> list[str]:
    """What jsonargparse passes to a class; none if it is not found."""
    with suppress(ImportError, AttributeError, ValueError):
        return ArgumentParser().add_class_arguments(pkgutil.resolve_name(class_path), fail_untyped=False)
    return []


def _config_of(error: BaseException | None) -> str:
    """`` (in FILE)`` if it was raised for what a ``--config`` holds, else nothing."""
    while error is not None:
        for frame, _ in walk_tb(error.__traceback__):
            if frame.f_code.co_name == "apply_config":  # of jsonargparse
                return f" (in {frame.f_locals.get('value')})"
        error = error.__cause__
    return ""


def _by_jsonargparse(error: BaseException) -> bool:
    """Whether it was raised there."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals["__name__"].split(".")[0] in ("jsonargparse", "argparse")
