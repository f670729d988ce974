"""The model card of what is shipped: a README.md in Hugging Face's format, with the plan, the numbers, their origin."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from laser_callback.plans.rank_rules import listed_places
from laser_callback.plans.reduction import Reduction
from laser_callback.plans.short import brief
from laser_callback.plans.words import in_words
from laser_callback.reports.row_text import (
    NO_INTERVAL,
    ahead_text,
    cell_text,
    change_text,
    interval_text,
    is_adjusted,
    p_text,
    value_text,
    without_variance,
)
from laser_callback.results.comparison import LaserResult
from laser_callback.stats.judgement import Judgement
from laser_callback.support.reading import built
from laser_callback.surgery.recipe import Recipe

_CONTROLS = {
    "zeroed": "the same matrices zeroed",
    "random": "random matrices cut at the same rho",
    "noise": "noise of the same size, the mean of several seeds",
}


def hub_name(name: str | None) -> str | None:
    """``name`` if it can be one of the hub, and is no folder here."""
    return name if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not os.path.exists(name) else None


def model_card(
    recipe: Recipe,
    *,
    title: str,
    usage: str,
    library: str,
    base: str | None = None,
    notes: Sequence[str] = (),
    ranks: Mapping[str, int] | None = None,
) -> ModelCard:
    """The card, whose ``save`` writes it.

    Args:
        recipe: what was cut, and its numbers.
        title: what this is, in a few words.
        usage: how to load it, as Python code.
        library: that loads it.
        base: hub name of the original, if it has one.
        notes: what a user must know besides.
        ranks: ranks of the matrices that became thin layers, by name.
    """
    numbers = built(_Numbers, recipe.numbers) if recipe.numbers else None
    result = None if numbers is None else numbers.comparison
    name, arm = (None, None) if result is None else next(iter(result.arms.items()))
    metrics = [] if arm is None else [row.metric for row in arm.rows]
    primary = None if result is None else result.primary or next(iter(metrics), None)
    controls = {} if result is None or name is None else result.controls.get(name, {})
    gone = tuple(f"{stack}.{i}.".lstrip(".") for stack, layers in recipe.left_out.items() for i in layers)
    return ModelCard.from_template(
        ModelCardData(library_name=library, tags=["laser", "rank-reduction"], base_model=base),
        template_str=(files("laser_callback.reports") / "templates" / "card.md").read_text(encoding="utf-8"),
        title=title,
        usage=usage,
        base=base,
        notes=[*notes],
        ranks=ranks or {},
        recipe=recipe,
        numbers=numbers,
        result=result,
        arm=arm,
        controls=[
            (_CONTROLS.get(kind, kind), row, arm.ahead_in(primary))
            for kind, arm in controls.items()
            for row in arm.rows
            if row.metric == primary
        ],
        cell=cell_text,
        code=_code,
        brief=brief,
        done=" or ".join(dict.fromkeys(map(_done, recipe))),
        words=in_words(recipe),
        is_adjusted=is_adjusted,
        ahead=ahead_text,
        change=change_text,
        interval=interval_text,
        p=p_text,
        value=value_text,
        no_interval=NO_INTERVAL if arm is not None and any(map(without_variance, arm.rows)) else "",
        is_left_out=lambda name: name.startswith(gone),
    )


def _done(r: Reduction) -> str:
    """What a reduction does to its matrices, behind "were"."""
    if r.noise is not None:
        return "changed by noise"
    if r.is_scaling:
        return f"multiplied by {r.scale:g}" if r.scale else "set to zero"
    if r.of == "entries":
        return "cut by the size of their entries"
    plain = r.keep == "head" and r.scale == 0 and r.band == 1 and listed_places(r.rho) is None
    return "replaced by low-rank approximations" if plain else "changed in some of their directions"


@dataclass(frozen=True)
class _Numbers:
    """What :func:`~laser_callback.results.numbers_of` gives."""

    comparison: LaserResult
    verdict: str = ""
    judgements: list[Judgement] = field(default_factory=list)
    sets: dict[str, int] = field(default_factory=dict)
    seed: Any = None
    warnings: list[str] = field(default_factory=list)


def _code(text: object) -> str:
    """Text as code, between more backticks than stand together in it; also in a cell of a table."""
    line = " ".join(str(text).split()).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence}{line}{fence}" if len(fence) == 1 else f"{fence} {line} {fence}"
