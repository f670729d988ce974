"""The script for the GPU, rehearsed on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpu_only import CPU_ONLY
from part_tests import EXISTING, OWN, files
from rows import part_of
from waits import counted

FOLDER = Path(__file__).parent
PARTS = ("validation", "factorisation", "search")  # pytest in pytest would only repeat what runs here anyway


def test_what_is_left_out_is_still_called_so():
    """A test that was renamed would fail on the GPU, where nobody looks for long."""
    text = "".join(Path(name).read_text() for name in files(EXISTING + OWN))
    assert not [name for name in CPU_ONLY if f"def {name}" not in text]


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what would wait")
def test_waits_are_counted_under_their_line():
    with counted() as counts:
        for _ in range(3):
            torch.ones(1).item()
    ((line, count),) = counts.items()
    assert count == 3
    assert "gpu/test_run.py" in line
    assert line.endswith("test_waits_are_counted_under_their_line")


@pytest.mark.slow
def test_each_part_on_the_cpu(tmp_path: Path):
    settings = {"DEVICE": "cpu", "PARTS": " ".join(PARTS), "OUT": str(tmp_path), "PYTHON": sys.executable}
    settings |= {"OMP_NUM_THREADS": "1", "GPU_ASSETS": ""}
    command = ["bash", str(FOLDER / "run.sh")]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: part["exit"] for name, part in found["parts"].items()} == dict.fromkeys(PARTS, 0)
    assert {part_of(title) for title in found["tables"]} == {"machine", *PARTS}
    assert all(part in done.stdout for part in PARTS)
