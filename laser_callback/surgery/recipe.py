"""A recipe: a plan that knows the weights it belongs to, what they become, and what was shown of them.

A few kilobytes stand for a reduced model: whoever has the original applies the recipe and has the other, bit for bit,
or is told what differs. Contract: a recipe goes wherever a plan goes; whatever it is put into is first held to the
hashes in it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from laser_callback.plans.matrices import WeightMatrix, same_name
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.reduction import Reduction
from laser_callback.plans.selection import NoSuchMatrixError
from laser_callback.plans.short import brief
from laser_callback.spectra.delta import BaseWeights
from laser_callback.spectra.directions import StoredDirections, from_text
from laser_callback.support.hashing import content_hash
from laser_callback.support.plain_json import plain
from laser_callback.support.reading import built, made, shown
from laser_callback.support.suggest import clipped

SKETCHES = 8
_ROWS = 1024  # are made float64 at a time


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
        >>> from laser_callback.surgery import apply
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
    @override
    def directions(self) -> StoredDirections | None:
        """What its cuts keep, where that is not in the weights; ``None`` where all of it is."""
        stored = {m.name: from_text(m.directions, m.shape[0]) for m in self.matrices if m.directions is not None}
        return StoredDirections(stored) if stored else None

    @property
    def before(self) -> list[str]:
        """The hashes of its matrices before the cut."""
        return [matrix.before for matrix in self.matrices]

    @classmethod
    @override
    def of(cls, plan: LaserPlan | str | Mapping[str, Any] | Iterable[Any]) -> LaserPlan:
        """As :meth:`LaserPlan.of`; a recipe where ``plan`` is one, or its file or dictionary."""
        return cls.from_dict(plan) if isinstance(plan, Mapping) and "matrices" in plan else super().of(plan)

    @override
    def resolve(self, model: nn.Module | Sequence[WeightMatrix]) -> list[tuple[WeightMatrix, Reduction]]:
        """As :meth:`LaserPlan.resolve`; what it finds must be what the recipe was made for, by names and shapes.

        Raises:
            ValueError: naming the first difference.
        """
        try:
            found = super().resolve(model)
        except NoSuchMatrixError as error:
            raise ValueError(f"the recipe was made for another model: {error}") from error
        if len(found) != len(self.matrices):
            raise ValueError(
                f"the recipe was made for another model: {brief(self)} cuts {len(found)} matrices of this one, not "
                f"{len(self.matrices)}"
            )
        for wanted, (matrix, _) in zip(self.matrices, found, strict=True):
            if not same_name(wanted.name, matrix.name):
                raise ValueError(
                    f"the recipe was made for another model: this has `{matrix.name}` where it had `{wanted.name}`"
                )
            if matrix.shape != wanted.shape:
                raise ValueError(
                    f"the recipe was made for another model: `{matrix.name}` is {_by(matrix.shape)}, not "
                    f"{_by(wanted.shape)}"
                )
        return found

    @override
    def check_weights(self, found: Iterable[WeightMatrix], base: BaseWeights | None) -> None:
        """Look whether these are the weights that the recipe was made for, and its base.

        Raises:
            ValueError: naming the first difference.
        """
        given = None if base is None else base.digest
        if self.base not in (None, given):
            raise ValueError(
                f"the recipe cuts the difference to the base {self.base}, and `spectra` has {given or 'none'}: give "
                "spectra=Spectra(base=BaseWeights(..., model)), on the command line --base"
            )
        for wanted, matrix in zip(self.matrices, found, strict=True):
            dtype = str(matrix.parameter.dtype).removeprefix("torch.")
            if dtype != wanted.dtype:
                raise ValueError(
                    f"`{matrix.name}` is {dtype}, but the recipe is for {wanted.dtype}: load the model with "
                    f"dtype={wanted.dtype!r}"
                )
            now = matrix_hash(matrix.value)
            if now == wanted.after != wanted.before:
                raise ValueError(f"`{matrix.name}` is already what this would make of it: there is nothing to do")
            if now != wanted.before:
                raise ValueError(
                    f"the weights of `{matrix.name}` are others than those that this was made for (hash {now[:12]}, "
                    f"not {wanted.before[:12]}): load that model"
                )

    @override
    def part(self, reductions: Collection[Reduction]) -> Recipe:
        """As :meth:`LaserPlan.part`, with hashes and directions."""
        texts = [str(reduction) for reduction in reductions]
        matrices = [matrix for matrix in self.matrices if matrix.reduction in texts]
        return Recipe(super().part(reductions), matrices, self.base, versions=self.versions)

    @override
    def to_file(self, path: str | Path) -> None:
        """Write the recipe as ``.json`` or ``.yaml``; the text form has no place for hashes."""
        need_recipe_ending(path=path)
        super().to_file(path)

    @override
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


def _by(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"
