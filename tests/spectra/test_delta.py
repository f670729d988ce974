"""Delta mode: the difference to the base is cut, and nothing else; what does not fit is said before any work."""

from __future__ import annotations

import copy
import json
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers as hf
from benchmarks.planted import plant
from matrices import best
from recall import SEARCH, Recall, all_examples, healthy
from safetensors.torch import save_file
from screening import Steps, ids, run
from tiny import tiny_causal_lm, tiny_tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toy import CLASSES, Toy, make_data
from trainers import quiet_trainer
from weights import same, weights

from laser_callback import (
    LaserCallback,
    LaserModule,
    LaserSearch,
    StagedRollout,
    find_matrices,
    reduced,
    restore,
    save_reduced,
)
from laser_callback.cli.commands import main
from laser_callback.plans.matrices import WeightMatrix
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.reduction import Reduction
from laser_callback.plans.target import Target, targets
from laser_callback.search.screen import GradientScreen
from laser_callback.search.sensitivities import View
from laser_callback.spectra.delta import BaseWeights
from laser_callback.spectra.store import Spectra
from laser_callback.support.merging import merged, put_effective
from laser_callback.surgery.recipe import Recipe
from laser_callback.surgery.record import apply

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("own_cache")


def tuned(base: nn.Module, size: float = 0.02, seed: int = 1) -> nn.Module:
    """The base after a change of all its matrices."""
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            change = torch.randn(parameter.shape, generator=generator) * size
            parameter.data += change.to(parameter.dtype)
    return model


def matrix_of(model: nn.Module, layer: int, kind: str) -> WeightMatrix:
    (found,) = [m for m in find_matrices(model) if (m.layer, m.kind) == (layer, kind)]
    return found


def expected(weight: Tensor, base: Tensor, rank: int) -> Tensor:
    """W_base + rank_k(W - W_base) by LAPACK's SVD in float64."""
    return base.double() + best(weight.double() - base.double(), rank)


# ---- the cut ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0, 0.1, 0.5, 1])
@pytest.mark.parametrize("kind", ["q_proj", "k_proj", "fc_in", "fc_out"])
def test_only_the_difference_is_cut(kind, rho):
    base = tiny_causal_lm()
    model = tuned(base)
    before = weights(model)
    matrix, counterpart = matrix_of(model, 2, kind), matrix_of(base, 2, kind)
    rank = Reduction(2, kind, rho).rank(matrix.max_rank)
    own, theirs = matrix.parameter.data.clone(), counterpart.parameter.data
    with reduced(model, f"2.{kind}@{rho}:cut=delta", Spectra(base=BaseWeights(base, model))):
        inside = matrix.parameter.data
        torch.testing.assert_close(inside.double(), expected(own, theirs, rank), rtol=0, atol=1e-7)
        if rho == 0:
            assert torch.equal(inside, theirs)
        others = {name: p for name, p in model.named_parameters() if p is not matrix.parameter}
        assert all(torch.equal(p, before[name]) for name, p in others.items())
        assert (inside.data_ptr() == own.data_ptr()) == (rho == 1) or rho == 1
    assert same(model, before)


def test_parts_of_fused_and_transposed_parameters():
    config = hf.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)
    base = hf.GPT2LMHeadModel(config).eval()
    model = tuned(base, 2e-3)
    own, theirs = (m.transformer.h[1].attn.c_attn.weight.data.clone() for m in (model, base))  # (in, q | k | v)
    with reduced(model, "1.k_proj@0.2:cut=delta", Spectra(base=BaseWeights(base, model))):
        inside = model.transformer.h[1].attn.c_attn.weight.data
        assert torch.equal(inside[:, :16], own[:, :16])
        assert torch.equal(inside[:, 32:], own[:, 32:])
        k = expected(own[:, 16:32].T, theirs[:, 16:32].T, 3).T
        torch.testing.assert_close(inside[:, 16:32].double(), k, rtol=0, atol=1e-7)


def test_a_base_of_higher_precision_counts_as_fine_tuning_had_it():
    base = tiny_causal_lm()
    model = copy.deepcopy(base).bfloat16()
    matrix_of(model, 1, "fc_up").parameter.data += 0.5
    weights = BaseWeights(base, model)
    changed = [m.name for m in find_matrices(model) if weights.changed(m)]
    assert changed == ["model.layers.1.mlp.up_proj"]  # rounding to bfloat16 is no fine-tuning
    with reduced(model, "1.fc_up@0:cut=delta", Spectra(base=weights)):
        inside = model.model.layers[1].mlp.up_proj.weight
        assert inside.dtype == torch.bfloat16
        assert torch.equal(inside, base.model.layers[1].mlp.up_proj.weight.bfloat16())


def test_scaled_and_tail_cuts_are_of_the_difference_too():
    base = tiny_causal_lm()
    model = tuned(base)
    own, theirs = (m.model.layers[0].mlp.gate_proj.weight.data.clone().double() for m in (model, base))
    head = expected(own, theirs, 3) - theirs
    cases = {
        "0.fc_in@0.1:cut=delta,scale=0.5": 0.5 * (own - theirs + head),
        "0.fc_in@0.1:cut=delta,keep=tail": own - theirs - head,
    }
    for text, kept in cases.items():
        with reduced(model, text, Spectra(base=BaseWeights(base, model))):
            inside = model.model.layers[0].mlp.gate_proj.weight.double()
            torch.testing.assert_close(inside, theirs + kept, rtol=0, atol=1e-7)


# ---- what a base can be ----------------------------------------------------------------------------------------------


class Wrapped(pl.LightningModule):
    """A model under a name of its own, beside a head whose name ends like a layer's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"backbone": model})
        self.q_proj = nn.Linear(3, 5, bias=False)


def test_every_form_of_a_base_is_the_same_base(tmp_path):
    base = tiny_causal_lm()
    module = Wrapped(tuned(base))
    base.save_pretrained(tmp_path / "folder")
    save_file({k: v.contiguous() for k, v in base.state_dict().items()}, tmp_path / "base.safetensors")
    torch.save(base.state_dict(), tmp_path / "base.pt")
    lightning = {f"lm.{name}": value for name, value in base.state_dict().items()}
    torch.save({"state_dict": lightning, "epoch": 3}, tmp_path / "base.ckpt")
    adapted = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["q_proj"]))
    forms = [base, Wrapped(base), base.state_dict(), adapted]
    forms += [tmp_path / "folder", str(tmp_path / "base.safetensors"), tmp_path / "base.pt", tmp_path / "base.ckpt"]
    digests = {BaseWeights(form, module).digest for form in forms}
    assert len(digests) == 1
    assert digests != {BaseWeights(tuned(base, 1e-3, seed=2), module).digest}


def wider() -> nn.Module:
    config = copy.deepcopy(tiny_causal_lm().config)
    config.intermediate_size = 48
    return hf.LlamaForCausalLM(config)


def shallower() -> nn.Module:
    config = copy.deepcopy(tiny_causal_lm().config)
    config.num_hidden_layers = 3
    return hf.LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (wider, r"12 of 28 matrices have another shape, first `model.layers.0.mlp.gate_proj`, \(48, 32\) in the base"),
        (shallower, "lacks 7 of 28 matrices, first `model.layers.3.self_attn.q_proj.weight`"),
        (lambda: tiny_causal_lm(seed=1), r"its weights differ from the model's by 14\d%"),
        (lambda: {}, "lacks 28 of 28 matrices"),
    ],
)
def test_another_base_is_refused(other, message):
    with pytest.raises(ValueError, match=message):
        BaseWeights(other(), tuned(tiny_causal_lm()))


def test_files_that_are_no_base(tmp_path):
    model = tiny_causal_lm()
    peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is an adapter: give the model under it"):
        BaseWeights(tmp_path, model)
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": nn.Linear(2, 2)}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"holds objects beside tensors \(torch.nn.modules.linear.Linear\)"):
        BaseWeights(tmp_path / "a.ckpt", model)


def test_a_matrix_without_counterpart_is_named():
    base = tiny_causal_lm()
    module = Wrapped(tuned(base))
    spectra = Spectra(base=BaseWeights(base, module))
    with (
        pytest.raises(ValueError, match="no counterpart of `q_proj`"),
        reduced(module, "/q_proj/@0:cut=delta", spectra),
    ):
        pass


def test_the_model_in_a_module_has_the_base_of_the_module():
    base = tiny_causal_lm()
    module = Wrapped(tuned(base))
    spectra = Spectra(base=BaseWeights(base, module))
    (inside,) = reduced(module.net["backbone"], "0.q_proj@0:cut=delta", spectra).prepare()
    (outside,) = reduced(module, "0.q_proj@0:cut=delta", spectra).prepare()
    assert torch.equal(inside, outside)
    assert torch.equal(inside, matrix_of(base, 0, "q_proj").parameter)


# ---- adapters --------------------------------------------------------------------------------------------------------


def with_lora(rank: int = 4, **options: Any) -> nn.Module:
    config = peft.LoraConfig(r=rank, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(tiny_causal_lm(), config).eval()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_merged_adapters_are_the_same_model_and_come_apart_bit_for_bit(options):
    model = with_lora(**options)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        before, logits = weights(model), model(input_ids=tokens).logits
        with merged(model):
            inside = weights(model)
            torch.testing.assert_close(model(input_ids=tokens).logits, logits, rtol=1e-4, atol=1e-4)
        changed = [name for name, value in inside.items() if not torch.equal(value, before[name])]
        assert len(changed) == 8
        assert all(name.endswith("base_layer.weight") for name in changed)
        with pytest.raises(KeyboardInterrupt), merged(model):
            raise KeyboardInterrupt
        assert torch.equal(model(input_ids=tokens).logits, logits)
    assert same(model, before)


def test_the_difference_of_lora_has_its_rank():
    model = with_lora(rank=4)
    base = tiny_causal_lm()
    with pytest.raises(ValueError, match=r"still in adapters, 8 of them from `base_model.*q_proj` on: merge them"):
        BaseWeights(base, model)
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    update = layer.get_delta_weight("default").detach()
    with merged(model):
        spectra = Spectra(base=BaseWeights(base, model))
        q, k = matrix_of(model, 1, "q_proj"), matrix_of(model, 1, "k_proj")
        unchanged = {
            rho: spectra.changes_nothing(q.parameter.data, Reduction(1, "q_proj", rho, cut="delta"), q.name)
            for rho in (0.0, 3 / 32, 4 / 32, 0.5)
        }
        assert unchanged == {0.0: False, 3 / 32: False, 4 / 32: True, 0.5: True}
        assert spectra.changes_nothing(k.parameter.data, Reduction(1, "k_proj", 0.0, cut="delta"), k.name)
        u, s, v = torch.linalg.svd(update.double())
        with reduced(model, f"1.q_proj@{2 / 32}:cut=delta", spectra):
            kept = q.parameter.data.double() - base.model.layers[1].self_attn.q_proj.weight.double()
            torch.testing.assert_close(kept, (u[:, :2] * s[:2]) @ v[:2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
def test_effective_weights_go_under_silent_adapters(options):
    model = with_lora(**options)
    other = with_lora(**options)
    tokens = torch.arange(12)[None]
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        with merged(model), reduced(model, "1.q_proj@0.1, 2.fc_out@0.2"):
            changed = {name: p.data for name, p in model.named_parameters() if ".1." in name and "q_proj.base" in name}
            changed |= {name: p.data for name, p in model.named_parameters() if ".2." in name and "down_proj.b" in name}
            logits = model(input_ids=tokens).logits
        put_effective(state, model, changed)
        other.load_state_dict(state)
        torch.testing.assert_close(other(input_ids=tokens).logits, logits, rtol=1e-4, atol=1e-4)
        layer = other.base_model.model.model.layers[1].self_attn.q_proj
        x = torch.randn(3, 32)
        assert torch.equal(
            layer(x), x @ changed["base_model.model.model.layers.1.self_attn.q_proj.base_layer.weight"].T
        )
    silent = [name for name, value in state.items() if "lora_B" in name and not value.any()]
    assert len(silent) == len(changed) == 2


# ---- in a run --------------------------------------------------------------------------------------------------------


def test_scores_are_derivatives_towards_the_base():
    torch.manual_seed(0)
    base = tiny_causal_lm().double()
    module = Steps(tuned(base))
    found = [Target(t.matrices, {**t.address, "cut": "delta"}) for t in targets(module, "1.attn, 3.mlp")]
    rhos = (0.0, 0.1, 0.5)
    batch = ids()
    views = {View("delta"): [matrix for target in found for matrix in target.matrices]}
    screen = GradientScreen(views, Spectra(base=BaseWeights(base, module)))
    run(screen, module, batch)
    module.losses(batch).mean().backward()
    for target in found:
        (matrix,) = target.matrices
        own = matrix.parameter
        theirs = dict(base.named_parameters())[matrix.parameter_names[0].removeprefix("model.")]
        for rho in rhos:
            change = expected(own.data, theirs.data, target.at(rho).rank(matrix.max_rank)) - own.data
            score, _ = screen.estimate(LaserPlan([target.at(rho)]))
            assert score == pytest.approx(float((own.grad * change).sum()), rel=1e-6)


def test_the_callback_compares_with_the_cut_difference(tmp_path):
    base = Toy()
    module = tuned(base, 0.3)
    laser = LaserCallback("1.mlp@0.1:cut=delta", base=base, controls=True, report=False)
    logged = quiet_trainer(laser).validate(module, make_data(), verbose=False)[0]
    with reduced(module, "1.mlp@0.1:cut=delta", Spectra(base=BaseWeights(base, module))):
        alone = quiet_trainer().validate(module, make_data(), verbose=False)[0]
    full = LaserCallback("1.mlp@0.1", report=False)
    quiet_trainer(full).validate(module, make_data(), verbose=False)
    assert {key: logged[f"laser/{key}"] for key in ("acc", "loss")} == pytest.approx(alone)
    assert laser.result.base == BaseWeights(base, module).digest
    assert full.result.base is None
    assert full.result["laser"]["loss"].reduced != laser.result["laser"]["loss"].reduced
    other = Toy()
    other.net.head = nn.Linear(4, CLASSES)
    other.net.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 3)
    with pytest.raises(ValueError, match="another shape"):
        quiet_trainer(LaserCallback("1.mlp@0.1:cut=delta", base=other)).validate(module, make_data())


def test_a_base_and_plans_that_do_not_go_together_are_refused_before_any_work():
    base = Toy()
    module = tuned(base, 0.3)
    with pytest.raises(ValueError, match=r"`base` is given, and 1\.mlp@0\.1 cuts the weights themselves"):
        LaserCallback("1.mlp@0.1", base=base)
    LaserCallback({"a": "1.mlp@0.1", "b": "1.mlp@0.1:cut=delta"}, base=base)
    for loop in ("validate", "fit"):
        laser = LaserCallback("1.mlp@0.1:cut=delta", loops=loop, report=False)
        trainer, before = quiet_trainer(laser, max_epochs=1), weights(module)
        with pytest.raises(ValueError, match=r"the plan 1\.mlp@0\.1:cut=delta cuts .* give that as `base`"):
            getattr(trainer, loop)(module, make_data())
        assert trainer.global_step == 0
        assert same(module, before)
    with pytest.raises(ValueError, match="give that as `base`"):
        StagedRollout(module, "1.mlp@0.1:cut=delta", ["loss < +1"], make_data()).prepare()


@pytest.fixture(scope="module")
def planted():
    return plant(layers=2, subjects=16, steps=150, rank=3, tail=0.95)


@pytest.mark.slow
def test_the_search_finds_what_fine_tuning_has_spoilt(planted):
    """All matrices have changed a little and one has a harmful tail, which the base has not."""
    module = Recall(planted.module.model).eval()
    base = tuned(Recall(healthy(planted)).eval(), 1e-3)
    (matrix,) = planted.target.matrices
    loader = all_examples(planted)
    before = weights(module)
    result = LaserSearch(module, loader, base=base, strategies="delta-matrices", **SEARCH).run()
    (found,) = result.plan
    assert (found.layer, found.matrix) == (planted.target.address["layer"], planted.target.address["matrix"])
    assert result.base == BaseWeights(base, module).digest
    assert result.to_dict()["base"] == result.confirmed.base == result.base
    assert "on the difference to the base" in result.verdict
    assert same(module, before)
    (name,) = matrix.parameter_names
    with reduced(module, result.plan, Spectra(base=BaseWeights(base, module))), torch.no_grad():
        inside = matrix.parameter.data.clone()
    torch.testing.assert_close(
        inside.double(),
        expected(before[name], dict(base.named_parameters())[name].data, found.rank(matrix.max_rank)),
        rtol=0,
        atol=1e-6,
    )


def test_a_search_without_any_difference_is_refused(planted):
    module = Recall(planted.module.model).eval()
    loader = DataLoader(TensorDataset(*planted.race), batch_size=50)
    with pytest.raises(ValueError, match=r"do not differ in any matrix of `within` '\*.all'"):
        LaserSearch(module, loader, base=module, **SEARCH).run()
    with pytest.raises(ValueError, match="`spectra` have their own `base`"):
        LaserSearch(module, loader, base=module, spectra=Spectra(), **SEARCH)


# ---- shipped ---------------------------------------------------------------------------------------------------------


def test_a_recipe_of_delta_mode_needs_its_base_and_can_be_undone(tmp_path):
    base = tiny_causal_lm()
    model = tuned(base)
    before = weights(model)
    spectra = Spectra(base=BaseWeights(base, model))
    save_reduced(model, "1.fc_in@0.1:cut=delta", tmp_path / "laser.json", "recipe", spectra=spectra)
    save_reduced(model, "1.fc_in@0.1:cut=delta", tmp_path / "undo.safetensors", "undo", spectra=spectra)
    recipe = Recipe.from_file(tmp_path / "laser.json")
    with pytest.raises(ValueError, match="cuts the difference to the base"):
        apply(model, recipe)
    with pytest.raises(ValueError, match="cuts the difference to the base"):
        apply(model, recipe, spectra=Spectra(base=BaseWeights(tuned(base, seed=9), model)))
    assert same(model, before)

    apply(model, recipe, spectra=spectra)
    matrix = matrix_of(model, 1, "fc_in")
    cut = expected(before[matrix.parameter_names[0]], dict(base.named_parameters())[matrix.parameter_names[0]], 3)
    assert torch.allclose(matrix.parameter.double(), cut, atol=1e-6)
    restore(model, tmp_path / "undo.safetensors")
    assert same(model, before)


def test_delta_mode_ships_from_the_command_line(tmp_path, capsys):
    base = tiny_causal_lm()
    model = tuned(base)
    for name, saved in (("base", base), ("tuned", model)):
        saved.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)

    def ship(*arguments: str) -> int:
        return main([str(tmp_path / a[1:]) if a.startswith("/") else a for a in arguments])

    export = ("export", "--model", "/tuned", "--plan", "1.fc_in@0.1:cut=delta", "--base", "/base")
    assert ship(*export, "--form", "recipe", "--output", "/laser.json") == 0
    apply = ("apply", "--model", "/tuned", "--recipe", "/laser.json", "--output", "/cut")
    assert ship(*apply) == 2
    assert "on the command line --base" in " ".join(capsys.readouterr().err.split())
    assert ship("export", "--model", "/tuned", "--plan", "1.fc_in@0.1", "--base", "/base", "--output", "/no") == 2
    assert "add cut=delta to the plan" in " ".join(capsys.readouterr().err.split())
    assert ship(*apply, "--base", "/base") == 0
    found = weights(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "cut"))
    with reduced(model, "1.fc_in@0.1:cut=delta", Spectra(base=BaseWeights(base, model))):
        assert same(model, found)


def test_a_rollout_in_delta_mode_from_the_command_line(tmp_path):
    base = tiny_causal_lm()
    for name, model in (("base", base), ("tuned", tuned(base))):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    facts = [{"id": f"{i}", "prompt": f"The capital of {i} is", "answer": "Paris"} for i in range(12)]
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)))
    command = ["gate", "--gates", '["log_loss: delta < 1e9"]', "--accelerator", "cpu"]
    command += ["--model", str(tmp_path / "tuned"), "--facts", str(tmp_path / "facts.jsonl")]
    losses = {}
    delta = ["--plan", "1.mlp@0:cut=delta", "--base", str(tmp_path / "base")]
    for name, options in (("full", ["--plan", "1.mlp@0"]), ("delta", delta)):
        assert main([*command, *options, "--output", str(tmp_path / name)]) == 0
        result = json.loads((tmp_path / name).read_text())
        assert ("base" in result["settings"]) == (name == "delta")
        rows = result["stages"][0]["results"][""]["arms"]["laser"]["rows"]
        losses[name] = next(row["reduced"] for row in rows if row["metric"] == "log_loss")
    assert losses["full"] != losses["delta"]


def test_what_is_left_of_a_difference_is_an_adapter_of_the_base(tmp_path):
    base = tiny_causal_lm()
    model = copy.deepcopy(base)
    for layer, kind in ((0, "q_proj"), (1, "fc_in")):
        weight = matrix_of(model, layer, kind).parameter
        weight.data += torch.randn(weight.shape, generator=torch.Generator().manual_seed(layer)) * 0.05
    module = LaserModule(model, tiny_tokenizer())
    spectra = Spectra(base=BaseWeights(base, module))  # of the module around: the folder holds the model in it
    plan = "0.q_proj@0.1:cut=delta, 1.fc_in@0.1:cut=delta"
    save_reduced(module, plan, tmp_path / "adapter", "adapter", spectra=spectra)
    save_reduced(module, plan, tmp_path / "dense", "dense", spectra=spectra)
    with torch.no_grad(), reduced(module, plan, spectra):
        wanted = model(ids(2)).logits
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    dense = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    with torch.no_grad():
        assert torch.equal(dense(ids(2)).logits, wanted)
        assert torch.allclose(adapted(ids(2)).logits, wanted, atol=1e-5)
        assert not torch.allclose(base(ids(2)).logits, wanted, atol=1e-3)

    with pytest.raises(
        ValueError, match=r"changed 1 parameters besides .* first `model\.model\.layers\.1\.mlp\.gate_proj"
    ):
        save_reduced(module, "0.q_proj@0.1:cut=delta", tmp_path / "part", "adapter", spectra=spectra)
    large = "0.q_proj@0.9:cut=delta, 1.fc_in@0.9:cut=delta"
    with pytest.raises(ValueError, match="leaves of the difference has rank"):
        save_reduced(module, large, tmp_path / "large", "adapter", spectra=spectra)
    model.model.norm.weight.data += 0.1
    again = Spectra(base=BaseWeights(base, module))
    with pytest.raises(ValueError, match=r"first `model\.model\.norm\.weight`"):
        save_reduced(module, plan, tmp_path / "norm", "adapter", spectra=again)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["adapter", "dense"]


def test_a_model_of_which_no_matrix_has_a_kind_has_a_base_too() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 3)))
    model = tuned(base)
    model[2][1].weight.data = base[2][1].weight.data.clone()
    known = BaseWeights(base, model)
    assert [known.changed(matrix) for matrix in find_matrices(model)] == [True, True, False]
    with reduced(nn.ModuleDict({"net": model}), "/net.*/@0:cut=delta", Spectra(base=known)):
        assert same(model, weights(base))
