"""The model card of what is shipped: a README.md in Hugging Face's format, with the plan, the numbers, their origin."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from laser_callback.reports.row_text import change_text, interval_text, p_text, value_text
from laser_callback.results.comparison import LaserResult
from laser_callback.stats.judgement import Judgement
from laser_callback.support.reading import typed
from laser_callback.surgery.recipe import Recipe

_CONTROLS = {"zeroed": "the same matrices zeroed", "random": "random matrices cut at the same rho"}


def hub_name(name: str | None) -> str | None:
    """``name`` if it can be one of the hub, and is no folder here."""
    return name if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None


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
    result = LaserResult.from_dict(numbers["comparison"]) if (numbers := recipe.numbers) else None
    name, arm = (None, None) if result is None else next(iter(result.arms.items()))
    primary = None if result is None or arm is None else result.primary or arm.rows[0].metric
    controls = {} if result is None or name is None else result.controls.get(name, {})
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
            (_CONTROLS[kind], row) for kind, arm in controls.items() for row in arm.rows if row.metric == primary
        ],
        judgements=typed(list[Judgement], numbers.get("judgements") or []),
        cell=lambda text: str(text).replace("|", "\\|"),  # or it would end the cell
        change=change_text,
        interval=interval_text,
        p=p_text,
        value=value_text,
    )
