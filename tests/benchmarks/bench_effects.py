"""What known cuts do to SmolLM2-135M on public benchmarks: python tests/benchmarks/bench_effects.py DATA_FOLDER

DATA_FOLDER holds pararel.jsonl, counterfact.jsonl, bigbench_qa_wikidata.jsonl and fever.jsonl in this package's facts
format; world facts are made here. The model's weights are dequantised 4-bit ones. Main prompts only.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl

from laser_callback import FactsDataModule, LaserModule
from laser_callback.data.demo_model import demo_model_folder
from laser_callback.data.facts import Fact, read_facts, sample_facts
from laser_callback.data.worldfacts import world_facts

CASES = [
    ("pararel.jsonl", "28.fc_up@0.01"),
    ("counterfact.jsonl", "28.fc_out@0.05"),
    ("bigbench_qa_wikidata.jsonl", "11.fc_in@0.01"),
    ("fever.jsonl", "13.k_proj@0.05"),
    ("world facts", "11.q_proj@0.05"),
    ("world facts", "28.fc_up@0.01"),
]
KEY = "first_token_accuracy"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n", type=int, default=600, help="facts, a seeded sample")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    folder = str(demo_model_folder(print))
    print(
        "| data | n | cut | first token | fixed / broken, p | log loss | without answers said most | zeroed | random "
        "| noise | cut - noise |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name, plan in CASES:
        if options.only not in name:
            continue
        facts = (
            [Fact(**_fields(row)) for row in world_facts()]
            if name == "world facts"
            else read_facts(options.folder / name)
        )
        facts = [
            replace(fact, paraphrases=(), choices=())
            for fact in sample_facts(facts, min(options.n, len(facts)), options.seed)
        ]
        module = LaserModule(folder, plan=plan, controls=True, report=False)
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.validate(module, FactsDataModule(facts, module.tokenizer, batch_size=64), verbose=False)
        arm, controls = module.result["laser"], module.result.controls["laser"]
        first, loss, checks = arm[KEY], arm["log_loss"], arm.prior_checks[KEY]
        rest = checks.majority_excluded
        zeroed, other, noise = (controls[kind] for kind in ("zeroed", "random", "noise"))
        ahead = noise.ahead_in(KEY)
        cells = [
            name.removesuffix(".jsonl"),
            str(first.n),
            plan,
            f"{first.original:.1%} -> {first.reduced:.1%} [{first.lower:+.1%}, {first.upper:+.1%}]",
            f"{first.fixed} / {first.broken}, {first.p:.1g}",
            f"{loss.original:.2f} -> {loss.reduced:.2f}",
            f"{rest.original:.1%} -> {rest.reduced:.1%} [{rest.lower:+.1%}, {rest.upper:+.1%}]"
            if rest
            else "none left",
            f"{zeroed[KEY].reduced:.1%}, {zeroed['log_loss'].reduced:.2f}",
            f"{other[KEY].reduced:.1%} ({other.plan})",
            f"{noise[KEY].reduced:.1%}, {noise['log_loss'].reduced:.2f}",
            f"{ahead.delta:+.1%} [{ahead.lower:+.1%}, {ahead.upper:+.1%}]",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
        for who, top in checks.top_predictions.items():
            said = ", ".join(f"{text!r} {count}" for text, count in top)
            print(f"<!-- {who} says most: {said}; entropy {checks.entropy[who]:.2f} nats -->", flush=True)


def _fields(row: dict) -> dict:
    return {**row, "paraphrases": tuple(row["paraphrases"])}


if __name__ == "__main__":
    main()
