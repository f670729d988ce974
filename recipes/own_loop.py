"""Compare in a loop of your own with Fabric, without a Trainer; runs under python, torchrun and fabric run."""

# python own_loop.py --facts facts.jsonl
# torchrun --nproc-per-node 2 own_loop.py --facts facts.jsonl
# fabric run --accelerator cpu --devices 2 own_loop.py --facts facts.jsonl

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from lightning.fabric import Fabric
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from laser_callback import Outcomes, reduced
from laser_callback.data import Fact, encode_facts, read_facts
from laser_callback.stats import adjust, compare


def main(
    facts: Path,
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
    plan: str = "28.fc_up@0.01",
    batch_size: int = 32,
) -> None:
    """Count answers whose first token is the greedy one, with the original weights and with reduced ones.

    Args:
        facts: a JSONL, CSV or Parquet file of {id, prompt, answer}.
        model: hub name or folder of a causal language model.
        plan: what to cut.
        batch_size: facts in a batch.
    """
    # A launcher says how many processes it has started; `fabric run` has launched them already.
    fabric = Fabric(devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if os.environ.get("LT_CLI_USED") != "1":
        fabric.launch()
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    network = AutoModelForCausalLM.from_pretrained(model).eval().to(fabric.device)
    loader = DataLoader(read_facts(facts), batch_size, collate_fn=list)
    # Every rank takes each n-th batch: nothing is padded to equal shares, so no fact counts twice.
    mine = [batch for number, batch in enumerate(loader) if number % fabric.world_size == fabric.global_rank]

    cut = reduced(network, plan)
    original, after = {}, {}
    with torch.inference_mode():
        for batch in mine:
            original.update(first_token_right(network, tokenizer, batch))
            with cut:  # in and out in microseconds; the weights are factorised once
                after.update(first_token_right(network, tokenizer, batch))

    # All ranks' outcomes on every rank: the pairs are few numbers.
    original, after = gathered(fabric, original), gathered(fabric, after)
    ids = sorted(original)
    arms = [Outcomes.of(torch.tensor([arm[i] for i in ids])) for arm in (original, after)]
    (row,) = adjust([compare("first_token_accuracy", *arms)], primary="first_token_accuracy")
    if fabric.is_global_zero:
        print(f"{plan} on {row.n} facts: {row.original:.1%} to {row.reduced:.1%}, p = {row.p:.2g}: {row.verdict}")


def first_token_right(network: Any, tokenizer: Any, batch: list[Fact]) -> dict[str, bool]:
    rows = [encoded.rows[0] for encoded in encode_facts(batch, tokenizer, masked=False)]
    prompts = [list(row.input_ids[: row.positions[row.first] + 1]) for row in rows]  # with the space before a number
    inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(network.device)
    said = network(**inputs).logits[:, -1].argmax(-1)
    right = [token == row.targets[row.first] for row, token in zip(rows, said.tolist(), strict=True)]
    return {fact.id: each for fact, each in zip(batch, right, strict=True)}


def gathered(fabric: Fabric, outcomes: dict[str, bool]) -> dict[str, bool]:
    if fabric.world_size == 1:
        return outcomes
    parts: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(parts, outcomes)
    return {key: value for part in parts for key, value in part.items()}


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
