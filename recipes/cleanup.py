"""Fine-tune a model on one relation of the world facts, clean it, and report what came of it, there and elsewhere.

    python recipes/cleanup.py --tuning lora
    python recipes/cleanup.py --tuning full

Trained on are the facts of a quarter of the countries. The search looks at the other countries' facts of the same
relation, of which half are kept for confirmation. The other relations of these countries show what training has made
the model forget, and whether the cut brings it back.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from jsonargparse import auto_cli
from peft import LoraConfig, inject_adapter_in_model
from rich.console import Console
from rich.table import Table

from laser_callback import FactsDataModule, LaserCallback, LaserCleanup, LaserModule
from laser_callback.data import ExampleSets, Fact, demo_model_folder, split_facts, world_facts
from laser_callback.shipping import Gates
from laser_callback.stats import PairedResult
from laser_callback.support import merged, quiet_libraries

KEY = "first_token_accuracy"
QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "devices": 1}


def cleanup(
    model: str | None = None,
    tuning: Literal["lora", "full"] = "lora",
    relation: str = "capital",
    epochs: int = 6,
    learning_rate: float | None = None,
    rank: int = 16,
    candidates: int = 24,
    minutes: float | None = None,
    seed: int = 0,
    folder: Path = Path("cleanup"),
) -> None:
    """Fine-tune, clean, and print a table.

    Args:
        model: folder or hub name; by default SmolLM2-135M-Instruct (dequantised 4-bit weights).
        tuning: LoRA on all linear layers, or all weights.
        relation: what is trained: capital, continent, currency or language.
        epochs: passes over the training facts.
        learning_rate: by default 1e-3 for LoRA, 5e-5 for all weights.
        rank: of LoRA.
        candidates: how many race, in each mode.
        minutes: for both searches together; by default as long as it takes.
        seed: of everything that is drawn.
        folder: where the cleaned checkpoint and its report go.
    """
    quiet_libraries()
    pl.seed_everything(seed, verbose=False)
    console, begin = Console(), time.perf_counter()
    base = model or str(demo_model_folder(console.print))
    rate = learning_rate or {"lora": 1e-3, "full": 5e-5}[tuning]
    module = LaserModule(base, learning_rate=rate)
    if tuning == "lora":
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0)
        inject_adapter_in_model(config, module.model)

    facts = [Fact.from_row(fact, fact["id"]) for fact in world_facts()]
    parts = split_facts(facts, {"train": 0.25, "rest": 0.75}, seed)
    train = [fact for fact in parts["train"] if fact.group == relation]
    held_out = [fact for fact in parts["rest"] if fact.group == relation]
    others = [fact for fact in parts["rest"] if fact.group != relation]
    train_data, search_data, other_data = (
        FactsDataModule(part, module.tokenizer, batch_size=size, limit=limit, seed=seed)
        for part, size, limit in ((train, 8, None), (held_out, 64, None), (others, 64, 240))
    )
    train_data.setup()
    sets = ExampleSets.of(search_data, sizes={"screen": 0.15, "race": 0.35, "confirm": 0.5}, seed=seed)

    tidy = LaserCleanup(
        sets,
        base=base,
        weights="last",
        gates=Gates([f"{KEY} >= -0.05"], other_data),
        folder=folder,
        minutes=minutes,
        seed=seed,
        objective=KEY,
        constraints=[],
        candidates=candidates,
    )
    trainer = pl.Trainer(**QUIET, max_epochs=epochs, callbacks=[tidy])
    trainer.fit(module, train_data.train_dataloader())
    trained = time.perf_counter() - begin

    table = Table("facts", "model", KEY, "change", "95 % interval", "p", "log loss", title=f"{tuning}, {relation}")
    other_data.setup()
    for name, loader in ((f"{relation}, confirm", sets.loader("confirm")), ("others", other_data.val_dataloader())):
        before = validate(LaserModule(base), loader)
        table.add_row(name, "base", f"{before[KEY]:.1%}", "", "", "", f"{before['log_loss']:.3f}")
        after = validate(module, loader)
        table.add_row("", "fine-tuned", f"{after[KEY]:.1%}", "", "", "", f"{after['log_loss']:.3f}")
        for mode, search in tidy.result.searches.items():
            if search.found is None:
                table.add_row("", f"{mode}: nothing found", *[""] * 5)
                continue
            callback = LaserCallback(search.found, base=base if mode == "delta" else None, primary=KEY, report=False)
            with merged(module):
                validate(module, loader, callback)
            rows = callback.result["laser"]
            loss = f"{rows['log_loss'].reduced:.3f}"
            table.add_row("", f"{mode}: {search.found}", *numbers(rows[KEY]), loss, end_section=mode == "delta")
    console.print(table)
    counts = f"{len(train)} facts trained on, {len(held_out)} to search and confirm"
    console.print(f"{counts}, {len(other_data.encoded)} of other relations")
    console.print(f"training and cleaning took {trained:.0f} s, all of it {time.perf_counter() - begin:.0f} s")


def validate(module: LaserModule, loader: Any, *callbacks: pl.Callback) -> dict[str, float]:
    """What the module logs on a loader."""
    trainer = pl.Trainer(**QUIET, enable_progress_bar=False, callbacks=list(callbacks))
    return dict(trainer.validate(module, loader, verbose=False)[0])


def numbers(row: PairedResult) -> list[str]:
    """A row's cells: value, change, interval and p."""
    ends = "" if row.lower is None or row.upper is None else f"{row.lower:+.1%} .. {row.upper:+.1%}"
    return [f"{row.reduced:.1%}", f"{row.delta:+.1%}", ends, "" if row.p is None else f"{row.p:.2g}"]


if __name__ == "__main__":
    auto_cli(cleanup, as_positional=False)
