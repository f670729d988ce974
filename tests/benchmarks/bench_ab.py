"""What routing costs: python tests/benchmarks/bench_ab.py

SmolLM2-135M on world facts. Prediction by one model against prediction with half (and a tenth) of the examples routed
to the reduced one, on the same batches, in turns within each repeat. Prints the ratio of their times per batch size; a
batch is split by arm, so each example is computed once. Factorisation is done before. Times are those of the process'
CPU, in one thread, so that they can be compared on a machine that does other work as well.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable

import lightning.pytorch as pl
import torch

from laser_callback import FactsDataModule, LaserModule
from laser_callback.compare.ab_test import ABTest
from laser_callback.data.demo_model import demo_model_folder
from laser_callback.data.worldfacts import world_facts
from laser_callback.plans.plan import LaserPlan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", default="28.fc_up@0.01")
    parser.add_argument("--facts", type=int, default=128)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.5, 0.1])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    torch.set_num_threads(1)
    module = LaserModule(str(demo_model_folder(print))).eval()
    plan = LaserPlan.parse(options.plan)
    print(f"{options.facts} facts in four wordings each, {plan}")
    for size in options.batch_sizes:
        data = FactsDataModule(world_facts(), module.tokenizer, limit=options.facts, batch_size=size)
        data.setup()
        batches = list(data.val_dataloader())
        tests = {fraction: ABTest(module, plan, fraction, 0) for fraction in options.fractions}

        def one(batches: list = batches) -> None:
            for batch in batches:
                module.predict_step(batch, 0)

        def both(test: ABTest, batches: list = batches) -> None:
            for batch in batches:
                test.step(lambda part: module._step(part, count=False), batch, 0)

        with torch.inference_mode():
            one()
            for test in tests.values():
                both(test)
            alone: list[float] = []
            ratios: dict[float, list[float]] = {fraction: [] for fraction in tests}
            for _ in range(options.repeats):
                alone.append(timed(one))
                for fraction, test in tests.items():
                    ratios[fraction].append(timed(lambda test=test: both(test)) / alone[-1])
        found = ", ".join(
            f"{fraction:.0%} routed {statistics.median(r):.3f} x ({min(r):.3f} to {max(r):.3f})"
            for fraction, r in ratios.items()
        )
        print(f"batches of {size:3}: one model {statistics.median(alone):.2f} s, {found}")


def timed(work: Callable[[], None]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


if __name__ == "__main__":
    pl.seed_everything(0, verbose=False)
    main()
