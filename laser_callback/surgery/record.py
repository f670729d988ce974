"""Cut a model as a plan says, for a block or for good, and write down what was there and what there is then.

Contract: :func:`recorded` cuts a model for the length of a block and writes down the hashes of each planned matrix
before and after; given a :class:`Recipe`, it holds the model to the hashes in it. A model that is refused is as it was.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from laser_callback.plans.matrices import WeightMatrix
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.reduction import Reduction
from laser_callback.spectra.store import Spectra
from laser_callback.support.interrupts import whole
from laser_callback.support.progress import PhaseProgress
from laser_callback.support.provenance import versions
from laser_callback.surgery.recipe import SKETCHES, CutMatrix, Recipe, matrix_hash, matrix_sketch
from laser_callback.surgery.swap import reduced

_COMPUTED = {"rank": 1e-8, "entries": 1e-8, "reference": 1e-4}
"""By how much a cut differs from one computed elsewhere before it is rounded to its dtype: float64, and float32."""


def apply(
    model: nn.Module,
    plan: LaserPlan | str | Mapping[str, Any],
    *,
    spectra: Spectra | None = None,
    exact: bool = True,
) -> Recipe:
    """Cut ``model`` for good, in place; wholly, or not at all. `reduced` is for a block of code instead.

    Args:
        model: any module.
        plan: what to cut; a :class:`Recipe` is only applied to the model that it was made for.
        spectra: where factorisations are looked up and kept. A recipe of delta mode needs the base in them.
        exact: demand the bits that a recipe has recorded. They may differ in the last place where it was made on
            another processor or number of threads; ``False`` accepts such rounding, and nothing else.

    Returns:
        What was done, with hashes and a recipe's numbers: the same plan, for the same weights elsewhere.

    Raises:
        ValueError, TypeError: as from :class:`~laser_callback.surgery.reduced`; or naming the first difference to a
            recipe. The model is then untouched.
    """
    with recorded(model, plan, spectra, exact=exact) as (cut, done):
        cut.keep()
    return done


def recorded(
    model: nn.Module,
    plan: LaserPlan | str | Mapping[str, Any],
    spectra: Spectra | None = None,
    *,
    numbers: Mapping[str, Any] | None = None,
    exact: bool = True,
    progress: PhaseProgress | None = None,
) -> AbstractContextManager[tuple[reduced, Recipe]]:
    """Cut ``model`` within the block; yields the reduction in place and the record of what it did.

    Args:
        model: any module.
        plan: what to cut. A :class:`Recipe` also says what must be there before, and what must be there after.
        spectra: where factorisations are looked up and kept.
        numbers: what the record says was shown; by default what ``plan`` says.
        exact: see :func:`apply`.
        progress: shown while matrices are cut.

    Raises:
        ValueError: if the model is not the one of the recipe, or has not become what the recipe says.
    """
    plan = Recipe.of(plan)
    expected = plan if isinstance(plan, Recipe) else None
    spectra = Spectra() if spectra is None else spectra
    if expected is not None:
        spectra = spectra.bringing(expected.directions)
    cut = reduced(model, plan, spectra)
    before = [matrix_hash(matrix.value) for matrix, _ in cut.matrices] if expected is None else expected.before
    cut.prepare(progress)  # holds the model to a recipe
    by_inputs = spectra.settled([each for each in cut.matrices if each[1].needs_inputs])
    kept = {matrix.name: spectra.directions_text(matrix.name, reduction) for matrix, reduction in by_inputs}
    with cut:
        done = [
            _written_down(matrix, reduction, was, kept.get(matrix.name))
            for (matrix, reduction), was in zip(cut.matrices, before, strict=True)
        ]
        if expected is not None:
            _check_after(expected, done, cut.matrices, exact)
            numbers = expected.numbers if numbers is None else numbers
    return _in_place(cut, Recipe(plan, done, _digest(plan, spectra), numbers, versions()))


def _written_down(matrix: WeightMatrix, reduction: Reduction, was: str, directions: str | None) -> CutMatrix:
    value = matrix.value
    return CutMatrix(
        matrix.name,
        str(reduction),
        matrix.shape,
        str(value.dtype).removeprefix("torch."),
        was,
        matrix_hash(value),
        float(torch.linalg.vector_norm(value, dtype=torch.float64)),
        matrix_sketch(value),
        directions,
    )


@whole
def _in_place(cut: reduced, recipe: Recipe) -> Generator[tuple[reduced, Recipe], None, None]:
    with cut:
        yield cut, recipe


def _digest(plan: LaserPlan, spectra: Spectra) -> str | None:
    return spectra.base.digest if spectra.base is not None and plan.cuts_delta else None


def _check_after(
    recipe: Recipe, done: Sequence[CutMatrix], resolved: Sequence[tuple[WeightMatrix, Reduction]], exact: bool
) -> None:
    for wanted, got, (_, reduction) in zip(recipe.matrices, done, resolved, strict=True):
        if got.after == wanted.after:
            continue
        if len(wanted.sketch) != SKETCHES:
            raise ValueError(
                f"after the cut `{got.name}` is not what the recipe says (hash {got.after[:12]}, not "
                f"{wanted.after[:12]}), and whether by rounding only cannot be told: the recipe has no sketch of it"
            )
        # A sketch of the difference is a random number with the difference's norm as its standard deviation.
        apart = math.dist(wanted.sketch, got.sketch) / math.sqrt(SKETCHES)
        rounding = (2 * torch.finfo(getattr(torch, got.dtype)).eps + _COMPUTED[reduction.of]) * got.norm
        if apart > rounding or abs(got.norm - wanted.norm) > rounding:
            raise ValueError(
                f"after the cut `{got.name}` is not what the recipe says (norm {got.norm:.6g}, not {wanted.norm:.6g}; "
                f"apart by about {apart:.2g}, which is no rounding): the recipe's plan or hashes were changed, or "
                "another version computes otherwise"
            )
        if exact:
            raise ValueError(
                f"after the cut `{got.name}` differs from the recipe by rounding (hash {got.after[:12]}, not "
                f"{wanted.after[:12]}), as it may on another processor or number of threads: accept that by exact=False"
            )
