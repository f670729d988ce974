#!/usr/bin/env bash
# What only a GPU can tell, in one command: is everything right there, and what do a comparison, a factorisation and a
# search take. From a checkout, without installing it and without a network; about five minutes on an H100.
#
#   GPU_ASSETS=.gpu OUT=/tmp/out bash tests/gpu/run.sh
#   DEVICE=cpu bash tests/gpu/run.sh     the same code at small sizes, to try it out
#
# GPU_ASSETS  folders, separated by colons, that hold what the machine lacks; each part may be missing: wheels/*.whl,
#             facts.jsonl, model/ (a transformers folder; its weights may be missing). Parts of files, NAME.part-00 and
#             so on, are put together.
# OUT         where the logs and gpu.json go, a table for each part in it.
# PARTS       some of "tests validation factorisation search", in this order.
# BUDGET      seconds for all parts.
# PYTHON      the interpreter.
#
# Each part is a process of its own with a limit of its own, and a failure of one stops no other. The exit code is that
# of the tests.
set -uo pipefail
OUT=$(realpath -m "${OUT:-gpu-out}")
assets=()
IFS=: read -r -a folders <<<"${GPU_ASSETS:-}"
for folder in "${folders[@]}"; do assets+=("$(realpath "$folder")"); done
cd "$(dirname "$0")/../.." || exit
export DEVICE=${DEVICE:-cuda}
PARTS=${PARTS:-tests validation factorisation search}
BUDGET=${BUDGET:-480}
PYTHON=${PYTHON:-python3}
declare -A limits=([tests]=220 [validation]=160 [factorisation]=120 [search]=160)

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$OUT" "$scratch"/{assets,site,rows,cache}
for folder in "${assets[@]}"; do cp -r "$folder"/. "$scratch/assets"; done
find "$scratch/assets" -name '*.part-00' | while read -r first; do
    cat "${first%00}"* >"${first%.part-00}" && rm "${first%00}"*
done
shopt -s nullglob
wheels=("$scratch"/assets/wheels/*.whl)
if ((${#wheels[@]})); then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$scratch/site" "${wheels[@]}" || exit
fi
# A checkout has no metadata, and results state the package's version.
metadata="$scratch/site/laser_callback-0.dist-info"
mkdir "$metadata"
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' laser_callback/__init__.py)
printf 'Metadata-Version: 2.1\nName: laser-callback\nVersion: %s\n' "$version" >"$metadata/METADATA"

export PYTHONPATH="$PWD:$scratch/site:$PWD/tests:$PWD/tests/shared:$PWD/tests/gpu${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONWARNINGS=ignore
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false CUBLAS_WORKSPACE_CONFIG=:4096:8
export LASER_TEST_DEVICE=$DEVICE LASER_GPU_ROWS="$scratch/rows" GPU_ASSETS="$scratch/assets"
export LASER_CALLBACK_CACHE="$scratch/cache"

"$PYTHON" tests/gpu/machine.py || exit
status=0
for part in $PARTS; do
    limit=${limits[$part]}
    left=$((BUDGET - SECONDS))
    began=$SECONDS
    echo "== $part, $((limit < left ? limit : left)) s at most"
    if ((left > 10)); then
        timeout --kill-after=10 $((limit < left ? limit : left)) "$PYTHON" "tests/gpu/part_$part.py" &>"$OUT/$part.log"
        code=$?
    else
        code=124
    fi
    echo "$part $code $((SECONDS - began))" >>"$scratch/rows/parts.txt"
    if [ "$part" = tests ]; then status=$code; fi
    if ((code)); then tail -n 40 "$OUT/$part.log"; fi
    "$PYTHON" tests/gpu/summary.py "$scratch/rows" "$OUT/gpu.json" "$part"
done
echo "all rows: $OUT/gpu.json"
exit $status
