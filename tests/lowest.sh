#!/usr/bin/env bash
# Proves the lower bounds in pyproject.toml: the tests with the lowest version of each direct dependency.
# Arguments go to pytest; without any, the quick tests run: bash tests/lowest.sh tests/compare
#   LOWEST_PYTHON=3.11   another Python than the lowest that is supported
#   LOWEST_VENV=DIR      where to install, anew (default: a temporary folder, removed at the end)
#   UV_TORCH_BACKEND=cpu torch without CUDA, where PyTorch's own index can be reached: gigabytes less
set -euo pipefail
cd "$(dirname "$0")/.."
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
venv="${LOWEST_VENV:-$work/venv}"
if ! command -v uv >/dev/null; then
    python3 -m venv "$work/uv"
    "$work/uv/bin/python" -m pip install --quiet uv
    PATH="$work/uv/bin:$PATH"
fi
uv venv --quiet --clear --python "${LOWEST_PYTHON:-3.10}" "$venv"
uv pip install --quiet --python "$venv/bin/python" --resolution lowest-direct --editable ".[dev]"
export PATH="$venv/bin:$PATH"
[ $# -gt 0 ] || set -- -m "not slow"
status=0
OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 python -m pytest "$@" || status=$?
python --version
uv pip freeze --quiet --python "$venv/bin/python" | grep -iE \
    '^(torch|lightning|transformers|torchmetrics|rich|safetensors|scipy|numpy|jsonargparse|matplotlib|peft|huggingface-hub|datasets|lm-eval)=='
exit "$status"
