"""The screen against finite differences, on every way in which a model holds its weights."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import peft
import pytest
import torch
import transformers as hf
from benchmarks.planted import plant
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from screening import Steps, estimates, ids, run, screen_of
from tiny import tiny_causal_lm
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from versions import EXACT

from laser_callback.plans.matrices import find_matrices
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.reduction import Reduction
from laser_callback.plans.target import RHOS, Target, targets
from laser_callback.search.screen import GradientScreen
from laser_callback.search.sensitivities import Sensitivities, View, in_parts
from laser_callback.spectra.delta import BaseWeights
from laser_callback.spectra.folder import size_for
from laser_callback.spectra.store import Spectra
from laser_callback.stats.outcomes import Outcomes
from laser_callback.surgery.swap import reduced

SHORT = (0.0, 0.1, 0.5)


class InDouble(TorchFunctionMode):
    """Inside, what a model asks to be in float32 (norms, softmax, routers) is in float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return (torch.Tensor.double if function is torch.Tensor.float else function)(*args, **kwargs)


def scores(
    module: pl.LightningModule, data: Any, size: int = 100, found: Sequence[Target] | None = None, **kwargs: Any
) -> dict[Reduction, float]:
    found = targets(module) if found is None else found
    screen = screen_of(found, **kwargs)
    run(screen, module, data, size)
    return {cut: score for cut, (score, _) in estimates(screen, found, SHORT).items()}


def tiny(name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
    model = {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads, **kwargs)),
        "gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)
        ),
        "mixtral": lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(**sizes, **heads, num_local_experts=3, num_experts_per_tok=2, **kwargs)
        ),
        "albert": lambda: hf.AlbertForMaskedLM(
            hf.AlbertConfig(**sizes, embedding_size=8, num_attention_heads=4, num_hidden_groups=1)
        ),
        "t5": lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"
            )
        ),
    }[name]()
    for weight in model.parameters():  # the default initialisation has gradients near zero
        if weight.dim() > 1:
            weight.data.normal_(std=0.3)
    return model.eval().double()


class Images(nn.Module):
    """Plain layers, one of them used twice, behind activation checkpointing on request."""

    def __init__(self, checkpointing: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.shared, self.head = nn.Linear(12, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 5)
        self.checkpointing = checkpointing
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        def body(hidden: Tensor) -> Tensor:
            return self.shared(self.shared(self.first(hidden).tanh()).tanh()).tanh()

        if self.checkpointing is None:
            return self.head(body(x))
        return self.head(checkpoint(body, x, use_reentrant=self.checkpointing))


def images(count: int = 7) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(12, generator=generator).double(), "y": torch.tensor(i % 5)} for i in range(count)]


def finite_difference(module: Steps, batch: Any, target: Target, rho: float) -> float:
    """Derivative of the mean loss along W -> W + t (W_k - W) at t = 0, by Richardson's extrapolation."""
    originals = [matrix.parameter.data for matrix in target.matrices]
    directions = []
    for matrix in target.matrices:
        weight = matrix.value
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        s[: target.at(rho).rank(matrix.max_rank)] = 0
        direction = torch.zeros_like(matrix.parameter.data)
        matrix.write(direction, -(u * s) @ v)
        directions.append(direction)

    def loss(t: float) -> float:
        # Several matrices may be parts of one parameter.
        for matrix, direction in zip(target.matrices, directions, strict=True):
            matrix.parameter.data = matrix.parameter.data + t * direction
        value = float(module.losses(batch).mean())
        for matrix, original in zip(target.matrices, originals, strict=True):
            matrix.parameter.data = original
        return value

    with torch.no_grad():
        coarse, fine = ((loss(h) - loss(-h)) / (2 * h) for h in (4e-4, 2e-4))
    return (4 * fine - coarse) / 3


def assert_derivatives(module: Steps, data: Any, found: Sequence[Target], **kwargs: Any) -> None:
    with InDouble(), torch.random.fork_rng():
        result = scores(module, data, found=found, **kwargs)
        batch = data if isinstance(data, Tensor) else torch.utils.data.default_collate(data)
        expected = {target.at(rho): finite_difference(module, batch, target, rho) for target in found for rho in SHORT}
    assert list(result) == list(expected)
    largest = max(map(abs, expected.values()))
    for reduction, value in expected.items():
        assert result[reduction] == pytest.approx(value, rel=1e-6, abs=1e-8 * largest), str(reduction)


# ---- what a score is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "albert", "t5"])
def test_scores_are_directional_derivatives(name):
    options = {"experts_implementation": "eager"} if name == "mixtral" else {}
    module = Steps(tiny(name, **options))
    found = targets(module, "encoder.*.all, decoder.*.all" if name == "t5" else "*.all")
    if name == "mixtral":  # all experts of a kind together, and one of them alone
        assert max(len(target.matrices) for target in found) == 3
        found += [t for t in targets(module, r"/.*experts.*/") if t.matrices[0].expert == 1]
    assert_derivatives(module, ids(), found)


def test_tied_weights_count_once_with_all_that_they_do():
    module = Steps(tiny("llama", tie_word_embeddings=True))
    (embedding,) = [m for m in find_matrices(module) if m.name.endswith("embed_tokens")]
    assert len(embedding.parameter_names) == 2
    both = "/" + "|".join(name.removesuffix(".weight") for name in embedding.parameter_names) + "/"
    assert_derivatives(module, ids(), [Target((embedding,), {"layer": None, "matrix": both})])


def test_frozen_weights_under_adapters():
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False)
    module = Steps(peft.get_peft_model(tiny("llama"), config).eval().double())
    found = targets(module)
    assert len(found) == 14
    assert not found[0].matrices[0].parameter.requires_grad
    assert_derivatives(module, ids(), found)
    assert not found[0].matrices[0].parameter.requires_grad


@pytest.mark.parametrize("checkpointing", [None, False], ids=["plain", "checkpointing"])
def test_plain_layers_one_of_them_used_twice(checkpointing):
    module = Steps(Images(checkpointing), returns=lambda losses: {"loss": losses.mean()})
    assert_derivatives(module, images(), targets(module, "/.*(first|shared|head)/"))


def test_gradient_checkpointing_of_transformers():
    module = Steps(tiny("llama"))
    expected = scores(module, ids())
    module.model.gradient_checkpointing_enable()
    assert scores(module, ids()) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_weights(dtype):
    model = tiny("llama").to(dtype)
    found = scores(Steps(model), ids())
    exact = scores(Steps(model.double()), ids())
    largest = max(map(abs, exact.values()))
    for reduction, value in exact.items():
        assert found[reduction] == pytest.approx(
            value, abs={torch.bfloat16: 0.03, torch.float32: 1e-6 if EXACT else 3e-6}[dtype] * largest
        )


RETURNS = {
    "scalar": Tensor.mean,
    "loss": lambda losses: {"loss": losses.mean()[None], "log_loss": None},
    "1-D": lambda losses: {"log_loss": losses},
    "outcomes": lambda losses: {"log_loss": Outcomes(losses), "id": list(range(len(losses)))},
}


@pytest.mark.parametrize("returns", RETURNS.values(), ids=RETURNS)
def test_micro_batches_of_unequal_size_are_one_big_batch(returns):
    module = Steps(tiny("gpt2"), returns)
    whole, parts = scores(module, ids(), 7), scores(module, ids(), 4)
    assert parts == pytest.approx(whole, rel=1e-10, abs=1e-14)
    given = scores(Steps(module.model, lambda _: None), ids(), 3, loss=lambda module, batch: module.losses(batch))
    assert given == pytest.approx(whole, rel=1e-10, abs=1e-14)


def test_standard_errors_are_those_between_batches():
    def screened(size: int) -> dict[Reduction, tuple[float, float]]:
        screen = screen_of(targets(module))
        run(screen, module, ids(), size)
        return estimates(screen, targets(module), SHORT)

    module = Steps(tiny("gpt2"))
    parts = [scores(module, [row]) for row in ids()]
    for reduction, (score, error) in screened(1).items():
        each = np.array([part[reduction] for part in parts])
        assert score == pytest.approx(each.mean(), rel=1e-9)
        assert error == pytest.approx(each.std(ddof=1) / np.sqrt(7), rel=1e-9)
    first, second = scores(module, ids()[:4]), scores(module, ids()[4:])
    for reduction, (_, error) in screened(4).items():  # of two batches: the weighted distance from their mean
        a, b = first[reduction], second[reduction]
        mean = (4 * a + 3 * b) / 7
        assert error == pytest.approx(np.sqrt((4 * (a - mean) ** 2 + 3 * (b - mean) ** 2) / 7), rel=1e-9)
    assert {error for _, error in screened(7).values()} == {0.0}


def test_missing_outcomes_and_weights():
    keep, weights = torch.tensor([1, 0, 1, 1, 0, 0, 1]).bool(), torch.arange(1.0, 8.0)
    nan = torch.tensor(torch.nan).double()
    seen = iter([slice(0, 4), slice(4, 7)])

    def outcomes(losses: Tensor) -> dict[str, Outcomes]:
        part = next(seen)
        return {"log_loss": Outcomes(torch.where(keep[part], losses, nan), weights[part])}

    model = tiny("gpt2")
    found = scores(Steps(model, outcomes), ids(), 4)
    expected = scores(Steps(model, lambda losses: (losses * weights)[keep].sum() / weights[keep].sum()), ids(), 7)
    assert found == pytest.approx(expected, rel=1e-10, abs=1e-14)


@pytest.mark.slow
def test_a_planted_early_attention_matrix_is_found():
    planted = plant(layers=2, subjects=16, steps=150)
    assert planted.sick > planted.healthy + 0.1
    screen = screen_of(targets(planted.module))
    run(screen, planted.module, list(zip(*planted.screen, strict=True)), 50)
    known = estimates(screen, targets(planted.module), RHOS)
    first = sorted(known, key=known.__getitem__)[:10]
    changes = planted.truth([planted.target], RHOS)
    best = min(changes, key=changes.__getitem__)
    assert best in first
    assert changes[best] < 0.5 * (planted.healthy - planted.sick)


# ---- what an estimate is of ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "0.fc_in@0.3:keep=tail",
        "0.fc_in@0.2:band=0.4",
        "1.q_proj@0.5:scale=0.25",
        "1.q_proj@places-0-3+7",
        "1.q_proj@k3",
        "1.q_proj@entropy",
        "*.fc_out@global-4",
        "0.v_proj@0.3:norm=whole",
        "0.fc_in@0.5, 1.q_proj@0.25:scale=2, 1.fc_out@0",
    ],
)
def test_any_plan_along_singular_directions_has_the_derivative_along_it(text):
    module, plan = Steps(tiny("llama")), LaserPlan.parse(text)
    screen = screen_of(targets(module))
    run(screen, module, ids())
    cuts = plan.resolve(module)
    originals = {matrix.name: matrix.value.clone() for matrix, _ in cuts}
    with reduced(module, plan):
        directions = {matrix.name: matrix.value - originals[matrix.name] for matrix, _ in cuts}

    def loss(t: float) -> float:
        for matrix, _ in cuts:
            matrix.parameter.data = matrix.parameter.data + t * directions[matrix.name]
        value = float(module.losses(ids()).mean())
        for matrix, _ in cuts:
            matrix.parameter.data = originals[matrix.name]
        return value

    with InDouble(), torch.no_grad():
        coarse, fine = ((loss(h) - loss(-h)) / (2 * h) for h in (4e-4, 2e-4))
    score, error = screen.estimate(text)
    assert error == 0
    assert score == pytest.approx((4 * fine - coarse) / 3, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize(
    "text", ["0.fc_in@0.5:of=entries", "0.fc_in@0.5:blocks=2", "0.fc_in@0.5:noise=1", "0.fc_in@0.5, 1.fc_in@0.5"]
)
def test_what_was_not_looked_at_has_no_estimate(text):
    module = Steps(tiny("llama"))
    screen = screen_of(targets(module, "0.all"))
    run(screen, module, ids())
    assert screen.estimate("0.fc_in@0.5") is not None
    assert screen.estimate(text) is None


def test_the_difference_to_a_base_is_a_view_of_its_own():
    model, source = tiny("llama"), tiny("llama")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=generator)
    module = Steps(model)
    spectra = Spectra(base=BaseWeights(source, module))
    found = [m for m in find_matrices(module) if m.kind == "fc_in"]
    screen = GradientScreen({View(): found, View("delta"): found[:1]}, spectra)
    run(screen, module, ids(), 4)
    of_weight, of_difference = screen.estimate("0.fc_in@0"), screen.estimate("0.fc_in@0:cut=delta")
    assert screen.estimate("1.fc_in@0:cut=delta") is None
    alone = GradientScreen(found[:1], Spectra())
    run(alone, module, ids(), 4)
    assert alone.estimate("0.fc_in@0") == pytest.approx(of_weight)
    matrix, base = found[0], next(m for m in find_matrices(source) if m.kind == "fc_in")
    (gradient,) = torch.autograd.grad(module.losses(ids()).mean(), matrix.parameter)
    expected = -float((gradient * (matrix.value - base.value)).sum())
    assert of_difference[0] == pytest.approx(expected, rel=1e-5)


def test_sensitivities_are_the_same_from_a_journal_and_in_parts():
    module = Steps(tiny("llama"))
    found = targets(module)
    screen = screen_of(found)
    run(screen, module, ids(), 2)
    parts = [screen_of(part) for part in (found[:5], found[5:])]
    for part in parts:
        run(part, module, ids(), 2)
    joined = Sensitivities.join([part.sensitivities for part in parts])
    data, tensors = screen.sensitivities.to_step()
    again = Sensitivities.from_step(json.loads(json.dumps(data)), tensors)
    for target in found:
        cuts = LaserPlan([target.at(0.3)]).resolve(module)
        estimate = screen.sensitivities.estimate(cuts, Spectra())
        assert estimate == again.estimate(cuts, Spectra()) == joined.estimate(cuts, Spectra())


def test_parts_have_room_for_their_spectra():
    found = [m for m in find_matrices(tiny("llama")) if m.kind]
    one = max(size_for(m.shape) for m in found)

    def size(view, matrix):
        return size_for(matrix.shape)

    parts = in_parts({View(): found, View("delta"): found[:3]}, 3 * one, size)
    assert [m.name for part in parts for m in part.get(View(), [])] == [m.name for m in found]
    assert all(sum(size_for(m.shape) for of in part.values() for m in of) <= 3 * one for part in parts)
    assert [m.name for part in parts for m in part.get(View("delta"), [])] == [m.name for m in found[:3]]
    assert all(set(map(id, part.get(View("delta"), []))) <= set(map(id, part[View()])) for part in parts)
    assert len(in_parts({View(): found}, 0, size)) == len(found)


# ---- what it leaves behind -------------------------------------------------------------------------------------------


class OneAtATime(pl.Callback):
    """Counts the gradients that are alive whenever one has been made."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.most, self.hooks = module, 0, []

    def on_validation_start(self, trainer, pl_module) -> None:
        for parameter in self.module.parameters():
            flag = parameter.requires_grad
            parameter.requires_grad_(True)
            self.hooks.append(parameter.register_post_accumulate_grad_hook(self.count))
            parameter.requires_grad_(flag)

    def count(self, _: Tensor) -> None:
        self.most = max(self.most, sum(p.grad is not None for p in self.module.parameters()))

    def on_validation_end(self, trainer, pl_module) -> None:
        for hook in self.hooks:
            hook.remove()


def facts(model: nn.Module) -> dict[str, Any]:
    return {
        name: (id(p), p.data_ptr(), p._version, p.requires_grad, id(p.grad), dict(p._post_accumulate_grad_hooks or {}))
        for name, p in model.named_parameters()
    }


class Once(Spectra):
    """Fails in the middle of the second backward pass."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error, self.calls = error, 0

    def operand(self, matrix: Tensor, name: str = "matrix", cut: str = "weight") -> Tensor:
        self.calls += 1
        if self.calls == 2 * 14 + 4:  # the first pass asks for each of 14 matrices twice, to factorise and to score
            raise self.error
        return super().operand(matrix, name, cut)


@pytest.mark.parametrize("fails", [None, "step", "hook", "interrupt"])
def test_nothing_is_left_behind(fails):
    model = tiny("llama").float()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
        parameter.grad = torch.ones_like(parameter) if number % 2 else None
    before, calls = facts(model), iter("ab")

    def returns(losses: Tensor) -> Tensor:
        if fails == "step" and next(calls) == "b":
            raise OSError("from the step")
        return losses.mean()

    error = {"hook": OSError("from the hook"), "interrupt": KeyboardInterrupt()}.get(fails)
    module, alive = Steps(model, returns), OneAtATime(model)
    screen = screen_of(targets(module), Spectra() if error is None else Once(error))
    if fails is None:
        run(screen, module, ids(), 4, others=[alive])
        assert alive.most == 0  # of linear layers none is made
        assert screen.estimate("0.q_proj@0.5") is not None
    else:
        with pytest.raises((OSError, SystemExit)):
            run(screen, module, ids(), 4)
        assert screen.estimate("0.q_proj@0.5") is None
    after = facts(model)
    assert {n: v[:5] for n, v in after.items()} == {n: v[:5] for n, v in before.items()}
    assert not any(v[5] for v in after.values())
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
    assert torch.is_grad_enabled()


def test_an_interrupt_while_putting_back_loses_nothing():
    screen, done, interrupts = GradientScreen([], Spectra()), [], iter([KeyboardInterrupt])

    def interrupted() -> None:
        for error in interrupts:
            raise error
        done.append("second")

    screen._undo = [lambda: done.append("first"), interrupted]
    with pytest.raises(KeyboardInterrupt):
        screen.on_exception(None, None, None)
    screen.teardown(None, None, "validate")
    assert done == ["second", "first"]


def test_the_users_pass_is_the_only_one_and_runs_under_the_trainers_precision():
    class Counting(Steps):
        calls = 0

        def losses(self, batch: Tensor) -> Tensor:
            Counting.calls += 1
            assert torch.is_autocast_enabled("cpu")
            return super().losses(batch)

    module = Counting(tiny("llama").float())
    screen = screen_of(targets(module))
    run(screen, module, ids(), 4, precision="bf16-mixed")
    assert Counting.calls == 2
    exact = scores(Steps(module.model), ids())
    known = estimates(screen, targets(module), SHORT)
    assert all(abs(known[r][0] - exact[r]) < 0.05 * max(map(abs, exact.values())) for r in exact)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returns", "match"),
    [
        (lambda losses: None, "returned nothing.*`screen_loss=`"),
        (lambda losses: {"acc": 1, "id": [2]}, "a mapping with 'acc', 'id'.*`screen_loss=`"),
        (lambda losses: {"loss": 3.0}, "one number per example, got float.*`screen_loss=`"),
        (lambda losses: losses[:, None].expand(-1, 2), "shape \\(7, 2\\).*`screen_loss=`"),
        (lambda losses: losses.mean().detach(), "no gradient.*`screen_loss=`"),
    ],
)
def test_a_step_without_a_loss(returns, match):
    module = Steps(tiny("llama"), returns)
    with pytest.raises(MisconfigurationException, match=match):
        scores(module, ids())
    # The cure that the message names; the step itself then runs without gradients.
    seen = []
    module.returns = lambda losses: seen.append(losses.requires_grad)
    assert scores(module, ids(), loss=lambda module, batch: module.losses(batch))
    assert seen == [False]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite(value):
    with pytest.raises(ValueError, match=r"the loss from the validation step is (nan|inf)"):
        scores(Steps(tiny("llama"), lambda losses: losses.mean() * value), ids())
    with pytest.raises(ValueError, match=r"`log_loss` of the validation step is (nan|inf)"):
        scores(Steps(tiny("llama"), lambda losses: {"log_loss": Outcomes(losses * value)}), ids())


def test_a_gradient_that_is_not_finite():
    with pytest.raises(ValueError, match=r"gradient of `model\.model\.layers\.1\.\S+` holds NaN"):
        scores(Steps(tiny("llama"), lambda losses: ((losses - losses.detach()) ** 2).sum().sqrt()), ids())


def test_where_it_does_not_run():
    module = Steps(tiny("llama"))
    screen = screen_of(targets(module))
    with pytest.raises(MisconfigurationException, match=r"Trainer\(inference_mode=False\)"):
        run(screen, module, ids(), inference_mode=True)
    module.test_step = module.validation_step
    trainer = pl.Trainer(logger=False, callbacks=[screen], enable_checkpointing=False)
    with pytest.raises(MisconfigurationException, match=r"trainer\.validate.*'test'"):
        trainer.test(module, DataLoader(ids()))
    with torch.inference_mode():
        born = Steps(tiny("llama"))
    with pytest.raises(MisconfigurationException, match=r"q_proj` was made under torch\.inference_mode"):
        scores(born, ids())


def test_what_no_gradient_reaches_is_named():
    module = Steps(Images(checkpointing=True), returns=lambda losses: {"loss": losses.mean()})
    with pytest.warns(
        UserWarning, match="no gradient reached 2 of 3 matrices, whose cuts score 0: model.first, model."
    ):
        result = scores(module, images(), found=targets(module, "/.*(first|shared|head)/"))
    assert [value != 0 for value in result.values()] == [False] * 6 + [True] * 3
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no gradient reached")
        scores(Steps(tiny_causal_lm()), ids())
