"""What a comparison costs on top of a plain evaluation: python tests/benchmarks/bench_replay.py

SmolLM2-135M on world facts, one plan, each in one run of this script: LaserModule (logits at the answers only) and
a plain LightningModule with full logits and the default key/value cache. Prints the ratio of a validation with the
callback to one without, the bound that the layers from the cut on and everything outside of the layers imply, and the
time of apply and restore per matrix. Factorisation is reported apart.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from laser_callback import FactsDataModule, LaserCallback, LaserModule, reduced
from laser_callback.data.demo_model import demo_model_folder
from laser_callback.data.worldfacts import world_facts


class FullLogits(pl.LightningModule):
    """As a user would write it: default forward, all logits, a mean loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        for chunk in batch["chunks"]:
            ids = chunk["input_ids"]
            logits = self.model(input_ids=ids, attention_mask=chunk["attention_mask"]).logits
            self.log(
                "loss",
                nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
                batch_size=len(ids),
            )


def validate(module: pl.LightningModule, data: pl.LightningDataModule, callbacks: list[pl.Callback]) -> float:
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=callbacks,
    )
    begin = time.perf_counter()
    trainer.validate(module, data, verbose=False)
    return time.perf_counter() - begin


def outside_share(module: pl.LightningModule, data: FactsDataModule, layer: int) -> float:
    """Share of a plain validation that is spent in layers >= `layer` and outside of the layers."""
    inside = 0.0
    layers = module.model.model.layers

    def before(module: nn.Module, *_: Any) -> None:
        module.begin = time.perf_counter()

    def after(module: nn.Module, *_: Any) -> None:
        nonlocal inside
        inside += time.perf_counter() - module.begin

    handles = [h for m in layers[:layer] for h in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]
    total = validate(module, data, [])
    for handle in handles:
        handle.remove()
    return 1 - inside / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", default="28.fc_up@0.01")
    parser.add_argument("--facts", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    module = LaserModule(str(demo_model_folder(print)))
    layer = int(options.plan.split(".")[0])
    data = FactsDataModule(world_facts(), module.tokenizer, limit=options.facts, batch_size=32)
    for name, subject in (
        ("LaserModule, answer-only logits", module),
        ("plain module, full logits, cache", FullLogits(module.model)),
    ):
        validate(subject, data, [])  # warm up
        plain, compared, factorise, shares = [], [], [], []
        for _ in range(options.repeats):  # in turns, so that a slow spell of the machine hits both
            plain.append(validate(subject, data, []))
            callback = LaserCallback(options.plan, report=False)
            seconds = validate(subject, data, [callback])
            factorise.append(callback.result["laser"].factorise_seconds)
            compared.append(seconds - factorise[-1])
            shares.append(outside_share(subject, data, layer))
        ratio = statistics.median(b / a for a, b in zip(plain, compared, strict=True))
        share = statistics.median(shares)
        print(f"{name}: plain {statistics.median(plain):.2f} s, with callback {ratio:.3f} x")
        print(f"  bound 1 + {share:.3f} + 0.10 = {1.1 + share:.3f} x; factorise {statistics.median(factorise):.2f} s")
        print(f"  {callback.result['laser'].replay}")

    print("matrix            factorise+build   apply+restore")
    for plan in ("28.q_proj@0.05", "28.k_proj@0.05", "28.fc_up@0.01", "28.fc_out@0.1"):
        begin = time.perf_counter()
        cut = reduced(module.model, plan)
        cut.prepare()
        built = time.perf_counter() - begin
        begin = time.perf_counter()
        for _ in range(1000):
            with cut:
                pass
        print(f"{plan:17} {built * 1e3:12.0f} ms {(time.perf_counter() - begin) * 1e3:12.1f} us")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
