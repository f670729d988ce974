"""Files of facts that others have written: read whatever their size, or refused with file and place."""

from __future__ import annotations

from pathlib import Path

import pytest

from laser_callback.data.facts import read_facts

ROW = '{"prompt": "The capital of France is", "answer": "Paris"}'


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"3", b"[1]", b"[" * 100_000, b"9" * 5_000, ROW.encode("utf-16"), ROW.encode()[:-9], b"PAR1\0PAR1"],
    ids=lambda content: repr(content[:12]),
)
def test_a_file_that_holds_no_facts_is_named(content: bytes, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"facts.{ending}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"facts\.{ending}") as error:
        read_facts(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 800


def test_a_field_of_any_length_is_read(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text(f"prompt,answer\n{'word ' * 40_000}is,Paris\n", encoding="utf-8-sig")
    assert len(read_facts(path)[0].prompt) == 200_002


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    other = ROW.replace("France", "France\u2028, the\u0085country")
    path.write_text(f"{other}\r\n\n{ROW}\n", encoding="utf-8")
    assert [fact.id for fact in read_facts(path)] == ["1", "2"]
