"""The harness on a small suite, and on Lightning's own where the environment says where its tests are.

``LIGHTNING_TESTS=/path/to/tests python -m pytest tests/lightning_suite`` runs the latter, which takes half an hour.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import suite

SMALL = """
import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

STEPS = []

class Model(BoringModel):
    def validation_step(self, batch, batch_idx):
        STEPS.append(batch_idx)
        out = super().validation_step(batch, batch_idx)
        self.log("x", out["x"])
        return out

def validate():
    STEPS.clear()
    options = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    return Trainer(limit_val_batches=2, **options).validate(Model(), verbose=False)[0]

def test_value():
    assert validate()["x"] > 0

def test_keys():
    assert set(validate()) == {"x"}

@pytest.mark.parametrize("name", ["[a]"])
def test_number_of_steps(name):
    validate()
    assert len(STEPS) == 2

def test_that_always_fails():
    assert validate() == {}
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, suite.Outcomes]:
    folder = tmp_path_factory.mktemp("suite")
    package = folder / suite.PACKAGE
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "test_small.py").write_text(SMALL)
    return {mode: suite.run(folder, "test_small.py", mode) for mode in suite.MODES}


@pytest.mark.slow
def test_a_small_suite(small: dict[str, suite.Outcomes], capsys: pytest.CaptureFixture[str]) -> None:
    passed = {mode: [t for t, (outcome, _) in found.items() if outcome == "passed"] for mode, found in small.items()}
    assert {mode: len(tests) for mode, tests in passed.items()} == {"nothing": 3, "unpublished": 2, "published": 1}
    assert suite.differences(small["nothing"], small["nothing"]) == {}

    assert suite.report(small, {"unpublished": {}, "published": {}}) == 2
    said = capsys.readouterr().out
    assert "| test_small.py | 3 | 2 | 1 |" in said
    assert "unpublished: test_small.py::test_number_of_steps[[a]]\n    NEW: " in said
    assert said.count("test_number_of_steps") == 1  # told once, not of both modes
    assert "published: test_small.py::test_keys\n    NEW: " in said

    reasons = {"unpublished": {"*::test_number_of_steps[*]": "counts"}, "published": {"test_small.py::test_keys": "k"}}
    assert suite.report(small, reasons) == 0
    assert "expected: counts" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif("LIGHTNING_TESTS" not in os.environ, reason="LIGHTNING_TESTS does not say where they are")
def test_lightnings_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["suite.py", str(Path(os.environ["LIGHTNING_TESTS"]))])
    assert suite.main() == 0
