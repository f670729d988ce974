"""Is everything right on the device? The tests that were written for the CPU, run there, and those of devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from device import ON_GPU
from rows import ROWS

TESTS = Path(__file__).parents[1]
EXISTING = (
    "compare/test_oracle*.py",
    "compare/test_callback*.py",
    "compare/test_arms.py",
    "compare/test_module*.py",
    "compare/test_ab_test.py",
    "surgery/test_replay*.py",
    "surgery/test_swap*.py",
    "search/test_screen*.py",
    "search/test_search.py",
    "spectra/test_spectrum.py",
    "spectra/test_store.py",
)
OWN = ("gpu/test_precisions.py", "gpu/test_random_states.py", "plans/test_families.py")
WORKERS = 12


def files(patterns: tuple[str, ...]) -> list[str]:
    """The tests' files; a pattern without any is an error, or a file that was renamed would be missed by nobody."""
    found = {pattern: sorted(map(str, TESTS.glob(pattern))) for pattern in patterns}
    assert all(found.values()), [pattern for pattern, names in found.items() if not names]
    return [name for names in found.values() for name in names]


def passes(name: str, *arguments: str) -> bool:
    """Run pytest; what it found stands beside the rows."""
    workers = min(WORKERS, os.cpu_count() or 1) if ON_GPU else 0
    report = Path(os.environ.get(ROWS, "."), f"{name}.xml")
    options = [
        "-p",
        "no:cacheprovider",
        "--tb=short",
        "--continue-on-collection-errors",
        "--numprocesses",
        str(workers),
        "--junitxml",
        str(report),
    ]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=TESTS.parent).returncode == 0


def main() -> int:
    """0 if all pass. On the CPU, where they all run anyway, a few."""
    existing, own = files(EXISTING), files(OWN)
    few = [] if ON_GPU else ["-k", "MetricAttributes and validate"]
    other = "not test_families or accelerator" if ON_GPU else "random_states"
    right = [passes("existing", "-p", "on_device", *existing, *few), passes("own", *own, "-k", other)]
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
