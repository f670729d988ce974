#!/usr/bin/env bash
# Sets up everything, then compares SmolLM2-135M with two reduced versions of it on facts about the world's countries.
# Options are those of the demo: bash recipes/quickstart.sh --limit 100
set -euo pipefail
. "$(dirname "$0")/setup.sh"
python -m laser_callback demo "$@"
