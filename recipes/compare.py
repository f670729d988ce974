"""Compare a plan with the original model from Python; runs under python, torchrun and fabric run."""

# python compare.py --facts facts.jsonl
# torchrun --nproc-per-node 2 compare.py --facts facts.jsonl
# fabric run --devices 2 compare.py --facts facts.jsonl          (what `lightning run model` became)

from __future__ import annotations

import os
from pathlib import Path

from jsonargparse import auto_cli
from lightning.pytorch import Trainer

from laser_callback import FactsDataModule, LaserModule


def main(
    facts: Path,
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
    plan: str = "28.fc_up@0.01",
    limit: int | None = 300,
    accelerator: str = "auto",
    output: Path = Path("compare.json"),
) -> None:
    """Compare a plan with the original model on facts.

    Args:
        facts: a JSONL, CSV or Parquet file of {id, prompt, answer, paraphrases?, choices?, subject?, group?}.
        model: hub name or folder of a causal or masked language model.
        plan: what to cut.
        limit: use a seeded sample of so many facts.
        accelerator: as in Lightning's Trainer.
        output: where the numbers are written as JSON.
    """
    module = LaserModule(model, plan=plan, report=str(output))
    data = FactsDataModule(facts, module.tokenizer, masked=module.masked, limit=limit)
    # A launcher says how many processes it has started; the Trainer joins them.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    trainer = Trainer(accelerator=accelerator, devices=processes, logger=False, enable_model_summary=False)
    trainer.validate(module, data, verbose=False)

    row = module.result["laser"]["first_token_accuracy"]
    if trainer.is_global_zero:
        print(f"{plan} on {row.n} facts: {row.original:.1%} to {row.reduced:.1%}, p = {row.p:.2g}: {row.verdict}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
