"""What it costs to let both models write their answers: python tests/benchmarks/bench_generation.py

SmolLM2-135M on arithmetic in words, cuts in the last tenth of its layers. Measured is a batch of prompts of which half
get the same continuation from both models, and one in which all part as early as there are such; no continuation ends
early. Each round times, in seconds of the processor and in this order: `generate` with the original, the original in a
comparison (what its layers give is kept), the reduced model in a comparison, and `generate` with the reduced model.
Ratios are to the first of these, within a round; printed is their median. Bounds: 1.5 where half agree, 2.1 in the
worst case.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from laser_callback import LaserModule, reduced
from laser_callback.compare.writing import write
from laser_callback.data.demo_model import demo_model_folder
from laser_callback.data.encoding import pad
from laser_callback.surgery.replay import LayerReplay

NAMES = ("Anna", "Tom", "Lea", "Omar", "Mia", "Jon", "Eva", "Sam")
THINGS = ("apples", "books", "coins", "stamps", "shells")


def question(i: int) -> str:
    name, thing = NAMES[i % len(NAMES)], THINGS[i % len(THINGS)]
    more = f"buys {2 * i + 1} more" if i % 3 else f"gives {i % 5 + 1} to a friend, who had {i} before"
    return f"Question: {name} has {7 * i % 40 + 5} {thing} and {more}. How many {thing} does {name} have now?\nAnswer:"


class Bench:
    def __init__(self, module: LaserModule, plan: str, new: int) -> None:
        self.model, self.tokenizer, self.new = module.model, module.tokenizer, new
        self.cut = reduced(self.model, plan)
        self.cut.prepare()
        self.replay = LayerReplay(self.model, {plan: [matrix for matrix, _ in self.cut.matrices]})
        self.plan = plan

    def asked(self, numbers: list[int]) -> dict[str, Any]:
        rows = [tuple(self.tokenizer(question(i))["input_ids"]) for i in numbers]
        mask = pad([(1,) * len(row) for row in rows], 0, "left")
        return {"input_ids": pad(rows, 0, "left"), "attention_mask": mask, "max_new_tokens": self.new, "stop": []}

    def original(self, asked: dict[str, Any]) -> Any:
        with self.replay.record():
            return write(self.model, self.tokenizer, asked)

    def reduced(self, asked: dict[str, Any]) -> Any:
        with self.cut, self.replay.replay(self.plan):
            return write(self.model, self.tokenizer, asked)

    def generate(self, asked: dict[str, Any]) -> Any:
        inputs = {name: asked[name] for name in ("input_ids", "attention_mask")}
        return self.model.generate(**inputs, max_new_tokens=self.new, do_sample=False, pad_token_id=0)

    def generate_reduced(self, asked: dict[str, Any]) -> Any:
        with self.cut:
            return self.generate(asked)

    def agreed(self, numbers: list[int], size: int) -> dict[int, int]:
        """How many tokens of each continuation both models write."""
        found = {}
        for first in range(0, len(numbers), size):
            part = numbers[first : first + size]
            asked = self.asked(part)
            pairs = zip(self.original(asked).tokens, self.reduced(asked).tokens, strict=True)
            for number, (one, other) in zip(part, pairs, strict=True):
                same = (i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
                found[number] = next(same, self.new)
        return found

    def shares(self, numbers: list[int], repeats: int) -> tuple[list[float], float, Any]:
        """Each step's share of `generate` once, its seconds, and what the arm has told."""
        asked, rounds = self.asked(numbers), []
        for _ in range(repeats):
            rounds.append(
                [_seconds(work, asked) for work in (self.generate, self.original, self.reduced, self.generate_reduced)]
            )
        shares = [statistics.median(row[i] / row[0] for row in rounds) for i in range(4)]
        return shares, statistics.median(row[0] for row in rounds), self.replay.reports[self.plan]


def _seconds(work: Callable[[dict[str, Any]], Any], asked: dict[str, Any]) -> float:
    begin = time.process_time()  # of one thread: what else the machine does tells less in it
    work(asked)
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--half", default="29.q_proj@0.5", help="a plan under which about half of the continuations agree"
    )
    parser.add_argument("--worst", default="27.mlp@0.01", help="one under which none does")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--new", type=int, default=64, help="tokens of each continuation")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    module = LaserModule(str(demo_model_folder(print)))
    module.model.generation_config.eos_token_id = None  # all continuations have the same length
    pool, size = list(range(3 * options.batch)), options.batch
    with torch.inference_mode():
        bench = Bench(module, options.half, options.new)
        agreed = bench.agreed(pool, size)
        same = [i for i in pool if agreed[i] == options.new][: size // 2]
        others = [i for i in pool if agreed[i] < options.new][: size - len(same)]
        print(f"{options.half}: {sum(n == options.new for n in agreed.values())} of {len(pool)} continuations agree")
        _tell(bench, same + others, agreed, options.repeats, 1.5)
        bench = Bench(module, options.worst, options.new)
        agreed = bench.agreed(pool, size)
        _tell(bench, sorted(pool, key=agreed.__getitem__)[:size], agreed, options.repeats, 2.1)


def _tell(bench: Bench, numbers: list[int], agreed: dict[int, int], repeats: int, bound: float) -> None:
    places = sorted(agreed[i] for i in numbers)
    (_, original, arm, again), seconds, report = bench.shares(numbers, repeats)
    print(f"{bench.plan}: {len(numbers)} prompts, of {bench.new} tokens agree {', '.join(map(str, places))}")
    print(f"  `generate` {seconds:.2f} s; the original in a comparison {original:.2f} x, the reduced model {arm:.2f} x")
    print(f"  both {original + arm:.2f} x, bound {bound}; `generate` twice {1 + again:.2f} x")
    print(f"  {report}")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    main()
