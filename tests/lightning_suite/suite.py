"""Lightning's own tests as an oracle: with a LaserCallback in every Trainer they must find what they find without.

Usage: ``python tests/lightning_suite/suite.py FOLDER [FILE ...]``, where FOLDER holds the ``tests_pytorch`` of
Lightning's repository at the installed version. Each file is run three times: with a callback that does nothing, with a
LaserCallback whose keys stay unpublished, and with one as users have it. What fails only with a LaserCallback has to
stand in ``expected.yaml``, with its reason; anything else is told, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import yaml
from with_laser import MODES

HERE = Path(__file__).parent
PACKAGE = "tests_pytorch"
FILES = (
    "loops",
    "trainer/logging_",
    "trainer/flags",
    "trainer/optimization",
    "trainer/connectors/test_callback_connector.py",
    "trainer/connectors/test_data_connector.py",
    "trainer/test_trainer.py",
    "trainer/test_dataloaders.py",
    "trainer/test_states.py",
    "trainer/test_config_validator.py",
    "core",
    "models/test_hooks.py",
    "models/test_restore.py",
    "models/test_hparams.py",
    "callbacks",
    "checkpointing",
    "loggers",
    "tuner",
    "utilities/test_combined_loader.py",
    "utilities/test_auto_restart.py",
    "utilities/test_compile.py",
)

Outcomes = dict[str, tuple[str, str]]  # by test: "passed", "failed" or "skipped", and why


def run(suite: Path, files: str, mode: str, options: Iterable[str] = ()) -> Outcomes:
    """The outcome of each test of a file or folder, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "outcomes.jsonl")
        command = [sys.executable, "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", "-p", "with_laser"]
        command += [f"--laser={mode}", f"--outcomes={path}", f"--basetemp={folder}/tmp", *options]
        paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        command.append(f"{PACKAGE}/{files}")
        done = subprocess.run(command, cwd=suite, env=environment, capture_output=True, text=True)
        if not path.exists():
            raise RuntimeError(f"pytest has run no test of {files} with the mode {mode!r}: {done.stdout}{done.stderr}")
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    outcomes: Outcomes = {}
    for line in lines:  # of a test whose teardown fails there are two
        test = line["test"].partition(f"{PACKAGE}/")[2]
        if outcomes.get(test, ("passed",))[0] == "passed":
            outcomes[test] = line["outcome"], " ".join(line["reason"].split())[:300]
    if done.returncode not in (0, 1):
        outcomes[f"{files}::end"] = "failed", f"pytest ended with {done.returncode}: {done.stdout[-2000:]}"
    return outcomes


def differences(base: Outcomes, other: Outcomes) -> dict[str, str]:
    """The tests that did something else with the other callback, and what."""
    found = {}
    for test in base.keys() | other.keys():
        before, after = base.get(test, ("absent", "")), other.get(test, ("absent", ""))
        if before[0] != after[0]:
            found[test] = after[1] or f"{before[0]} with a callback that does nothing, {after[0]} with a LaserCallback"
    return dict(sorted(found.items()))


def reason_for(test: str, expected: dict[str, str]) -> str | None:
    """The reason that is on file for a test, whose name may be a pattern."""
    escaped = {pattern.replace("[", "[[]"): reason for pattern, reason in expected.items()}
    return next((reason for pattern, reason in escaped.items() if fnmatch.fnmatchcase(test, pattern)), None)


def report(found: dict[str, Outcomes], expected: dict[str, dict[str, str]]) -> int:
    """Print how many tests of each file pass and what differs; returns how many differences have no reason on file."""
    files = sorted({test.partition("::")[0] for outcomes in found.values() for test in outcomes})
    for file in files:
        counts = [
            sum(outcome == "passed" for test, (outcome, _) in found[mode].items() if test.startswith(f"{file}::"))
            for mode in MODES
        ]
        print(f"| {file} | {' | '.join(map(str, counts))} |")
    new = 0
    quiet, loud = (differences(found["nothing"], found[mode]) for mode in MODES[1:])
    for mode, differing in (("unpublished", quiet), ("published", {k: v for k, v in loud.items() if k not in quiet})):
        for test, what in differing.items():
            known = reason_for(test, expected[mode])
            new += known is None
            print(f"  {mode}: {test}\n    {'expected: ' + known if known else 'NEW: ' + what}")
    return new


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds `tests_pytorch` of Lightning's repository")
    parser.add_argument("files", nargs="*", help=f"below tests_pytorch, or folders (default: {', '.join(FILES)})")
    parser.add_argument("-k", dest="keyword", default="", help="only these tests, as for pytest")
    given = parser.parse_args()
    expected = yaml.safe_load((HERE / "expected.yaml").read_text(encoding="utf-8"))
    options = ["-k", given.keyword] if given.keyword else []
    print("| file | " + " | ".join(MODES) + " |\n" + "|---" * (len(MODES) + 1) + "|")
    new = 0
    for files in given.files or FILES:
        new += report({mode: run(given.folder, files, mode, options) for mode in MODES}, expected)
        sys.stdout.flush()
    print(f"{new} differences without a reason in expected.yaml")
    return 1 if new else 0


if __name__ == "__main__":
    raise SystemExit(main())
