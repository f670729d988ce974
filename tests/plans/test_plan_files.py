"""Plan files that hold something else: one sentence with the file and what was expected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.rank_rules import rank_by

BROKEN = [
    b"",
    b"null",
    b"3",
    b"[3]",
    b'{"reductions": 3}',
    b'{"reductions": [{"layer": 0}]}',
    b'{"reductions": [{"layer": 0, "matrix": "fc_in", "rho": 1e999}]}',
    b"[" * 100_000,
    b'{"reductions": [',
    '{"reductions": []}'.encode("utf-16"),
    b"\xff\xfe\x00",
    b"a: &a [*a]",
    b"!!python/object/apply:os.system [ls]",
]


@pytest.mark.parametrize("ending", ["json", "yaml", "txt"])
@pytest.mark.parametrize("content", BROKEN, ids=lambda content: repr(content[:20]))
def test_a_file_that_is_no_plan_is_named_in_a_line(content: bytes, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"plan.{ending}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"`plan`: .*plan\.{ending}: |plan\.{ending} is no text in UTF-8") as error:
        LaserPlan.of(str(path))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 800


def test_a_text_is_a_plan_however_long_it_is() -> None:
    text = ", ".join(f"{i}.fc_up@0.1" for i in range(30))
    assert len(text) > 255
    assert len(LaserPlan.of(text)) == 30


@pytest.mark.parametrize("given", [{"0.fc_in@0.1": 1}, "0.fc_in@0.1"])
def test_reductions_are_a_list(given: object, tmp_path: Path) -> None:
    (path := tmp_path / "plan.json").write_text(json.dumps({"reductions": given}))
    with pytest.raises(ValueError, match=r"plan.json: `reductions` must be a list, got "):
        LaserPlan.of(str(path))


def test_a_byte_order_mark_is_no_part_of_a_plan(tmp_path: Path) -> None:
    for ending, text in {"json": '["0.fc_in@0.1"]', "yaml": "- 0.fc_in@0.1", "txt": "0.fc_in@0.1"}.items():
        path = tmp_path / f"plan.{ending}"
        path.write_text(text, encoding="utf-8-sig")
        assert LaserPlan.from_file(path) == LaserPlan.parse("0.fc_in@0.1")


@pytest.mark.parametrize("rule", ["entropy", "gavish-donoho", "marchenko-pastur", "laser-rmt", "energy-0.9", "k2"])
@pytest.mark.parametrize("shape", [(5, 0), (0, 5), (0, 0)])
def test_of_a_matrix_without_entries_every_rule_keeps_nothing(rule: str, shape: tuple[int, int]) -> None:
    assert rank_by(rule, torch.zeros(0, dtype=torch.float64), shape) == 0
