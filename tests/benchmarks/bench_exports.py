"""Sizes of the forms in which one cut is shipped, and the way back: python tests/benchmarks/bench_exports.py

SmolLM2-135M. The cuts of the adapter are others, since an adapter holds what is removed: it is small where little is.
The last lines prove the undo file: the weights' file of the restored model has the hash of the original's.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from pathlib import Path

from laser_callback import restore, save_reduced
from laser_callback.data.demo_model import demo_model_folder
from laser_callback.spectra.store import Spectra
from laser_callback.support.in_files import save_dense
from laser_callback.support.pretrained import load_pretrained


def size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", action="append", help="default: one matrix, and all MLPs")
    parser.add_argument("--adapter", default="28.fc_up@0.9", help="the plan of the adapter")
    parser.add_argument("--bfloat16", action="store_true")
    arguments = parser.parse_args()
    model, spectra = load_pretrained(demo_model_folder(print)), Spectra.default()
    model = model.bfloat16() if arguments.bfloat16 else model
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_dense(model, folder / "original")
        print(f"original: {size(folder / 'original'):,} bytes, {model.dtype}")
        plans = arguments.plan or ["28.fc_up@0.01", "*.mlp@0.1"]
        for number, plan in enumerate([*plans, arguments.adapter]):
            forms = ["recipe", "dense", "factored", "undo"] if number < len(plans) else ["recipe", "dense", "adapter"]
            for form in forms:
                path = folder / f"{number}-{form}.json"
                begin = time.perf_counter()
                save_reduced(model, plan, path, form, spectra=spectra)
                print(f"{plan:14} {form:9} {size(path):13,} bytes  {time.perf_counter() - begin:6.1f} s")
            if "undo" in forms:
                cut = load_pretrained(folder / f"{number}-dense.json")
                begin = time.perf_counter()
                restore(cut, folder / f"{number}-undo.json")
                taken = time.perf_counter() - begin
                save_dense(cut, folder / f"{number}-back")
                files = [
                    folder / name / "model.safetensors"
                    for name in ("original", f"{number}-dense.json", f"{number}-back")
                ]
                hashes = [digest(file) for file in files]
                assert hashes[0] == hashes[2] != hashes[1]
                print(f"{plan:14} restored in {taken:.1f} s; sha256 original {hashes[0][:16]}, cut {hashes[1][:16]}, "
                      f"restored {hashes[2][:16]}")  # fmt: skip


if __name__ == "__main__":
    main()
