"""What a comparison costs beside a plain validation on a GPU, where it waits, and what replay's checks take.

Random Llamas, one late cut, a LaserModule and a plain module with all logits. Timed is the evaluation loop alone, less
the factorisation; the module stays on the device, where Lightning would take it to the CPU and back for each Trainer,
and what that takes is a row of its own.

In the table of the ratios of a comparison to a plain validation, "inputs trusted" is one where replay does not compare
a layer's inputs with the recorded ones, "no replay" computes everything twice, and "checks" is the share of the
comparison's time that the host spends in replay's checks, waits for the device included.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import waits
from benchmarks.bench_replay import FullLogits
from device import DEVICE, ON_GPU, clock, forget_peak, peak_gib
from models import made_up_facts, random_llama, tokenizer
from moves import staying
from rows import row
from trainers import quiet_trainer

from laser_callback import FactsDataModule, LaserCallback, LaserModule
from laser_callback.compare.measure import quiet_trainer as quietly
from laser_callback.surgery import replay

SIZES = ("1B", "8B") if ON_GPU else ("tiny",)
REPEATS = 3 if ON_GPU else 1
TOP = 8
"""So many of the lines that wait are shown."""
CHECKS = (
    "flatten",
    "why_not_call",
    "context_of",
    "random_states",
    "same_states",
    "_held",
    "added_to_cache",
    "why_not_output",
    "same_value",
    "_fresh",
)
"""What replay does beside calling layers, by its names in ``replay.py``."""


class Loop(pl.Callback):
    """The clock of one evaluation loop."""

    seconds = 0.0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begin = clock()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = clock() - self.begin


def validate(module: pl.LightningModule, data: Any, *callbacks: pl.Callback) -> float:
    """Seconds of the loop, without factorisation."""
    loop = Loop()
    with quietly():
        trainer = quiet_trainer(loop, *callbacks, accelerator=DEVICE.type)
        trainer.validate(module, data, verbose=False)
    factorised = [
        arm.factorise_seconds for c in callbacks if isinstance(c, LaserCallback) for arm in c.result.arms.values()
    ]
    return loop.seconds - sum(factorised)


@contextmanager
def timed_checks() -> Iterator[Counter[str]]:
    """Within: the host's seconds in each of :data:`CHECKS`, waits included."""
    seconds: Counter[str] = Counter()

    def timed(name: str, check: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return check(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - begin

        return call

    with ExitStack() as stack:
        for name in CHECKS:
            if hasattr(replay, name):
                stack.enter_context(patch.object(replay, name, timed(name, getattr(replay, name))))
        yield seconds


def median(run: Callable[[], float]) -> float:
    return sorted(run() for _ in range(REPEATS))[REPEATS // 2]


def measure(name: str, module: pl.LightningModule, data: FactsDataModule, plan: str) -> None:
    """All rows of one module on some data."""

    def compared(**options: Any) -> float:
        return validate(module, data, LaserCallback(plan, report=False, **options))

    validate(module, data)  # warm up
    batches = list(data.val_dataloader())
    tokens = sum(int(chunk["attention_mask"].sum()) for batch in batches for chunk in batch["chunks"])
    forget_peak()
    plain = median(lambda: validate(module, data))
    plain_gib = peak_gib()
    compared()
    forget_peak()
    both = median(compared)
    both_gib = peak_gib()
    with patch.object(replay, "same_value", lambda new, old: True):
        trusted = median(compared)
    with timed_checks() as checks:
        whole = compared()
    row(
        "validation",
        module=name,
        tokens=tokens,
        **{"plain, tokens/s": round(tokens / plain), "compared, tokens/s": round(tokens / both), "ratio": both / plain},
        **{"inputs trusted": trusted / plain, "no replay": compared(replay=False) / plain},
        checks=sum(checks.values()) / whole,
        **{"plain, GiB": plain_gib, "compared, GiB": both_gib},
    )
    for check, seconds in checks.most_common(4):
        row("validation: host time of replay's checks", module=name, check=check, share=seconds / whole)
    waiting(name, module, data, plan, len(batches))


def waiting(name: str, module: pl.LightningModule, data: FactsDataModule, plan: str, batches: int) -> None:
    """Waits per batch, and the lines that most of them are for."""
    with waits.counted() as plain:
        validate(module, data)
    with waits.counted() as both:
        validate(module, data, LaserCallback(plan, report=False))
    row(
        "validation: waits per batch",
        module=name,
        plain=plain.total() / batches,
        compared=both.total() / batches,
        by_package=sum(n for line, n in both.items() if line.startswith("laser_callback")) / batches,
    )
    for title, counts in (("in a plain validation", plain), ("beyond those, with a comparison", both - plain)):
        for line, count in counts.most_common(TOP):
            row(f"validation: lines that wait {title}", module=name, per_batch=count / batches, line=line)


def main() -> None:
    """One size after the other."""
    words = tokenizer()
    short = FactsDataModule(made_up_facts(512 if ON_GPU else 32), words, batch_size=64, rows_per_forward=256)
    long = FactsDataModule(made_up_facts(64 if ON_GPU else 8, 300, 0), words, batch_size=16, max_length=2048)
    for data in (short, long):
        data.setup()
    for size in SIZES:
        begin = clock()
        module = LaserModule(random_llama(size), words)
        built = clock() - begin
        plan = f"{len(module.model.model.layers) - 2}.fc_up@0.01"
        factorise = LaserCallback(plan, report=False)
        begin = clock()
        validate(module, short, factorise)  # Lightning leaves the module on the CPU
        there = clock() - begin
        begin = clock()
        module.to(DEVICE)
        row(
            "validation: per size",
            size=size,
            build_s=built,
            cut=plan,
            factorise_s=factorise.result["laser"].factorise_seconds,
            whole_trainer_s=there,
            back_to_device_s=clock() - begin,
        )
        plain = FullLogits(module.model)
        with staying(module), staying(plain):
            measure(f"{size}, LaserModule, short rows", module, short, plan)
            measure(f"{size}, LaserModule, long rows", module, long, plan)
            measure(f"{size}, all logits, long rows", plain, long, plan)
        del module, plain


if __name__ == "__main__":
    main()
