"""The benchmark of whole decisions runs, and says so where a level is not kept."""

from __future__ import annotations

import pytest
from benchmarks import bench_calibration


@pytest.mark.parametrize(
    "only",
    [
        "ties",
        "gains at last",
        "A/B test, 4",
        "by loss, 4",
        "20 examples",
        "20 windows",
        "150 small",
        "of 10%",
    ],
)
def test_a_few_data_sets_of_each_decision_keep_their_level(only, capsys):
    assert bench_calibration.main(["--sets", "20", "--only", only]) == 0
    told = capsys.readouterr().out.splitlines()
    assert len(told) > 1
    assert all(" 20 " in line for line in told if "%" in line)
    assert "NOT KEPT" not in "".join(told)
    if only == "150 small":
        assert [line.split()[-2:] for line in told[1:] if line] == [["this", "file):"], ["a", "limit"]]


def test_a_level_that_is_not_kept_is_the_exit_status(monkeypatch, capsys):
    rows = [("never", 0.025, lambda rng: False), ("always", 0.025, lambda rng: True)]
    monkeypatch.setattr(bench_calibration, "scenarios", lambda: iter(rows))
    monkeypatch.setattr(bench_calibration, "limits", lambda: iter(rows[1:]))
    assert bench_calibration.main(["--sets", "20", "--only", "never"]) == 0
    assert bench_calibration.main(["--sets", "20", "--only", "always"]) == 1
    assert capsys.readouterr().out.count("NOT KEPT") == 1
