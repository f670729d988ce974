"""The command line: exit codes, errors, --json, quick help, completion, and the Lightning commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import ArgumentError
from contextlib import nullcontext

import pytest
import torch
import yaml
from tiny import tiny_causal_lm, tiny_tokenizer

from laser_callback.cli import commands as cli
from laser_callback.cli.command import Answer, Exit, json_numbers, run
from laser_callback.cli.commands import COMMANDS, main
from laser_callback.cli.options import call, parser_of


@pytest.fixture
def lm(lm):
    """Options of `validate` and `fit`."""
    return [*lm, "--data.limit", "8"]


# ---- what all commands share -----------------------------------------------------------------------------------------


def greet(name: str, times: int = 1, fail: str | None = None) -> Answer:
    """Say hello.

    Args:
        name: of whom.
        times: how often.
        fail: with which error.
    """
    if fail is not None:
        raise {"value": ValueError("a\n b"), "file": FileNotFoundError("no x"), "bug": KeyError("x")}[fail]
    print(f"hello {name} " * times)
    return Answer({"name": name, "times": times}, Exit.KEPT_ORIGINAL)


@pytest.fixture
def greet_command(monkeypatch):
    monkeypatch.setitem(COMMANDS, "greet", (__name__, "say hello"))
    monkeypatch.setattr(sys.modules["laser_callback.cli.commands"], "function_of", lambda name: greet)


def test_options_come_from_the_signature_and_the_code_from_the_answer(greet_command, capsys, tmp_path):
    assert main(["greet", "Ann", "--times", "2"]) == Exit.KEPT_ORIGINAL == 3
    assert capsys.readouterr().out == "hello Ann hello Ann \n"
    (tmp_path / "greet.yaml").write_text("name: Bo\ntimes: 3\n")
    assert main(["greet", "--config", str(tmp_path / "greet.yaml"), "Ann"]) == 3
    assert capsys.readouterr().out.count("Ann") == 3
    with pytest.raises(SystemExit) as exit_:
        main(["greet", "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert "Say hello." in shown
    assert "how often" in shown
    assert "--json" in shown


def test_json_is_all_there_is_on_stdout(greet_command, capsys):
    main(["greet", "Ann", "--json"])
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"name": "Ann", "times": 1}
    assert shown.err == "hello Ann \n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["Ann", "--fail", "value"], "laser-callback greet: error: a\n b\n"),
        (["Ann", "--fail", "file"], "laser-callback greet: error: no x\n"),
    ],
)
def test_a_mistake_is_told_without_a_traceback(greet_command, capsys, arguments, line):
    assert main(["greet", *arguments, "--json"]) == Exit.MISUSED == 2
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("arguments", [[], ["Ann", "--times", "x"], ["Ann", "--tims", "2"], ["Ann", "--config", "no"]])
def test_a_bad_option_is_one_line_too(greet_command, capsys, arguments):
    assert main(["greet", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("laser-callback greet: error: ")
    assert shown.err.count("\n") == 1


def test_debug_and_bugs_keep_their_traceback(greet_command, monkeypatch):
    with pytest.raises(ValueError, match="a\n b"):
        main(["greet", "Ann", "--fail", "value", "--debug"])
    with pytest.raises(KeyError):
        main(["greet", "Ann", "--fail", "bug"])
    monkeypatch.setenv("LASER_CALLBACK_DEBUG", "1")
    with pytest.raises(ArgumentError):
        main(["greet", "Ann", "--tims", "2"])


def test_an_interrupt_is_130(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert run(interrupted, "prog", as_json=False, debug=False) == Exit.INTERRUPTED == 130
    assert capsys.readouterr().err == "prog: interrupted\n"


def test_numbers_for_json():
    assert json_numbers({"a": torch.tensor(0.5), "b": float("nan"), "c": 2}) == {"a": 0.5, "b": None, "c": 2.0}
    assert run(lambda: Answer({"a": float("nan")}), "prog", as_json=False, debug=False) == 0
    with pytest.raises(ValueError, match="not JSON compliant"):  # and not the word NaN, which is no JSON
        run(lambda: Answer({"a": float("nan")}), "prog", as_json=True, debug=False)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["dmeo"], "laser-callback: error: unknown command 'dmeo', did you mean `demo`?\n"),
        (["valdate", "--config", "x"], "laser-callback: error: unknown command 'valdate', did you mean `validate`?\n"),
        (["zzz"], "laser-callback: error: unknown command 'zzz'; there are demo, validate"),
        (["--jsn"], "laser-callback: error: the following arguments are required: COMMAND"),
        (["recipes"], "laser-callback recipes: error: the following arguments are required: {ls,show,cp,run}\n"),
        (["recipes", "lss", "--json"], "laser-callback recipes: error: unknown command 'lss', did you mean `ls`?\n"),
    ],
)
def test_unknown_commands(arguments, error, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == Exit.MISUSED
    shown = capsys.readouterr()
    assert shown.err.startswith(error)
    assert shown.out == ""


@pytest.mark.parametrize("arguments", [[], ["--help"], ["recipes", "--help"], ["--version"]])
def test_help_and_version_end_well(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_help_is_quick_and_without_torch():
    code = (
        "import atexit, sys; from laser_callback.cli.commands import main; "
        "atexit.register(lambda: print('torch' in sys.modules)); main(['--help'])"
    )
    begin = time.perf_counter()
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert time.perf_counter() - begin < 2  # half a second on an idle machine; torch alone takes longer than this
    assert all(name.split()[0] in shown for name in COMMANDS)
    assert shown.endswith("False\n")


@pytest.mark.slow
def test_without_a_home_folder_the_work_goes_on(tmp_path, monkeypatch, capsys):
    """Containers often have none: what a cache would have saved is done again, and that is told once."""
    tiny_causal_lm().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.delenv("LASER_CALLBACK_CACHE", raising=False)

    def no_home(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.expanduser", no_home)
    with pytest.warns(UserWarning, match="no home folder"):
        assert main(["inspect", str(tmp_path / "model")]) == 0
    assert "fc_in" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(name, capsys):
    with pytest.raises(SystemExit) if name != "recipes run" else nullcontext() as exit_:
        main([*name.split(), "--help"])
    assert exit_ is None or exit_.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: laser-callback ")
    assert name in shown.splitlines()[0]


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in cli.READ_THEIR_OWN_ARGUMENTS])
def test_each_option_is_explained(name):
    actions = parser_of(cli.function_of(name), name)._actions
    assert [action.dest for action in actions if not action.help] == []


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_and_options(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in (
        "validate",
        "rollout",
        "--laser.plan",
        "--trainer.max_epochs",
        "--max_reductions",
        "compare.yaml",
        "delta-matrices",
    ):
        assert word in script, word
    assert "--module.model" not in script  # options of classes would be endless
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


# ---- validate, test, fit ---------------------------------------------------------------------------------------------


def test_validate_compares_and_answers(lm, capsys):
    assert main(["validate", *lm, "--laser.plan", "28.fc_up@0.5", "--laser.primary", "log_loss", "--json"]) == 0
    shown = capsys.readouterr()
    answer = json.loads(shown.out)
    assert {"log_loss", "laser/log_loss", "laser/delta/log_loss"} <= set(answer["metrics"])
    assert answer["laser"]["laser"]["primary"] == "log_loss"
    assert answer["laser"]["laser"]["arms"]["laser"]["plan"] == "28.fc_up@0.5"
    assert set(answer) == {"metrics", "laser"}
    assert "original against reduced" in shown.err
    assert os.listdir() == []  # an evaluation leaves no files


def test_test_takes_several_plans_from_a_file(lm, capsys, tmp_path):
    block = {"laser": {"plan": {"a": "28.fc_up@0.5", "b": "27.fc_in@0.1"}, "controls": True}}
    (tmp_path / "laser.yaml").write_text(yaml.safe_dump(block))
    assert main(["test", "--config", "laser.yaml", *lm, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["laser"]["laser"]
    assert set(result["arms"]) == {"a", "b"}
    assert set(result["controls"]["a"]) == {"zeroed", "random", "noise"}


def test_fit_compares_in_its_validation_if_there_is_a_plan(lm, capsys):
    options = ["--trainer.max_epochs", "1", "--trainer.logger", "false", "--json"]
    assert main(["fit", *lm, *options, "--laser.plan", "28.fc_up@0.5"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert "laser/log_loss" in answer["metrics"]
    assert answer["laser"]["laser"]["arms"]["laser"]["rows"]
    assert os.path.isfile(answer["checkpoint"])
    assert main(["fit", *lm, *options]) == 2
    assert "config.yaml of an earlier run is in" in capsys.readouterr().err
    os.remove("config.yaml")
    assert main(["fit", *lm, *options]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["laser"] == {}
    assert answer["cleanup"] == []
    assert not any(key.startswith("laser") for key in answer["metrics"])


OWN = """
import lightning.pytorch as pl, torch
from torch.utils.data import DataLoader

class Mine(pl.LightningModule):
    def __init__(self, width: int = 8):
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(width, 2, 16, batch_first=True)
        self.net = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def validation_step(self, batch, batch_idx):
        self.log("mean", self.net(batch).mean())

class Data(pl.LightningDataModule):
    def val_dataloader(self):
        return DataLoader(torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(0)), 2)
"""


def test_classes_in_the_current_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_of_test_cli.py").write_text(OWN)
    classes = ["--model", "mine_of_test_cli.Mine", "--data", "mine_of_test_cli.Data"]
    assert main(["validate", *classes, "--laser.plan", "1.fc_in@0.2", "--trainer.accelerator", "cpu", "--json"]) == 0
    assert {"mean", "laser/mean"} <= set(json.loads(capsys.readouterr().out)["metrics"])


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ([], "`laser.plan` must say what to cut"),
        (["--laser.plan", "28.fc_up"], "cannot read the reduction '28.fc_up'"),
        (["--laser.plan", "99.fc_up@0.1"], "99"),
        (["--laser.plan", "28.fc_up@0.5", "--data.path", "missing.jsonl"], "missing.jsonl"),
        (["--laser.plan", "28.fc_up@0.5", "--data.path", "facts.txt"], "must end in one of .jsonl"),
        (["--laser.plan", "28.fc_up@0.5", "--laser.loops", "predict"], "`loops` must be some of"),
        (["--laser.plan", "28.fc_up@0.5", "--trainer.max_steps", "many"], "many"),
        (["--laser.plan", "28.fc_up@0.5", "--model.model", "no/such/folder"], "no/such/folder"),
        (["--laser.plan", "28.fc_up@0.5", "--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_mistakes_in_validate_are_told(lm, capsys, tmp_path, extra, words):
    (tmp_path / "facts.txt").touch()
    assert main(["validate", *lm, *extra]) == Exit.MISUSED
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert error.startswith("laser-callback validate: error: ")
    assert words in error


def test_print_config_is_a_config(lm, capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["validate", *lm, "--laser.plan", "28.fc_up@0.5", "--print_config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert main(["validate", "--config", "printed.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["laser"]["laser"]["arms"]["laser"]["plan"] == "28.fc_up@0.5"


def test_what_is_required_is_positional_unless_it_is_keyword_only():
    def pair(left: str, *, right: str, sep: str = "-") -> str:
        """Join."""
        return sep.join((left, right))

    assert call(pair, ["a", "--right", "b", "--sep", "+"], "pair") == "a+b"
