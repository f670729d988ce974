"""A search that was killed between two files of one step, or whose model has changed beside its parameters."""

from __future__ import annotations

import pytest
import torch
from recall import SEARCH
from torch import nn
from torch.utils.data import DataLoader

from laser_callback import LaserSearch
from laser_callback.data.example_set import fingerprints
from laser_callback.results.examples import PairedExamples
from laser_callback.support import journal


@pytest.mark.slow
@pytest.mark.parametrize("at", ["examples", "json"])
def test_a_step_is_finished_only_with_its_examples(recall, tmp_path, monkeypatch, at):
    module, loader = recall
    write, write_json = PairedExamples.write, journal.write_json

    def killed(self, path):
        if at == "json":
            write(self, path)
        raise KeyboardInterrupt

    def killed_later(path, data):
        if "confirm" in str(path):
            raise KeyboardInterrupt
        write_json(path, data)

    monkeypatch.setattr(PairedExamples, "write", killed if at == "examples" else write)
    monkeypatch.setattr(journal, "write_json", killed_later if at == "json" else write_json)
    with pytest.raises(KeyboardInterrupt):
        LaserSearch(module, loader, **SEARCH, folder=tmp_path / "run").run()
    monkeypatch.undo()
    found = LaserSearch(module, loader, **SEARCH, folder=tmp_path / "run", resume=True).run()
    assert found.confirmed is not None
    lines = (tmp_path / "run" / "confirm.examples.jsonl").read_text(encoding="utf-8").split("\n")
    assert len(lines) == found.sets["confirm"] + 1


@pytest.mark.parametrize("changed", [0, 99])
def test_every_example_must_be_unchanged_not_those_of_the_first_batch_alone(changed):
    module, rows = nn.Linear(3, 3), torch.arange(100.0)
    before = fingerprints(module, {"race": [DataLoader(rows.clone(), 8)]})
    assert fingerprints(module, {"race": [DataLoader(rows.clone(), 8)]}) == before
    rows[changed] += 1
    after = fingerprints(module, {"race": [DataLoader(rows, 8)]})
    assert after["race"] != before["race"]
    assert after["weights"] == before["weights"]


def test_buffers_are_part_of_what_must_be_unchanged():
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = fingerprints(module, {})
    assert fingerprints(module, {}) == before
    module(torch.randn(4, 3))  # in train mode: the running statistics move, and no parameter
    assert fingerprints(module, {}) != before
