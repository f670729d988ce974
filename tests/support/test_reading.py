"""Files that others may have written: read as what they should be, or refused in one line with file and place."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from laser_callback.support.reading import parse_plain, read_json_lines, read_plain, read_text, typed

BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@dataclass
class _Inner:
    n: int
    kind: Literal["mean", "binary"] | None = None

    @property
    def verdict(self) -> str:
        return "pass"


@dataclass
class _Outer:
    rows: list[_Inner]
    by_name: Mapping[str, tuple[float, ...]]
    shape: tuple[int, int] = (1, 1)
    p: float | None = None
    right: bool = False
    more: Any = field(default_factory=dict)
    names: Sequence[str] = ()


WHOLE: dict[str, Any] = {
    "rows": [{"n": 3, "kind": "mean", "verdict": "pass"}, {"n": 2, "kind": None}],
    "by_name": {"a": [1, 2.5, None]},
    "shape": [3, 4],
    "p": None,
    "right": True,
    "more": {"any": [1]},
    "names": ["x"],
}


def test_plain_data_becomes_what_the_annotations_say() -> None:
    found = typed(_Outer, WHOLE)
    assert found.rows == [_Inner(3, "mean"), _Inner(2)]
    assert found.shape == (3, 4)
    assert found.right
    assert found.by_name["a"][:2] == (1.0, 2.5)
    assert math.isnan(found.by_name["a"][2])


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (("rows", 0, "n"), "3", "`rows[0].n`: expected an integer, got '3'"),
        (("rows", 0, "n"), True, "`rows[0].n`: expected an integer, got True"),
        (("rows", 1, "kind"), "sum", "`rows[1].kind`: expected one of 'mean', 'binary' or null, got 'sum'"),
        (("rows", 1), 5, "`rows[1]`: expected a mapping of names, got 5"),
        (("rows",), {}, "`rows`: expected a list, got {}"),
        (("by_name", "a", 0), "x", "`by_name.a[0]`: expected a number, got 'x'"),
        (("by_name", "b c"), None, "`by_name['b c']`: expected a list, got None"),
        (("by_name", "a", 0), 10**400, "`by_name.a[0]`: int too large to convert to float"),
        (("shape",), [1, 2, 3], "`shape`: expected 2 values, got [1, 2, 3]"),
        (("p",), [], "`p`: expected a number or null, got []"),
        (("right",), 1, "`right`: expected true or false, got 1"),
        (("other",), 1, "expected the keys rows, by_name, shape, p, right, more, names; got 'other', too"),
    ],
)
def test_what_does_not_fit_is_told_with_its_place(place: Sequence[Any], value: Any, told: str) -> None:
    data = parse_plain(json.dumps(WHOLE))
    inside = data
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    with pytest.raises(ValueError, match="") as error:
        typed(_Outer, data)
    assert str(error.value) == told


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ValueError, match=r"^`rows\[0\]`: `n` is missing$"):
        typed(_Outer, {**WHOLE, "rows": [{}]})


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.json", b"", "expected JSON, got nothing"),
        ("a.json", b"null", "expected a mapping of names, got None"),
        ("a.json", b"[1]", "expected a mapping of names, got [1]"),
        ("a.json", b'{"a": 1', "expected JSON: Expecting ',' delimiter"),
        ("a.json", b"[" * 100_000, "at most 100 nested levels"),
        ("a.json", b'{"a":' * 500 + b"1" + b"}" * 500, "at most 100 nested levels"),
        ("a.json", b'{"a": ' + b"9" * 5000 + b"}", "expected JSON: Exceeds the limit"),
        ("a.json", b"\xff\xfe{\x00}\x00", "is no text in UTF-8"),
        ("a.yaml", b"a: &a [*a]", "at most 100 nested levels"),
        ("a.yaml", b"[" * 5_000, "at most 100 nested levels"),
        ("a.yaml", BOMB.encode(), "its aliases make it far larger than its text"),
        ("a.yaml", b"a: b: c", "expected YAML: mapping values are not allowed here (line 1, column 5)"),
        ("a.yaml", b"a: !!bool x", "expected YAML: 'x'"),
        ("a.yaml", b"a: !!python/object:os.system x", "could not determine a constructor"),
        ("a.yaml", b"1: 2", "expected names as keys, got 1"),
        ("a.yaml", b"a: 0x" + b"f" * 10_000, "`a`: int too large to convert to float"),
    ],
)
def test_a_file_of_something_else_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    begin = time.perf_counter()
    with pytest.raises(ValueError, match="") as error:
        read_plain(path, "recipe", lambda data: typed(dict[str, float], data))
    message = str(error.value)
    assert message.startswith(f"`recipe`: {path}")
    assert told in message
    assert "\n" not in message
    assert len(message) < 500 + len(str(path))
    assert time.perf_counter() - begin < 5


def test_a_byte_order_mark_is_no_fault_and_a_folder_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_plain(tmp_path / "a.json", "path") == {"a": 1}
    with pytest.raises(IsADirectoryError, match=r"`path`: .* is a folder, expected a file"):
        read_text(tmp_path, "path")
    with pytest.raises(FileNotFoundError, match="`path`: there is no file"):
        read_text(tmp_path / "none", "path")


def test_lines_end_in_line_feeds_only(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "x\u2028y\u0085z\x1c"}\n\n{"a": 2}\n'.replace("\x1c", "\\u001c"), encoding="utf-8")
    assert read_json_lines(path, "path") == [{"a": "x\u2028y\u0085z\x1c"}, {"a": 2}]
    path.write_text('{"a": 1}\n{"a": \n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: expected JSON: Expecting value"):
        read_json_lines(path, "path")
