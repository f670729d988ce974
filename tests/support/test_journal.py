"""The journal: what was computed once is read back, and nothing else is."""

from __future__ import annotations

import json
import math
from functools import partial
from typing import Any

import pytest
import torch

from laser_callback.support.journal import Journal
from laser_callback.support.reading import typed


def count(calls: list, value: float = 1.5):
    def compute():
        calls.append(1)
        return {"value": value, "nan": math.nan, "pair": (1, 2)}, {"x": torch.arange(3.0).double()}

    return compute


def test_a_finished_step_is_read_back(tmp_path):
    calls: list = []
    first = Journal(tmp_path / "run", {"seed": 0}).step("one", count(calls))
    again = Journal(tmp_path / "run", {"seed": 0}, resume=True)
    second = again.step("one", count(calls, value=2.0))
    assert len(calls) == 1
    assert again.restored == ["one"]
    assert first[0] == second[0] == {"value": 1.5, "nan": None, "pair": [1, 2]}
    assert torch.equal(first[1]["x"], second[1]["x"])
    assert second[1]["x"].dtype == torch.float64


def test_without_a_folder_the_outcome_looks_the_same(tmp_path):
    kept = Journal(tmp_path, {}).step("one", count([]))
    assert Journal(None, {}).step("one", count([]))[0] == kept[0]


def test_a_step_that_fails_leaves_nothing(tmp_path):
    journal = Journal(tmp_path, {})

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        journal.step("one", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]
    calls: list = []
    Journal(tmp_path, {}, resume=True).step("one", count(calls))
    assert calls


def test_a_step_counts_as_finished_only_with_its_json(tmp_path):
    Journal(tmp_path, {}).step("one", count([]))
    (tmp_path / "one.json").unlink()
    calls: list = []
    Journal(tmp_path, {}, resume=True).step("one", count(calls))
    assert calls


def test_a_step_without_its_tensors_is_said_with_the_cure(tmp_path):
    Journal(tmp_path, {}).step("one", count([]))
    (tmp_path / "one.safetensors").unlink()
    with pytest.raises(ValueError, match=r"`folder`: there is no file .*; without one\.json the step is done anew"):
        Journal(tmp_path, {}, resume=True).step("one", count([]))


def test_a_folder_in_use_is_refused(tmp_path):
    Journal(tmp_path, {"seed": 0})
    with pytest.raises(FileExistsError, match="resume=True"):
        Journal(tmp_path, {"seed": 0})


def test_other_settings_are_refused_and_named(tmp_path):
    Journal(tmp_path, {"seed": 0, "rhos": (0.1, 0.2)})
    Journal(tmp_path, {"seed": 0, "rhos": [0.1, 0.2]}, resume=True)
    with pytest.raises(ValueError, match=r"seed \(0 then, 1 now\)"):
        Journal(tmp_path, {"seed": 1, "rhos": [0.1, 0.2]}, resume=True)


def test_files_are_plain_json(tmp_path):
    Journal(tmp_path, {}).step("one", count([]))
    json.loads((tmp_path / "one.json").read_text(), parse_constant=lambda word: pytest.fail(word))


@pytest.mark.parametrize("content", [b"", b"null", b"5", b"[]", b'{"seed": ', b"[" * 9999, b"\xff\xfe"])
def test_what_is_no_journal_is_said(tmp_path, content):
    Journal(tmp_path, {"seed": 0}).step("one", count([]))
    read = partial(typed, dict[str, Any])
    (tmp_path / "one.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"`folder`: .*one\.json"):
        Journal(tmp_path, {"seed": 0}, resume=True).step("one", count([]), read)
    (tmp_path / "one.json").write_text("{}")
    (tmp_path / "one.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"`folder`: .*one\.safetensors is damaged"):
        Journal(tmp_path, {"seed": 0}, resume=True).step("one", count([]), read)
    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"`folder`: .*settings\.json"):
        Journal(tmp_path, {"seed": 0}, resume=True)


def test_a_folder_that_cannot_be_is_said_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"`folder`: .* cannot be written: Not a directory"):
        Journal(tmp_path / "file", {})
