"""Adapters merged for a while: the same model inside, every bit and object as before outside, and what is refused."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from seeded import seeded
from small_models import IDS, gpt2, mixtral, t5
from tiny import tiny_causal_lm
from torch import Tensor, nn
from untouched import assert_untouched, snapshot

from laser_callback.spectra.delta import BaseWeights
from laser_callback.support.merging import merged, refuse_unmergeable

peft = pytest.importorskip("peft")
LINEAR = ["q_proj", "down_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
MLP = "mlp.c_proj"


def llama(tied: bool = False) -> nn.Module:
    model = tiny_causal_lm()
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def adapted(model: nn.Module, config: Any, **more: Any) -> nn.Module:
    """With adapters whose every number is random."""

    def build() -> nn.Module:
        found = peft.get_peft_model(model, config).eval()
        for name, other in more.items():
            found.add_adapter(name, other)
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.3)
        return found

    return seeded(build)


def lora(target_modules: Any = tuple(LINEAR), **options: Any) -> Any:
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    return peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options)


def two_active() -> nn.Module:
    model = adapted(llama(), lora(), second=lora(["q_proj", "v_proj"], use_dora=True))
    model.base_model.set_adapter(["default", "second"])
    return model


def one_elsewhere() -> nn.Module:
    """The active adapter is on some of the layers that have one."""
    model = adapted(llama(), lora(), second=lora(["v_proj"]))
    model.set_adapter("second")
    return model


def switched_off() -> nn.Module:
    model = adapted(llama(), lora())
    model.base_model.disable_adapter_layers()
    return model


def merged_before() -> nn.Module:
    model = adapted(llama(), lora())
    model.merge_adapter()
    return model


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.self_attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)

    def forward(self, input_ids: Tensor) -> Any:
        x = self.embed(input_ids)
        return {"logits": self.norm(self.self_attn(x, x, x)[0])}


MODELS: dict[str, Callable[[], nn.Module]] = {
    "lora": lambda: adapted(llama(), lora()),
    "rslora": lambda: adapted(llama(), lora(use_rslora=True)),
    "dora": lambda: adapted(llama(), lora(use_dora=True)),
    "bias": lambda: adapted(gpt2(), lora(["c_attn", "c_proj"], lora_bias=True)),
    "embedding": lambda: adapted(llama(), lora(["embed_tokens", "q_proj"])),
    "saved": lambda: adapted(llama(tied=True), lora(modules_to_save=["lm_head"])),
    "several": two_active,
    "elsewhere": one_elsewhere,
    "off": switched_off,
    "before": merged_before,
    "norm": lambda: adapted(seeded(Attention), peft.LNTuningConfig(target_modules=["norm"])),
    "experts": lambda: adapted(mixtral(), lora(["q_proj"], target_parameters=EXPERTS)),
    "tokens": lambda: adapted(
        llama(), peft.TrainableTokensConfig(token_indices=[3, 5], target_modules=["embed_tokens"])
    ),
    "loha": lambda: adapted(llama(), peft.LoHaConfig(r=4, target_modules=LINEAR)),
    "lokr": lambda: adapted(llama(), peft.LoKrConfig(r=4, target_modules=LINEAR)),
    "ia3": lambda: adapted(gpt2(), peft.IA3Config(target_modules=["c_attn", MLP], feedforward_modules=[MLP])),
    "oft": lambda: adapted(llama(), peft.OFTConfig(oft_block_size=8, target_modules=LINEAR)),
    "boft": lambda: adapted(llama(), peft.BOFTConfig(boft_block_size=8, target_modules=LINEAR)),
    "vera": lambda: adapted(llama(), peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"])),
    "shared": lambda: adapted(t5(), lora(["q", "wo"])),
}


def logits(model: nn.Module) -> Tensor:
    options = {"decoder_input_ids": IDS} if "decoder" in dict(model.base_model.model.named_children()) else {}
    with torch.no_grad():
        return model(input_ids=IDS, **options)["logits"]


def objects(model: nn.Module) -> dict[str, Any]:
    """Which modules and parameters stand where, and what PEFT has noted of them."""
    notes = {
        name: (list(module.merged_adapters), sorted(getattr(module, "_caches", ())), module.disable_adapters)
        for name, module in model.named_modules()
        if hasattr(module, "merged_adapters")
    }
    modules = {name: (id(module), sorted(vars(module))) for name, module in model.named_modules()}
    return {"modules": modules, "parameters": {n: id(p) for n, p in model.named_parameters()}, "notes": notes}


@pytest.mark.parametrize("name", MODELS)
def test_inside_it_is_the_same_model_and_outside_the_very_same(name):
    model = MODELS[name]()
    outside = logits(model)
    before, standing = snapshot(model), objects(model)
    with merged(model):
        torch.testing.assert_close(logits(model), outside, rtol=2e-3, atol=2e-3)
        BaseWeights(model, model)  # that is: no difference is left in an adapter
        within = objects(model)
        assert within["parameters"].keys() == standing["parameters"].keys()
    assert_untouched(model, before)
    assert objects(model) == standing
    with contextlib.suppress(KeyboardInterrupt), merged(model):
        raise KeyboardInterrupt
    assert_untouched(model, before)
    assert objects(model) == standing
    assert torch.equal(logits(model), outside)


def test_a_layer_that_cannot_be_merged_leaves_none_merged(monkeypatch):
    model = adapted(llama(), lora())
    layer = model.base_model.model.model.layers[2].mlp.down_proj
    before, standing = snapshot(model), objects(model)

    def fail(**_: Any) -> None:
        layer.get_base_layer().weight.data.add_(1)
        raise NotImplementedError("no")

    monkeypatch.setattr(type(layer), "merge", lambda self, **kw: fail(**kw) if self is layer else None)
    with pytest.raises(NotImplementedError), merged(model):
        pass
    monkeypatch.undo()
    assert_untouched(model, before)
    assert objects(model) == standing


# ---- tied weights ----------------------------------------------------------------------------------------------------


def tied_by_storage() -> nn.Module:
    model = llama()
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data, requires_grad=False)
    return model


def half_of_it() -> nn.Module:
    """The head is the end of the embedding."""
    model = llama()
    model.lm_head = nn.Linear(32, 100, bias=False)
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data[-100:])
    return model


def tied_layers() -> nn.Module:
    model = llama()
    model.model.layers[3].self_attn.q_proj.weight = model.model.layers[1].self_attn.q_proj.weight
    return model


@pytest.mark.parametrize(
    ("model", "targets", "names"),
    [
        (lambda: llama(tied=True), ["embed_tokens", "lm_head", "q_proj"], ("lm_head", "embed_tokens")),
        (lambda: llama(tied=True), ["embed_tokens", "q_proj"], ("embed_tokens", "lm_head")),
        (lambda: llama(tied=True), ["lm_head"], ("lm_head", "embed_tokens")),
        (tied_by_storage, ["embed_tokens", "lm_head"], ("lm_head", "embed_tokens")),
        (tied_by_storage, ["lm_head"], ("lm_head", "embed_tokens")),
        (half_of_it, ["embed_tokens"], ("embed_tokens", "lm_head")),
        (half_of_it, ["lm_head"], ("lm_head", "embed_tokens")),
        (tied_layers, ["q_proj"], ("layers.3.self_attn.q_proj", "layers.1.self_attn.q_proj")),
        (tied_layers, r".*1\.self_attn\.q_proj", ("layers.1.self_attn.q_proj", "layers.3.self_attn.q_proj")),
        (gpt2, ["lm_head"], ("lm_head", "wte")),
        (t5, ["shared"], ("shared", "embed_tokens")),
    ],
)
def test_a_weight_that_others_use_is_refused_with_both_names(model, targets, names):
    model = adapted(model(), lora(targets))
    outside, before, standing = logits(model), snapshot(model), objects(model)
    with pytest.raises(ValueError, match="cannot be merged: its weight is tied to that of") as caught, merged(model):
        pytest.fail("merged")
    assert all(name in str(caught.value) for name in names), caught.value
    assert_untouched(model, before)
    assert objects(model) == standing
    assert torch.equal(logits(model), outside)


class Frozen(nn.Linear):
    """Its weight is a buffer: no optimizer finds it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        del self.weight
        self.register_buffer("weight", linear.weight.data)


def test_a_weight_that_is_a_buffer_comes_back_too():
    model = llama()
    model.model.layers[1].self_attn.q_proj = Frozen(model.model.layers[1].self_attn.q_proj)
    model = adapted(model, lora())
    before, outside = snapshot(model), logits(model)
    with merged(model):
        torch.testing.assert_close(logits(model), outside, rtol=1e-3, atol=1e-3)
    assert_untouched(model, before)


def test_ties_beside_the_adapters_and_views_side_by_side_are_no_matter():
    tied = adapted(llama(tied=True), lora())
    whole = torch.randn(64, 32)
    split = llama()
    for name, rows in (("q_proj", slice(0, 32)), ("k_proj", slice(32, 48)), ("v_proj", slice(48, 64))):
        getattr(split.model.layers[0].self_attn, name).weight = nn.Parameter(whole[rows])
    layer = llama()
    layer.model.layers[2] = layer.model.layers[1]  # one layer that is called twice
    for model in (tied, adapted(split, lora(["q_proj", "v_proj"])), adapted(layer, lora())):
        before, outside = snapshot(model), logits(model)
        with merged(model):
            torch.testing.assert_close(logits(model), outside, rtol=1e-3, atol=1e-3)
        assert_untouched(model, before)


# ---- quantised weights -----------------------------------------------------------------------------------------------


class EightBit(nn.Linear):
    """As quantisers keep weights: whole numbers, and a scale for each row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.data.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.data / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ (self.weight * self.scale).T


def test_quantised_weights_are_refused_by_name():
    model = llama()
    model.model.layers[1].self_attn.q_proj = EightBit(model.model.layers[1].self_attn.q_proj)
    model = peft.get_peft_model(model, lora())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj` cannot .*quantised .*torch.int8"), merged(model):
        pass
    refuse_unmergeable(adapted(llama(), lora()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_that_peft_makes_anew_are_refused():
    model = adapted(seeded(Attention), lora(["self_attn"]))
    with pytest.raises(ValueError, match=r"self_attn` cannot .* anew whenever they are listed \(MultiheadAttention"):
        refuse_unmergeable(model)
