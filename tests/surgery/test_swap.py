from __future__ import annotations

import copy
import os
import random
import signal
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from matrices import best
from small_models import IDS, gpt2, run
from tiny import tiny_causal_lm
from torch import nn
from tracing import interrupted
from weights import Snapshot

from laser_callback.plans.plan import LaserPlan
from laser_callback.spectra import store as spectra
from laser_callback.surgery import swap as surgery
from laser_callback.surgery.swap import reduced

PLAN = "1.fc_in@0.1, -1.attn@0.2, 0.fc_out@0.3:keep=tail, 2.mlp@gavish-donoho, 3.fc_up@0.5:scale=-0.25"


# ---- in and out ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_restored_to_the_last_bit(dtype):
    model = tiny_causal_lm().to(dtype)
    before, snapshot = run(model), Snapshot(model)
    cut = reduced(model, PLAN)
    for _ in range(3):
        with cut as entered:
            assert entered is cut
            assert not snapshot.is_restored()
            inside = run(model)
        assert snapshot.is_restored()
        assert torch.equal(run(model), before)
        assert not torch.equal(inside, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inside_are_the_truncated_matrices_and_nothing_else(dtype):
    model = tiny_causal_lm().to(dtype)
    originals = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = {  # widths 32 and 64: rank 3 of 32, rank 16 of 32
        "model.layers.1.mlp.gate_proj.weight": lambda w: best(w, 3),
        "model.layers.3.self_attn.o_proj.weight": lambda w: w.double() - best(w, 16),
        "model.layers.0.mlp.down_proj.weight": lambda w: w.double() * 0,
    }
    with reduced(model, "1.fc_in@0.1, 3.out_proj@0.5:keep=tail, 0.fc_out@0"):
        for name, parameter in model.named_parameters():
            assert parameter.dtype == dtype
            if name in expected:
                exact = expected[name](originals[name])
                step = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]  # one unit of rounding
                torch.testing.assert_close(parameter.detach().double(), exact, rtol=step, atol=1e-6)
                assert not torch.equal(parameter, originals[name])
            else:
                assert torch.equal(parameter, originals[name])


def test_fused_parts_share_one_parameter():
    model = gpt2()
    weight = model.transformer.h[1].attn.c_attn.weight
    expected = weight.detach().clone()
    expected[:, :16] = best(expected[:, :16], 4)
    expected[:, 32:] = best(expected[:, 32:], 8)
    snapshot = Snapshot(model)
    cut = reduced(model, "1.q_proj@0.25, 1.v_proj@0.5")
    assert len(cut.prepare()) == 1
    with cut:
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-6)
        assert torch.equal(weight[:, 16:32], snapshot.values["transformer.h.1.attn.c_attn.weight"][:, 16:32])
    assert snapshot.is_restored()


def test_tied_matrices_change_together():
    block = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    model = nn.ModuleDict({"layers": nn.ModuleList([block, nn.TransformerEncoderLayer(16, 2, 24), block])})
    snapshot = Snapshot(model)
    cut = reduced(model, "0.fc_in@0.1")
    assert len(cut.prepare()) == 1
    with cut:
        state = model.state_dict()
        assert torch.equal(state["layers.0.linear1.weight"], state["layers.2.linear1.weight"])
        assert not torch.equal(state["layers.0.linear1.weight"], snapshot.values["layers.0.linear1.weight"])
    assert snapshot.is_restored()


def test_rho_one_and_its_likes_change_no_bit():
    model = tiny_causal_lm().bfloat16()  # rounding a product of factors would show
    before = run(model)
    cut = reduced(model, "*.attn@1, 0.mlp@0:keep=tail, 1-3.mlp@0.1:scale=1")
    assert cut.prepare() == []
    snapshot = Snapshot(model)
    with cut:
        assert snapshot.is_restored()
        assert torch.equal(run(model), before)
    assert snapshot.is_restored()


def test_strides_are_kept():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.TransformerEncoderLayer(16, 2, 24) for _ in range(2)])})
    model["layers"][0].linear1.weight = nn.Parameter(torch.randn(16, 24).T)
    snapshot = Snapshot(model)
    with reduced(model, "0.fc_in@0.2"):
        assert model["layers"][0].linear1.weight.stride() == (1, 24)
        assert torch.linalg.matrix_rank(model["layers"][0].linear1.weight.detach()) == 3
    assert snapshot.is_restored()


def test_one_factorisation_for_all_entries(monkeypatch):
    model = tiny_causal_lm()
    calls = []
    original = spectra.Spectrum.of
    monkeypatch.setattr(spectra.Spectrum, "of", lambda *args: calls.append(args) or original(*args))
    cut = reduced(model, "1.fc_in@0.1")
    assert not calls  # nothing before it is needed: weights may still be loaded
    for _ in range(3):
        with cut:
            pass
    assert len(calls) == 1


def test_plans_in_other_forms():
    model = tiny_causal_lm()
    outputs = []
    for plan in ("1.fc_in@0.1", LaserPlan.parse("1.fc_in@0.1"), LaserPlan.parse("1.fc_in@0.1").to_dict()):
        with reduced(model, plan):
            outputs.append(run(model))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_nested_plans():
    model = tiny_causal_lm()
    snapshot, before = Snapshot(model), run(model)
    first, second = reduced(model, "1.fc_in@0.1"), reduced(model, "1.fc_in@0, 2.fc_in@0.1")
    with first:
        middle = run(model)
        with second:
            assert not model.model.layers[1].mlp.gate_proj.weight.any()
            inner = run(model)
        assert torch.equal(run(model), middle)
        with pytest.raises(RuntimeError, match="body"), second:
            raise RuntimeError("body")
        assert torch.equal(run(model), middle)
    assert snapshot.is_restored()
    assert torch.equal(run(model), before)
    assert not torch.equal(inner, middle)
    with ExitStack() as stack:
        stack.enter_context(first)
        stack.enter_context(second)
    assert snapshot.is_restored()


def test_double_entry_is_refused():
    model = tiny_causal_lm()
    snapshot = Snapshot(model)
    cut = reduced(model, PLAN)
    with cut:
        inside = run(model)
        with pytest.raises(RuntimeError, match="already in place"), cut:
            pass
        assert torch.equal(run(model), inside)
    assert snapshot.is_restored()
    with cut:
        assert torch.equal(run(model), inside)
    assert snapshot.is_restored()


def test_restore_may_be_called_at_any_time():
    model = tiny_causal_lm()
    snapshot = Snapshot(model)
    cut = reduced(model, PLAN)
    cut.restore()
    with cut:
        cut.restore()
        assert snapshot.is_restored()
        cut.restore()
    assert snapshot.is_restored()
    cut.restore()
    assert snapshot.is_restored()


# ---- training --------------------------------------------------------------------------------------------------------


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_training_goes_on_as_if_nothing_had_been(context):
    model, twin = tiny_causal_lm(), tiny_causal_lm()
    optimizer, twins = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, twin))
    step(model, optimizer)
    step(twin, twins)
    model(IDS, labels=IDS).loss.backward()  # gradients that are still being accumulated
    twin(IDS, labels=IDS).loss.backward()
    snapshot = Snapshot(model)
    state = copy.deepcopy(optimizer.state_dict())
    with context(), reduced(model, PLAN):
        model(IDS)
    assert snapshot.is_restored()
    assert str(optimizer.state_dict()) == str(state)
    assert not any(p.is_inference() for p in model.parameters())
    for _ in range(2):
        step(model, optimizer)
        step(twin, twins)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_factors_made_in_inference_mode_serve_autograd_later():
    model = tiny_causal_lm()
    snapshot = Snapshot(model)
    cut = reduced(model, PLAN)
    with torch.inference_mode():
        assert not any(tensor.is_inference() for tensor in cut.prepare())
        with cut:
            inside = model(IDS).logits
    with cut:
        logits = model(IDS).logits
        logits.sum().backward()
    assert torch.equal(logits.detach(), inside)
    model.zero_grad()
    assert snapshot.is_restored()


def test_gradients_inside_are_those_of_the_reduced_model():
    model, twin = tiny_causal_lm(), tiny_causal_lm()
    cut = reduced(model, PLAN)
    with cut:
        twin.load_state_dict(model.state_dict())
        model(IDS, labels=IDS).loss.backward()
    twin(IDS, labels=IDS).loss.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_model_made_of_inference_tensors():
    with torch.inference_mode():
        model = tiny_causal_lm()
        before, snapshot = run(model), Snapshot(model)
        cut = reduced(model, PLAN)
        with cut:
            assert not torch.equal(run(model), before)
        assert snapshot.is_restored()
    cut = reduced(model, PLAN)
    with torch.inference_mode(), cut:
        assert not torch.equal(run(model), before)
    assert snapshot.is_restored()


# ---- whole or not at all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_matrix_and_nothing_is_cut(value):
    model = tiny_causal_lm()
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[1, 2] = value
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    cut = reduced(model, PLAN)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"`model\.layers\.3\.mlp\.up_proj` hold NaN"), cut:
            pytest.fail("entered")
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    with reduced(model, "0.fc_in@0.1"):  # the bad matrix does not matter to other plans
        pass


def test_a_swap_that_fails_in_the_middle_is_undone():
    model = tiny_causal_lm()
    snapshot = Snapshot(model)
    cut = reduced(model, PLAN)
    cut.prepare()
    assert cut._cuts is not None
    assert len(cut._cuts) > 3
    parameter, _, matrices = cut._cuts[3]
    cut._cuts[3] = (parameter, torch.zeros(1).to_sparse(), matrices)  # another layout is refused by torch
    with pytest.raises(RuntimeError), cut:
        pytest.fail("entered")
    assert snapshot.is_restored()


def test_weights_without_storage_are_refused():
    with torch.device("meta"):
        model = gpt2()
    with (
        pytest.raises(TypeError, match=r"`transformer\.h\.1\.mlp\.c_fc` is on the meta device"),
        reduced(model, "1.fc_in@0.1"),
    ):
        pytest.fail("entered")


def test_a_plan_that_does_not_fit_touches_nothing():
    model = tiny_causal_lm()
    snapshot = Snapshot(model)
    for plan in ("9.fc_in@0.1", "1.fc_in@0.1, *.mlp@0.5", "1.c_fc@0.1", "1.fc_in@7"):
        with pytest.raises(ValueError, match=r"."):
            reduced(model, plan)
    assert snapshot.is_restored()


# ---- exceptions, interrupts, signals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exceptions_in_the_body(error, dtype):
    model = tiny_causal_lm().to(dtype)
    snapshot = Snapshot(model)
    with pytest.raises(error), reduced(model, PLAN):
        raise error
    assert snapshot.is_restored()


def test_an_exception_inside_of_a_layer():
    model = tiny_causal_lm()
    snapshot = Snapshot(model)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[2].mlp.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt), reduced(model, PLAN):
        run(model)
    handle.remove()
    assert snapshot.is_restored()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_in_the_body(number):
    class Terminated(BaseException):
        pass

    def handler(*_: Any) -> None:
        raise Terminated

    model = tiny_causal_lm()
    snapshot = Snapshot(model)

    def validate() -> None:
        for _ in range(1000):
            os.kill(os.getpid(), number)
            run(model)

    before = signal.signal(number, handler)
    try:
        with pytest.raises(Terminated), reduced(model, PLAN):
            validate()
    finally:
        signal.signal(number, before)
    assert snapshot.is_restored()


@pytest.mark.parametrize("prepared", [False, True])
def test_an_interrupt_at_every_line(prepared):
    """At each line of entering, body and leaving, with and without a factorisation to make."""
    model = gpt2()
    plan = "0.q_proj@0.25, 0.k_proj@0.25, 1.fc_in@0.1"
    with reduced(model, plan):
        inside = run(model)
    snapshot = Snapshot(model)
    places: list[tuple[str, int]] = []
    late: list[tuple[str, int]] = []
    while True:
        cut = reduced(model, plan)
        if prepared:
            cut.prepare()

        def work(cut: reduced = cut) -> None:
            with cut:
                assert not snapshot.is_restored()
                cut.matrices.copy()

        place = interrupted(work, len(places), {surgery.__file__, work.__code__})
        torch.set_grad_enabled(True)  # torch's own `no_grad` leaves it off when it is interrupted on its way out
        if place is None:
            break
        if not snapshot.is_restored():
            late.append(place)
            cut.restore()
        places.append(place)
        assert snapshot.is_restored(), place
        if len(places) % 7 == 0:  # the object is as good as new
            with cut:
                assert torch.equal(run(model), inside)
            assert snapshot.is_restored()
    # Only between the end of the body and the `try` of `__exit__`, where no Python code can be earlier. CPython itself
    # handles signals there at one point, the start of `__exit__`.
    assert {name for name, _ in late} <= {"work", "__exit__"}
    assert [line for name, line in late if name == "work"] in ([], [1])  # the `with`, on leaving it
    assert len([line for name, line in late if name == "__exit__"]) <= 2
    assert {"work", "__enter__", "_swap_in", "__exit__", "restore", "prepare"} <= {name for name, _ in places}
    assert prepared or {"_reduced_parameters"} <= {name for name, _ in places}


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_real_interrupts_at_random_moments():
    model = gpt2()
    snapshot = Snapshot(model)
    cut = reduced(model, "*.attn@0.25, *.mlp@0.25")
    cut.prepare()
    with cut:
        inside = run(model)
    armed, hits = [False], 0

    def handler(*_: Any) -> None:
        if armed[0]:
            armed[0] = False
            raise KeyboardInterrupt

    rng = random.Random(0)
    before = signal.signal(signal.SIGALRM, handler)
    try:
        for _ in range(300):
            try:
                armed[0] = True
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 3e-4))
                for _ in range(50):
                    with cut:
                        cut.matrices.copy()
            except KeyboardInterrupt:
                hits += 1
            armed[0] = False
            cut.restore()  # as the callback does after any exception
            assert snapshot.is_restored()
        with cut:
            assert torch.equal(run(model), inside)
    finally:
        armed[0] = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert snapshot.is_restored()
    assert hits > 50
