"""What strategies propose: right by direct computation in float64, scored right, and found in a search."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers as hf
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from recall import SEARCH, Recall
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from weights import same, weights

from laser_callback import LaserSearch
from laser_callback.compare.measure import Lab
from laser_callback.plans import RHOS, LaserPlan, WeightMatrix, find_matrices
from laser_callback.plans.target import targets
from laser_callback.search.moments import MomentsPass, input_directions_of
from laser_callback.search.proposals import views_for
from laser_callback.search.screen import sense
from laser_callback.search.sensitivities import Sensitivities
from laser_callback.search.strategies import STRATEGIES, Context, Strategy
from laser_callback.search.strategies.joint import at, cover
from laser_callback.spectra import BaseWeights, Spectra
from laser_callback.surgery import reduced

SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = {"intermediate_size": 24, "num_key_value_heads": 2}


class Last(pl.LightningModule):
    """Predicts the last token from those before it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, tokens: Tensor) -> Tensor:
        logits = self.model(input_ids=tokens[:, :-1]).logits[:, -1]
        return nn.functional.cross_entropy(logits, tokens[:, -1], reduction="none")

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        loss = self.loss(batch[0])
        self.log("val_acc", (loss < 3).float().mean(), batch_size=len(loss))
        self.log("val_loss", loss.mean(), batch_size=len(loss))
        return {"loss": loss.mean(), "val_loss": loss, "val_acc": loss < 3}


def language_model(kind: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **LLAMA)),
        "opt": lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                **SIZES, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32, activation_function="gelu"
            )
        ),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=32, n_embd=16, n_layer=3, n_head=4)),
        "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES, intermediate_size=24, max_position_embeddings=32)),
    }[kind]()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model.double().eval()


def tokens(count: int = 60) -> DataLoader[Any]:
    drawn = torch.randint(2, 32, (count, 6), generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(drawn), batch_size=10)


def fine_tuned(model: nn.Module) -> nn.Module:
    """A copy with changes of rank 5 in each matrix, and of every bias and norm."""
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(2)
    for parameter in tuned.parameters():
        shape = parameter.shape
        left, right = (torch.randn(size, 5, generator=generator, dtype=torch.float64) for size in (shape[0], shape[-1]))
        parameter.data += 0.05 * (left @ right.T if parameter.ndim == 2 else left[:, 0])
    return tuned


def context_of(module: pl.LightningModule, strategy: Strategy, base: nn.Module | None = None, **given: Any) -> Context:
    """As a search makes it for one strategy."""
    spectra = Spectra(base=None if base is None else BaseWeights(base, module))
    lab = Lab(module, spectra, "cpu", "64-true")
    run = partial(lab.validate, tokens(), limit_batches=1)
    context = Context(module, lab.matrices, targets(module, **given), RHOS, "", 0, spectra, run)
    if "activations" in strategy.needs:
        context = replace(context, spectra=spectra.bringing(input_directions_of(lab, context.targets, tokens())))
        lab.spectra = context.spectra
    if views := views_for([strategy], context):
        context = replace(context, sensitivities=sense(lab, views, tokens()))
    return context


def matrix_named(model: nn.Module, end: str) -> WeightMatrix:
    return next(matrix for matrix in find_matrices(model) if matrix.name.endswith(end))


def mean_loss(module: Last) -> float:
    with torch.no_grad():
        return float(torch.cat([module.loss(batch) for (batch,) in tokens()]).mean())


# ---- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in STRATEGIES if "gradient" in STRATEGIES[name]().needs])
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_scores_are_derivatives_of_the_loss(name: str, kind: str) -> None:
    step = {"llama": 1e-2, "opt": 1e-3}[kind]  # the norms of the one are in float32
    strategy = STRATEGIES[name]()
    base = language_model(kind)
    module = Last(fine_tuned(base)).eval()
    context = context_of(module, strategy, base if "base" in strategy.needs else None)
    candidates = [c for c in strategy.propose(context) if c.score is not None]
    if name.endswith("components"):  # whose scores are honest, and so no derivatives of the plan
        candidates = [replace(c, score=context.estimate(c.plan)[0]) for c in candidates]
    assert candidates
    for candidate in candidates[:: max(len(candidates) // 12, 1)]:
        # The same directions, of which a small part is changed; a central difference has no second order.
        ends = []
        for part in (step, -step):
            small = LaserPlan(replace(r, scale=1 + (r.scale - 1) * part, bias="kept") for r in candidate.plan)
            biased = LaserPlan(replace(r, scale=1 + (r.scale - 1) * part) for r in candidate.plan)
            with reduced(module, biased if kind == "opt" else small, context.spectra):
                ends.append(mean_loss(module))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert slope == pytest.approx(candidate.score, rel=5e-3, abs=2e-5), str(candidate.plan)


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_finds_its_way_through_a_search(name: str, recall: Any) -> None:
    module, loader = recall
    torch.manual_seed(0)
    needs = STRATEGIES[name]().needs
    base = (
        {n: p.detach() + 0.01 * torch.randn_like(p) for n, p in module.named_parameters()} if "base" in needs else None
    )
    before = weights(module)
    result = LaserSearch(module, loader, **{**SEARCH, "strategies": [name], "candidates": 6}, base=base).run()
    raced = [candidate for candidate in result.candidates if candidate.examples]
    assert raced
    assert {candidate.strategy for candidate in raced} == {name}
    assert same(module, before)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in module.modules())


# ---- joint plans -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("within", "texts"),
    [
        ("*.all", ["*.all@k2"]),
        ("*.mlp", ["*.fc_in@k2", "*.fc_up@k2", "*.fc_out@k2"]),
        ("1.mlp, *.q_proj", ["*.q_proj@k2", "1.fc_in@k2", "1.fc_up@k2", "1.fc_out@k2"]),
    ],
)
def test_few_words_for_many_matrices(within: str, texts: list[str]) -> None:
    module = Last(language_model())
    lab = Lab(module, Spectra(), "cpu")
    found = targets(module, within)
    plan = at(cover(found, lab.matrices), "k2")
    assert sorted(map(str, plan)) == sorted(texts)
    assert {m.name for m, _ in plan.resolve(module)} == {m.name for target in found for m in target.matrices}


def test_stacks_are_told_apart() -> None:
    torch.manual_seed(0)
    config = hf.T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    model = Last(hf.T5ForConditionalGeneration(config))
    found = targets(model)
    plan = at(cover(found, Lab(model, Spectra(), "cpu").matrices), "k2")
    assert sorted(map(str, plan)) == ["decoder.block.*.all@k2", "encoder.block.*.all@k2"]
    assert {m.name for m, _ in plan.resolve(model)} == {m.name for target in found for m in target.matrices}


# ---- the change of fine-tuning ---------------------------------------------------------------------------------------


def test_the_whole_change_under_one_rule() -> None:
    base = language_model()
    module = Last(fine_tuned(base))
    strategy = STRATEGIES["delta"]()
    context = context_of(module, strategy, base)
    plans = [str(candidate.plan) for candidate in strategy.propose(context)]
    assert {f"*.all@k{rank}:cut=delta" for rank in (1, 2, 3, 4, 8, 16)} <= {*plans}
    assert {f"*.all@global-{mean}:cut=delta" for mean in ("0.25", "0.5", "1", "2", "4")} <= {*plans}
    assert "*.all@0:scale=0.5,cut=delta" in plans
    matrix, own = matrix_named(module, "layers.1.mlp.up_proj"), matrix_named(base, "layers.1.mlp.up_proj")
    change = matrix.value - own.value
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    first = s[0] * torch.outer(u[:, 0], v[0])
    for plan, left in (
        ("*.all@k1:cut=delta", first),
        ("*.all@0:scale=0.25,cut=delta", 0.25 * change),
        ("*.all@k1:cut=delta,norm=whole", first * change.norm() / s[0]),
    ):
        assert plan in plans
        with reduced(module, plan, context.spectra):
            assert torch.allclose(matrix.value, own.value + left, atol=1e-12), plan


def test_what_else_has_changed_is_left_or_included() -> None:
    base = language_model("opt")
    module = Last(fine_tuned(base))
    narrow, wide = STRATEGIES["delta"](), STRATEGIES["delta-all"]()
    context = context_of(module, narrow, base)
    halved = next(c.plan for c in wide.propose(context) if "scale=0.5" in str(c.plan))
    names = {
        name
        for name, p in module.model.named_parameters()
        if p.ndim == 2 or (name.endswith("bias") and "norm" not in name)
    }
    with reduced(module, halved, context.spectra):
        for name, parameter in module.model.named_parameters():
            was = fine_tuned(base).get_parameter(name)
            half = (was + base.get_parameter(name)) / 2
            assert torch.allclose(parameter, half if name in names else was, atol=1e-12), name
    only = next(c.plan for c in narrow.propose(context) if "scale=0.5" in str(c.plan))
    assert all(matrix.kind is not None for matrix, _ in only.resolve(module))


def test_ranks_thresholds_and_factors_have_neighbours() -> None:
    base = language_model()
    module = Last(fine_tuned(base))
    strategy = STRATEGIES["delta"]()
    context = context_of(module, strategy, base)
    by_text = {str(candidate.plan): candidate for candidate in strategy.propose(context)}
    for text, near in (
        ("*.all@k4:cut=delta", {"*.all@k3:cut=delta", "*.all@k6:cut=delta"}),
        ("*.all@0:scale=0.5,cut=delta", {"*.all@0:scale=0.4,cut=delta", "*.all@0:scale=0.6,cut=delta"}),
        ("*.all@k1:cut=delta,norm=whole", set()),
        ("*.all@energy-0.9:cut=delta", set()),
    ):
        assert {str(c.plan) for c in strategy.neighbours(by_text[text], context, closest=False)} == near


def test_strategies_that_need_a_base_say_so_before_the_work(recall: Any) -> None:
    module, loader = recall
    with pytest.raises(MisconfigurationException, match="'intruders' needs `base`"):
        LaserSearch(module, loader, **{**SEARCH, "strategies": ["intruders"]}).run()


def test_where_only_the_head_was_trained_its_change_is_cut_by_who_includes_it(recall: Any) -> None:
    module, loader = recall
    base = copy.deepcopy(module.model)
    head = module.model.lm_head.weight
    own = head.detach().clone()
    assert head is not module.model.model.embed_tokens.weight
    try:
        with torch.no_grad():
            head += 0.01 * torch.randn(head.shape, generator=torch.Generator().manual_seed(0))
        with pytest.raises(MisconfigurationException, match=r"'delta' has .*what differs is .*lm_head.*: 'delta-all'"):
            LaserSearch(module, loader, **{**SEARCH, "strategies": "delta"}, base=base).run()
        found = LaserSearch(module, loader, **{**SEARCH, "strategies": "delta-all"}, base=base).run()
        plans = [candidate.plan for candidate in found.candidates]
        assert all(head is m.parameter for plan in plans for m, _ in plan.resolve(module) if "lm_head" in m.name)
        assert any("lm_head" in str(plan) for plan in plans)
        by_default = {key: value for key, value in SEARCH.items() if key != "strategies"} | {"candidates": 4}
        with pytest.warns(UserWarning, match="without the strategy 'delta'"):
            found = LaserSearch(module, loader, **by_default, base=base).run()
        assert {candidate.strategy for candidate in found.candidates} <= {"laser", "components", "drop"}
    finally:
        head.data = own


# ---- intruders, components, whitened, blocks -------------------------------------------------------------------------


def test_intruders_are_pefts() -> None:
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    base = language_model()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["up_proj", "q_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    model = peft.get_peft_model(copy.deepcopy(base), config).double()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    tuned = copy.deepcopy(model).merge_and_unload()
    module = Last(tuned)
    strategy = STRATEGIES["intruders"]()
    context = context_of(module, strategy, base)
    shrunk = next(c.plan for c in strategy.propose(context) if next(iter(c.plan)).scale == 0.75)
    reduce_intruder_dimension(model, logging_sink=None)
    assert len(shrunk) > 1
    with reduced(module, shrunk, context.spectra):
        for end in ("layers.0.mlp.up_proj", "layers.2.self_attn.q_proj"):
            layer = next(m for name, m in model.named_modules() if name.endswith(end) and hasattr(m, "lora_A"))
            ours = matrix_named(module, end).value - matrix_named(base, end).value
            u, s, v = torch.linalg.svd(ours, full_matrices=False)  # PEFT takes it back to the adapter's rank
            theirs = layer.get_delta_weight("intruder_reduced")
            assert torch.allclose(theirs, (u[:, :4] * s[:4]) @ v[:4], atol=1e-6), end


def test_components_are_chosen_by_their_derivative() -> None:
    module = Last(language_model())
    strategy = STRATEGIES["components"]()
    context = context_of(module, strategy)
    matrix = matrix_named(module, "layers.1.mlp.down_proj")
    u, s, v = torch.linalg.svd(matrix.value, full_matrices=False)
    values = s.clone().requires_grad_()
    changed = torch.func.functional_call(
        module.model,
        {matrix.parameter_names[0].removeprefix("model."): (u * values) @ v},
        kwargs={"input_ids": torch.cat([batch for (batch,) in tokens()])[:, :-1]},
    ).logits[:, -1]
    answers = torch.cat([batch for (batch,) in tokens()])[:, -1]
    nn.functional.cross_entropy(changed, answers).backward()
    gains = (values.grad * s).argsort(descending=True)
    candidates = list(strategy.propose(context))
    assert [c.plan.reductions[0].scale for c in candidates if c.score is None] == [1.25, 0.8]  # so that both race
    proposed = [c.plan for c in candidates]
    four = ("1.fc_out@places-" + "+".join(map(str, sorted(gains[:4].tolist()))), ":keep=tail")
    assert LaserPlan.parse("".join(four)) in proposed
    largest = values.grad.abs().argsort(descending=True)[: round(0.2 * len(s))]
    amplified = next(r for r in proposed[0] if (r.layer, r.matrix) == (1, "fc_out"))
    assert amplified.scale == 1.25
    with reduced(module, LaserPlan([amplified])):
        made = torch.linalg.svdvals(matrix.value)
    right = torch.where(torch.isin(torch.arange(len(s)), largest), s * 1.25, s)
    assert torch.allclose(made, right.sort(descending=True).values)


def test_what_chance_has_chosen_has_no_good_score() -> None:
    """Where the sensitivities are noise, the largest promise much, and their scores promise nothing."""
    module = Last(language_model())
    strategy = STRATEGIES["components"]()
    context = context_of(module, strategy)
    generator = torch.Generator().manual_seed(0)
    views = {
        view: {name: torch.randn(found.shape, generator=generator).double() for name, found in of_view.items()}
        for view, of_view in context.sensitivities.views.items()
    }
    context = replace(context, sensitivities=Sensitivities(context.sensitivities.weights, views))
    removed = [c for c in strategy.propose(context) if c.score is not None]
    naive = torch.tensor([context.estimate(c.plan) for c in removed])
    honest = torch.tensor([(c.score, c.error) for c in removed])
    assert float((naive[:, 0] / naive[:, 1]).mean()) < -2
    assert abs(float((honest[:, 0] / honest[:, 1]).mean())) < 0.6
    assert len(removed) > 30


def test_few_batches_say_what_they_promise_and_of_no_error() -> None:
    """Of one batch there are no others to choose by; of fewer than five the error is not known."""
    module = Last(language_model())
    strategy = STRATEGIES["components"]()
    whole = context_of(module, strategy)
    for batches in (1, 3):
        views = {v: {name: t[:batches] for name, t in of.items()} for v, of in whole.sensitivities.views.items()}
        context = replace(whole, sensitivities=Sensitivities(whole.sensitivities.weights[:batches], views))
        removed = [c for c in strategy.propose(context) if c.score is not None]
        assert removed
        assert {c.error for c in removed} == {0.0}
        if batches == 1:
            assert [c.score for c in removed] == pytest.approx([context.estimate(c.plan)[0] for c in removed])


def test_moments_are_those_of_what_goes_in() -> None:
    module = Last(language_model()).eval()
    matrices = [matrix_named(module, "layers.1.mlp.down_proj"), matrix_named(module, "layers.0.self_attn.q_proj")]
    seen: dict[str, list[Tensor]] = {}
    for matrix in matrices:
        matrix.module.register_forward_pre_hook(
            lambda _, given, name=matrix.name: seen.setdefault(name, []).append(given[0])
        )
    passed = MomentsPass(matrices)
    Lab(module, Spectra(), "cpu", "64-true").validate(tokens(), passed)
    for matrix in matrices:
        rows = torch.cat([rows.flatten(0, -2) for rows in seen[matrix.name]])
        assert torch.allclose(passed.moments[matrix.name], rows.T @ rows)


def test_padding_is_left_out() -> None:
    class Masked(Last):
        def loss(self, tokens: Tensor) -> Tensor:
            mask = (torch.arange(5) >= 2).long().expand(len(tokens), 5)  # two positions on the left are no text
            logits = self.model(input_ids=tokens[:, :-1], attention_mask=mask).logits[:, -1]
            return nn.functional.cross_entropy(logits, tokens[:, -1], reduction="none")

    module = Masked(language_model()).eval()
    matrix = matrix_named(module, "layers.1.mlp.down_proj")
    seen: list[Tensor] = []
    matrix.module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    passed = MomentsPass([matrix])
    Lab(module, Spectra(), "cpu", "64-true").validate(tokens(), passed)
    rows = torch.cat(seen)[:, 2:].flatten(0, 1)
    assert torch.allclose(passed.moments[matrix.name], rows.T @ rows)


def test_what_a_recurrent_layer_makes_itself_does_not_go_in() -> None:
    class Recurrent(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 2)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.out(self.rnn(batch[0])[0])

    module = Recurrent()
    passed = MomentsPass(find_matrices(module))
    Lab(module, Spectra(), "cpu").validate(DataLoader(TensorDataset(torch.randn(6, 3, 4)), 3), passed)
    assert [*passed.moments] == ["out"]


def test_heads_are_cut_apart() -> None:
    module = Last(language_model())
    blocks = {
        str(next(iter(c.plan)).matrix): next(iter(c.plan)).blocks
        for c in STRATEGIES["blocks"]().propose(context_of(module, STRATEGIES["blocks"]()))
    }
    assert blocks == {"q_proj": 4, "k_proj": 2, "v_proj": 2, "out_proj": 4, "fc_in": 4, "fc_up": 4, "fc_out": 4}


def test_a_whitened_plan_comes_as_a_recipe(recall: Any, tmp_path: Any) -> None:
    module, loader = recall
    search = LaserSearch(module, loader, **{**SEARCH, "strategies": ["whitened"]}, folder=tmp_path / "run")
    result = search.run()
    assert result.found is not None
    assert result.found.directions is not None
    other = copy.deepcopy(module)
    with reduced(other, result.found):
        assert not same(other, weights(module))


# ---- drops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
def test_a_dropped_layer_hands_on_what_it_is_given(kind: str) -> None:
    module = Last(language_model(kind))
    strategy = STRATEGIES["drop"]()
    plans = {str(c.plan) for c in strategy.propose(context_of(module, strategy))}
    bias = "" if kind == "llama" else ":bias=cut"
    assert plans == {f"{layer}.{word}@0{bias}" for layer in range(3) for word in ("out_proj", "fc_out", "writes")}
    layers = next(m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)
    seen: list[tuple[Tensor, Tensor]] = []

    def look(_: nn.Module, given: Any, output: Any) -> None:
        seen.append((given[0], output[0] if isinstance(output, tuple) else output))

    hook = layers[1].register_forward_hook(look)
    with torch.no_grad(), reduced(module, f"1.writes@0{bias}"):
        mean_loss(module)
    hook.remove()
    assert seen
    assert all(torch.equal(*pair) for pair in seen)


def test_layers_with_a_norm_behind_the_sum_are_refused_or_left_out(recall: Any) -> None:
    module = Last(language_model("bert"))
    reason = "a norm stands behind its sum"
    with pytest.raises(MisconfigurationException, match=f"'drop' has nothing to propose: {reason}"):
        LaserSearch(module.float(), tokens(200), **{**SEARCH, "strategies": ["drop"]}).run()
    with pytest.warns(UserWarning, match=f"without the strategy 'drop': {reason}"):
        result = LaserSearch(module, tokens(200), **{**SEARCH, "candidates": 2}).run()
    assert {candidate.strategy for candidate in result.candidates} == {"laser", "components"}


def test_a_step_that_fails_without_layers_is_searched_without_drops(recall: Any) -> None:
    class Demanding(Recall):
        def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            if not any(bool(p.any()) for name, p in self.named_parameters() if "down_proj" in name):
                raise ValueError("where are the layers?")
            return super().validation_step(batch, batch_idx)

    module, loader = recall
    module = Demanding(module.model).eval()
    reason = r"the step fails where no layer writes anything: where are the layers\?"
    with pytest.warns(UserWarning, match=f"without the strategy 'drop': {reason}"):
        result = LaserSearch(module, loader, **{**SEARCH, "candidates": 4, "controls": False}).run()
    assert {c.strategy for c in result.candidates} == {"laser", "components"}
    with pytest.raises(MisconfigurationException, match=f"'drop' has nothing to propose: {reason}"):
        LaserSearch(module, loader, **{**SEARCH, "strategies": "drop"}).run()


def test_a_layer_that_cannot_be_left_out_is_no_neighbour_either() -> None:
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True, norm_first=i != 1) for i in range(3)]
    module = Last(nn.ModuleDict({"layers": nn.ModuleList(layers)})).eval()
    data = torch.randn(5, 2, 4, 16)

    def run() -> None:
        for layer in layers:
            layer(data[0])

    strategy = STRATEGIES["drop"]()
    lab = Lab(module, Spectra(), "cpu")
    context = Context(module, lab.matrices, targets(module), RHOS, "", 0, lab.spectra, run)
    proposed = list(strategy.propose(context))
    assert {c.layer for c in proposed} == {0, 2}
    around = [
        c for leader in proposed for closest in (False, True) for c in strategy.neighbours(leader, context, closest)
    ]
    assert {c.layer for c in around} == {0, 2}


def test_by_default_cuts_directions_and_drops_and_with_a_base_the_change(recall: Any) -> None:
    module, loader = recall
    assert [s.name for s in LaserSearch(module, loader, **SEARCH)._strategies] == ["laser", "components", "drop"]
    assert [s.name for s in LaserSearch(module, loader, base=module, **SEARCH)._strategies] == [
        "laser",
        "components",
        "drop",
        "delta",
    ]
    assert [s.name for s in LaserSearch(module, loader, method="paper", **SEARCH)._strategies] == ["reference"]


def test_a_drop_then_a_cut(recall: Any) -> None:
    module, loader = recall
    torch.manual_seed(0)
    layer = copy.deepcopy(module.model.model.layers[1])  # one more, which only writes noise
    for name in ("o_proj", "down_proj"):
        weight = next(p for n, p in layer.named_parameters() if n.endswith(f"{name}.weight"))
        weight.data = 0.4 * torch.randn_like(weight)
    module = copy.deepcopy(module)
    module.model.model.layers.append(layer)
    module.model.config.num_hidden_layers = 3
    result = LaserSearch(module, loader, **{**SEARCH, "strategies": ["drop", "laser"], "max_reductions": 2}).run()
    assert result.found is not None
    assert any(r.layer == 2 for r in result.found)
