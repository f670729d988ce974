"""One step of gradient descent, with the examples of a search: python tests/benchmarks/bench_gradient_step.py DATA

A rival that trains, for the strategy ``components``, which goes by the same gradient. The step is in all matrices of
the layers, against the gradient of the loss of the right answers on the screen set; its length, a share of the weights'
Frobenius norm, is the one of LENGTHS with the highest accuracy on the race set. Shown is the confirm set. Sets and
perplexity are those of bench_strategies.py, whose DATA this takes; --only takes data sets whose name contains this.
"""

from __future__ import annotations

import argparse
import logging
import math
import warnings
from pathlib import Path

import torch
from bench_search import PROTOTYPE, sets_of
from bench_strategies import KEY, WINDOWS

from laser_callback import LaserModule, find_matrices
from laser_callback.compare.measure import Lab
from laser_callback.data.datamodule import TextWindows
from laser_callback.data.demo_model import demo_model_folder
from laser_callback.spectra.store import Spectra

LENGTHS = (3e-5, 1e-4, 2e-4, 4e-4)


def accuracy(lab: Lab, loader: object) -> float:
    """Of the module as it stands."""
    examples = lab.alone(loader).examples
    values = [row["original"][KEY] for row in examples.to_rows()]
    return sum(values) / len(values)


@torch.no_grad()
def nats(module: LaserModule, text: TextWindows) -> float:
    """Per token of running text."""
    windows = [torch.tensor([text[i * len(text) // WINDOWS]["input_ids"]]) for i in range(WINDOWS)]
    scores = [module.model(input_ids=w).logits[0, :-1].log_softmax(-1).gather(1, w[0, 1:, None]) for w in windows]
    return -float(torch.cat(scores).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    module = LaserModule(str(demo_model_folder(print))).eval()
    text = TextWindows(options.folder / "wikitext2.txt", module.tokenizer)
    weights = [matrix.parameter for matrix in find_matrices(module) if matrix.kind is not None]
    before = [weight.detach().clone() for weight in weights]
    lab, fluent = Lab(module, Spectra()), nats(module, text)

    def step(length: float, gradients: list[torch.Tensor]) -> None:
        norms = [math.hypot(*(float(tensor.norm()) for tensor in tensors)) for tensors in (before, gradients)]
        with torch.no_grad():
            for weight, was, gradient in zip(weights, before, gradients, strict=True):
                weight.copy_(was - length * norms[0] / norms[1] * gradient)

    for data in (name for name in PROTOTYPE if options.only in name):
        sets = sets_of(module, options.folder, data, options.seed, most=1500)
        total = [torch.zeros_like(weight) for weight in weights]
        for batch in sets.loader("screen"):
            scores = module._scores(batch)
            for one, gradient in zip(total, torch.autograd.grad(-scores.mean_log_prob.mean(), weights), strict=True):
                one += gradient
        race = {}
        for length in LENGTHS:
            step(length, total)
            race[length] = accuracy(lab, sets.loader("race"))
        best = max(race, key=lambda length: race[length])
        step(0.0, total)
        original = accuracy(lab, sets.loader("confirm"))
        step(best, total)
        reached, change = accuracy(lab, sets.loader("confirm")), math.expm1(nats(module, text) - fluent)
        step(0.0, total)
        print(
            f"{data}: step {best:g}, {original:.1%} to {reached:.1%}, perplexity {change:+.1%}; race {race}", flush=True
        )


if __name__ == "__main__":
    main()
