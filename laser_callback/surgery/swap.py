"""Put a plan into a live model and take it out again, bit for bit.

``with reduced(model, plan): ...`` is the one way in which this package changes weights. Inside of the block the planned
parameters point at reduced tensors; on the way out they point at their own storage again. No copy is made of the model
or of the original weights, no version counter moves, and an optimizer's state stays attached to the same parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from laser_callback.plans.matrices import WeightMatrix
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.reduction import Reduction
from laser_callback.plans.short import brief
from laser_callback.spectra.store import SIDE_BY_SIDE, Spectra
from laser_callback.support.interrupts import catch_up, closed, opened, undisturbed
from laser_callback.support.progress import PhaseProgress
from laser_callback.support.settings import with_gradients, with_inference
from laser_callback.support.stored import Spill, Stored, contents, has_values, lies_in_file, place, put
from laser_callback.surgery.recipe import Recipe


@dataclass(eq=False)
class _Swap:
    """A parameter that points at a reduced tensor, in memory or in a file."""

    parameter: nn.Parameter
    original: Tensor | Stored
    reduced: Tensor | Stored
    version: int | None
    matrices: list[WeightMatrix]

    @classmethod
    def of(cls, parameter: nn.Parameter, tensor: Tensor | Stored, matrices: list[WeightMatrix]) -> _Swap:
        return cls(parameter, place(parameter), tensor, _version(parameter), matrices)

    def is_untouched(self) -> bool:
        """Whether the parameter holds what was put there, if on another device or in another precision."""
        now = place(self.parameter)
        if isinstance(now, Stored) or isinstance(self.reduced, Stored):
            return now is self.reduced
        if now.data_ptr() == self.reduced.data_ptr():
            return self.version == _version(self.parameter)
        converted = now.dtype != self.reduced.dtype or now.device != self.reduced.device
        return converted or (now.shape == self.reduced.shape and torch.equal(now, self.reduced))

    def take_back(self) -> None:
        if isinstance(self.original, Stored) or isinstance(self.reduced, Stored):
            put(self.parameter, self.original)
            return
        # The module may have gone to another device or precision meanwhile (`Trainer(precision="bf16-true")`).
        self.parameter.data = self.original.to(self.parameter.device, self.parameter.dtype)
        for matrix in self.matrices:
            # Another may have taken its place (`load_state_dict(assign=True)`): one that holds the same, goes back too.
            now = matrix.module._parameters.get(matrix.attribute)
            if now is not None and now is not self.parameter and _is_copy(now.data, self.reduced):
                now.data = self.original.to(now.device, now.dtype)


def _is_copy(tensor: Tensor, reduced: Tensor) -> bool:
    if tensor.shape != reduced.shape or tensor.is_meta or not tensor.is_floating_point():
        return False
    reduced = reduced.to(tensor.device).double()  # it may have been in half precision meanwhile
    return bool((tensor.double() - reduced).abs().max() <= 2**-7 * reduced.abs().max())


def _version(parameter: nn.Parameter) -> int | None:
    return None if parameter.is_inference() else parameter._version


_Cut = tuple[nn.Parameter, "Tensor | Stored", list[WeightMatrix]]

# What is in place in this process, in the order of entry, so that blocks may end in any order.
_in_place: list[list[_Swap]] = []


class reduced(AbstractContextManager["reduced"]):  # noqa: N801 - reads as a verb, like contextlib.suppress
    """Context in which ``model`` is reduced as ``plan`` says.

    The first entry factorises; the object can be entered again and then only swaps pointers. It cannot be entered while
    it is open. If the model's weights change between two entries, make a new object: the reduced tensors are those of
    the first entry. Blocks may overlap, and end in any order. What the block writes to a reduced parameter (an
    optimizer's step, ``load_state_dict``) is lost at its end, and a warning names it, but for what is written through
    ``.data``, which cannot be seen; a move to another device or precision holds for the weights that come back, too.

    Args:
        model: any module, or the matrices that :func:`find_matrices` has found in it.
        plan: a :class:`LaserPlan`, or anything that :meth:`LaserPlan.of` takes. A recipe is only for
            the weights that it was made for: the first entry holds them to its hashes.
        spectra: where factorisations are looked up and kept, for those who cut the same matrices again and again.

    Attributes:
        matrices: the planned matrices with their reductions, in the model's order.
        is_suspended: whether a signal handler is running, for which the original weights are back.

    Raises:
        ValueError: if the plan does not fit the model, weights are not finite, or not those of a recipe. The model is
            then untouched.
        TypeError: if a planned weight is packed, sharded, complex or without storage.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
        >>> x = torch.ones(1, 3, 8)
        >>> with torch.no_grad():
        ...     before = model(x)
        ...     with reduced(model, "1.mlp@0.1, 0.q_proj@0.5"):
        ...         inside = model(x)
        ...     after = model(x)
        >>> torch.equal(before, inside), torch.equal(before, after)
        (False, True)
    """

    def __init__(
        self,
        model: nn.Module | Sequence[WeightMatrix],
        plan: LaserPlan | str | Mapping[str, Any],
        spectra: Spectra | None = None,
    ) -> None:
        self.plan = Recipe.of(plan)
        self._spectra = spectra
        self.matrices: list[tuple[WeightMatrix, Reduction]] = self.plan.resolve(model)
        self._cuts: list[_Cut] | None = None
        self._swaps: list[_Swap] = []  # empty unless in place
        self.is_suspended = False

    def prepare(self, progress: PhaseProgress | None = None) -> list[Tensor]:
        """Factorise now, unless that has been done. Returns the reduced tensors, one per changed parameter.

        Of a parameter that lies in a file the reduced tensor does so, too, and is not among them.
        """
        if self._cuts is None:
            with with_gradients(False):
                spectra = (self._spectra or Spectra()).bringing(self.plan.directions)
                self.plan.check_weights([matrix for matrix, _ in self.matrices], spectra.base)
                self._cuts = _reduced_parameters(self.matrices, spectra, progress or PhaseProgress(enabled=False))
        return [tensor for _, tensor, _ in self._cuts if isinstance(tensor, Tensor)]

    def forget(self) -> None:
        """Free the reduced tensors; the next entry makes them again, from the model's weights at that time."""
        if self._swaps:
            raise RuntimeError("this reduction is in place; leave its `with` block before forgetting it")
        self._cuts = None

    def __enter__(self) -> reduced:
        if self._swaps:
            raise RuntimeError("this reduction is already in place; leave its `with` block before entering it again")
        self.prepare()
        try:
            return self._swap_in()
        except BaseException:
            self.restore()
            raise

    @undisturbed
    def _swap_in(self) -> reduced:
        opened(self, partial(_dropped, self._swaps, brief(self.plan)))
        _in_place.append(self._swaps)
        for parameter, tensor, matrices in self._cuts or []:
            # Remember first, then swap: an exception between the two lines restores a parameter to itself.
            self._swaps.append(_Swap.of(parameter, tensor, matrices))
            put(parameter, tensor)
        torch.clear_autocast_cache()
        catch_up()
        return self

    @undisturbed
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            try:
                lost = self.written_to()
            finally:
                self.restore()
        except BaseException:  # brought by no signal (another thread, a debugger): finish, then let it through
            self.restore()
            raise
        if lost:
            self._cuts = None  # they are not what they were: the next entry makes others
        if lost and kind is None:
            warnings.warn(
                f"{', '.join(lost)}: written to while reduced by {brief(self.plan)!r}. What was written is lost: the "
                "original weights are back",
                stacklevel=2,
            )
        catch_up()

    @undisturbed
    def restore(self) -> None:
        """Put the original weights back. Does nothing when they are in place; goes on where an interrupt stopped it."""
        self.is_suspended = False
        try:
            _put_back(self._swaps)
        finally:
            closed(self)

    def written_to(self) -> list[str]:
        """The names of the reduced parameters that no longer hold what this has put there."""
        later = {id(swap.parameter) for swap in _after(self._swaps)}  # a block that was entered meanwhile
        touched = [s for s in self._swaps if id(s.parameter) not in later and not s.is_untouched()]
        return [f"`{matrix.name}`" for swap in touched for matrix in swap.matrices]

    @undisturbed
    def suspend(self) -> None:
        """Put the original weights back for as long as a signal handler runs."""
        self.is_suspended = bool(self._swaps)
        for swap in reversed(self._swaps):
            put(swap.parameter, swap.original)
        torch.clear_autocast_cache()

    @undisturbed
    def resume(self) -> None:
        """End what :meth:`suspend` began."""
        for swap in self._swaps:
            put(swap.parameter, swap.reduced)
        self.is_suspended = False
        torch.clear_autocast_cache()

    @undisturbed
    def stay(self) -> None:
        """Leave the reduced weights in place also when nobody refers to this any more; :meth:`restore` still works."""
        closed(self)

    @undisturbed
    def keep(self) -> None:
        """Leave the reduced weights in place for good; what was there is freed."""
        _forget(self._swaps)
        self._swaps.clear()
        self._cuts = None
        closed(self)


@undisturbed
def _put_back(swaps: list[_Swap]) -> None:
    while swaps:
        swap = swaps[-1]
        after = next((other for other in _after(swaps) if other.parameter is swap.parameter), None)
        if after is None:
            swap.take_back()
        else:  # another reduction was put on top of this one: it goes back to what was there before both
            after.original = swap.original
        swaps.pop()
    _forget(swaps)
    torch.clear_autocast_cache()


def _after(swaps: list[_Swap]) -> list[_Swap]:
    position = next((i for i, other in enumerate(_in_place) if other is swaps), len(_in_place))
    return [swap for other in _in_place[position + 1 :] for swap in other]


def _forget(swaps: list[_Swap]) -> None:
    _in_place[:] = [other for other in _in_place if other is not swaps]


@undisturbed
def _dropped(swaps: list[_Swap], plan: str) -> None:
    if swaps:
        _put_back(swaps)
        warnings.warn(
            f"the reduction by {plan!r} was entered, never left and dropped: its weights are back", stacklevel=1
        )


def _reduced_parameters(
    matrices: list[tuple[WeightMatrix, Reduction]], spectra: Spectra, progress: PhaseProgress
) -> list[_Cut]:
    """One reduced tensor per parameter that changes; several matrices of a fused parameter share it."""
    for matrix, _ in matrices:
        if not has_values(matrix.parameter):
            raise TypeError(_without_storage(matrix))
    by_parameter: dict[int, list[tuple[WeightMatrix, Reduction]]] = {}
    for matrix, reduction in spectra.settled(matrices):
        by_parameter.setdefault(id(matrix.parameter), []).append((matrix, reduction))
    ordered = [each for group in by_parameter.values() for each in group]
    ahead = _ahead(ordered, spectra)
    cuts: list[_Cut] = []
    spill: Spill | None = None
    with progress.phase(f"cutting {len(ordered)} matrices", len(ordered)):
        for group in by_parameter.values():
            parameter = group[0][0].parameter
            where = place(parameter)
            # Normal tensors also inside of inference mode, since a later `fit` may run autograd while one is in place;
            # for a parameter that was itself made in inference mode, again such a tensor: torch cannot mix the two.
            with with_inference(parameter.is_inference()):
                changed, changing = _changed(where, zip(group, ahead, strict=False), spectra)
            if changed is not None and isinstance(where, Stored):
                spill = Spill(where.scratch) if spill is None else spill
                cuts.append((parameter, spill.add(changed), changing))
            elif changed is not None:
                cuts.append((parameter, changed, changing))
            progress.advance(len(group))
            del changed  # before the next is read
    return cuts


def _ahead(matrices: list[tuple[WeightMatrix, Reduction]], spectra: Spectra) -> Iterator[None]:
    """One step for each matrix, with some that come next factorised; what lies in files is held one by one."""
    for i, (matrix, _) in enumerate(matrices):
        if i % SIDE_BY_SIDE == 0 and not lies_in_file(matrix.parameter):
            spectra.ahead(_factorised_whole(matrices[i : i + SIDE_BY_SIDE]))
        yield


def _changed(
    where: Tensor | Stored, group: Iterable[tuple[tuple[WeightMatrix, Reduction], None]], spectra: Spectra
) -> tuple[Tensor | None, list[WeightMatrix]]:
    """What the cuts of its matrices make of a parameter, ``None`` if that is nothing else; and which change it."""
    values, changed, changing = contents(where), None, []
    for (matrix, reduction), _ in group:
        original = matrix.read(values)
        if not spectra.changes_nothing(original, reduction, matrix.name):
            if changed is None:  # what was read from a file is a copy already
                in_file = isinstance(where, Stored)
                changed = values if in_file else values.clone(memory_format=torch.preserve_format)
            matrix.write(changed, spectra.reduce(original, reduction, matrix.name))
            changing.append(matrix)
    return changed, changing


def _factorised_whole(matrices: list[tuple[WeightMatrix, Reduction]]) -> list[tuple[Tensor, str, str]]:
    return [
        (matrix.value, matrix.name, reduction.cut)
        for matrix, reduction in matrices
        if reduction.is_spectral and not reduction.is_scaling and 1 not in (reduction.rho, reduction.scale)
    ]


def _without_storage(matrix: WeightMatrix) -> str:
    if hasattr(matrix.module, "_hf_hook"):
        return (
            f"the weight of `{matrix.name}` is offloaded by accelerate, which brings it in only for its own forward: "
            "load the model without a `device_map` that offloads, or bring it back with "
            "`accelerate.hooks.remove_hook_from_module(model, recurse=True)`"
        )
    return f"the weight of `{matrix.name}` is on the meta device: load it before cutting"
