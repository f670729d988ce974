"""The stages of a rollout: a part of the plan at a time, or all of it deeper and deeper."""

from __future__ import annotations

import pytest

from laser_callback import LaserPlan
from laser_callback.shipping.rollout import STAGES, in_parts, in_steps


def test_stages_of_a_plan():
    plan = "1.fc_in@0.01, 0.q_proj@0.2:keep=tail"
    assert [len(stage) for stage in in_parts(plan)] == [1, 2]
    deeper = in_steps(plan, [0.05, 0.5, 0.2, 0.001])
    assert [str(stage) for stage in deeper[:2]] == [
        "1.fc_in@0.5, 0.q_proj@0.5:keep=tail",
        "1.fc_in@0.2, 0.q_proj@0.2:keep=tail",
    ]
    assert deeper[-1] == LaserPlan.parse(plan)
    assert len(deeper) == 4  # 0.001 is below every rho of the plan: it would be the plan itself
    with pytest.raises(ValueError, match="must have a number for each rho"):
        in_steps("1.fc_in@entropy", [0.5])
    with pytest.raises(ValueError, match="`rhos` must be between 0 and 1"):
        in_steps(plan, [1.0])


KINDS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_up", "fc_out")
BESIDES = ["/model.embed_tokens|lm_head/@0.5", "/model.norm/@0.5"]


def every_matrix(layers: int) -> str:
    """As a strategy names them one by one, from the last layer to the first."""
    cuts = [f"{layer}.{kind}@places-0-4:keep=tail" for layer in reversed(range(layers)) for kind in KINDS]
    return ", ".join([*cuts, *BESIDES])


def ends(stages: list[LaserPlan]) -> list[object]:
    """The layer, or else the name, that each stage ends with."""
    last = [stage.reductions[-1] for stage in stages]
    return [r.matrix if r.layer is None else r.layer for r in last]


@pytest.mark.parametrize("layers", [1, 3, 6, 7, 30, 100])
def test_a_long_plan_goes_by_layers_in_few_stages(layers):
    plan = LaserPlan.parse(every_matrix(layers))
    stages = in_parts(plan)
    assert len(stages) == min(STAGES, layers + len(BESIDES))
    assert stages[-1] is plan
    for stage, longer in zip([(), *stages], stages, strict=False):
        added = longer.reductions[len(stage) :]
        assert longer.reductions[: len(stage)] == tuple(stage)
        assert added
        before = {r.layer for r in stage if r.layer is not None}
        assert before.isdisjoint(r.layer for r in added)  # no layer is half cut
    sizes = [len({r.layer for r in stage}) for stage in stages]
    steps = [b - a for a, b in zip([0, *sizes], sizes, strict=False)]
    assert max(steps) - min(steps[:-1] or steps) <= 1


def test_so_many_stages_as_are_asked_for():
    plan = every_matrix(6)
    assert ends(in_parts(plan, most=3)) == [4, 1, LaserPlan.parse(plan).reductions[-1].matrix]
    assert len(in_parts(plan, most=1)) == 1
    assert len(in_parts(plan, most=1000)) == 6 * len(KINDS) + len(BESIDES)
    eight = ", ".join(f"{layer}.fc_in@0.1" for layer in range(STAGES))
    assert [len(stage) for stage in in_parts(eight)] == list(range(1, STAGES + 1))
    with pytest.raises(ValueError, match="`most` must be at least 1, got 0"):
        in_parts(plan, most=0)
