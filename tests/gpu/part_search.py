"""A whole search on a small model, and the screen and ten candidates on a large one: seconds and peak memory.

The small model is the demo's where its weights were brought along, else a random one of its size, which takes as long.
Of the large one two layers are screened, since most of the time goes into factorising: so many of its targets are said.
"""

from __future__ import annotations

from device import DEVICE, ON_GPU, clock, forget_peak, peak_gib
from models import demo_facts, demo_module, made_up_facts, random_llama, tokenizer
from moves import Moves, staying
from rows import row

from laser_callback import FactsDataModule, LaserModule, LaserSearch
from laser_callback.compare.measure import Lab
from laser_callback.plans.target import RHOS, targets
from laser_callback.search.screen import GradientScreen
from laser_callback.search.strategies.grid import grid
from laser_callback.spectra.store import Spectra

CANDIDATES = 10
KEYS = ("first_token_accuracy", "soft_error")


def whole() -> None:
    """The search as anyone would run it, with an empty cache of spectra."""
    module, model = demo_module(small=not ON_GPU)
    facts, moves = FactsDataModule(demo_facts(), module.tokenizer, limit=400 if ON_GPU else 60, batch_size=64), Moves()
    forget_peak()
    begin = clock()
    search = LaserSearch(module, facts, candidates=24, progress=False, accelerator=DEVICE.type)
    with moves.counted():
        found = search.run()
    row(
        "search: whole",
        model=model,
        seconds=clock() - begin,
        found=str(found.found),
        trainers=moves.trainers,
        moving_s=moves.seconds,
        peak_gib=peak_gib(),
    )
    for phase in found.phases:
        row("search: phases", phase=phase.name, seconds=phase.seconds, passes=phase.passes)


def large() -> None:
    """What a search does most of, on a model whose matrices are large."""
    size = "8B" if ON_GPU else "tiny"
    module = LaserModule(random_llama(size), tokenizer())
    layers = len(module.model.model.layers)
    found = targets(module, f"{layers - 2}-{layers - 1}.all")
    data = FactsDataModule(made_up_facts(128 if ON_GPU else 16), module.tokenizer, batch_size=32, rows_per_forward=256)
    data.setup()
    loader, spectra = data.val_dataloader(), Spectra(memory_bytes=16 * 2**30)
    lab, screen = (
        Lab(module, spectra, DEVICE.type),
        GradientScreen([matrix for t in found for matrix in t.matrices], spectra),
    )
    cells = {"model": f"random weights, {size}", "targets": f"{len(found)} of {len(targets(module))}"}
    with staying(module):
        forget_peak()
        begin = clock()
        lab.validate(loader, screen, inference_mode=False)
        seconds = clock() - begin
        row(
            "search: large", step="screen", seconds=seconds, factorising_s=spectra.seconds, peak_gib=peak_gib(), **cells
        )

        plans = [candidate.plan for candidate in grid(found, RHOS, "laser")]
        best = sorted(plans, key=lambda plan: screen.estimate(plan) or (0.0, 0.0))[:CANDIDATES]
        before = spectra.seconds
        forget_peak()
        begin = clock()
        lab.measure({str(plan): plan for plan in best}, loader, KEYS)
        seconds, factorising = clock() - begin, spectra.seconds - before
        step = f"{len(best)} candidates on {len(data.encoded)} facts"
        row("search: large", step=step, seconds=seconds, factorising_s=factorising, peak_gib=peak_gib(), **cells)


if __name__ == "__main__":
    whole()
    large()
