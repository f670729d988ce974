"""Every cut of one matrix, one after the other: the truth that a screen is measured against.

python tests/benchmarks/exhaustive.py FACTS.jsonl OUTPUT.npz writes, for a sample of the facts and each (matrix, rho) of
SmolLM2-135M, the log loss and the correctness of every fact. About half an hour on two cores; it can be interrupted.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from laser_callback import LaserModule, find_matrices
from laser_callback.data.demo_model import demo_model_folder
from laser_callback.data.encoding import FactCollator, encode_facts
from laser_callback.data.facts import read_facts, sample_facts, split_facts
from laser_callback.plans.reduction import Reduction
from laser_callback.spectra.spectrum import Spectrum
from laser_callback.surgery.replay import LayerReplay

RHOS = (0, 0.005, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9)
SIZES = {"screen": 100, "race": 300, "confirm": 400}


def sets(path: Path, seed: int = 0) -> dict[str, list]:
    """The benchmark's sets of a file: main prompts only, disjoint by subject."""
    facts = [replace(fact, paraphrases=(), choices=()) for fact in read_facts(path)]
    return split_facts(facts, SIZES, seed)


def sweep(module: LaserModule, facts: list, output: Path, thin_below: int, thin_rhos: list[float]) -> None:
    """Write ``output``; where a layer is below ``thin_below``, only ``thin_rhos``, the others stay NaN."""
    matrices = [m for m in find_matrices(module) if m.kind is not None]
    encoded = encode_facts(facts, module.tokenizer, masked=False)
    batch = FactCollator(module.tokenizer.pad_token_id or 0, rows_per_forward=len(encoded))(encoded)
    loss = np.full((len(matrices), len(RHOS), len(facts)), np.nan, dtype=np.float32)
    right = np.zeros(loss.shape, dtype=bool)
    if output.exists():
        saved = np.load(output, allow_pickle=True)
        loss, right = saved["loss"], saved["right"]

    def scores() -> tuple[np.ndarray, np.ndarray]:
        found = module._scores(batch)
        order = found.fact.argsort()
        return -found.mean_log_prob[order].numpy(), (found.first_rank == 0)[order].numpy()

    replay = LayerReplay(module, {str(i): [m] for i, m in enumerate(matrices)})
    with torch.inference_mode():
        with replay.record():
            base_loss, base_right = scores()
        print("original", base_loss.mean(), base_right.mean(), flush=True)
        for i in sorted(range(len(matrices)), key=lambda i: -matrices[i].layer):
            thin = matrices[i].layer < thin_below
            wanted = [j for j, rho in enumerate(RHOS) if not thin or rho in thin_rhos]
            if not np.isnan(loss[i][wanted]).any():
                continue
            matrix, begin = matrices[i], time.perf_counter()
            data = matrix.parameter.data
            spectrum = Spectrum.of(matrix.read(data))
            for j in wanted:
                cut = data.clone()
                matrix.write(cut, spectrum.reduce(matrix.read(data), Reduction(matrix.layer, matrix.kind, RHOS[j])))
                matrix.parameter.data = cut
                try:
                    with replay.replay(str(i)):
                        loss[i, j], right[i, j] = scores()
                finally:
                    matrix.parameter.data = data
            print(matrix.name, loss[i].mean(1).round(3), f"{time.perf_counter() - begin:.1f} s", flush=True)
            np.savez(
                output,
                loss=loss,
                right=right,
                base_loss=base_loss,
                base_right=base_right,
                layer=[m.layer for m in matrices],
                kind=[m.kind for m in matrices],
                rhos=RHOS,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("facts", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--thin-below", type=int, default=0, help="layers below this run at few rhos only")
    parser.add_argument("--thin-rhos", type=float, nargs="+", default=(0.0, 0.1, 0.8), help="these")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    module = LaserModule(str(demo_model_folder(print))).eval()
    facts = sample_facts(sets(options.facts)["race"], options.n, seed=0)
    sweep(module, facts, options.output, options.thin_below, options.thin_rhos)


if __name__ == "__main__":
    main()
