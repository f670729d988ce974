from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from small_models import gpt2
from tiny import tiny_causal_lm, tiny_tokenizer
from transformers import T5Config, T5ForConditionalGeneration

from laser_callback.cli.commands import main
from laser_callback.cli.inspect import render
from laser_callback.plans.kinds import KINDS
from laser_callback.reports.inspection import save_spectra
from laser_callback.spectra.inspection import RULES, inspect_model
from laser_callback.spectra.store import Spectra


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_causal_lm().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def text(renderable) -> str:
    console = Console(width=160, color_system=None, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_every_matrix_with_its_values_and_ranks():
    model = tiny_causal_lm()
    found = inspect_model(model)
    assert len(found.matrices) == 4 * 7
    for matrix in found.matrices:
        weight = model.get_submodule(matrix.name).weight.detach().double()
        values = torch.linalg.svdvals(weight)
        torch.testing.assert_close(matrix.values, values, rtol=0, atol=1e-7 * float(values[0]))
        assert matrix.shape == tuple(weight.shape)
        assert matrix.ranks["energy-0.9"] == int((values.square().cumsum(0) < 0.9 * values.square().sum()).sum()) + 1
        for rho in (0.0, 0.1, 0.5, 1.0):
            rank = int(rho * matrix.max_rank)
            assert matrix.energy(rho) == pytest.approx(float(values[:rank].square().sum() / values.square().sum()))
    assert 0 < found.factorising < found.seconds
    assert [n.name for n in found.not_cut] == ["model.embed_tokens.weight", "lm_head.weight"]


def test_the_model_is_left_alone_and_spectra_are_used_again():
    model = tiny_causal_lm()
    before = {name: p.clone() for name, p in model.named_parameters()}
    spectra = Spectra()
    first, second = inspect_model(model, spectra=spectra), inspect_model(model, spectra=spectra)
    assert spectra.factorised == 28
    assert [m.to_dict() for m in first.matrices] == [m.to_dict() for m in second.matrices]
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_within_and_a_zero_matrix():
    model = tiny_causal_lm()
    model.model.layers[3].mlp.gate_proj.weight.data.zero_()
    found = inspect_model(model, within="-1.fc_in, 0.attn")
    assert [m.kind for m in found.matrices] == ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in"]
    assert found.matrices[-1].ranks == dict.fromkeys(RULES, 0)
    assert found.matrices[-1].energy(0.5) == 0.0
    with pytest.raises(ValueError, match="99"):
        inspect_model(model, within="99.fc_in")


def test_table_by_kind_and_by_matrix():
    found = inspect_model(tiny_causal_lm())
    by_kind, by_matrix = text(render(found)), text(render(found, each=True))
    for kind in ("q_proj", "fc_out"):
        assert re.search(rf"^{kind} +0-3 +\d+x\d+ ", by_kind, re.MULTILINE)
    assert by_matrix.count("model.layers.") == 28
    for table in (by_kind, by_matrix):
        assert re.search(r"model\.embed_tokens\.weight +\d+x32 +an embedding; only when named", table)
        assert "28 matrices in " in table
    ranks = sorted(100 * m.ranks["entropy"] / m.max_rank for m in found.matrices if m.kind == "q_proj")
    shown = f"{(ranks[1] + ranks[2]) / 2:.0f} ({ranks[0]:.0f}-{ranks[3]:.0f})"
    assert shown in next(line for line in by_kind.splitlines() if line.startswith("q_proj"))


def test_parts_of_a_fused_matrix_have_their_names():
    """`[q_proj]` is no markup."""
    table = text(render(inspect_model(gpt2()), each=True))
    for part in ("q_proj", "k_proj", "v_proj"):
        assert f"c_attn[{part}]" in "".join(table.split())


def test_several_stacks_and_what_is_not_cut():
    config = T5Config(
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        vocab_size=64,
        decoder_start_token_id=0,
    )
    table = text(render(inspect_model(T5ForConditionalGeneration(config))))
    assert re.search(r"encoder\.block: q_proj +0-1 ", table)
    assert re.search(r"decoder\.block: q_proj +0-1 ", table)
    assert "an embedding" in table


def test_command(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LASER_CALLBACK_CACHE", str(tmp_path / "cache"))
    assert main(["inspect", str(folder), "--within", "0-1.all"]) == 0
    shown = capsys.readouterr()
    assert "fc_in" in shown.out
    assert "factorising 14 matrices" in shown.err  # progress, and not in the way of a pipe
    assert main(["inspect", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["matrices"]) == 28
    assert set(found["matrices"][0]["ranks"]) == set(RULES)
    assert [n["name"] for n in found["not_cut"]] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert len(list((tmp_path / "cache" / "spectra").glob("*.safetensors"))) == 28


@pytest.mark.parametrize(
    ("ending", "begins"),
    [
        (".svg", b"<svg"),
        pytest.param(".png", b"\x89PNG", marks=pytest.mark.slow),
        pytest.param(".pdf", b"%PDF", marks=pytest.mark.slow),
    ],
)
def test_picture(tmp_path, ending, begins):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"spectra{ending}"
    save_spectra(inspect_model(tiny_causal_lm()), path)
    content = path.read_bytes()
    assert content.startswith(begins)
    if ending == ".svg":
        assert all(kind.encode() in content for kind in (*KINDS, "effective rank"))  # a panel for each


def test_picture_refusals(tmp_path):
    found = inspect_model(tiny_causal_lm(), within="0.fc_in")
    with pytest.raises(ValueError, match=r"\.svg, \.png or \.pdf, got .*spectra\.gif"):
        save_spectra(found, tmp_path / "spectra.gif")
