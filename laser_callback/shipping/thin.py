"""Two thin layers in place of a matrix of low rank: fewer numbers to keep, to read and to multiply.

A matrix of shape (m, n) and rank r is the product of one of shape (m, r) and one of (r, n), which has fewer numbers
where r < m n / (m + n). Contract: :func:`factored` cuts a model as a plan says, for the length of a block or for good;
each planned matrix becomes two thin layers where that is worth it, and is cut as a dense matrix where it is not, with
the reason.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from laser_callback.plans.matrices import WeightMatrix
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.reduction import Reduction
from laser_callback.spectra.spectrum import Spectrum, as_double
from laser_callback.spectra.store import Spectra
from laser_callback.support.interrupts import whole
from laser_callback.support.progress import PhaseProgress
from laser_callback.surgery.recipe import Recipe
from laser_callback.surgery.record import recorded
from laser_callback.surgery.swap import reduced

MAX_SHARE = 0.5
"""Factors with more than this share of a matrix' numbers stay dense: two small products may take as long as one."""

_Place: TypeAlias = "tuple[nn.Module, str]"
"""A module and the name under which it has a child."""


class FactoredLinear(nn.Module):
    """A linear layer whose matrix is ``up @ down``.

    Args:
        up: shape (outputs, rank).
        down: shape (rank, inputs).
        bias: shape (outputs,), or ``None``.
    """

    def __init__(self, up: Tensor, down: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.up = nn.Parameter(up)
        self.down = nn.Parameter(down)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs`` of shape (..., inputs) to (..., outputs)."""
        return functional.linear(functional.linear(inputs, self.down), self.up, self.bias)

    def extra_repr(self) -> str:
        """Sizes, as other layers show them."""
        (rank, inputs), outputs = self.down.shape, len(self.up)
        return f"in_features={inputs}, out_features={outputs}, rank={rank}, bias={self.bias is not None}"


@dataclass
class Factored:
    """What :func:`factored` did.

    Attributes:
        layers: the thin layers by the name of the module that each replaces.
        dense: the planned matrices that are cut but dense, with the reason.
        recipe: the cut.
    """

    layers: dict[str, FactoredLinear]
    dense: dict[str, str]
    recipe: Recipe
    _cut: reduced = field(repr=False)
    _kept: bool = field(default=False, repr=False)

    @property
    def ranks(self) -> dict[str, int]:
        """Module name -> rank: what :func:`make_room` needs."""
        return {name: len(layer.down) for name, layer in self.layers.items()}

    def keep(self) -> None:
        """Leave the thin layers and the cut matrices in place for good."""
        self._kept = True
        self._cut.keep()


def factored(
    model: nn.Module,
    plan: LaserPlan | str | Mapping[str, Any],
    spectra: Spectra | None = None,
    *,
    numbers: Mapping[str, Any] | None = None,
    exact: bool = True,
    progress: PhaseProgress | None = None,
    max_share: float = MAX_SHARE,
) -> AbstractContextManager[Factored]:
    """Cut ``model`` within the block, with thin layers where they are worth it.

    Args:
        model: any module. Optimizers do not know the new parameters: make them inside.
        plan: what to cut; a recipe's hashes are checked.
        spectra: where factorisations are looked up and kept.
        numbers: see :func:`recorded`.
        exact: see :func:`recorded`.
        progress: see :func:`recorded`.
        max_share: use thin layers where they have at most this share of the matrix' numbers, in (0, 1].

    Raises:
        ValueError: if ``max_share`` is out of range, or as from :func:`recorded`.

    Example:
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(64, 64)})])})
        >>> with factored(model, "0.fc_in@0.1") as thin:
        ...     thin.ranks, model["layers"][0]["fc1"]
        ({'layers.0.fc1': 6}, FactoredLinear(in_features=64, out_features=64, rank=6, bias=True))
    """
    if not 0 < max_share <= 1:
        raise ValueError(f"`max_share` must be a number above 0 and at most 1, got {max_share!r}")
    plan = Recipe.of(plan)
    spectra = (Spectra() if spectra is None else spectra).bringing(plan.directions)
    layers: dict[str, FactoredLinear] = {}
    dense: dict[str, str] = {}
    places: list[tuple[_Place, nn.Module]] = []
    registered, owners = _places(model), _owners(model)
    for matrix, reduction in spectra.settled(plan.resolve(model)):
        original = matrix.value
        if matrix.is_bias or spectra.changes_nothing(original, reduction, matrix.name):
            continue
        own = registered.get(matrix.module, [])
        why = why_not_thin(matrix, reduction) or _why_in_use(matrix, own, owners[matrix.parameter])
        layer = why or _thin_layer(matrix, reduction, spectra, max_share)
        if isinstance(layer, FactoredLinear):
            layers[matrix.name] = layer
            places += [(place, layer) for place in own]
        else:
            dense[matrix.name] = layer
    record = recorded(model, plan, spectra, numbers=numbers, exact=exact, progress=progress)
    return _in_place(record, layers, dense, places)


@whole
def _in_place(
    record: AbstractContextManager[tuple[reduced, Recipe]],
    layers: dict[str, FactoredLinear],
    dense: dict[str, str],
    places: Sequence[tuple[_Place, nn.Module]],
) -> Generator[Factored, None, None]:
    with record as (cut, recipe):
        result = Factored(layers, dense, recipe, cut)
        before = [((parent, name), parent._modules[name]) for (parent, name), _ in places]
        try:
            _put(places)
            yield result
        finally:
            if not result._kept:
                _put(before)


def make_room(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Put thin layers of these ranks, with no values yet, into ``model``: into what a factored model's weights fit.

    Args:
        model: a model of the class that was factored, or a module around it.
        ranks: module name -> rank, as from :attr:`Factored.ranks`.

    Raises:
        ValueError: if a named module is not there, or is no linear layer.
    """
    places: list[tuple[_Place, nn.Module]] = []
    registered = _places(model)
    for name, rank in ranks.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"this is another model: it has no module `{name}`") from None
        weight = getattr(module, "weight", None)
        if type(module).__name__ not in _LINEAR or not isinstance(weight, Tensor):
            raise ValueError(f"this is another model: `{name}` is a {type(module).__name__}, not a linear layer")
        inputs, outputs = weight.shape if type(module).__name__ == "Conv1D" else weight.shape[::-1]
        layer = _layer(module, weight.new_empty(outputs, rank), weight.new_empty(rank, inputs))
        places += [(place, layer) for place in registered[module]]
    _put(places)


def thin_factors(matrix: Tensor, spectrum: Spectrum, gains: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of gains[i] s_i u_i v_i' over the singular values s_i of ``matrix`` as a product of two thin matrices.

    Args:
        matrix: shape (m, n).
        spectrum: its factorisation.
        gains: shape (min(m, n),).

    Returns:
        Of shapes (m, r) and (r, n), float64; r counts the terms that are not 0.
    """
    used = (gains != 0) & (spectrum.values > 0)
    basis, work = spectrum.basis[:, used], as_double(matrix)
    # As in `Spectrum.truncate`. One factor is orthonormal but for the gains, so that what is between the two layers
    # is no larger than what goes in or comes out: float16 does not overflow.
    if matrix.shape[0] >= matrix.shape[1]:
        return work @ (basis * gains[used]), basis.T
    return basis, (basis * gains[used]).T @ work


# ---- which matrices --------------------------------------------------------------------------------------------------

_LINEAR = ("Linear", "Conv1D")


def why_not_thin(matrix: WeightMatrix, reduction: Reduction) -> str | None:
    """``None`` if ``matrix`` is the weight of a plain linear layer, cut along its singular directions."""
    if not reduction.is_spectral or reduction.noise is not None:
        return "it is not cut along its singular directions"
    if matrix.expert is not None and matrix.parameter.ndim == 3:
        return "it is an expert in a 3-D tensor"
    if matrix.parameter.numel() != matrix.shape[0] * matrix.shape[1]:
        return "it is a part of a fused weight"
    if type(matrix.module).__name__ not in _LINEAR:  # a subclass does something else with its weight
        return f"its module is a {type(matrix.module).__name__}, not a linear layer"
    return None


def _why_in_use(matrix: WeightMatrix, places: list[_Place], owners: int) -> str | None:
    """Why the layer cannot be replaced, if so: somebody relies on the layer or its weight being there."""
    module = matrix.module
    if not places:
        return "it is the whole model"
    if owners > 1:
        return "its weight is tied to another module's"
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return "hooks are attached to its module"
    for parent, name in places:
        if _reads_weight(parent, name):
            return f"{type(parent).__name__} reads its weight"
    return None


def _reads_weight(parent: nn.Module, name: str) -> bool:
    """Whether ``parent`` does more with its layer than to call it, such as torch's fused encoder layer, or T5's MLP."""
    try:
        source = inspect.getsource(type(parent))
    except (OSError, TypeError):  # made at run time: then it fails loudly, since a thin layer has no `weight`
        return False
    return re.search(rf"\bself\.{name}\.weight\b", source) is not None


def _thin_layer(matrix: WeightMatrix, reduction: Reduction, spectra: Spectra, max_share: float) -> FactoredLinear | str:
    """The layer, or why there is none."""
    if reduction.cut == "delta":
        return "the difference to a base is of low rank, and the sum is not"
    original, (rows, columns) = matrix.value, matrix.shape
    spectrum = spectra.of(original, matrix.name)
    gains = spectrum.gains(reduction)
    rank, most = int((gains != 0).sum()), int(max_share * rows * columns / (rows + columns))
    if rank > most:
        return f"its rank is {rank}, and two thin layers are worth it up to {most}"
    found = thin_factors(original, spectrum, gains)
    factors = [factor.to(original.device, original.dtype).contiguous() for factor in found]
    if not all(bool(torch.isfinite(factor).all()) for factor in factors):
        return f"its two thin layers would have values beyond {original.dtype}"
    return _layer(matrix.module, *factors)


def _layer(module: nn.Module, up: Tensor, down: Tensor) -> FactoredLinear:
    layer = FactoredLinear(up, down).train(module.training).requires_grad_(bool(module.weight.requires_grad))
    layer.bias = module.bias if isinstance(module.bias, nn.Parameter) else None  # the very parameter
    return layer


# ---- in and out ------------------------------------------------------------------------------------------------------


def _places(model: nn.Module) -> dict[nn.Module, list[_Place]]:
    """Where each module is registered: in several places if it is shared."""
    places: dict[nn.Module, list[_Place]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, name))
    return places


def _owners(model: nn.Module) -> Counter[nn.Parameter]:
    """How many modules have each parameter."""
    return Counter(parameter for module in model.modules() for parameter in module.parameters(recurse=False))


def _put(modules: Sequence[tuple[_Place, nn.Module | None]]) -> None:
    for (parent, name), module in modules:
        setattr(parent, name, module)
