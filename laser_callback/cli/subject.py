"""What a command examines: a language model on facts, or a LightningModule on data of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl

from laser_callback.cli.quick.check import need_subject
from laser_callback.compare.module import LaserModule
from laser_callback.data.datamodule import FactsDataModule
from laser_callback.data.generation import Generation
from laser_callback.data.lm_eval.source import file_of
from laser_callback.support.files import need_files


def subject(
    model: str | None,
    facts: Path | None,
    module: pl.LightningModule | None,
    data: pl.LightningDataModule | None,
    text: Path | None,
    *,
    limit: int,
    batch_size: int,
    seed: int,
    chat: bool,
    system: str | None,
    generation: Generation | None = None,
    allow_missing: bool = False,
    facts_from: str = "`--facts`",
) -> tuple[pl.LightningModule, pl.LightningDataModule]:
    """What the options of a command ask for; files are looked for before a model is loaded."""
    need_subject(model, facts, module, data, facts_from)
    if model is not None and facts is not None:
        need_files(facts=file_of(facts), text=file_of(text))
        language_model = LaserModule(model, allow_missing=allow_missing)
        options: dict[str, Any] = {"limit": limit, "batch_size": batch_size, "seed": seed, "chat": chat}
        options |= {"system": system, "generation": generation}
        return language_model, facts_for(language_model, facts, text, **options)
    of_models = {"text": text is not None, "chat": chat, "system": system is not None}
    of_models |= {"generation": generation is not None, "allow_missing": allow_missing}
    if given := [option for option, is_given in of_models.items() if is_given]:
        raise ValueError(f"`--{given[0]}` goes with `--model`")
    return cast("tuple[pl.LightningModule, pl.LightningDataModule]", (module, data))


def facts_for(
    module: LaserModule,
    facts: Path,
    text: Path | None = None,
    *,
    limit: int,
    batch_size: int,
    seed: int,
    chat: bool,
    system: str | None,
    generation: Generation | None = None,
) -> FactsDataModule:
    """Facts as the model reads them; a limit of 0 is none."""
    return FactsDataModule(
        facts,
        module.tokenizer,
        text=text,
        limit=limit or None,
        seed=seed,
        batch_size=batch_size,
        masked=module.masked,
        max_length=module.context,
        chat=chat,
        system=system,
        generation=generation,
    )
