"""Plans of any size and any text: read and resolved in time that grows with them, refused in a line."""

from __future__ import annotations

import re
import time

import pytest
from torch import nn

from laser_callback.plans import selection
from laser_callback.plans.matrices import WeightMatrix, find_matrices
from laser_callback.plans.plan import LaserPlan, pieces
from laser_callback.plans.reduction import Reduction


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.down_proj = nn.Linear(2, 2, False), nn.Linear(2, 2, False)


def experts(layers: int, count: int) -> list[WeightMatrix]:
    blocks = [nn.ModuleDict({"experts": nn.ModuleList(Expert() for _ in range(count))}) for _ in range(layers)]
    return find_matrices(nn.ModuleDict({"layers": nn.ModuleList(blocks)}))


@pytest.mark.parametrize("by", ["layer", "name"])
def test_many_reductions_resolve_without_going_through_all_matrices_for_each(by: str) -> None:
    matrices = experts(layers=32, count=32)
    wanted = [m for m in matrices if m.kind == "fc_in"]
    plan = LaserPlan(
        Reduction(m.layer, "fc_in", 0.5, expert=m.expert)
        if by == "layer"
        else Reduction(None, f"/{re.escape(m.name)}/", 0.5)
        for m in wanted
    )
    begin = time.perf_counter()
    assert [matrix for matrix, _ in plan.resolve(matrices)] == wanted
    assert time.perf_counter() - begin < 4  # for each through all: 20 s


@pytest.mark.parametrize(
    "text",
    [
        "," * 100_000,
        "/" * 99_999,
        ",x=1" * 100_000,
        "0.fc_in@0.1" + ",x=1" * 100_000,
        "/@a:/" * 30_000,
        "a." * 100_000,
        "1" * 1_000_000,
        "/" + "(" * 5_000 + "/@1",
        "/" + "a" * 100_000 + "(/@1",
        "0.fc_in@" + "9" * 10_000,
        "9" * 5_000 + ".fc_in@0.1",
        "0.fc_in[" + "9" * 5_000 + "]@0.1",
        "0.fc_in@0.1:blocks=" + "9" * 5_000,
        "a" * 100_000 + "@0.1",
    ],
    ids=lambda text: text[:12],
)
def test_text_of_any_length_is_refused_at_once_and_in_a_line(text: str) -> None:
    begin = time.perf_counter()
    with pytest.raises(ValueError) as error:  # noqa: PT011  # each has its own sentence
        LaserPlan.parse(text)
    assert time.perf_counter() - begin < 4
    assert len(str(error.value)) < 600
    assert "\n" not in str(error.value)


def test_a_plan_of_ten_thousand_reductions() -> None:
    begin = time.perf_counter()
    plan = LaserPlan.parse(", ".join(f"{i}.fc_in@0.1" for i in range(10_000)))
    assert len(plan) == 10_000
    with pytest.raises(ValueError, match=r"twice: 5\.fc_in@0\.1"):
        LaserPlan([*plan, Reduction(5, "fc_in", 0.1)])
    assert time.perf_counter() - begin < 4


def test_commas_part_outside_of_patterns_only() -> None:
    assert pieces("0.a@1, /a,b/@1:keep=tail\n/c{1,2}/@1") == ["0.a@1", " /a,b/@1:keep=tail", "/c{1,2}/@1"]


@pytest.mark.parametrize(
    "pattern", [r"(\w+\.?)+[^\w.]", r"(a|[a-z.0-9_]|.)*[A-Z]$", r"(.*)(.*)(.*)(.*)(.*)\1\2\3\4\5\d"]
)
def test_patterns_that_would_never_end_are_stopped(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_PATIENCE", 0.3)
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=r"takes more than|matches no matrix"):
        LaserPlan.parse(f"/{pattern}/@0.1").resolve(experts(2, 4))
    assert time.perf_counter() - begin < 3


def test_a_message_names_a_long_reduction_in_a_line() -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        LaserPlan([Reduction(0, "a" * 1_000_000, 0.1)]).resolve(experts(1, 1))
    assert max(map(len, str(error.value).split("\n"))) < 1_000


@pytest.mark.parametrize("rho", [10**400, "1e999", -(10**400)])
def test_numbers_beyond_floats_are_refused_by_name(rho: object) -> None:
    with pytest.raises(ValueError, match="`rho` must be a number in"):
        Reduction(0, "fc_in", rho)  # type: ignore[arg-type]
