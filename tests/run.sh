#!/usr/bin/env bash
# Sets up everything, then passes lint, types, contracts, documentation and tests, whose summary is the last line.
# Arguments go to pytest: bash tests/run.sh -m "not slow"   # minutes less
set -euo pipefail
. "$(dirname "$0")/../recipes/setup.sh"
ruff format --check .
ruff check .
mypy
lint-imports --no-logo --no-cache
python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet docs docs/_build/html
# One thread per worker: with more, the workers' thread pools wait for each other.
OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 python -m pytest --numprocesses 2 "$@"
