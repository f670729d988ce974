"""How often does the race lose the true best? python tests/benchmarks/bench_race.py TRUTH.npz...

TRUTH.npz is what exhaustive.py writes. Its examples stand for the population: race examples are drawn from them with
replacement, the 48 candidates that are truly best by log loss race with the package's own schedule and rules, and the
one that is chosen is compared with the truly best of them. Near-equals among the 48 make this harder than a usual race.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from laser_callback.compare.measure import Table, Values
from laser_callback.results.examples import ORIGINAL
from laser_callback.search.race import Objective, choose, order, schedule

OBJECTIVE = Objective(("right",), (1,), "loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("truth", type=Path, nargs="+")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--candidates", type=int, default=48)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| data | examples | best by accuracy lost | its accuracy missed | best by loss lost | cost of all on all |")
    print("|---|---|---|---|---|---|")
    for path in options.truth:
        saved = np.load(path, allow_pickle=True)
        done = ~np.isnan(saved["loss"]).any(-1)
        loss, right = saved["loss"][done].astype(np.float64), saved["right"][done].astype(np.float64)
        best = np.argsort(loss.mean(1))[: options.candidates]
        for examples in (100, 300, 600):
            cells = simulate(loss[best], right[best], saved["base_loss"], saved["base_right"], examples, options.trials)
            print(f"| {path.stem} | {examples} | {' | '.join(cells)} |", flush=True)


def simulate(loss, right, base_loss, base_right, examples: int, trials: int) -> list[str]:
    rng = np.random.default_rng(0)
    accuracy, mean_loss = right.mean(1), loss.mean(1)
    lost = lost_by_loss = missed = 0.0
    for _ in range(trials):
        drawn = rng.integers(0, loss.shape[1], examples)
        alive, begin = [str(i) for i in range(len(loss))], 0
        for rung in schedule(examples, len(loss)):
            begin += rung.examples
            table = table_of(alive, loss, right, base_loss, base_right, drawn[:begin])
            alive = order(OBJECTIVE, table, alive)[: rung.keep]
        chosen = int(choose(OBJECTIVE, table, alive))
        # Zeroing either of two matrices may be the same cut: equal accuracy and loss is the best, too.
        kept = [int(name) for name in alive]
        lost += max(accuracy[kept]) < accuracy.max()
        lost_by_loss += min(mean_loss[kept]) > mean_loss.min()
        missed += (accuracy.max() - accuracy[chosen]) / trials
    cost, racing = 0, len(loss)
    for rung in schedule(examples, len(loss)):
        cost, racing = cost + rung.examples * racing, rung.keep
    share = cost / (examples * len(loss))
    return [f"{lost / trials:.0%}", f"{100 * missed:.2f} points", f"{lost_by_loss / trials:.0%}", f"{share:.0%}"]


def table_of(alive, loss, right, base_loss, base_right, drawn) -> Table:
    def values(numbers) -> Values:
        found = torch.from_numpy(np.ascontiguousarray(numbers[drawn], dtype=np.float64))
        return Values(found, torch.ones_like(found))

    table = {ORIGINAL: {"right": values(base_right), "loss": values(base_loss)}}
    return table | {name: {"right": values(right[int(name)]), "loss": values(loss[int(name)])} for name in alive}


if __name__ == "__main__":
    main()
