"""Every recipe runs, on small settings; and an installed package brings them along."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from laser_callback import load_factored
from laser_callback.cli.commands import COMMANDS, main
from laser_callback.cli.recipes import recipes

FOLDER = Path(__file__).parents[2] / "recipes"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(autouse=True)
def _elsewhere(own_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(capsys, name, *options):
    """Run a recipe; returns its exit code and its answer."""
    code = main(["recipes", "run", name, *map(str, options), "--json"])
    shown = capsys.readouterr()
    assert code in (0, 3), shown.err
    return code, json.loads(shown.out)


def rows_of(answer, plan="laser"):
    return {row["metric"]: row for row in answer["laser"]["laser"]["arms"][plan]["rows"]}


CPU = ("--trainer.accelerator", "cpu")


def facts_and_text(model):
    """Options of the commands that read no Lightning config."""
    return ("--model", model, "--facts", model / "facts.jsonl", "--text", model / "text.txt", "--accelerator", "cpu")


# ---- ls, show, cp ----------------------------------------------------------------------------------------------------


def test_ls_show_cp(capsys, tmp_path):
    assert main(["recipes", "ls", "--json"]) == 0
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(listed) == {path.name for path in FOLDER.iterdir() if path.suffix in (".py", ".yaml")}
    assert listed["search.yaml"]["command"] == "search"
    assert main(["recipes", "show", "search.yaml"]) == 0
    assert capsys.readouterr().out == (FOLDER / "search.yaml").read_text()
    assert main(["recipes", "cp", "search.yaml", "mine.yaml"]) == 0
    assert "laser-callback search --config mine.yaml" in capsys.readouterr().out
    assert Path("mine.yaml").read_bytes() == (FOLDER / "search.yaml").read_bytes()
    assert main(["recipes", "cp", "search.yaml", "mine.yaml"]) == 2
    assert "must be a new file" in capsys.readouterr().err
    assert main(["recipes", "cp", "vit.py", str(tmp_path)]) == 0
    assert (tmp_path / "vit.py").is_file()
    for command in (["show", "nope"], ["cp", "nope", "to"], ["run", "nope"]):
        assert main(["recipes", *command]) == 2
        assert "`name` must be a path or one of cleanup.py, " in capsys.readouterr().err


@pytest.mark.slow
def test_a_recipe_of_ones_own_is_named_by_its_path(capsys, deep_lm):
    """A path is the user's file, a bare name the package's, and a changed copy beside it is mentioned."""
    assert main(["recipes", "cp", "own_facts.yaml", "."]) == 0
    capsys.readouterr()
    assert main(["recipes", "show", "own_facts.yaml"]) == 0
    assert capsys.readouterr().err == ""  # the same file
    mine = Path("own_facts.yaml")
    mine.write_text(mine.read_text().replace("28.fc_up@0.01", "27.fc_in@0.5"))
    Path("text.txt").write_bytes((deep_lm / "text.txt").read_bytes())
    options = ("--model.model", str(deep_lm), "--data.path", str(deep_lm / "facts.jsonl"), *CPU, "--json")
    for name, plan, note in (
        ("./own_facts.yaml", "27.fc_in@0.5", False),
        (str(mine.resolve()), "27.fc_in@0.5", False),
        ("own_facts.yaml", "28.fc_up@0.01", True),
    ):
        assert main(["recipes", "run", name, *options]) == 0
        shown = capsys.readouterr()
        assert json.loads(shown.out)["laser"]["laser"]["arms"]["laser"]["plan"] == plan
        assert ("is the package's recipe; yours, in this folder, is ./own_facts.yaml" in shown.err) is note
    assert main(["recipes", "run", "./gone.yaml"]) == 2
    assert "there is no file 'gone.yaml'" in capsys.readouterr().err
    mine.rename("mine.yaml")
    assert main(["recipes", "run", "mine.yaml"]) == 2
    assert "the file in this folder is ./mine.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in recipes() if name.endswith(".yaml")])
def test_every_key_is_explained(name):
    """Above each key that is not only a block, a comment; if it has a type, that too, as "(type, default)"."""
    lines = (FOLDER / name).read_text().splitlines()
    for number, line in enumerate(lines):
        match = re.match(r" *(\w+):( .+)?$", line)
        if match is None or match[1] in ("class_path", "init_args"):
            continue
        inside_plans = any(lines[above].strip() == "plan:" for above in range(number - 3, number))
        following = lines[number + 1].strip() if number + 1 < len(lines) else ""
        is_block = match[2] is None and not following.startswith("- ") and match[1] != "plan"
        if not inside_plans and not is_block:
            comment = "\n".join(lines[max(0, number - 4) : number])
            assert re.search(r"#[^\n]*\n?[^\n]*\((.*)\)", comment), f"{name}:{number + 1}: {line}"
    assert recipes()[name].command in COMMANDS
    assert isinstance(yaml.safe_load("\n".join(lines)), dict)


# ---- each recipe -----------------------------------------------------------------------------------------------------


def test_compare_yaml(capsys, deep_lm):
    options = ("--model.model", deep_lm, "--data.path", deep_lm / "facts.jsonl", "--data.limit", "12", *CPU)
    _, answer = run(capsys, "compare.yaml", *options)
    assert rows_of(answer, "late_mlp")["first_token_accuracy"]["n"] == 12
    assert set(answer["laser"]["laser"]["controls"]["attention"]) == {"zeroed", "random", "noise"}
    assert json.loads(Path("compare.json").read_text())["arms"] == answer["laser"]["laser"]["arms"]


def test_own_facts_yaml(capsys, deep_lm, tmp_path):
    fact = {"prompt": "The capital of {} is", "answer": "Paris", "choices": ["Paris", "Rome"]}
    rows = [{**fact, "prompt": fact["prompt"].format(i), "paraphrases": [f"{i} has the capital"]} for i in range(30)]
    (path := tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("--model.model", deep_lm, "--data.path", path, "--data.text", deep_lm / "text.txt", *CPU)
    _, answer = run(capsys, "own_facts.yaml", *options)
    assert {"choice_accuracy", "paraphrase_robustness", "perplexity"} <= set(rows_of(answer))
    assert rows_of(answer)["first_token_accuracy"]["n"] == 12  # the confirm set


def test_paper_task_yaml(capsys, deep_lm, tmp_path):
    rows = [{"id": i, "claim": f"Claim {i}.", "label": ["SUPPORTS", "REFUTES"][i % 2]} for i in range(20)]
    (path := tmp_path / "fever.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = ("--data.task", "fever", "--data.source", path, "--laser.primary", "choice_accuracy")
    _, answer = run(capsys, "paper_task.yaml", "--model.model", deep_lm, *task, *CPU)
    assert rows_of(answer)["choice_accuracy"]["n"] == 16  # four fifths are the test part


@pytest.mark.slow
def test_search_yaml(capsys, deep_lm):
    data = facts_and_text(deep_lm)
    code, answer = run(capsys, "search.yaml", *data, "--candidates", "4", "--within", "28-29.mlp")
    assert code == (3 if answer["plan"] is None else 0)
    assert answer["sets"] == {"screen": 6, "race": 18, "confirm": 24, "guard": 12}
    assert Path("laser-search/result.json").is_file()
    assert Path("plan.yaml").is_file() == (answer["plan"] is not None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cleanup.yaml", "delta_cleanup.yaml"])
def test_cleanup_yaml_and_delta_cleanup_yaml(name, capsys, deep_lm):
    options = ["--model.model", deep_lm, "--data.path", deep_lm / "facts.jsonl", "--trainer.max_epochs", "1", *CPU]
    search = {"data.path": deep_lm / "facts.jsonl", "candidates": 2, "within": "29.mlp"}
    if name == "delta_cleanup.yaml":
        search["base"] = deep_lm
    for key, value in search.items():
        options += [f"--cleanup.{key}", value]
    _, answer = run(capsys, name, *options)
    assert answer["laser"] == {}
    (cleanup,) = answer["cleanup"]
    wanted = {"cleanup.yaml": ["laser"], "delta_cleanup.yaml": ["delta(besides=False)", "delta-matrices"]}
    assert cleanup["search"]["settings"]["strategies"] == wanted[name]


@pytest.mark.slow
def test_rollout_yaml(capsys, deep_lm):
    data = facts_and_text(deep_lm)
    code, answer = run(capsys, "rollout.yaml", *data)
    assert code == 3  # random weights: there is nothing to gain
    assert json.loads(Path("laser-rollout.json").read_text()) == answer


def test_export_factored_yaml(capsys, deep_lm):
    code, answer = run(capsys, "export_factored.yaml", "--model", deep_lm)
    assert code == 0
    assert answer["path"] == "factored"
    assert load_factored("factored")


@pytest.mark.slow
def test_ddp_yaml(deep_lm, tmp_path):
    """Two real processes; the second is a relaunch of the same command."""
    options = ["--model.model", deep_lm, "--data.path", deep_lm / "facts.jsonl", "--data.limit", "11", *CPU, "--json"]
    command = [sys.executable, "-m", "laser_callback", "recipes", "run", "ddp.yaml", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)  # of the first process alone
    assert rows_of(answer)["first_token_accuracy"]["n"] == 11
    assert answer["laser"]["laser"]["duplicates_removed"] == 1


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A small ViT and images of two labels."""
    image = pytest.importorskip("PIL.Image")
    import numpy as np
    from transformers import ViTConfig, ViTForImageClassification

    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        id2label={0: "cat", 1: "dog"},
        label2id={"cat": 0, "dog": 1},
    )
    ViTForImageClassification(config).save_pretrained(folder / "model")
    generator = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (folder / "images" / label).mkdir(parents=True)
        for i in range(5):
            pixels = generator.integers(0, 256, (40, 30, 3), dtype=np.uint8)
            image.fromarray(pixels).save(folder / "images" / label / f"{i}.png")
    return folder


def test_vit_yaml(capsys, vit):
    options = ("--model.model", vit / "model", "--data.folder", vit / "images", "--data.size", "32", *CPU)
    _, answer = run(capsys, "vit.yaml", *options)
    assert rows_of(answer)["accuracy"]["n"] == 10
    assert rows_of(answer)["accuracy"]["test"] == "exact McNemar"


@pytest.mark.slow
def test_vit_py_is_an_ordinary_script(vit):
    options = ["validate", "--model.model", vit / "model", "--data.folder", vit / "images", "--data.size", "32", *CPU]
    done = script([sys.executable], "vit.py", *options, "--trainer.logger", "false")
    assert "accuracy" in done.stdout
    assert "laser" not in done.stdout


def script(launcher, name, *options):
    command = [*launcher, FOLDER / name, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=ONE_THREAD, timeout=600)
    assert done.returncode == 0, done.stderr
    return done


BIN = Path(sys.executable).parent
TORCHRUN = [BIN / "torchrun", "--standalone", "--nproc-per-node", "2"]
FABRIC = [BIN / "fabric", "run", "--accelerator", "cpu", "--devices", "2", "--main-port", "29517"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, FABRIC], ids=["torchrun", "fabric"])
def test_compare_py(launcher, deep_lm):
    options = ("--model", deep_lm, "--facts", deep_lm / "facts.jsonl", "--limit", "11", "--accelerator", "cpu")
    done = script(launcher, "compare.py", *options)
    assert done.stdout.count("28.fc_up@0.01 on 11 facts: ") == 1
    assert json.loads(Path("compare.json").read_text())["primary"] == "first_token_accuracy"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, FABRIC], ids=["torchrun", "fabric"])
def test_own_loop_py(launcher, deep_lm):
    done = script(launcher, "own_loop.py", "--model", deep_lm, "--facts", deep_lm / "facts.jsonl", "--batch_size", "7")
    assert done.stdout.count("28.fc_up@0.01 on 60 facts: ") == 1


@pytest.mark.parametrize(("name", "count"), [("compare.py", 11), ("own_loop.py", 60)])
def test_scripts_run_under_python_too(name, count, deep_lm, capsys):
    few = ["--limit", "11", "--accelerator", "cpu"] if name == "compare.py" else []
    assert main(["recipes", "run", name, "--model", str(deep_lm), "--facts", str(deep_lm / "facts.jsonl"), *few]) == 0
    assert f"28.fc_up@0.01 on {count} facts: " in capsys.readouterr().out


@pytest.fixture(scope="module")
def cleanup():
    """What is in the recipe."""
    return SimpleNamespace(**runpy.run_path(str(FOLDER / "cleanup.py"), run_name="recipe"))


def test_cleanup_py_deals_disjoint_sets_of_equally_many_of_each_class(cleanup):
    rows = [(f"text {i}", i % 3) for i in range(300)]
    sets = cleanup.drawn(rows, {"train": 150, "valid": 61, "test": 60}, 0)
    assert {name: Counter(label for _, label in part) for name, part in sets.items()} == {
        "train": {0: 50, 1: 50, 2: 50},
        "valid": {0: 20, 1: 20, 2: 20},
        "test": {0: 20, 1: 20, 2: 20},
    }
    texts = [text for part in sets.values() for text, _ in part]
    assert len(set(texts)) == len(texts)
    assert {row for part in sets.values() for row in part} <= set(rows)
    assert sets["train"] == cleanup.drawn(rows, {"train": 150}, 0)["train"]
    assert sets["train"] != cleanup.drawn(rows, {"train": 150}, 1)["train"]
    with pytest.raises(ValueError, match="class 0 has 100 texts, and 110 are asked for"):
        cleanup.drawn(rows, {"train": 150, "test": 180}, 0)


@pytest.mark.parametrize("classes", [2, 6])
def test_cleanup_py_gives_exactly_a_share_of_the_labels_another(cleanup, classes):
    rows = [(f"text {i}", i % classes) for i in range(3000)]
    noisy = cleanup.partly_wrong(rows, 0.2, classes, 0)
    wrong = [(a, b) for (_, a), (_, b) in zip(rows, noisy, strict=True) if a != b]
    assert [text for text, _ in noisy] == [text for text, _ in rows]
    assert len(wrong) == 600
    assert len(set(wrong)) == classes * (classes - 1)  # from each to each other, and to nothing else
    assert {label for _, label in noisy} == set(range(classes))
    assert cleanup.partly_wrong(rows, 0.0, classes, 0) == rows
    assert cleanup.partly_wrong(rows, 0.2, classes, 1) != noisy


def test_cleanup_py_says_what_to_do_without_a_package_index(cleanup, own_cache):
    folder = own_cache / "recipes" / "vaderSentiment==3.3.2"
    with pytest.raises(OSError, match=r"pip cannot download vaderSentiment==3\.3\.2: ") as told:
        cleanup.downloaded("vaderSentiment==3.3.2", "--no-index")
    assert str(told.value).endswith(
        "run `pip download --no-deps --no-index vaderSentiment==3.3.2` elsewhere and put the file into " + str(folder)
    )
    assert not list(own_cache.rglob("*vader*"))
    folder.mkdir()
    (folder / "file.tar.gz").touch()
    assert cleanup.downloaded("vaderSentiment==3.3.2", "--no-index") == folder / "file.tar.gz"


@pytest.mark.slow
def test_cleanup_py(tmp_path):
    command = [sys.executable, str(FOLDER / "cleanup.py"), "--quick", "true", "--noise", "0.4"]
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, timeout=900)
    if "pip cannot download" in done.stderr:
        pytest.skip(done.stderr[done.stderr.index("pip cannot download") :].split("\n")[0])
    assert done.returncode == 0, done.stderr
    for share in (40, 0):
        assert f"polarity, {share}% of the training labels wrong, seed 0: 60 test examples" in done.stdout
        assert f"polarity, {share}% of the training labels wrong, mean of 1 trainings" in done.stdout
    for then in ("as trained", "WiSE-FT", "joint rule", "LaserCleanup"):
        cells = re.findall(rf"^ +(?:last|best)? +{then} +(\d+\.\d) +(\d+)% ", done.stdout, re.MULTILINE)
        assert len(cells) == 8, done.stdout  # last and best of two trainings, and of their means
        assert all(0 <= float(accuracy) <= 100 and int(most) >= 50 for accuracy, most in cells)
    kept = {path.parent.name for path in Path("cleanup").rglob("last.ckpt")}
    assert kept == {"polarity-0.4-0", "polarity-0-0"}


# ---- packaging -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_wheel_brings_them_along(tmp_path):
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=FOLDER.parent, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    inside = {Path(name).name for name in names if name.startswith("laser_callback/recipes/")}
    assert inside == set(recipes())
    assert "laser_callback/cli/commands.py" in names


def test_all_recipes_are_run_here():
    here = Path(__file__).read_text()
    assert [name for name in recipes() if f"{name.replace('.', '_')}" not in here] == []
