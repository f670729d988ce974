"""What a search must know before it works: the objective and its direction, and the constraints.

Contract: whatever is wrong with the arguments and can be seen from one small batch is an error here, with its cure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from laser_callback.compare.module import LaserModule
from laser_callback.data.encoding import EncodedFact
from laser_callback.data.scoring import FLUENCY, OF_TEXT
from laser_callback.data.sets import ExampleSets
from laser_callback.results.examples import Logged
from laser_callback.search.race import Objective
from laser_callback.search.strategies.base import Strategy
from laser_callback.stats.constraint import Constraint

_ROBUSTNESS = "paraphrase_robustness"
_OF_FIRST_TOKEN = frozenset({"first_token_accuracy", "paraphrase_accuracy", _ROBUSTNESS})


def objective_of(
    module: pl.LightningModule,
    keys: str | Sequence[str] | None,
    direction: str | Mapping[str, str] | None,
    loss: str | None,
    logged: Mapping[str, Logged],
    metric: str | None = None,
) -> Objective:
    """The objective, from the search's arguments, what the module logs, and the ``metric`` that the data names.

    Raises:
        MisconfigurationException: if a key is not logged, or its better direction is not known.
    """
    facts = isinstance(module, LaserModule)
    if keys is None and metric is not None and (facts or metric in logged):
        keys = metric
    if keys is None:
        if not facts:
            raise MisconfigurationException(
                f"`objective` must name what to improve; `validation_step` logs {_names(logged)}"
            )
        keys = ["first_token_accuracy", *([_ROBUSTNESS] if _ROBUSTNESS in logged else [])]
    keys = (keys,) if isinstance(keys, str) else tuple(keys)
    tie = None
    if loss is None and facts and "log_loss" in logged:
        loss, tie = ("soft_error", "log_loss") if _OF_FIRST_TOKEN.issuperset(keys) else ("log_loss", None)
    for key in (*keys, *([loss] if loss else [])):
        if key not in logged:
            what = "objective" if key in keys else "loss"
            raise MisconfigurationException(
                f"`{what}` {key!r} is not logged by `validation_step`; it logs {_names(logged)}"
            )
        if logged[key].of_both:
            raise MisconfigurationException(
                f"`{'objective' if key in keys else 'loss'}` must be a metric of one model, but the original has the "
                f"best {key!r} by definition: bound it in `constraints`"
            )
    return Objective(keys, tuple(_sign(key, direction, logged[key]) for key in keys), loss, tie)


def race_of(key: str | None, objective: Objective, *, writes: bool, paper: bool) -> tuple[bool, str]:
    """Whether candidates race by the loss alone, and a sentence for the report where they do.

    Args:
        key: as of :class:`LaserSearch`.
        objective: of the search.
        writes: whether answers are written.
        paper: whether the paper's procedure chooses, which races by its own measure.

    Raises:
        MisconfigurationException: if they cannot race by ``key``.
    """
    first, loss = objective.keys[0], objective.loss
    if key is None:
        key = loss if writes and loss is not None and not paper else first
    if key not in (first, loss) or (paper and key != first):
        known = " or ".join(dict.fromkeys(map(repr, [first] if paper else filter(None, [first, loss]))))
        raise MisconfigurationException(f"`race` must be {known}, which this search measures, got {key!r}")
    if key == first or loss is None:
        return False, ""
    of = " of the answers that should be written" if writes else ""
    told = f"candidates raced by {loss}{of}; {' and '.join(objective.keys)} chose among the finalists, on the examples "
    return True, f"{told}of the last round"


def _sign(key: str, direction: str | Mapping[str, str] | None, logged: Logged) -> int:
    given = direction if isinstance(direction, str) or direction is None else direction.get(key)
    if given not in (None, "max", "min"):
        raise MisconfigurationException(f"`direction` must be 'max' or 'min', got {given!r} for {key!r}")
    if given is not None:
        return 1 if given == "max" else -1
    if logged.higher_is_better is None:
        raise MisconfigurationException(
            f"`direction` must say whether {key!r} is better high ('max') or low ('min'): a plain number is logged"
        )
    return 1 if logged.higher_is_better else -1


def constraints_of(
    texts: Sequence[str] | None, sets: ExampleSets, objective: Objective, logged: Mapping[str, Logged]
) -> list[Constraint]:
    """The constraints, the default ones where none are given.

    Raises:
        MisconfigurationException: if a constraint has no data, naming the cure.
    """
    has_guard, has_text = sets.sizes.get("guard", 0) > 0, sets.text("guard") is not None
    if texts is None:
        texts = [f"{FLUENCY} <= +5 %"] if has_text else []
        texts = [*texts, *([f"{_ROBUSTNESS} >= -0.02"] if has_guard and _ROBUSTNESS in objective.keys else [])]
    constraints = [Constraint.parse(text) for text in texts]
    for constraint in constraints:
        key = constraint.key
        if key in sets.text_metrics and key not in logged:
            continue
        if key in OF_TEXT and key not in logged:
            raise MisconfigurationException(f"the constraint '{constraint}' needs running text: give the data `text=`")
        if key not in logged:
            raise MisconfigurationException(f"the constraint '{constraint}' needs {key!r}; logged are {_names(logged)}")
        if not has_guard:
            raise MisconfigurationException(
                f"the constraint '{constraint}' is judged on the guard set, and there is none: give it a size"
            )
    return constraints


def _names(logged: Mapping[str, Logged]) -> str:
    return ", ".join(logged) or "nothing"


def probe_positions(module: pl.LightningModule, sets: ExampleSets, most: int) -> list[int]:
    """Race examples that show what is logged: the first ones, of facts those with paraphrases."""
    positions = range(sets.sizes["race"])
    if isinstance(module, LaserModule):
        data: Any = sets.loader("race").dataset
        told = [isinstance(data[i], EncodedFact) and bool(data[i].fact.paraphrases) for i in positions]
        return sorted(positions, key=lambda i: not told[i])[:most]
    return list(positions[:most])


def plain(value: Any) -> Any:
    """A setting as JSON can hold it."""
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted(map(plain, value), key=repr)  # in which order it gives them is drawn for each process
    if isinstance(value, Sequence):  # not what may be used up, or have no end
        return [plain(item) for item in value]
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.tolist()
    return getattr(value, "__qualname__", None) or type(value).__qualname__


def described(strategy: Strategy) -> str:
    """A strategy by its name, and by what it was made with: ``drop(blocks=4)``."""
    made_with = {key: value for key, value in getattr(strategy, "__dict__", {}).items() if key not in ("name", "needs")}
    options = ", ".join(f"{key}={plain(value)}" for key, value in made_with.items() if not key.startswith("_"))
    return f"{strategy.name}({options})" if options else strategy.name
