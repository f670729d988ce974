"""Gates from texts and files that others have written, and the names of their data."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from laser_callback.shipping.gates import Gates, read_gates
from laser_callback.stats.gates import parse_gate


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "must hold at least one gate"),
        ("null", "must hold at least one gate"),
        ("5", "must be texts, a mapping or a YAML file, got 5"),
        ("[[[5]]]", "must be texts, a mapping or a YAML file, got 5"),
        ("acc: [1, 2]", "a constraint is"),
        ("- acc: gain: no", "expected YAML: mapping values are not allowed here"),
        ("- 'gates.yaml'", "is named twice, or names itself"),
        ("- other.yml\n- other.yml", "is named twice, or names itself"),
        ("- none.yaml", "there is no file 'none.yaml'"),
        ("&a [*a]", "at most 100 nested levels"),
        ("- !!python/object:os.system x", "could not determine a constructor"),
        ("[" * 3000, "at most 100 nested levels"),
        ("- 'acc <= +1e9999999'", "beyond what can be computed with"),
    ],
)
def test_files_that_hold_something_else_are_refused(content, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("gates.yaml").write_text(content)
    Path("other.yml").write_text("- 'acc: gain'")
    with pytest.raises((ValueError, OSError), match=told) as error:
        read_gates("gates.yaml")
    assert "\n" not in str(error.value)
    Path("gates.yaml").write_bytes(b"\xff\xfe- acc")
    with pytest.raises(ValueError, match=r"gates\.yaml is no text in UTF-8"):
        read_gates(["gates.yaml"])


@pytest.mark.parametrize(
    "text",
    [
        f"acc{' ' * 50_000}: gain",
        f"acc {': ' * 30_000}",
        f"a{' ' * 160}:{' ' * 160}{'<' * 160}",
        "acc <= +1e9999999",
        "acc <= -1e9999999 %",
        "acc: ratio < 1e99999999999999999999",
        "acc: gain, alpha 1e9999999",
        f"acc <= +{'9' * 40_000}",
    ],
)
def test_no_text_takes_long_or_ends_in_another_error(text):
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=r"."):
        parse_gate(text)
    assert time.perf_counter() - begin < 1


def test_spaces_around_a_gate_are_none_of_it():
    assert parse_gate(f"{' ' * 50_000}acc: gain{' ' * 50_000}") == parse_gate("acc: gain")


@pytest.mark.parametrize(
    "name", ["../../../x", "a/b", "", ".", "..", " a", "a ", "data", "x" * 51, "a\nb", "\ud800", 5, "a\0"]
)
def test_names_of_other_data_are_parts_of_file_names(name):
    with pytest.raises(ValueError, match="`others` must have names of at most 50 letters"):
        Gates("acc: gain", None, {name: None})


def test_names_that_people_give_their_data():
    assert set(Gates("acc: gain", None, {"safety": 1, "my data-2.0": 2, "données": 3}).data) == {
        "",
        "safety",
        "my data-2.0",
        "données",
    }
