"""The original once more under other arithmetic: what differs then, differs by that alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl

from laser_callback.compare.measure import Lab
from laser_callback.finished.pairing import compare_runs
from laser_callback.finished.reading import run_of_rows
from laser_callback.results.comparison import LaserResult
from laser_callback.spectra.store import Spectra


def rerun(
    result: LaserResult,
    module: pl.LightningModule,
    data: Any,
    *,
    precision: Any = None,
    accelerator: str = "auto",
) -> LaserResult:
    """A comparison with its :attr:`~laser_callback.results.LaserResult.rerun`: what the original answers otherwise.

    It tells a gain from rounding, and nothing about other seeds of a training or of sampling.

    Args:
        result: of :class:`LaserCallback`, with its examples; the step returns an ``id`` for each.
        module: as it was compared.
        data: the same examples, as ``trainer.validate`` takes them, in batches of the same size or of another.
        precision: as in ``Trainer``, such as "bf16-mixed"; "bf16-true" would leave the module in it.
        accelerator: as in ``Trainer``, but "auto" takes CUDA or the CPU.

    Raises:
        ValueError: if an example has no ``id``, or is another under its ``id``.

    Example::

        trainer.validate(module, FactsDataModule("facts.jsonl", module.tokenizer, batch_size=64))
        halved = FactsDataModule("facts.jsonl", module.tokenizer, batch_size=32)
        print_report(rerun(module.result, module, halved))
    """
    how = [f"precision {precision}" if precision else "", accelerator if accelerator != "auto" else ""]
    told = ", ".join(filter(None, how)) or "other batches"
    again = Lab(module, Spectra(), accelerator, precision).alone(data)
    own = run_of_rows(result.examples.to_rows(), "original", "the comparison")
    other = run_of_rows(again.examples.to_rows(), "original again", told)
    return replace(result, rerun=compare_runs(own, own, again=other).rerun)
