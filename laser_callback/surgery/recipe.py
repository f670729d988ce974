"""A recipe: a plan that knows the weights it belongs to, what they become, and what was shown of them.

A few kilobytes stand for a reduced model: whoever has the original applies the recipe and has the other, bit for bit,
or is told what differs. Contract: :func:`recorded` cuts a model for the length of a block and writes down the hashes of
each planned matrix before and after; given a :class:`Recipe`, it holds the model to the hashes in it. A model that is
refused is as it was.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laser_callback.plans.matrices import WeightMatrix, same_name
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.reduction import Reduction
from laser_callback.plans.selection import NoSuchMatrixError
from laser_callback.plans.short import brief
from laser_callback.spectra.directions import StoredDirections, from_text
from laser_callback.spectra.store import Spectra
from laser_callback.support.hashing import content_hash
from laser_callback.support.interrupts import whole
from laser_callback.support.plain_json import plain
from laser_callback.support.provenance import versions
from laser_callback.support.reading import built, made, shown
from laser_callback.support.suggest import clipped
from laser_callback.surgery.swap import reduced

SKETCHES = 8
_ROWS = 1024  # are made float64 at a time
_COMPUTED = {"rank": 1e-8, "entries": 1e-8, "reference": 1e-4}
"""By how much a cut differs from one computed elsewhere before it is rounded to its dtype: float64, and float32."""


@dataclass(frozen=True)
class CutMatrix:
    """One planned matrix, before and after the cut.

    Attributes:
        name: as :attr:`WeightMatrix.name`.
        reduction: the text of the reduction that names it.
        shape: (rows, columns).
        dtype: such as ``"bfloat16"``.
        before: 64 hexadecimal digits that stand for its elements before the cut (:func:`matrix_hash`).
        after: the same after the cut.
        norm: its Frobenius norm after the cut.
        sketch: products of random signs with it after the cut (:func:`matrix_sketch`), by which another matrix is told
            from one that was rounded otherwise; empty in recipes of earlier versions.
        directions: of a cut in the metric of the inputs, the directions that it keeps, float32, shape (rows, k), as
            base64; ``None`` where the cut can be made from the weights alone.

    Raises:
        ValueError: if a value cannot be any matrix'.
    """

    name: str
    reduction: str
    shape: tuple[int, int]
    dtype: str
    before: str
    after: str
    norm: float
    sketch: tuple[float, ...] = ()
    directions: str | None = None

    def __post_init__(self) -> None:
        if self.directions is not None:
            self._check_directions(from_text(self.directions, self.shape[0]))
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"`dtype` must be a floating dtype of torch, got {shown(self.dtype)}")
        if min(self.shape) < 0:
            raise ValueError(f"`shape` must be rows and columns, got {self.shape}")
        if not all(map(math.isfinite, (self.norm, *self.sketch))):
            raise ValueError(f"`norm` and `sketch` must be finite, got {self.norm} and {self.sketch}")

    def _check_directions(self, columns: Tensor) -> None:
        """They are used as they are, so that what is none is told here."""
        size, reduction = min(self.shape), Reduction.parse(self.reduction)
        kept, wanted = columns.shape[1], f"at most {size}"
        fits = kept <= size
        if not reduction.is_ruled:
            removed = reduction.removed(reduction.rank(size), size)
            wanted = str(size - sum(stop - start for start, stop in removed))
            fits = kept == int(wanted)
        if not fits or not bool(columns.isfinite().all()) or bool((columns.norm(dim=0) > 2).any()):
            raise ValueError(
                f"`directions` of {self.reduction} must be {wanted} finite columns of norm 1, got {kept}, the largest "
                f"of norm {float(columns.norm(dim=0).max()) if kept else 0.0:.3g}"
            )


class Recipe(LaserPlan):
    """A plan with the hashes of the matrices that it cuts, and the numbers that were confirmed.

    Args:
        plan: the reductions.
        matrices: what they cut, in the model's order.
        base: the digest of the base's weights, if a difference to these was cut, else ``None``.
        numbers: what was shown, as plain data; see :func:`laser_callback.results.numbers_of`.
        versions: of the packages that the cut was made with.
        left_out: stack -> the layers that a written model has no more, since the plan cuts all that they write.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        >>> recipe = apply(model, "1.mlp@0.1")
        >>> [(matrix.name, matrix.shape) for matrix in recipe.matrices]
        [('layers.1.linear1', (16, 8)), ('layers.1.linear2', (8, 16))]
        >>> apply(model, recipe)
        Traceback (most recent call last):
        ...
        ValueError: `layers.1.linear1` is already what this would make of it: there is nothing to do
    """

    matrices: tuple[CutMatrix, ...]
    base: str | None
    numbers: Mapping[str, Any]
    versions: Mapping[str, str]
    left_out: Mapping[str, Sequence[int]]

    def __init__(
        self,
        plan: LaserPlan,
        matrices: Sequence[CutMatrix],
        base: str | None = None,
        numbers: Mapping[str, Any] | None = None,
        versions: Mapping[str, str] | None = None,
        left_out: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(plan.reductions)
        for name, value in (
            ("matrices", tuple(matrices)),
            ("base", base),
            ("numbers", dict(numbers or {})),
            ("versions", dict(versions or {})),
            ("left_out", dict(left_out or {})),
        ):
            object.__setattr__(self, name, value)

    @property
    def directions(self) -> StoredDirections | None:
        """What its cuts keep, where that is not in the weights; ``None`` where all of it is."""
        stored = {m.name: from_text(m.directions, m.shape[0]) for m in self.matrices if m.directions is not None}
        return StoredDirections(stored) if stored else None

    @classmethod
    def of(cls, plan: LaserPlan | str | Mapping[str, Any] | Iterable[Any]) -> LaserPlan:
        """As :meth:`LaserPlan.of`; a recipe where ``plan`` is one, or its file or dictionary."""
        return cls.from_dict(plan) if isinstance(plan, Mapping) and "matrices" in plan else super().of(plan)

    def to_file(self, path: str | Path) -> None:
        """Write the recipe as ``.json`` or ``.yaml``; the text form has no place for hashes."""
        need_recipe_ending(path=path)
        super().to_file(path)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; :meth:`of` makes a recipe of it again."""
        return plain(
            {
                **super().to_dict(),
                "base": self.base,
                "matrices": [asdict(matrix) for matrix in self.matrices],
                "numbers": dict(self.numbers),
                "versions": dict(self.versions),
                "left_out": dict(self.left_out),
            }
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: if something else than a recipe is read, naming its place.
        """
        read = built(_Written, data)
        plan = made(LaserPlan.of, {"reductions": read.reductions})
        return cls(plan, read.matrices, read.base, read.numbers, read.versions, read.left_out)


@dataclass(frozen=True)
class _Written:
    """A recipe's dictionary form."""

    reductions: list[Any]
    base: str | None
    matrices: tuple[CutMatrix, ...]
    numbers: dict[str, Any]
    versions: dict[str, str]
    left_out: dict[str, list[int]] = field(default_factory=dict)


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
) -> AbstractContextManager[tuple[reduced, Recipe]]:
    """Cut ``model`` within the block; yields the reduction in place and the record of what it did.

    Args:
        model: any module.
        plan: what to cut. A :class:`Recipe` also says what must be there before, and what must be there after.
        spectra: where factorisations are looked up and kept.
        numbers: what the record says was shown; by default what ``plan`` says.
        exact: see :func:`apply`.

    Raises:
        ValueError: if the model is not the one of the recipe, or has not become what the recipe says.
    """
    plan = Recipe.of(plan)
    expected = plan if isinstance(plan, Recipe) else None
    spectra = Spectra() if spectra is None else spectra
    if expected is not None:
        spectra = spectra.bringing(expected.directions)
        _check_base(expected, spectra)
    try:
        cut = reduced(model, plan, spectra)
    except NoSuchMatrixError as error:
        raise error if expected is None else ValueError(f"the recipe was made for another model: {error}") from error
    before = [matrix_hash(matrix.value) for matrix, _ in cut.matrices]
    if expected is not None:
        _check_before(expected, [matrix for matrix, _ in cut.matrices], before)
    kept = [spectra.directions_text(matrix.name, reduction) for matrix, reduction in spectra.settled(cut.matrices)]
    with cut:
        done = [
            CutMatrix(
                matrix.name,
                str(reduction),
                matrix.shape,
                str(matrix.parameter.dtype).removeprefix("torch."),
                was,
                matrix_hash(matrix.value),
                float(torch.linalg.vector_norm(matrix.value, dtype=torch.float64)),
                matrix_sketch(matrix.value),
                directions,
            )
            for (matrix, reduction), was, directions in zip(cut.matrices, before, kept, strict=True)
        ]
        if expected is not None:
            _check_after(expected, done, cut.matrices, exact)
            numbers = expected.numbers if numbers is None else numbers
    return _in_place(cut, Recipe(plan, done, _digest(plan, spectra), numbers, versions()))


@whole
def _in_place(cut: reduced, recipe: Recipe) -> Generator[tuple[reduced, Recipe], None, None]:
    with cut:
        yield cut, recipe


def need_recipe_ending(**paths: str | Path) -> None:
    """Look whether recipes can be written to files of these names.

    Args:
        **paths: by the name of the option that asks for it.

    Raises:
        ValueError: naming the first that cannot.
    """
    for option, path in paths.items():
        if Path(path).suffix not in (".json", ".yaml", ".yml"):
            raise ValueError(f"`{option}` of a recipe must end in .json or .yaml, got {clipped(path)!r}")


def matrix_hash(matrix: Tensor) -> str:
    """64 hexadecimal digits that stand for the dtype, the shape and the elements of ``matrix``, wherever it lies."""
    return content_hash(f"{matrix.dtype} {tuple(matrix.shape)}", matrix.contiguous())


def matrix_sketch(matrix: Tensor) -> tuple[float, ...]:
    """Sums over the elements of ``matrix``, each time with other random signs of its rows and columns."""
    left, right = (_signs(side, size).to(matrix.device) for side, size in zip("mn", matrix.shape, strict=True))
    rows = zip(left.split(_ROWS, 1), matrix.detach().split(_ROWS), strict=True)
    products = sum((((signs @ part.double()) * right).sum(1) for signs, part in rows), left.new_zeros(SKETCHES))
    return tuple(float(f"{product:.9g}") for product in products.tolist())


def _signs(name: str, size: int) -> Tensor:
    """(SKETCHES, size) of 1 and -1, the same everywhere and for ever."""
    stream = hashlib.shake_256(name.encode()).digest(SKETCHES * size)
    return torch.tensor(bytearray(stream), dtype=torch.uint8).reshape(SKETCHES, size).bitwise_and(1).double() * 2 - 1


def _digest(plan: LaserPlan, spectra: Spectra) -> str | None:
    return spectra.base.digest if spectra.base is not None and plan.cuts_delta else None


def _check_base(recipe: Recipe, spectra: Spectra) -> None:
    given = None if spectra.base is None else spectra.base.digest
    if recipe.base not in (None, given):
        raise ValueError(
            f"the recipe cuts the difference to the base {recipe.base}, and `spectra` has {given or 'none'}: give "
            "spectra=Spectra(base=BaseWeights(..., model)), on the command line --base"
        )


def _check_before(recipe: Recipe, found: Sequence[WeightMatrix], hashes: Sequence[str]) -> None:
    if len(found) != len(recipe.matrices):
        raise ValueError(
            f"the recipe was made for another model: {brief(recipe)} cuts {len(found)} matrices of this one, not "
            f"{len(recipe.matrices)}"
        )
    for wanted, matrix, now in zip(recipe.matrices, found, hashes, strict=True):
        here = _by(matrix.shape)
        if not same_name(wanted.name, matrix.name):
            raise ValueError(
                f"the recipe was made for another model: this has `{matrix.name}` where it had `{wanted.name}`"
            )
        if matrix.shape != wanted.shape:
            raise ValueError(
                f"the recipe was made for another model: `{matrix.name}` is {here}, not {_by(wanted.shape)}"
            )
        dtype = str(matrix.parameter.dtype).removeprefix("torch.")
        if dtype != wanted.dtype:
            raise ValueError(
                f"`{matrix.name}` is {dtype}, but the recipe is for {wanted.dtype}: load the model with "
                f"dtype={wanted.dtype!r}"
            )
        if now == wanted.after != wanted.before:
            raise ValueError(f"`{matrix.name}` is already what this would make of it: there is nothing to do")
        if now != wanted.before:
            raise ValueError(
                f"the weights of `{matrix.name}` are others than those that this was made for (hash {now[:12]}, not "
                f"{wanted.before[:12]}): load that model"
            )


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


def _by(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"
