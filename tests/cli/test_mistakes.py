"""What a user gets wrong on the command line is told in a line or two, with the cure; and files get their names."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import yaml
from jsonargparse import ArgumentParser
from safetensors.torch import load_file, save_file
from tiny import tiny_causal_lm, tiny_tokenizer
from torch import nn, zeros

from laser_callback.cli.commands import main
from laser_callback.cli.mistakes import told_plainly
from laser_callback.cli.options import call, parser_of
from laser_callback.cli.rollout import gate, rollout
from laser_callback.cli.search import search
from laser_callback.data.datamodule import TextWindows
from laser_callback.data.facts import read_facts
from laser_callback.data.generation import Generation
from laser_callback.plans.plan import LaserPlan
from laser_callback.shipping.export import save_reduced
from laser_callback.stats.gates import parse_gate
from laser_callback.support.files import appearing


@pytest.fixture
def lm(lm):
    """Options of `validate`."""
    return [*lm, "--laser.plan", "28.fc_up@0.5"]


def error_of(capsys, *arguments: object) -> str:
    """What a command says, which fails for a mistake of the user."""
    assert main([*map(str, arguments)]) == 2
    return capsys.readouterr().err.rstrip("\n").split("error: ", 1)[1]


# ---- options that do not exist, or do not fit ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "error"),
    [
        ({"laser": {"contrls": True}}, "`laser.contrls` is not an option, did you mean `laser.controls`?"),
        (
            {"data": {"class_path": "laser_callback.FactsDataModule", "init_args": {"pathh": "x"}}},
            "`data.pathh` is no parameter of laser_callback.FactsDataModule, did you mean `path`?",
        ),
        (
            {"data": {"class_path": "laser_callback.FactsDataModule", "init_args": {"path": "x", "limit": "few"}}},
            "`data.limit`: expected int | null, got few",
        ),
        (
            {"model": {"class_path": "laser_callback.LaserModule", "init_args": {"model": "no/such"}}},
            "'no/such' is neither a folder here nor found on the hub: ",
        ),
        (
            {"model": {"class_path": "laser_callback.LaserModul"}},
            "`model`: No laser_callback attribute LaserModul, did you mean `LaserModule`?",
        ),
        ({"trainer": {"max_steps": "many"}}, "`trainer.max_steps`: expected int, got many"),
    ],
)
def test_the_innermost_cause_is_told(lm, capsys, block, error):
    Path("block.yaml").write_text(json.dumps(block))
    said = error_of(capsys, "validate", *lm, "--config", "block.yaml")
    assert said.startswith(error)
    assert "\n" not in said
    assert "Namespace" not in said


class Broken(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        {}["a bug"]


def test_a_bug_in_a_class_of_ones_own_is_none_of_the_command_line():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=Broken | None)
    with pytest.raises(KeyError, match="a bug"), told_plainly(parser):
        parser.instantiate(parser.parse_args(["--model", f"{__name__}.Broken"]))


def test_one_text_stands_for_a_list_of_one():
    parser = parser_of(search, "search")
    given = parser.parse_args(["--objective", "val_acc", "--constraints", "perplexity <= +2 %", "--rhos", "0.5"])
    assert (given.objective, given.constraints, given.rhos) == ("val_acc", "perplexity <= +2 %", 0.5)
    given = parser.parse_args(["--constraints", '["perplexity <= +2 %", "log_loss <= 0"]', "--rhos", "[0, 0.5]"])
    assert (given.constraints, given.rhos) == (["perplexity <= +2 %", "log_loss <= 0"], [0, 0.5])
    for command in (rollout, gate):
        given = parser_of(command, "c").parse_args(["--plan", "1.fc_in@0.1", "--gates", "accuracy: gain"])
        assert given.gates == "accuracy: gain"
    given = parser_of(rollout, "c").parse_args(["--plan", "p", "--gates", "g", "--stages", "1.mlp@0.5", "--steps", "1"])
    assert (given.stages, given.steps) == ("1.mlp@0.5", 1.0)


@pytest.mark.parametrize("text", [r"#### (\S+)", r"Answer: (\d+)", "[a-z]: (x)", "a #(b)", "{(x)}", "- (y)"])
def test_texts_are_taken_as_they_are(text, tmp_path):
    seen = {}

    def command(generation: Generation | None = None, system: str | None = None) -> None:
        seen.update(extract=generation.extract, system=system)

    call(command, ["--generation.extract", text, "--system", f"# {text}"], "c")
    assert seen == {"extract": text, "system": f"# {text}"}
    call(command, [f"--generation.extract={text}", "--generation.max_new_tokens=3"], "c")
    assert seen == {"extract": text, "system": None}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"generation": {"extract": text}, "system": f"# {text}"}))
    call(command, ["--config", str(tmp_path / "c.yaml")], "c")
    assert seen == {"extract": text, "system": f"# {text}"}


def test_types_in_help_are_readable():
    shown = " ".join(parser_of(search, "search").format_help().split())
    assert "(type: str | list[str] | null, default: null)" in shown
    assert "(type: Path, default: laser-search.json)" in shown
    assert "<class" not in shown
    assert "Optional[" not in shown


# ---- files and models that are not there -----------------------------------------------------------------------------


def test_missing_files_are_named_by_option_before_a_model_is_loaded(lm, deep_lm, capsys):
    plan, model, facts = ("--plan", "28.fc_up@0.5"), ("--model", "no/such"), ("--facts", deep_lm / "facts.jsonl")
    for option, arguments in (
        ("facts", ("search", *model, "--facts", "gone")),
        ("text", ("search", *model, *facts, "--text", "gone")),
        ("facts", ("gate", *plan, *model, "--gates", "log_loss <= +0.1", "--facts", "gone")),
        ("plan", ("gate", "--plan", "gone.yaml", *model, *facts, "--gates", "log_loss <= +0.1")),
        ("plan", ("export", "--plan", "gone.yaml", *model, "--output", "out")),
        ("result", ("export", *plan, *model, "--output", "out", "--result", "gone")),
        ("recipe", ("apply", "--recipe", "gone", *model, "--output", "out")),
        ("undo", ("restore", "--undo", "gone", *model, "--output", "out")),
        ("facts", ("demo", *plan, *model, "--facts", "gone")),
        ("result", ("report", "gone")),
        ("data.text", ("validate", *lm, "--model.model", "no/such", "--data.text", "gone")),
        ("data.path", ("validate", *lm, "--model.model", "no/such", "--data.path", "gone")),
    ):
        assert error_of(capsys, *arguments).startswith(f"`{option}`: there is no file 'gone"), arguments
    assert error_of(capsys, "validate", *lm, "--model.model", "no/such", "--laser.plan", "1.mlp@2").startswith("`rho`")
    for arguments in (("inspect", "no/such"), ("export", *plan, *model, "--output", "out")):
        assert error_of(capsys, *arguments).startswith("'no/such' is neither a folder here nor found on the hub: ")
    assert f"{deep_lm / 'facts.jsonl'}: expected JSON: " in error_of(capsys, "report", deep_lm / "facts.jsonl")


def test_missing_files_are_named_in_python_too():
    with pytest.raises(FileNotFoundError, match=r"`text`: there is no file 'gone\.txt'"):
        TextWindows("gone.txt", tiny_tokenizer())
    with pytest.raises(FileNotFoundError, match=r"`path`: there is no file 'gone\.jsonl'"):
        read_facts("gone.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("config", [["--config", "gone.yaml"], ["--config=gone.yaml"], ["-c", "gone.yaml"]])
def test_a_missing_config_is_told_before_torch_is_imported(config, tmp_path):
    code = (
        f"import sys; from laser_callback.cli.commands import main; assert main(['validate', *{config}]) == 2; "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr == "laser-callback validate: error: `config`: there is no file 'gone.yaml'\n"


# ---- reductions that match nothing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "wrong"),
    [
        ("4.fc_in@0.1", "layer 4: there are 0..3 with fc_in"),
        ("1.fc_inn@0.1", "none is called fc_inn, did you mean `fc_in`"),
        ("encoder.1.fc_in@0.1", "fc_in is not in encoder"),
        ("1.lm_head@0.1", "lm_head is outside of all layers"),
        ("1.fc_in[0]@0.1", "expert 0: there are none"),
    ],
)
def test_the_part_that_is_wrong_is_named(plan, wrong):
    with pytest.raises(ValueError, match="matches no matrix of the model") as error:
        LaserPlan.parse(plan).resolve(tiny_causal_lm())
    assert f": {wrong}. It has:\n" in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["embed_tokens@0.1", "1.embed_tokens@0.1", "*.lm_head@0.5", "first.fc_in@0.1", "layers.last.attn@0.1", "1.mlp@10%"],
)
def test_what_a_hint_says_works(text):
    model = tiny_causal_lm()
    with pytest.raises(ValueError, match=r"name: |layer: |did you mean ") as error:
        LaserPlan.parse(text).resolve(model)
    hint = re.search(r"(?:name: |layer: |did you mean )(\S+?)\??$", str(error.value))[1]
    assert LaserPlan.parse(hint if "@" in hint else f"1.mlp@{hint}").resolve(model)


def test_hints_name_what_exists():
    with pytest.raises(ValueError, match=r"a gain is `metric: gain`.* a constraint is .*; got 'acc: gian'"):
        parse_gate("acc: gian")
    with pytest.raises(TypeError, match=r"text is read by LaserPlan\.parse\('2\.fc_in@0\.1'\)"):
        LaserPlan("2.fc_in@0.1")


def test_an_option_without_its_block_is_named_with_it(lm, capsys):
    assert error_of(capsys, "validate", *lm[:4], "--plan", "1.mlp@0.5").endswith("did you mean `laser.plan`?")


@pytest.mark.parametrize(
    ("command", "text", "error"),
    [
        ("search", "limit: many", "`limit`: expected int, got many (in own.yaml)"),
        ("validate", "trainer: {max_steps: many}", "`trainer.max_steps`: expected int, got many (in own.yaml)"),
        ("fit", "laser: {seed: [1]}", "`laser.seed`: expected int, got [1] (in own.yaml)"),
    ],
)
def test_a_wrong_type_in_a_config_is_told_with_key_and_file(command, text, error, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text(text)
    assert error_of(capsys, command, "--config", "own.yaml") == error


def test_matrices_without_a_kind_are_cut_by_the_name_that_the_error_gives():
    blocks = nn.ModuleList(nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))}) for _ in range(3))
    with pytest.raises(ValueError, match=r"cut by name, e\.g\. 0\.mlp\.0@0\.1\. It has:"):
        LaserPlan.parse("2.mlp@0.1").resolve(blocks)
    assert [matrix.name for matrix, _ in LaserPlan.parse("0.mlp.0@0.1").resolve(blocks)] == ["0.mlp.0"]


def test_line_breaks_of_a_message_are_kept(deep_lm, tmp_path, capsys):
    said = error_of(capsys, "export", "--model", deep_lm, "--plan", "99.fc_up@0.1", "--output", tmp_path / "out")
    assert said.splitlines()[1].startswith("outside of the layers: ")
    assert said.splitlines()[2].startswith("model.layers: layers 0..29")


# ---- files that appear -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_that_appear_have_the_mode_of_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with appearing(tmp_path / "file") as file:
            save_file({"x": zeros(1)}, file)
        with appearing(tmp_path / "folder") as made:
            made.mkdir()
            save_file({"x": zeros(1)}, made / "model.safetensors")
    finally:
        os.umask(before)
    files = tmp_path / "file", tmp_path / "folder" / "model.safetensors"
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [mode, mode]
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("command", ["search", "inspect", "validate", "gate"])
def test_options_are_given_by_their_whole_name(command, capsys):
    assert main([command, "--conf=no.yaml"]) == 2
    assert "conf" in capsys.readouterr().err


def test_a_report_is_not_written_over_what_it_is_of(tmp_path, capsys):
    (result := tmp_path / "result.json").write_text("{}")
    for to, words in ((result, "is also `result`"), (tmp_path, "it is a folder")):
        assert words in error_of(capsys, "report", result, "--html", to)
    assert result.read_text() == "{}"


def test_a_message_repeats_no_more_than_can_be_read(capsys):
    assert main(["export", "--plan", "x" * 1_000_000, "--model", "no/such", "--output", "out"]) == 2
    assert main(["inspect", "y" * 1_000_000]) == 2
    assert len(capsys.readouterr().err) < 10_000


# ---- models of which weights are missing -----------------------------------------------------------------------------


@pytest.mark.slow
def test_missing_weights_are_refused_unless_they_are_allowed(own_cache, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    plan = "1.fc_in@0.1"
    whole = tiny_causal_lm()
    for form in ("recipe", "undo"):
        save_reduced(whole, plan, tmp_path / f"{form}.{'json' if form == 'recipe' else 'safetensors'}", form)
    save_reduced(whole, plan, tmp_path / "cut")
    whole.save_pretrained("model")
    for folder in ("model", "cut"):
        tiny_tokenizer().save_pretrained(folder)
        weights = load_file(f"{folder}/model.safetensors")
        del weights["model.layers.3.mlp.up_proj.weight"]
        save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
    rows = [json.dumps({"prompt": f"The capital of country {i} is", "answer": "Paris"}) for i in range(12)]
    Path("facts.jsonl").write_text("\n".join(rows))
    facts, model, out = ("--facts", "facts.jsonl"), ("--model", "model"), ("--output", "out")
    gates = ("--plan", plan, "--gates", "log_loss <= +9")
    lightning = ("--model", "laser_callback.LaserModule", "--model.model", "model", "--laser.plan", plan, "--data",
                 "laser_callback.FactsDataModule", "--data.path", "facts.jsonl",
                 "--trainer.accelerator", "cpu")  # fmt: skip
    for allow, *arguments in (
        ("--allow_missing", "search", *model, *facts, "--candidates", "1", "--rhos", "0.5", "--accelerator", "cpu"),
        ("--allow_missing", "gate", *gates, *model, *facts, "--accelerator", "cpu"),
        ("--allow_missing", "rollout", *gates, *model, *facts, "--accelerator", "cpu"),
        ("--allow_missing", "demo", "--plan", plan, *model, *facts),
        ("--allow_missing", "inspect", "model"),
        ("--allow_missing", "export", *model, "--plan", plan, "--output", "exported"),
        ("--allow_missing", "apply", *model, "--recipe", "recipe.json", "--output", "applied"),
        ("--allow_missing", "restore", "--model", "cut", "--undo", "undo.safetensors", *out),
        ("--model.allow_missing", "validate", *lightning),
    ):
        assert main(arguments) == 2, arguments
        assert "has no weights for model.layers.3.mlp.up_proj.weight, which would be" in capfd.readouterr().err
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            assert main([*arguments, allow, "true"]) in (0, 3), arguments
        told = [*(str(warning.message) for warning in warned), *capfd.readouterr().err.split("note: ")]
        assert any("has no weights for model.layers.3.mlp.up_proj.weight: these are random" in one for one in told)
    assert main(["gate", *gates, "--module", "m.M", "--data", "m.D", "--allow_missing", "true"]) == 2
