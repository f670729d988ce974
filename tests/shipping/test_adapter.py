from __future__ import annotations

import json
import sys
from functools import partial

import pytest
import torch
from language_models import masked_lm
from peft import PeftModel
from small_models import gpt2, run
from tiny import tiny_causal_lm
from weights import same, weights

from laser_callback.plans.plan import LaserPlan
from laser_callback.shipping.adapter import difference_of, save_adapter
from laser_callback.shipping.export import save_reduced
from laser_callback.spectra.store import Spectra
from laser_callback.surgery.swap import reduced


@pytest.mark.parametrize(
    ("make", "plan"),
    [
        (tiny_causal_lm, "1.fc_in@0.8"),
        (tiny_causal_lm, "*.mlp@0.9, 2.q_proj@0.7, 2.k_proj@0.8"),  # several ranks
        (tiny_causal_lm, "1.fc_in@0.1:keep=tail"),
        (tiny_causal_lm, "1.fc_in@0.8:scale=-0.5"),
        (gpt2, "*.fc_in@0.8, 1.fc_out@0.9"),
    ],
)
def test_the_original_with_the_adapter_is_the_reduced_model(make, plan, tmp_path):
    model = make()
    before, original = weights(model), run(model)
    with reduced(model, plan):
        expected = run(model)
    save_reduced(model, plan, tmp_path / "adapter", "adapter")
    assert same(model, before)
    with_adapter = PeftModel.from_pretrained(make(), str(tmp_path / "adapter"))
    torch.testing.assert_close(run(with_adapter), expected, rtol=1e-4, atol=1e-4)
    assert (run(with_adapter) - original).abs().max() > 100 * (run(with_adapter) - expected).abs().max()
    with with_adapter.disable_adapter():  # switched off per request
        assert torch.equal(run(with_adapter), original)
    merged = with_adapter.merge_and_unload()
    torch.testing.assert_close(run(merged), expected, rtol=1e-4, atol=1e-4)


def test_the_adapter_is_smaller_than_the_matrices(tmp_path):
    model = tiny_causal_lm()
    save_reduced(model, "*.mlp@0.9", tmp_path / "adapter", "adapter")
    own = sum(p.nbytes for name, p in model.named_parameters() if "mlp" in name)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    assert file.stat().st_size < 0.3 * own
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["task_type"]) == ("LORA", 4, 4, "CAUSAL_LM")


@pytest.mark.parametrize(("make", "task"), [(gpt2, "CAUSAL_LM"), (partial(masked_lm, "bert"), None)])
def test_the_adapter_says_what_it_is_for(make, task, tmp_path):
    save_reduced(make(), "1.fc_in@0.9", tmp_path / "adapter", "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["task_type"] == task


@pytest.mark.parametrize(
    ("make", "plan", "message"),
    [
        (tiny_causal_lm, "1.fc_in@0.01", r"removes has rank 31: as an adapter it takes 2,976 numbers, and .* 2,048"),
        (gpt2, "1.q_proj@0.9", r"`transformer\.h\.1\.attn\.c_attn\[q_proj\]` cannot have an adapter: it is a part of"),
        (tiny_causal_lm, "1.fc_in@1", "the plan changes no weights"),
    ],
)
def test_refused(make, plan, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_reduced(make(), plan, tmp_path / "adapter", "adapter")
    assert list(tmp_path.iterdir()) == []


def test_factors_from_elsewhere(tmp_path):
    """As of a fine-tuned model: what is added to a base is given, not cut."""
    base, tuned = tiny_causal_lm(), tiny_causal_lm()
    name = "model.layers.1.mlp.gate_proj"
    up, down = torch.randn(64, 2, dtype=torch.float64), torch.randn(2, 32, dtype=torch.float64)
    with torch.no_grad():
        tuned.get_parameter(f"{name}.weight").add_(up @ down)
    save_adapter(base, {name: (up, down)}, tmp_path / "adapter", "someone/base")
    with_adapter = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    torch.testing.assert_close(run(with_adapter), run(tuned), rtol=1e-4, atol=1e-3)
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "someone/base"
    )


def test_the_difference_is_exact():
    model = tiny_causal_lm()
    factors = difference_of(model, LaserPlan.parse("1.fc_in@0.9"), Spectra())
    up, down = factors["model.layers.1.mlp.gate_proj"]
    weight = model.model.layers[1].mlp.gate_proj.weight.detach().double()
    u, s, v = torch.linalg.svd(weight)
    removed = (u[:, 28:32] * s[28:]) @ v[28:]
    torch.testing.assert_close(up @ down, -removed, rtol=1e-9, atol=1e-9)


def test_without_peft(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r'adapters need peft: `pip install "laser-callback\[adapter\]"`'):
        save_reduced(tiny_causal_lm(), "1.fc_in@0.9", tmp_path / "adapter", "adapter")
    assert list(tmp_path.iterdir()) == []
