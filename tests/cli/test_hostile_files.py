"""Whatever stands where a command expects a file or folder: a sentence that names it as it is spelled, and code 2."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from classifier import compared
from tiny import tiny_causal_lm, tiny_tokenizer

from laser_callback.cli.commands import COMMANDS, main
from laser_callback.shipping.export import save_reduced
from laser_callback.spectra.delta import BaseWeights
from laser_callback.spectra.store import Spectra

PLAN = "1.fc_in@0.1"
OF_DELTA = f"{PLAN}:cut=delta"
NAME = "[/red] [bold]x"
"""With what rich takes for markup, in a folder."""
HERE = "HERE"
"""In arguments: the path of what is tried."""
GONE, FOLDER, TRUNCATED = "missing", "folder", "truncated"
CONTENTS: dict[str, bytes | None] = {
    "empty": b"",
    "null": b"null",
    "number": b"5",
    "list": b"[1, [2], null]",
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "utf-16": '{"reductions": ["1.fc_in@0.1"]}'.encode("utf-16"),
    "noise": bytes(range(255, -1, -1)) * 40,
    TRUNCATED: None,
    GONE: None,
    FOLDER: None,
}
ALL, FEW = tuple(CONTENTS), ("null", "noise", GONE)
MOST = tuple(name for name in CONTENTS if name != "deep")
"""For YAML, which takes its time over that: three commands have it in full."""
NOT_UTF_8 = ("empty", "utf-16", "noise", GONE, FOLDER)
"""What is no text; all else is one as good as any."""
BROKEN = ("empty", "null", "deep", "noise", TRUNCATED)
"""Of a part of a folder."""

MODEL, OUT = ("--model", "model"), ("--output", "out")
FACTS = ("--facts", "facts.jsonl")
ON_FACTS = (*MODEL, *FACTS, "--accelerator", "cpu")
GATE = ("--plan", PLAN, "--gates", "log_loss <= +0.1")
GATE_DELTA = ("--plan", OF_DELTA, *GATE[2:])
DATA = ("--data", "laser_callback.FactsDataModule")
LIGHTNING = ("--model", "laser_callback.LaserModule", "--model.model", "model", "--trainer.accelerator", "cpu",
             "--trainer.logger", "false", *DATA)  # fmt: skip
ON_DATA = (*LIGHTNING, "--data.path", "facts.jsonl", "--laser.plan", PLAN)

# The command, a file that is valid there, what may stand in its place, and the arguments.
Case = tuple[str, str, tuple[str, ...], tuple[str, ...]]
CASES: list[Case] = [
    *(("export", plan, ALL, (*MODEL, *OUT, "--plan", HERE)) for plan in ("plan.yaml", "plan.json", "plan.txt")),
    *(("gate", facts, ALL, (*MODEL, *GATE, "--facts", HERE)) for facts in ("facts.jsonl", "facts.parquet")),
    ("gate", "facts.csv", tuple({*ALL} - {TRUNCATED}), (*MODEL, *GATE, "--facts", HERE)),
    ("gate", "plan.yaml", FEW, (*ON_FACTS, "--gates", "log_loss <= +0.1", "--plan", HERE)),
    ("gate", "gates.yaml", ALL, (*ON_FACTS, "--plan", PLAN, "--gates", HERE)),
    ("gate", "probes.jsonl", ALL, (*ON_FACTS, *GATE, "--probes", HERE)),
    ("gate", "facts.jsonl", FEW, (*ON_FACTS, *GATE, "--others", '{"more": "HERE"}')),
    ("gate", "text.txt", NOT_UTF_8, (*ON_FACTS, *GATE, "--text", HERE)),
    ("gate", "base.safetensors", FEW, (*ON_FACTS, *GATE_DELTA, "--base", HERE)),
    ("rollout", "plan.yaml", FEW, (*ON_FACTS, "--gates", "log_loss <= +0.1", "--plan", HERE)),
    ("rollout", "plan.yaml", FEW, (*ON_FACTS, *GATE, "--stages", HERE)),
    ("rollout", "gates.yaml", FEW, (*ON_FACTS, "--plan", PLAN, "--gates", HERE)),
    ("rollout", "facts.jsonl", FEW, (*MODEL, *GATE, "--facts", HERE)),
    ("rollout", "probes.jsonl", FEW, (*ON_FACTS, *GATE, "--probes", HERE)),
    ("rollout", "text.txt", ("noise", GONE), (*ON_FACTS, *GATE, "--text", HERE)),
    ("rollout", "base.ckpt", FEW, (*ON_FACTS, *GATE_DELTA, "--base", HERE)),
    ("rollout", "journal/settings.json", BROKEN, (*ON_FACTS, *GATE, "--folder", HERE, "--resume", "true")),
    ("rollout", "journal/*.json", BROKEN, (*ON_FACTS, *GATE, "--folder", HERE, "--resume", "true")),
    ("rollout", "journal/*.safetensors", BROKEN, (*ON_FACTS, *GATE, "--folder", HERE, "--resume", "true")),
    ("search", "facts.jsonl", FEW, (*MODEL, "--facts", HERE)),
    ("search", "text.txt", NOT_UTF_8, (*ON_FACTS, "--text", HERE)),
    ("search", "base.safetensors", FEW, (*ON_FACTS, "--base", HERE)),
    ("search", "task.yaml", MOST, (*MODEL, "--judge", "lm_eval:HERE?include_path=none")),
    ("search", "journal/settings.json", ("null", "noise"), (*ON_FACTS, "--folder", HERE, "--resume", "true")),
    ("search", "config.yaml", MOST, (*ON_FACTS, "--module", HERE)),
    ("export", "recipe.json", FEW, (*MODEL, *OUT, "--plan", HERE)),
    ("export", "base.safetensors", ALL, (*MODEL, *OUT, "--plan", OF_DELTA, "--base", HERE)),
    ("export", "base.ckpt", ALL, (*MODEL, *OUT, "--plan", OF_DELTA, "--base", HERE)),
    ("export", "model/model.safetensors", BROKEN, (*MODEL, *OUT, "--plan", OF_DELTA, "--base", HERE)),
    ("export", "result.json", ALL, (*MODEL, *OUT, "--plan", PLAN, "--result", HERE)),
    ("apply", "recipe.json", ALL, (*MODEL, *OUT, "--recipe", HERE)),
    ("apply", "base.safetensors", FEW, (*MODEL, *OUT, "--recipe", "delta.json", "--base", HERE)),
    ("restore", "undo.safetensors", ALL, (*MODEL, *OUT, "--undo", HERE)),
    ("report", "result.json", ALL, (HERE,)),
    ("report", "result.json", FEW, (HERE, "--html", "page.html")),
    ("report", "result.examples.jsonl", ALL[1:], ("result.json", "--html", "page.html", "--examples", HERE)),
    ("compare", "run.jsonl", ALL[:-1], (HERE, "run.csv")),
    ("compare", "run.csv", ("empty", "utf-16", "noise", GONE), ("run.jsonl", HERE)),
    ("compare", "log.json", ALL[:-1], ("log.json", HERE)),
    ("compare", "run.jsonl", (FOLDER,), ("run.csv", "run.jsonl", "--noise", HERE)),
    ("demo", "facts.jsonl", FEW, (*MODEL, "--plan", PLAN, "--facts", HERE)),
    ("demo", "text.txt", ("noise", GONE), (*MODEL, "--plan", PLAN, *FACTS, "--text", HERE)),
    ("demo", "plan.yaml", FEW, (*MODEL, *FACTS, "--plan", HERE)),
    (
        "validate",
        "plan.yaml",
        ("empty", "utf-16", TRUNCATED),
        (*LIGHTNING, "--data.path", "facts.jsonl", "--laser.plan", HERE),
    ),
    ("validate", "laser.yaml", MOST, (*ON_DATA, "--laser", HERE)),
    ("validate", "config.yaml", FEW, (*LIGHTNING, "--laser.plan", PLAN, "--data", HERE)),
    ("validate", "base.ckpt", ("empty", TRUNCATED), (*ON_DATA, "--ckpt_path", HERE)),
    ("search", "config.yaml", ALL, ("--config", HERE)),
    ("search", "config.json", MOST, (f"--config={HERE}",)),
    ("inspect", "model.gguf", ALL, (HERE,)),
]
for command in ("validate", "test", "fit"):
    CASES += [
        (command, "facts.jsonl", FEW[1:], (*LIGHTNING, "--laser.plan", PLAN, "--data.path", HERE)),
        (command, "text.txt", ("noise", GONE), (*ON_DATA, "--data.text", HERE)),
        (command, "plan.yaml", FEW[:2], (*LIGHTNING, "--data.path", "facts.jsonl", "--laser.plan", HERE)),
        (command, "base.ckpt", FEW[1:], (*ON_DATA, "--ckpt_path", HERE)),
        (command, "model/config.json", ("noise",), (*ON_DATA, "--model.model", HERE)),
        (command, "model/tokenizer.json", ("null",), (*ON_DATA, "--model.model", HERE)),
    ]
for command in ("show", "cp", "run"):
    CASES.append(
        (
            f"recipes {command}",
            "recipe.yaml",
            ALL if command == "show" else FEW,
            (HERE, *["to.yaml"] * (command == "cp")),
        )
    )
CONFIGURED = [name for name in COMMANDS if name not in ("recipes ls", "recipes run", "get model")]
CASES += [(command, "config.yaml", FEW, ("--config", HERE)) for command in CONFIGURED]
for command, others in {
    "search": FACTS,
    "gate": (*GATE, *FACTS),
    "rollout": (*GATE, *FACTS),
    "export": ("--plan", PLAN, *OUT),
    "apply": ("--recipe", "recipe.json", *OUT),
    "restore": ("--undo", "undo.safetensors", *OUT),
    "demo": ("--plan", PLAN, *FACTS),
    "inspect": (),
}.items():
    model = (HERE,) if command == "inspect" else ("--model", HERE)
    parts = ["config.json", "model.safetensors", *["tokenizer.json"] * (command not in ("restore", "inspect"))]
    CASES += [
        (command, f"model/{part}", BROKEN if command == "export" else FEW[:2], (*others, *model)) for part in parts
    ]
    CASES += [(command, "model.gguf", FEW, (*others, *model)), (command, "model/", ("noise", GONE), (*others, *model))]

# Where a command writes to: what is there already, and the arguments.
PLACES: list[tuple[str, str, tuple[str, ...]]] = [
    ("search", "file", (*ON_FACTS, "--folder", HERE)),
    ("rollout", "file", (*ON_FACTS, *GATE, "--folder", HERE)),
    ("cache ls", "file", ("--folder", HERE)),
    ("cache clear", "file", ("--folder", HERE)),
    ("get facts", FOLDER, (HERE,)),
    ("get facts", "file", (HERE,)),
    ("get facts", "file", (f"{HERE}/facts.jsonl",)),
    ("recipes cp", "file", ("search.yaml", HERE)),
    ("recipes cp", "file", ("search.yaml", f"{HERE}/to.yaml")),
    ("report", "file", ("result.json", "--pictures", HERE)),
    ("report", FOLDER, ("result.json", "--html", HERE)),
    ("report", "file", ("result.json", "--html", f"{HERE}/page.html")),
    *(("export", what, (*MODEL, "--plan", PLAN, "--output", HERE)) for what in ("file", FOLDER)),
    *(("apply", what, (*MODEL, "--recipe", "recipe.json", "--output", HERE)) for what in ("file", FOLDER)),
    *(("restore", what, (*MODEL, "--undo", "undo.safetensors", "--output", HERE)) for what in ("file", FOLDER)),
    ("search", FOLDER, (*ON_FACTS, "--output", HERE)),
    ("search", FOLDER, (*ON_FACTS, "--html", HERE)),
    ("search", FOLDER, (*ON_FACTS, "--plan", HERE)),
    ("gate", FOLDER, (*ON_FACTS, *GATE, "--output", HERE)),
    ("rollout", "file", (*ON_FACTS, *GATE, "--output", f"{HERE}/out.json")),
    ("demo", FOLDER, (*MODEL, *FACTS, "--plan", PLAN, "--output", HERE)),
    ("demo", FOLDER, (*MODEL, *FACTS, "--plan", PLAN, "--picture", HERE)),
    ("inspect", FOLDER, ("model", "--picture", HERE)),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a valid file of each kind."""
    home = tmp_path_factory.mktemp("home")
    model = tiny_causal_lm()
    model.save_pretrained(home / "model")
    tiny_tokenizer().save_pretrained(home / "model")
    for form, name in (("recipe", "recipe.json"), ("undo", "undo.safetensors")):
        save_reduced(model, PLAN, home / name, form)  # type: ignore[arg-type]
    save_reduced(model, OF_DELTA, home / "delta.json", "recipe", spectra=Spectra(base=BaseWeights(model, model)))
    compared(PLAN).to_json(home / "result.json")
    shutil.copy(home / "model" / "model.safetensors", home / "base.safetensors")
    torch.save(model.state_dict(), home / "base.ckpt")
    rows = [{"prompt": f"The capital of country {i} is", "answer": "Paris"} for i in range(12)]
    files = {
        "plan.yaml": f"reductions:\n- {PLAN}\n",
        "plan.json": json.dumps({"reductions": [PLAN]}),
        "plan.txt": f"{PLAN}\n",
        "gates.yaml": "log_loss: <= +0.1\n",
        "probes.jsonl": '{"prompt": "How?", "should": "answer"}\n',
        "facts.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "facts.csv": "prompt,answer\n" + "".join(f"{row['prompt']},{row['answer']}\n" for row in rows),
        "text.txt": "Paris is the capital of France. " * 20,
        "task.yaml": "task: mine\noutput_type: multiple_choice\n",
        "result.examples.jsonl": '{"id": "1"}\n',
        "run.jsonl": '{"id": "1", "acc": 1}\n',
        "run.csv": "id,acc\n1,1\n",
        "log.json": '{"version": 2, "eval": {}, "samples": [{"id": 1, "scores": {"match": {"value": "C"}}}]}',
        "config.yaml": "{seed: 3, model: model}",
        "config.json": '{"seed": 3}',
        "laser.yaml": "{plan: 1.fc_in@0.1, loops: [fit]}",
        "recipe.yaml": "# laser-callback search: mine\nseed: 3\n",
        "facts.parquet": "PAR1" + "x" * 40,
        "model.gguf": "GGUF" + "x" * 40,
    }
    for name, text in files.items():
        (home / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("LASER_CALLBACK_CACHE", str(home / "cache"))
        assert main(["rollout", *ON_FACTS, *GATE, "--folder", "journal"]) in (0, 3)
    return home


@pytest.fixture
def refused(home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Asserts that a command is refused in a sentence with the path as it is spelled."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("LASER_CALLBACK_CACHE", str(home / "cache"))
    before = {*os.listdir()}

    def refused(command: str, arguments: tuple[str, ...], path: str, what: str) -> None:
        code = main([*command.split(), *(each.replace(HERE, path) for each in arguments)])
        said = capfd.readouterr().err
        assert code == 2, (what, said)
        start, told = said.rstrip("\n").split("error: ", 1)
        assert start.endswith(f"laser-callback {command}: "), (what, said)
        assert path in told, (what, told)
        assert "\n" not in told, (what, told)
        assert len(told) < 1000, (what, told)
        assert "Traceback" not in said, (what, said)
        assert {*os.listdir()} <= {*before, Path(NAME).parts[0], "cache"}, what  # and nothing is left behind

    return refused


def put(home: Path, valid: str, name: str) -> str:
    """Puts content in place of a valid file; returns its path, or that of the folder that it is a part of."""
    shutil.rmtree(home / Path(NAME).parent, ignore_errors=True)
    path = whole = home / f"{NAME}{Path(valid).suffix if '/' not in valid else ''}"
    path.parent.mkdir()
    folder, _, part = valid.rpartition("/")
    if part and folder:
        shutil.copytree(home / folder, whole)
        path = next(path for path in sorted(whole.glob(part)) if "settings" in part or path.name != "settings.json")
        raw = path.read_bytes()
        path.unlink()
    elif name == TRUNCATED:
        raw = (home / valid).read_bytes()
    if name == FOLDER:
        path.mkdir()
    elif name == TRUNCATED:
        path.write_bytes(raw[: len(raw) * 2 // 3].rstrip())
    elif name != GONE:
        path.write_bytes(CONTENTS.get(name) or b"")
    return str(whole.relative_to(home))


def _ids(cases: list[Any]) -> list[str]:
    return [f"{command} {what} {arguments[-2:]}" for command, what, *_, arguments in cases]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "valid", "contents", "arguments"), CASES, ids=_ids(CASES))
def test_what_is_no_valid_file_is_named(command, valid, contents, arguments, home, refused):
    for content in contents:
        refused(command, arguments, put(home, valid, content), content)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "what", "arguments"), PLACES, ids=_ids(PLACES))
def test_a_place_that_cannot_be_written_to_is_named(command, what, arguments, home, refused):
    suffixes = {"--html": ".html", "--plan": ".yaml", "--picture": ".svg"}
    suffix = ".jsonl" if command == "get facts" else suffixes.get(arguments[-2], "")
    refused(command, arguments, put(home, f"a{suffix}", "empty" if what == "file" else FOLDER), what)


def test_every_command_that_takes_a_path_is_among_them():
    without = {"recipes ls", "get model"}
    assert {command for command, *_ in [*CASES, *PLACES]} == {*COMMANDS} - without
