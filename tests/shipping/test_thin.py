from __future__ import annotations

import copy
import re

import lightning.pytorch as pl
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from small_models import IDS, gpt2, mixtral, run, t5
from tiny import tiny_causal_lm
from torch import nn
from weights import same, weights

from laser_callback.plans.reduction import Reduction
from laser_callback.shipping.export import save_reduced
from laser_callback.shipping.factored_file import WEIGHTS, load_factored
from laser_callback.shipping.thin import FactoredLinear, factored, make_room, thin_factors
from laser_callback.spectra.spectrum import Spectrum
from laser_callback.spectra.store import Spectra
from laser_callback.surgery.record import apply
from laser_callback.surgery.swap import reduced


def dense(model: nn.Module, plan: str, spectra: Spectra | None = None) -> torch.Tensor:
    with reduced(model, plan, spectra):
        return run(model)


# ---- in a live model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "plan", "ranks"),
    [
        (tiny_causal_lm, "1.fc_in@0.1, 3.out_proj@0.2", {"model.layers.1.mlp.gate_proj": 3,
                                                         "model.layers.3.self_attn.o_proj": 6}),
        (tiny_causal_lm, "2.fc_out@0", {"model.layers.2.mlp.down_proj": 0}),
        (tiny_causal_lm, "2.fc_out@0.9:keep=tail", {"model.layers.2.mlp.down_proj": 4}),
        (tiny_causal_lm, "2.fc_out@0.1:band=0.8", {"model.layers.2.mlp.down_proj": 7}),
        (gpt2, "1.fc_in@0.2, 2.fc_out@0.1", {"transformer.h.1.mlp.c_fc": 3, "transformer.h.2.mlp.c_proj": 1}),
        (mixtral, "0.q_proj@0.2", {"model.layers.0.self_attn.q_proj": 3}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_thin_layers_are_the_cut(make, plan, ranks, dtype):
    model = make().to(dtype)
    before, original, expected = weights(model), run(model), dense(model, plan)
    modules = list(model.modules())
    with factored(model, plan) as thin:
        assert thin.ranks == ranks
        assert thin.dense == {}
        for name, rank in ranks.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, FactoredLinear)
            assert layer.up.dtype == layer.down.dtype == dtype
            assert layer.down.shape[0] == layer.up.shape[1] == rank
        inside = run(model)
        tolerance = {torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.1}[dtype]
        torch.testing.assert_close(inside, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
        assert not torch.equal(inside, original)
    assert same(model, before)
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
    assert torch.equal(run(model), original)


def test_biases_stay():
    model = gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.bias.normal_()
    bias = model.transformer.h[1].mlp.c_fc.bias
    with factored(model, "1.fc_in@0"):
        assert model.transformer.h[1].mlp.c_fc.bias is bias
        assert torch.equal(model.transformer.h[1].mlp.c_fc(torch.ones(2, 16)), bias.expand(2, -1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(16, 16)}) for _ in range(3)])
        self.layers[1]["fc1"].weight = self.layers[0]["fc1"].weight
        self.hooked = self.layers[2]["fc1"].register_forward_hook(lambda *_: None)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()


@pytest.mark.parametrize(
    ("make", "plan", "name", "reason"),
    [
        (tiny_causal_lm, "1.fc_in@0.4", "model.layers.1.mlp.gate_proj", "its rank is 12, and two .* worth it up to 10"),
        (tiny_causal_lm, "1.fc_in@0.1:scale=0.5", "model.layers.1.mlp.gate_proj", "its rank is 32"),
        (tiny_causal_lm, "1.fc_in@0.1:of=entries", "model.layers.1.mlp.gate_proj", "not cut along its singular direct"),
        (tiny_causal_lm, "1.fc_in@0.1:blocks=2", "model.layers.1.mlp.gate_proj", "not cut along its singular direct"),
        (gpt2, "1.q_proj@0.1", "transformer.h.1.attn.c_attn[q_proj]", "a part of a fused weight"),
        (mixtral, "1.fc_out[2]@0.1", "model.layers.1.mlp.experts.down_proj[2]", "an expert in a 3-D tensor"),
        (Tied, "0.fc_in@0.1", "layers.0.fc1", "tied to another module's"),
        (Tied, "2.fc_in@0.1", "layers.2.fc1", "hooks are attached"),
        (t5, "encoder.0.fc_out@0.1", "encoder.block.0.layer.1.DenseReluDense.wo", "T5DenseActDense reads its weight"),
        (encoder, "1.fc_in@0.1", "layers.1.linear1", "TransformerEncoderLayer reads its weight"),
        (lambda: nn.Linear(16, 16), "/.*/@0.1", "weight", "the whole model"),
        (encoder, "1.out_proj@0.1", "layers.1.self_attn.out_proj", "NonDynamicallyQuantizableLinear, not a linear"),
    ],
)  # fmt: skip
def test_what_stays_dense_is_cut_and_said(make, plan, name, reason):
    model = make()
    with reduced(model, plan):
        expected = weights(model)
    before = weights(model)
    with factored(model, plan) as thin:
        assert not thin.layers
        assert list(thin.dense) == [name]
        assert re.search(reason, thin.dense[name]), thin.dense[name]
        assert same(model, expected)
    assert same(model, before)


def test_how_much_smaller_is_up_to_the_caller():
    model = tiny_causal_lm()
    with factored(model, "1.fc_in@0.6", max_share=1) as thin:  # 19 x 96 of 32 x 64 numbers
        assert thin.ranks == {"model.layers.1.mlp.gate_proj": 19}
    with factored(model, "1.fc_in@0.7", max_share=1) as thin:  # 22 x 96: more than there are
        assert list(thin.dense) == ["model.layers.1.mlp.gate_proj"]
    for share in (0, 1.1, float("nan")):
        with (
            pytest.raises(ValueError, match="`max_share` must be a number above 0"),
            factored(model, "1.fc_in@0.1", max_share=share),
        ):
            pass


def test_a_shared_layer_becomes_one_thin_layer():
    block = nn.ModuleDict({"fc1": nn.Linear(16, 16)})
    other = nn.ModuleDict({"fc1": nn.Linear(16, 16)})
    model = nn.ModuleDict({"layers": nn.ModuleList([block, other, block]), "head": block["fc1"]})
    linear = block["fc1"]
    with factored(model, "0.fc_in@0.1") as thin:
        assert model["head"] is block["fc1"] is thin.layers["layers.0.fc1"]
    assert model["head"] is block["fc1"] is linear


def test_kept_layers_train_and_go_through_training_mode():
    model = tiny_causal_lm()
    model.model.layers[2].mlp.gate_proj.weight.requires_grad_(False)
    expected = dense(model, "1.fc_in@0.1, 2.fc_in@0.1, 3.fc_in@0.9")
    with factored(model, "1.fc_in@0.1, 2.fc_in@0.1, 3.fc_in@0.9") as thin:
        thin.keep()
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-4)
    layer, frozen = (model.model.layers[i].mlp.gate_proj for i in (1, 2))
    assert not frozen.up.requires_grad
    before = layer.up.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert layer.training
    assert not torch.equal(layer.up, before)


def test_an_exception_in_the_block_puts_all_back():
    model = tiny_causal_lm()
    before, modules = weights(model), list(model.modules())
    with pytest.raises(KeyboardInterrupt), factored(model, "*.mlp@0.1"):
        raise KeyboardInterrupt
    assert same(model, before)
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))


def test_cuts_of_the_paper_s_code_stay_dense():
    model = tiny_causal_lm()
    expected = dense(model, "1.fc_in@0.1:of=reference")
    with factored(model, "1.fc_in@0.1:of=reference") as thin:
        assert not thin.layers
        assert torch.equal(run(model), expected)


def test_one_factorisation_serves_the_layer_and_the_record():
    spectra = Spectra()
    with factored(tiny_causal_lm(), "*.mlp@0.1", spectra):
        assert spectra.factorised == 12


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
@pytest.mark.parametrize(
    "text",
    [
        "0.x@0",
        "0.x@0.3",
        "0.x@0.9:keep=tail",
        "0.x@0.2:scale=-0.5",
        "0.x@1",
        "0.x@0.2:norm=whole",
        "0.x@0.2:scale=0.3,norm=whole",
        "0.x@places-1+4-6",
    ],
)
def test_factors_multiply_to_the_cut(shape, text):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reduction, spectrum = Reduction.parse(text), Spectrum.of(matrix)
    gains = spectrum.gains(reduction)
    up, down = thin_factors(matrix, spectrum, gains)
    assert up.shape[1] == down.shape[0] == int((gains != 0).sum())
    torch.testing.assert_close(up @ down, spectrum.reduce(matrix, reduction), rtol=1e-10, atol=1e-10)


# ---- torch.export, Lightning -----------------------------------------------------------------------------------------


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


@pytest.mark.slow
def test_torch_export():
    model = tiny_causal_lm()
    with factored(model, "*.mlp@0.1, 1.q_proj@0") as thin:
        thin.keep()
    program = torch.export.export(Logits(model), (IDS,))
    torch.testing.assert_close(program.module()(IDS), run(model))
    assert "model.model.layers.1.mlp.gate_proj.up" in program.state_dict


class Module(pl.LightningModule):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = tiny_causal_lm(seed)


def test_a_lightning_checkpoint_of_the_factored_module(tmp_path):
    module, plan = Module(seed=3), "*.fc_in@0.1, 1.fc_up@0.9"
    before, expected = weights(module), dense(module.net, plan)
    save_reduced(module, plan, tmp_path / "thin.ckpt", "factored")
    assert same(module, before)
    fresh = Module()
    assert load_factored(tmp_path / "thin.ckpt", fresh) is fresh
    torch.testing.assert_close(run(fresh.net), expected, rtol=1e-5, atol=1e-4)
    # Lightning itself reads it into a module that has room for it.
    content = torch.load(tmp_path / "thin.ckpt", weights_only=True)
    assert content["hyper_parameters"] == {"seed": 3}
    again = Module()
    make_room(again, content["laser_ranks"])
    again.load_state_dict(content["state_dict"])
    assert same(again, weights(fresh))
    save = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    save.strategy.connect(again)
    save.save_checkpoint(tmp_path / "again.ckpt")
    state = torch.load(tmp_path / "again.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(state[name], value) for name, value in content["state_dict"].items())


class Given(pl.LightningModule):
    """Its hyperparameters are objects: a loss, and the very model that is cut."""

    def __init__(self, net: nn.Module, criterion: nn.Module) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = net


def test_a_lightning_checkpoint_whose_hyperparameters_are_objects(tmp_path):
    module, plan = Given(tiny_causal_lm(seed=3), nn.MSELoss()), "*.fc_in@0.1"
    expected = dense(module.net, plan)
    save_reduced(module, plan, tmp_path / "thin.ckpt", "factored")
    fresh = Given(tiny_causal_lm(), nn.MSELoss())
    load_factored(tmp_path / "thin.ckpt", fresh)
    torch.testing.assert_close(run(fresh.net), expected, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match=r"thin.ckpt' holds objects beside tensors \(.*torch.nn.modules.loss.MSELoss"):
        load_factored(tmp_path / "thin.ckpt", Module())


# ---- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_causal_lm, gpt2])  # GPT-2's output layer is tied to its embedding
def test_a_folder_is_the_factored_model(make, dtype, tmp_path):
    model = make().to(dtype)
    with factored(model, "*.mlp@0.1") as thin:
        expected, state, count = run(model), weights(model), len(thin.layers)
    save_reduced(model, "*.mlp@0.1", tmp_path / "thin", "factored")
    torch.manual_seed(0)
    random = torch.random.get_rng_state()
    loaded = load_factored(tmp_path / "thin")
    assert torch.equal(torch.random.get_rng_state(), random)  # no weights were made up first
    assert sum(isinstance(m, FactoredLinear) for m in loaded.modules()) == count
    assert type(loaded) is type(model)
    assert not loaded.training
    assert loaded.dtype == dtype
    assert same(loaded, state)
    assert dtype != torch.float32 or torch.equal(run(loaded), expected)  # `.to(bfloat16)` has rounded buffers too
    assert not any(p.is_meta for p in loaded.parameters())
    if make is gpt2:
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
    small, large = (sum(p.numel() for p in m.parameters()) for m in (loaded, model))
    assert small < large
    save_reduced(model, "*.mlp@0.1", tmp_path / "dense")
    assert (tmp_path / "thin" / WEIGHTS).stat().st_size < (tmp_path / "dense" / "model.safetensors").stat().st_size


def test_generation_with_a_loaded_model(tmp_path):
    model = tiny_causal_lm()
    save_reduced(model, "*.mlp@0.1", tmp_path / "thin", "factored")
    with reduced(model, "*.mlp@0.1"):
        expected = model.generate(IDS, max_new_tokens=8, do_sample=False)
    assert torch.equal(load_factored(tmp_path / "thin").generate(IDS, max_new_tokens=8, do_sample=False), expected)


def test_plain_transformers_does_not_make_weights_up(tmp_path):
    save_reduced(tiny_causal_lm(), "*.mlp@0.1", tmp_path / "thin", "factored")
    with pytest.raises(OSError, match=r"no file named .*model\.safetensors"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "thin")


def test_the_file_alone_with_a_model_of_ones_own(tmp_path):
    model = tiny_causal_lm()
    with factored(model, "*.mlp@0.1"):
        expected = run(model)
    save_reduced(model, "*.mlp@0.1", tmp_path / "thin", "factored")
    fresh = tiny_causal_lm(seed=5)
    load_factored(tmp_path / "thin" / WEIGHTS, fresh)
    assert torch.equal(run(fresh), expected)


def test_what_cannot_be_loaded_is_said(tmp_path):
    save_reduced(tiny_causal_lm(), "*.mlp@0.1", tmp_path / "thin", "factored")
    with pytest.raises(FileNotFoundError, match=f"no factored model at .*: it has no {WEIGHTS}"):
        load_factored(tmp_path)
    with pytest.raises(ValueError, match="`model` must be given"):
        load_factored(tmp_path / "thin" / WEIGHTS)
    with pytest.raises(ValueError, match=r"another model: it has no module `model\.layers"):
        load_factored(tmp_path / "thin" / WEIGHTS, gpt2())
    config = copy.deepcopy(tiny_causal_lm().config)
    config.hidden_size = 16
    with pytest.raises(ValueError, match="`model` is another model than that of"):
        load_factored(tmp_path / "thin", hf.LlamaForCausalLM(config))
    save_file(load_file(tmp_path / "thin" / WEIGHTS), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="is no factored model: it does not say the ranks"):
        load_factored(tmp_path / "plain.safetensors", tiny_causal_lm())
    content = (tmp_path / "thin" / WEIGHTS).read_bytes()
    (tmp_path / "thin" / WEIGHTS).write_bytes(content[:-10])
    with pytest.raises(ValueError, match="is damaged"):
        load_factored(tmp_path / "thin")


def test_a_plan_that_makes_nothing_thin_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"no matrix can be two thin layers \(`model\.layers\.1\.mlp\.gate_proj`: its rank"
    ):
        save_reduced(tiny_causal_lm(), "1.fc_in@0.9", tmp_path / "thin", "factored")
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_holds_for_factored_models(tmp_path):
    recipe = apply(tiny_causal_lm(), "*.mlp@0.1")
    assert save_reduced(tiny_causal_lm(), recipe, tmp_path / "thin", "factored").matrices == recipe.matrices
    with pytest.raises(ValueError, match="are others than those"):
        save_reduced(tiny_causal_lm(seed=1), recipe, tmp_path / "other", "factored")
    assert [path.name for path in tmp_path.iterdir()] == ["thin"]
