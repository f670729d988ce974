"""Help and mistakes in options come without the imports that take seconds, and say what the commands themselves do."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from argparse import ArgumentError
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from laser_callback.cli.commands import COMMANDS, function_of, main
from laser_callback.cli.lightning import LaserCLI
from laser_callback.cli.mistakes import told_plainly
from laser_callback.cli.options import parser_of
from laser_callback.cli.quick import parser as quick
from laser_callback.cli.quick.check import checked
from laser_callback.cli.recipes import recipes

LIGHTNING = quick.LIGHTNING
WHAT_THEY_NEED = {"report": ["r.json"], "inspect": ["m"], "compare": ["a", "b"], "completion": ["bash"]}


def run(*arguments: str, cwd: Path) -> tuple[float, subprocess.CompletedProcess[str]]:
    """A command in a process of its own: the processor's seconds that it took, and what it said."""
    code = (
        "import atexit, sys; from laser_callback.cli.commands import main; "
        "atexit.register(lambda: print([*{'torch', 'lightning', 'transformers'} & {*sys.modules}], file=sys.stderr)); "
        f"sys.exit(main({[*arguments]}))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr.endswith("[]\n"), done.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


@pytest.fixture(scope="module")
def described():
    """What the parsers that the commands run with say of themselves."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
    import describe

    return json.loads(describe.written(describe.described()))


def test_the_description_is_that_of_the_parsers(described):
    kept = quick.table()
    if version("lightning") == kept["lightning"]:
        assert described == kept, "python docs/describe.py writes it"
        return
    for name, command in described["commands"].items():  # of another version only what is ours
        of_ours = [
            {key: row.get(key) for key in ("name", "flags", "default", "required", "help")}
            for options in (command["options"], kept["commands"][name]["options"])
            for row in options
            if name not in LIGHTNING or row["name"].startswith("laser.")
        ]
        half = len(of_ours) // 2
        assert of_ours[:half] == of_ours[half:], "python docs/describe.py writes it"


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "recipes run"])
def test_help_and_mistakes_are_quick(name, tmp_path):
    most = 2.0 if name in LIGHTNING else 1.0
    seconds, done = run(*name.split(), "--help", cwd=tmp_path)
    assert seconds < most
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: laser-callback {name}")
    seconds, done = run(*name.split(), *WHAT_THEY_NEED.get(name, []), "--fodler", "x", cwd=tmp_path)
    assert seconds < most
    assert done.returncode == 2
    assert "`fodler`" in done.stderr or "required" in done.stderr


def test_a_script_for_shells_is_quick(tmp_path):
    seconds, done = run("completion", "bash", cwd=tmp_path)
    assert seconds < 1
    assert "--trainer.max_epochs" in done.stdout


@pytest.mark.parametrize("name", LIGHTNING)
def test_help_of_the_lightning_commands_shows_ours_first_and_takes_two_screens(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([name, "--help"])
    shown = capsys.readouterr().out
    assert shown.count("\n") < 120
    assert shown.index("--laser.plan PLAN ") < shown.index("--model MODEL ") < shown.index("--trainer.accelerator ")
    assert all(f"--{row.name} " in shown for row in quick.options_of(name) if row.name.startswith("laser."))
    assert ":class:" not in shown
    assert "--help=all" in shown
    with pytest.raises(SystemExit):
        main([name, "--help=all"])
    shown = capsys.readouterr().out
    assert all(f"--{row.name} " in shown for row in quick.options_of(name) if row.kind == "option")


MODULE = ["--model", "m.M", "--laser.plan", "1.mlp@0.5"]
SAME = [
    ("search", ["--limt", "3"]),
    ("search", ["--limit", "many"]),
    ("search", ["--direction", "up"]),
    ("search", ["--rhos", "[0, a]"]),
    ("search", ["--config", "mistaken.yaml"]),
    ("export", ["--model", "m", "--plan", "p"]),
    ("report", ["r.json", "--format", "gif"]),
    ("compare", ["a"]),
    ("validate", [*MODULE, "--trainer.max_step", "3"]),
    ("validate", [*MODULE, "--trainer.max_steps=many"]),
    ("validate", [*MODULE, "--laser.contrls", "true"]),
    ("validate", [*MODULE, "--trainer.precision", "17"]),
    ("fit", [*MODULE, "--laser.seed", "[1]"]),
    ("fit", [*MODULE, "--config", "lightning.yaml"]),
]


def read_by_itself(name, arguments):
    """As when the command runs."""
    if name in LIGHTNING:
        LaserCLI(function_of(name), arguments)
    else:
        with told_plainly(parser := parser_of(function_of(name), name)):
            parser.parse_args(arguments)


@pytest.mark.parametrize(("name", "arguments"), SAME)
def test_mistakes_are_told_in_the_words_of_the_command_itself(name, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text("import lightning.pytorch as pl\nclass M(pl.LightningModule): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("mistaken.yaml").write_text("limit: many\n")
    Path("lightning.yaml").write_text("trainer:\n  max_epochs: many\n")
    with pytest.raises(ArgumentError) as quickly:
        checked(name, arguments)
    with pytest.raises(ArgumentError) as slowly:
        read_by_itself(name, arguments)
    assert str(quickly.value) == str(slowly.value)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("validate", [*MODULE, "--model.width", "x", "--data=m.D", "--data.path", "p", "--trainer.logger.name", "x"]),
        ("validate", ["--model", "m.M", "--config", "laser.yaml", "--trainer", "trainer.yaml"]),
        ("fit", ["--config", "all.yaml", "--optimizer", "Adam", "--optimizer.lr", "0.1", "--cleanup.data", "m.D"]),
        ("fit", [*MODULE, "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "x"]),
        ("fit", [*MODULE, "--trainer.devices", "[0, 1]", "--trainer.max_time", "00:01:00:00"]),
        ("search", ["--module", "m.M", "--module.width", "3", "--data", "m.D", "--rhos", "0.5"]),
        ("search", ["--model", "m", "--facts", "f", "--generation.max_new_tokens", "3", "--limit", "-1"]),
        ("search", ["--model", "m", "--facts", "f", "--strategies", "laser,drop", "--strategies+=delta"]),
        ("gate", ["--plan", "p", "--gates", '["a: gain"]', "--module", "m.M", "--data", "m.D"]),
        ("validate", ["--print_config"]),
        ("validate", ["--model.help", "laser_callback.LaserModule"]),
    ],
)
def test_what_a_class_decides_is_left_to_it(name, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("laser.yaml").write_text("laser:\n  plan: {a: 1.mlp@0.5}\n")
    Path("trainer.yaml").write_text("max_epochs: 3\nlogger: {class_path: CSVLogger, init_args: {save_dir: x}}\n")
    blocks = {
        "model": {"class_path": "m.M", "init_args": {"width": 3}},
        "trainer": {"callbacks": [{"class_path": "x"}]},
    }
    Path("all.yaml").write_text(yaml.safe_dump({**blocks, "seed_everything": True, "data": "data.yaml"}))
    assert checked(name, arguments) == arguments


@pytest.mark.parametrize("name", [name for name in recipes() if name.endswith(".yaml")])
def test_recipes_are_no_mistakes(name):
    recipe = recipes()[name]
    arguments = ["--config", str(recipe.path)]
    assert checked(recipe.command, arguments) == arguments


def test_a_mistake_beside_a_class_is_quick_too(tmp_path):
    (tmp_path / "own.yaml").write_text("model: {class_path: laser_callback.LaserModule}\nlaser: {seed: many}\n")
    seconds, done = run("validate", "--config", "own.yaml", cwd=tmp_path)
    assert seconds < 2
    assert "`laser.seed`: expected int, got many (in own.yaml)" in done.stderr


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("search", [], "give `--model` and `--facts` or `--judge`, or `--module` and `--data`"),
        ("gate", ["--plan", "p", "--gates", "g", "--model", "m"], "give `--model` and `--facts`, or"),
        ("demo", ["--model", "m"], "`--plan` must say what to cut"),
        ("export", ["--model", "m", "--output", "o"], "`--plan` is missing"),
        ("validate", ["--model", "m.M"], "`laser.plan` must say what to cut"),
        ("fit", [], "the following arguments are required: --model"),
    ],
)
def test_what_is_missing_is_told_first(name, arguments, error):
    with pytest.raises((ArgumentError, ValueError), match=error):
        checked(name, arguments)


def test_another_version_of_lightning_judges_its_own_options(monkeypatch):
    monkeypatch.setattr(quick, "version", lambda name: "2.5.0")
    arguments = [*MODULE, "--trainer.no_such", "3", "--no_such", "3"]
    assert checked("validate", arguments) == arguments
    assert checked("validate", ["--help=all"]) == ["--help"]
    with pytest.raises(ArgumentError, match=r"laser\.contrls"):
        checked("validate", [*arguments, "--laser.contrls", "true"])
