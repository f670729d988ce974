from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import PLAN, Wrapped, gpt2, mixtral
from tiny import tiny_causal_lm
from weights import same, weights

from laser_callback.plans.plan import LaserPlan
from laser_callback.shipping.undo import restore, save_undo
from laser_callback.surgery.record import apply


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("make", "plan"),
    [
        (tiny_causal_lm, PLAN),
        (gpt2, "1.q_proj@0.25, 1.v_proj@0.5, 2.fc_in@0.1"),
        (mixtral, "1.fc_in[2]@0.1, 0.fc_out@0.2, 0.q_proj@0.5"),
    ],
)
def test_back_to_the_last_bit(make, plan, dtype, tmp_path):
    model = make().to(dtype)
    before = weights(model)
    save_undo(model, plan, tmp_path / "undo.safetensors")
    assert same(model, before)
    apply(model, plan)
    assert not same(model, before)
    recipe = restore(model, tmp_path / "undo.safetensors")
    assert same(model, before)
    assert recipe == LaserPlan.parse(plan)
    assert list(tmp_path.iterdir()) == [tmp_path / "undo.safetensors"]


def test_special_numbers_come_back(tmp_path):
    model = tiny_causal_lm()
    weight = model.model.layers[1].mlp.gate_proj.weight
    with torch.no_grad():
        weight[0, :3] = torch.tensor([-0.0, 1e-42, 3e38])
    bits = weight.detach().view(torch.int32).clone()
    save_undo(model, "1.fc_in@0", tmp_path / "undo")
    apply(model, "1.fc_in@0")
    restore(model, tmp_path / "undo")
    assert torch.equal(model.model.layers[1].mlp.gate_proj.weight.detach().view(torch.int32), bits)


def test_a_module_around_the_model_is_restored_too(tmp_path):
    save_undo(tiny_causal_lm(), PLAN, tmp_path / "undo")
    module = Wrapped()
    before = weights(module)
    apply(module, PLAN)
    restore(module, tmp_path / "undo")
    assert same(module, before)


def test_cuts_of_the_paper_s_code(tmp_path):
    model = tiny_causal_lm()
    before = weights(model)
    save_undo(model, "1.fc_in@0.1:of=reference", tmp_path / "undo")
    apply(model, "1.fc_in@0.1:of=reference")
    restore(model, tmp_path / "undo")
    assert same(model, before)


def test_weights_with_pattern_take_less_room(tmp_path):
    """Weights that were 4-bit once, as those of GGUF models."""
    model = tiny_causal_lm()
    weight = model.model.layers[1].mlp.gate_proj.weight
    with torch.no_grad():
        weight.copy_((weight * 10).round().clamp(-8, 7) / 10)
    save_undo(model, "1.fc_in@0.1", tmp_path / "undo")
    assert (tmp_path / "undo").stat().st_size < 0.4 * weight.nbytes + 1500


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_other_models_stay_as_they_are(tmp_path):
    file = tmp_path / "undo"
    save_undo(tiny_causal_lm(), PLAN, file)
    original, other, trained = tiny_causal_lm(), tiny_causal_lm(seed=1), tiny_causal_lm()
    apply(trained, PLAN)
    with torch.no_grad():
        trained.model.layers[3].mlp.up_proj.weight[0, 0] += 1e-3
    for model, message in (
        (original, "is already what this would make of it"),
        (other, r"the weights of `model\.layers\.0\.mlp\.down_proj` are others"),
        (trained, r"the weights of `model\.layers\.3\.mlp\.up_proj` are others"),
    ):
        before = weights(model)
        with pytest.raises(ValueError, match=message):
            restore(model, file)
        assert same(model, before)


def test_damaged_files_are_refused(tmp_path):
    file, model = tmp_path / "undo", tiny_causal_lm()
    save_undo(model, "1.fc_in@0.1, 2.fc_in@0.1", file)
    apply(model, "1.fc_in@0.1, 2.fc_in@0.1")
    before, content = weights(model), file.read_bytes()
    for position in (len(content) // 2, len(content) - 3):  # inside of either matrix
        file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(ValueError, match="damaged"):
            restore(model, file)
    file.write_bytes(content[:-100])
    with pytest.raises(ValueError, match="damaged, or no undo file"):
        restore(model, file)
    save_file(load_file_of(content, tmp_path), file)
    with pytest.raises(ValueError, match="is not an undo file: its format is None"):
        restore(model, file)
    assert same(model, before)


def test_what_a_file_claims_of_itself_is_not_unpacked_beyond_the_model(tmp_path):
    file, model = tmp_path / "undo", tiny_causal_lm()
    save_undo(model, "1.fc_in@0.1", file)
    apply(model, "1.fc_in@0.1")
    before = weights(model)
    with safe_open(file, "pt") as whole:
        about = whole.metadata()
        (name,) = whole.keys()
    plane = zlib.compress(bytes(100_000_000), 1)
    bomb = b"".join(len(plane).to_bytes(8, "little") + plane for _ in range(4))
    recipe = json.loads(about["recipe"])
    larger = json.dumps({**recipe, "matrices": [{**recipe["matrices"][0], "shape": [10_000, 10_000]}]})
    lengths = (2**63).to_bytes(8, "little") * 5
    for content, told, message in (
        (bomb, about["recipe"], "has not the bytes of 64 x 32 numbers"),
        (bomb, larger, "is 64 x 32, not 10000 x 10000"),
        (bomb[:1000], about["recipe"], "damaged"),
        (lengths, about["recipe"], "damaged"),
        (b"", about["recipe"], "damaged"),
        (bomb, "null", "the recipe in it: expected a mapping of names, got None"),
        (bomb, "[" * 10_000, "the recipe in it: expected JSON of at most"),
        (bomb, "{}", "the recipe in it: `reductions`, .* is missing"),
    ):
        save_file(
            {name: torch.frombuffer(bytearray(content or b" "), dtype=torch.uint8)}, file, {**about, "recipe": told}
        )
        tracemalloc.start()
        with pytest.raises(ValueError, match=message):
            restore(model, file)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
        tracemalloc.stop()
    for tensors in ({}, {name: torch.zeros(3)}, {"other": torch.zeros(3, dtype=torch.uint8)}):
        save_file(tensors, file, about)
        with pytest.raises(ValueError, match=rf"is damaged: it has no bytes of `{name}`"):
            restore(model, file)
    assert same(model, before)


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"7", bytes(100), b"\xff" * 100, b"\x08" + bytes(7) + b"nonsense"]
)
def test_what_is_no_undo_file_is_said(content, tmp_path):
    (tmp_path / "undo").write_bytes(content)
    with pytest.raises(ValueError, match="undo is damaged, or no undo file"):
        restore(tiny_causal_lm(), tmp_path / "undo")
    with pytest.raises(FileNotFoundError, match="`path`: there is no file"):
        restore(tiny_causal_lm(), tmp_path / "none")
    with pytest.raises(OSError, match="expected a file"):
        restore(tiny_causal_lm(), tmp_path)


def load_file_of(content: bytes, folder: Path) -> dict[str, torch.Tensor]:
    (folder / "whole").write_bytes(content)
    return load_file(folder / "whole")


def test_what_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "undo").write_text("mine")
    with pytest.raises(FileExistsError, match="undo exists already"):
        save_undo(tiny_causal_lm(), "1.fc_in@0.1", tmp_path / "undo")
    assert (tmp_path / "undo").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a limit on file sizes")
def test_a_full_disk_leaves_nothing(tmp_path):
    """The operating system refuses to write on, as on a full disk."""
    code = f"""
import resource, sys
sys.path[:0] = {[str(Path(__file__).parents[1] / "shared")]!r}
from tiny import tiny_causal_lm
from laser_callback.shipping.export import save_reduced
import torch
torch.set_num_threads(1)
model = tiny_causal_lm()
before = [p.clone() for p in model.parameters()]
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for form in ("undo", "dense", "factored"):
    try:
        save_reduced(model, "*.mlp@0.1", {str(tmp_path)!r} + "/out", form)
    except OSError as error:
        print(form, str(error).endswith("File too large: '{tmp_path}/out'"), error)
print(all(torch.equal(a, b) for a, b in zip(before, model.parameters())))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [[form, "True"] for form in ("undo", "dense", "factored")], done
    assert lines[3] == "True"
    assert list(tmp_path.iterdir()) == []
