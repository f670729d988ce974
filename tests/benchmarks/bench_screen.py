"""Is the screen worth its pass? Each strategy's order of all cuts, against the true change of the log loss.

python tests/benchmarks/bench_screen.py [DATA_FOLDER TRUTH.npz ...] prints one table for a small model with a planted
effect, and one for each file that `exhaustive.py` has written, for SmolLM2-135M and the data set of that name in
DATA_FOLDER (only of the matrices that are done, if it is still being written). Then the peak memory of the screen.

    rank     Spearman correlation of scores and true changes
    recall   share of the true 48 best cuts that are among its first 48
    regret   true log loss of the best cut among its first 48 (24) minus that of the best of all, in nats
    points   true accuracy of the best of all minus that of the best cut among its first 40, in points
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from planted import plant
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch.utils.data import DataLoader

from laser_callback import LaserModule
from laser_callback.data.demo_model import demo_model_folder
from laser_callback.data.encoding import FactCollator, encode_facts
from laser_callback.plans.matrices import find_matrices
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.reduction import Reduction
from laser_callback.plans.selection import Catalogue
from laser_callback.plans.target import RHOS, Target, targets
from laser_callback.results.candidates import Candidate
from laser_callback.search.candidates import CAUTION, shortlist
from laser_callback.search.screen import GradientScreen
from laser_callback.search.strategies import Context, strategies_of
from laser_callback.search.strategies.grid import grid
from laser_callback.spectra.store import Spectra
from laser_callback.surgery.swap import reduced

ALTERNATIVES = ("late-mlp", "gavish-donoho", "entropy", "laser-rmt")
SEEDS = 20  # of the strategy random, whose row is the mean


def validate(screen: GradientScreen, module: pl.LightningModule, loader: DataLoader[Any]) -> float:
    begin = time.perf_counter()
    pl.Trainer(
        inference_mode=False,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[screen],
    ).validate(module, loader, verbose=False)
    return time.perf_counter() - begin


def gradient_screen(found: list[Target], spectra: Spectra, **options: Any) -> GradientScreen:
    return GradientScreen([matrix for target in found for matrix in target.matrices], spectra, **options)


def scores(screen: GradientScreen, found: list[Target]) -> list[Candidate]:
    """The grid, scored."""
    candidates = grid(found, RHOS, "laser")
    for candidate in candidates:
        candidate.score, candidate.error = screen.estimate(candidate.plan) or (None, 0.0)
    return candidates


def cut_of(candidate: Candidate) -> Reduction:
    (cut,) = candidate.plan
    return cut


def places(candidates: Iterable[Candidate]) -> dict[Reduction, float]:
    """An order as scores."""
    return {cut_of(candidate): float(place) for place, candidate in enumerate(candidates)}


@dataclass(frozen=True)
class Truth:
    """Each cut's true change of the log loss, in nats, and of accuracy, where it is known."""

    loss: dict[Reduction, float] = field(default_factory=dict)
    accuracy: dict[Reduction, float] = field(default_factory=dict)


def quality(scores: Mapping[Reduction, float], of: Truth) -> list[float]:
    """Spearman, recall@48, regret@48, regret@24, points@40 over the candidates that have a true value."""
    truth = of.loss
    known = [reduction for reduction in scores if reduction in truth]
    score, true = (np.array([values[r] for r in known]) for values in (scores, truth))
    first, best = np.argsort(score, kind="stable"), np.argsort(true, kind="stable")
    recall = len(set(first[:48]) & set(best[:48])) / min(48, len(best))
    regret = [float(true[first[:n]].min() - true.min()) for n in (48, 24)]
    right = np.array([of.accuracy[r] for r in known if r in of.accuracy])
    points = 100 * float(right.max() - right[first[:40]].max()) if len(right) else float("nan")
    return [float(spearmanr(score, true)[0]), recall, *regret, points]


def table(
    title: str,
    module: pl.LightningModule,
    found: list[Target],
    loaders: Mapping[str, DataLoader[Any]],
    truth: Truth,
    spectra: Spectra,
) -> None:
    columns = ("order", "rank", "recall@48", "regret@48", "regret@24", "points@40", "s")
    shown = Table(*columns, title=title, title_justify="left")

    def row(name: str, values: list[float], seconds: float | None = None) -> None:
        spent = "" if seconds is None else f"{seconds:.0f}"
        shown.add_row(
            name, f"{values[0]:.2f}", f"{values[1]:.2f}", *(f"{v:.3f}" for v in values[2:4]), f"{values[4]:.1f}", spent
        )

    keys = ("log_loss", "soft_error") if isinstance(module, LaserModule) else ("log_loss",)
    for (name, loader), key in product(loaders.items(), keys):
        name = f"{key}, {name}"
        screen = gradient_screen(found, spectra, key=key)
        seconds = validate(screen, module, loader)
        scored = scores(screen, found)
        row(f"gradient, {name}", quality({cut_of(c): c.score or 0.0 for c in scored}, truth), seconds)
        if len(loader) > 1:
            careful = {cut_of(c): (c.score or 0.0) + CAUTION * c.error for c in scored}
            row(f"gradient, cautious order, {name}", quality(careful, truth))
            row(f"the shortlist of both, {name}", quality(places(shortlist(scored)), truth))
    name, loader = next(iter(loaders.items()))
    for share in (0.1, 0.5):
        # The gradient part of the way, which knows of curvature, but of that of all cuts together.
        shrunk = LaserPlan([replace(target.at(0.1), scale=1 - share) for target in found])
        screen = gradient_screen(found, spectra)
        with reduced(module, shrunk, spectra):
            seconds = validate(screen, module, loader)
        known = {cut_of(c): c.score or 0.0 for c in scores(screen, found)}
        row(f"gradient where all tails are {share:.0%} smaller, {name}", quality(known, truth), seconds)
    context = Context(module, Catalogue(find_matrices(module)), found, RHOS, "", 0, spectra)
    for strategy in strategies_of(ALTERNATIVES):
        row(strategy.name, quality(places(strategy.propose(context)), truth))
    (draw,) = strategies_of("random")
    drawn = [quality(places(draw.propose(replace(context, seed=seed))), truth) for seed in range(SEEDS)]
    row(f"random, mean of {SEEDS}", np.mean(drawn, axis=0).tolist())
    best = min(truth.loss, key=truth.loss.__getitem__)
    Console(width=120).print(shown, f"best of {len(truth.loss)} cuts: {best}, {truth.loss[best]:+.3f} nats\n")


def planted_effect(spectra: Spectra) -> None:
    planted = plant()
    found = targets(planted.module)
    truth = Truth(planted.truth(found, RHOS))
    title = (
        f"planted in {planted.target.at(0.1)}: log loss {planted.healthy:.2f} -> {planted.sick:.2f}, "
        "100 examples screened"
    )
    loaders = {"1 batch": planted.loader(100), "5 batches": planted.loader(20)}
    table(title, planted.module, found, loaders, truth, spectra)


def exhaustive_truth(path: Path, found: list[Target]) -> Truth:
    """Of every cut that is done."""
    saved = np.load(path)
    changes, right = (saved[n].astype(np.float64).mean(2) - saved[f"base_{n}"].mean() for n in ("loss", "right"))
    places = {place: i for i, place in enumerate(zip(saved["layer"].tolist(), saved["kind"].tolist(), strict=True))}
    truth = Truth()
    for target in found:
        row = places[target.address["layer"], target.address["matrix"]]
        for column, rho in enumerate(saved["rhos"].tolist()):
            if np.isfinite(changes[row, column]):
                truth.loss[target.at(rho)] = float(changes[row, column])
                truth.accuracy[target.at(rho)] = float(right[row, column])
    return truth


def language_model(data: Path, files: list[Path], sizes: list[int], spectra: Spectra) -> None:
    from exhaustive import sets

    module = LaserModule(str(demo_model_folder(print))).eval()
    found = targets(module)
    for file in files:
        facts = sets(data / f"{file.stem}.jsonl")["screen"]
        encoded = encode_facts(facts, module.tokenizer, masked=False)
        loaders = {}
        for size in sizes:
            collate = FactCollator(module.tokenizer.pad_token_id or 0, rows_per_forward=size)
            loader = DataLoader(encoded, batch_size=size, collate_fn=collate)
            loaders["1 batch" if len(loader) == 1 else f"{len(loader)} batches"] = loader
        title = f"SmolLM2-135M, {file.stem}, {len(facts)} facts screened"
        table(title, module, found, loaders, exhaustive_truth(file, found), spectra)


# ---- memory ----------------------------------------------------------------------------------------------------------


class Random(pl.LightningModule):
    """A model whose weights are much larger than its activations."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(768, 1536), torch.nn.GELU(), torch.nn.Linear(1536, 768))
            for _ in range(layers)
        )

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        hidden = batch[0]
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return (hidden**2).mean()


def peak(layers: int, what: str) -> float:
    """Peak resident memory in MiB of this process (Linux) after one forward pass, and after ``what``."""
    torch.set_num_threads(1)
    module = Random(layers)
    loader = DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 768)), batch_size=8)
    if what == "screen":
        found = targets(module, "/.*/")
        validate(gradient_screen(found, Spectra(memory_bytes=0)), module, loader)
    elif what == "factorise":
        with torch.no_grad():
            Spectra(memory_bytes=0).of(module.layers[0][0].weight)
            module.validation_step([torch.randn(8, 768)], 0)
    elif what == "all gradients":
        module.validation_step([torch.randn(8, 768)], 0).backward()
    # Not `ru_maxrss`, which starts at what the parent process held.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def memory() -> None:
    shown = Table(
        "layers", "weights", "forward, one factorisation", "screen", "all gradients", title="peak memory, MiB"
    )
    for layers in (8, 32):
        command = [sys.executable, __file__, "--peak", str(layers)]
        figures = [
            float(subprocess.run([*command, what], capture_output=True, text=True, check=True).stdout.split()[-1])
            for what in ("factorise", "screen", "all gradients")
        ]
        weights = layers * 2 * 768 * 1536 * 4 / 2**20
        shown.add_row(str(layers), *(f"{figure:.0f}" for figure in (weights, *figures)))
    Console(width=120).print(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("truth", type=Path, nargs="*")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 20], help="examples per batch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak(int(options.peak[0]), options.peak[1]))
        return
    torch.set_num_threads(options.threads)
    # All of the model's spectra fit, so that only the first screen of each table factorises.
    spectra = Spectra(memory_bytes=2 * 2**30)
    planted_effect(spectra)
    if options.truth:
        language_model(options.data, options.truth, options.sizes, spectra)
    memory()


if __name__ == "__main__":
    main()
