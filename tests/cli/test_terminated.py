"""SIGTERM, as a scheduler or a container sends it, while a command works."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from laser_callback.cli.command import Exit, run, terminable
from laser_callback.support.checkpoints import read_tensors
from laser_callback.support.reading import read_plain


def test_a_command_ends_as_by_ctrl_c_and_the_code_says_which(capsys):
    before, handler = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def work(number):
        with terminable():
            os.kill(os.getpid(), number)

    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, code, told in ((signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")):
            assert run(lambda n=number: work(n), "laser-callback search", as_json=False, debug=False) == code
            assert capsys.readouterr().err == f"laser-callback search: {told}\n"
            assert signal.getsignal(signal.SIGTERM) == before
    finally:
        signal.signal(signal.SIGINT, handler)


@pytest.mark.slow
def test_a_search_keeps_whole_steps_and_goes_on(deep_lm: Path, tmp_path: Path):
    folder, output = tmp_path / "run", tmp_path / "found.json"
    given = {"--model": deep_lm, "--facts": deep_lm / "facts.jsonl", "--folder": folder, "--output": output}
    given |= {"--within": "0-5.mlp", "--strategies": "laser", "--candidates": 8, "--accelerator": "cpu"}
    command = [
        sys.executable,
        "-m",
        "laser_callback",
        "search",
        *(str(word) for pair in given.items() for word in pair),
    ]
    env = {**os.environ, "LASER_CALLBACK_CACHE": str(tmp_path / "cache")}
    before = {path: path.read_bytes() for path in deep_lm.iterdir() if path.is_file()}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (folder / "1-propose.json").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode == Exit.TERMINATED, told
    assert "so far: interrupted; no candidate has run yet\nlaser-callback search: terminated" in told

    kept = {path.name for path in folder.iterdir()}
    assert {"settings.json", "result.json", "1-screen.json", "1-propose.json"} <= kept
    assert not [name for name in kept if name.startswith(".")]  # what is being written has such a name
    for name in kept:
        if name.endswith(".json"):
            read_plain(folder / name, "folder", lambda data: data)
        else:
            read_tensors(folder / name, "folder")
    assert not json.loads(output.read_text())["confirmed"]
    assert {path: path.read_bytes() for path in before} == before

    done = subprocess.run([*command, "--resume", "true"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == Exit.KEPT_ORIGINAL, done.stderr
    assert "screen:" not in done.stderr  # that is read back
    assert json.loads(output.read_text())["confirmed"]
