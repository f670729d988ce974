"""Which layers are the identity once what they write to the residual stream is zero: those can be dropped.

A layer of a pre-norm transformer adds to what it is given: attention(norm(h)) to h, and to that an MLP. With the
matrices and biases that write (``out_proj`` and ``fc_out``) at zero it hands on h, bit for bit, and so does each part
of it for itself: that is what a *drop* relies on (TALE, arXiv 2510.22767). Not every layer is like that, and no table
of families is kept here: a pass tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from laser_callback.plans.kinds import WRITES
from laser_callback.plans.matrices import WeightMatrix, find_matrices
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.reduction import Reduction
from laser_callback.plans.stacks import layer_stacks
from laser_callback.support.settings import with_gradients
from laser_callback.surgery.interception import Forward, Watch
from laser_callback.surgery.swap import reduced

_ALL = LaserPlan([Reduction(layer=None, matrix="/.+/", rho=0, bias="cut")])


@dataclass(frozen=True)
class Droppable:
    """What :func:`droppable` finds.

    Attributes:
        layers: stack -> the layers, in order, that hand on what they are given once their writes are zero. A stack
            without any has an empty list.
        reasons: by a layer's path, such as ``encoder.layer.3``, why it cannot be dropped.
    """

    layers: dict[str, list[int]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def droppable(model: nn.Module, run: Callable[[], object]) -> Droppable:
    """Find out which layers can be dropped, by one pass in which no layer writes anything.

    The writes of all layers are cut to zero at once: a layer that is the identity is so for whatever it is given. The
    weights are the same bits afterwards.

    Args:
        model: any module.
        run: passes a batch through the model once, such as ``lambda: module.validation_step(batch, 0)``; gradients are
            not recorded. What it changes besides, and in which mode it runs, is its own business.

    Raises:
        ValueError, TypeError: as from :class:`~laser_callback.surgery.reduced`; and whatever ``run`` raises.

    Example:
        >>> layers = [nn.TransformerEncoderLayer(8, 2, 16, norm_first=first) for first in (True, False)]
        >>> model = nn.ModuleDict({"layers": nn.ModuleList(layers)}).eval()
        >>> droppable(model, lambda: [layer(torch.ones(1, 3, 8)) for layer in model["layers"]])
        Droppable(layers={'layers': [0]}, reasons={'layers.1': 'a norm stands behind its sum: what it gives comes from \
`norm2`'})
    """
    matrices = find_matrices(model)
    found, writes = Droppable(), list[WeightMatrix]()
    places: dict[nn.Module, tuple[str, int, list[WeightMatrix]]] = {}
    for stack, layers in layer_stacks(model).items():
        found.layers[stack] = []
        for position, layer in enumerate(layers):
            inside = {*layer.modules()}
            own = [matrix for matrix in matrices if matrix.module in inside]
            index = next((matrix.layer for matrix in own if matrix.layer is not None), position)
            mine = [matrix for matrix in own if matrix.kind in WRITES]
            refused = [matrix for matrix in mine if matrix.obstacle]
            if refused:
                found.reasons[layer_path(stack, index)] = f"`{refused[0].name}` cannot be cut: {refused[0].obstacle}"
            elif not mine:
                found.reasons[layer_path(stack, index)] = f"no matrix in it is known to write{_unknown(own)}"
            else:
                places[layer] = stack, index, own
                writes += mine
    if not writes:
        return found
    with reduced(writes, _ALL):
        reasons = why_no_identity(places, run)
    for layer, (stack, index, own) in places.items():
        if reason := reasons[layer]:
            found.reasons[layer_path(stack, index)] = reason + (_unknown(own) if reason == _ADDS else "")
        else:
            found.layers[stack].append(index)
    return found


def why_no_identity(layers: Iterable[nn.Module], run: Callable[[], object]) -> dict[nn.Module, str]:
    """Let ``run`` pass a batch through ``layers``, and say of each why it does not hand on what it is given.

    Compared are the values of a layer's first argument ahead of its call and of the first tensor that it returns, bit
    for bit: the same, or rounded to a dtype.

    Returns:
        Layer -> the reason; an empty one if it is the identity.
    """
    layers = [*layers]
    reasons = dict.fromkeys(layers, _UNSEEN)
    norms = {norm: name for layer in layers for name, norm in layer.named_modules() if "Norm" in type(norm).__name__}
    last: list[tuple[str, Any]] = [("", None)]  # the norm that was called last, and what it gave

    def see(module: nn.Module, _: str, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if module in norms:
            output = forward(*args, **kwargs)
            last[:] = [(norms[module], output)]
            return output
        given = _first_tensor([*args] or [kwargs.get("hidden_states"), *kwargs.values()])
        before = None if given is None else given.clone()  # a layer may write to what it is given
        output = forward(*args, **kwargs)
        after = _first_tensor(output)
        name, of_norm = last[0]
        if reasons[module] in ("", _UNSEEN):  # called several times, it must be the identity each time
            reasons[module] = _why_not_same(before, after, name if after is not None and after is of_norm else "")
        return output

    with with_gradients(False), Watch([*layers, *norms], see):
        run()
    return reasons


def layer_path(stack: str, layer: int) -> str:
    """``encoder.layer.3``"""
    return f"{stack}.{layer}".lstrip(".")


_ROUNDED = (torch.float32, torch.bfloat16, torch.float16)
_UNSEEN = "no call of it is seen in the pass"
_ADDS = "with all that is known to write in it at zero it still changes what it is given"


def _why_not_same(before: Tensor | None, after: Tensor | None, norm: str) -> str:
    if before is None or after is None:
        return f"it {'is given' if before is None else 'returns'} no hidden states"
    if before.shape != after.shape:
        return f"it makes a tensor of shape {tuple(after.shape)} of one of shape {tuple(before.shape)}"
    if any(torch.equal(before.to(dtype).to(after.dtype), after) for dtype in (before.dtype, *_ROUNDED)):
        return ""
    if norm:
        return f"a norm stands behind its sum: what it gives comes from `{norm}`"
    one, other = before.double().flatten(), after.double().flatten()
    if not bool(torch.isfinite(other).all()):
        return "with its writes at zero it gives values that are not finite"
    factor = float(one @ other / (one @ one).clamp_min(1e-300))
    if abs(factor - 1) > 0.01 and bool((factor * one - other).norm() <= 0.01 * other.norm()):  # but for rounding
        return f"it multiplies what it is given by {factor:.4g}"
    return _ADDS


def _unknown(matrices: Iterable[WeightMatrix]) -> str:
    """The matrices of which it is not known what they are for: one of these may write."""
    names = [f"`{matrix.path_in_layer}`" for matrix in matrices if matrix.kind is None]
    more = ", ..." if len(names) > 3 else ""
    return f"; what is of no known kind: {', '.join(names[:3])}{more}" if names else ""


def _first_tensor(value: Any) -> Tensor | None:
    """The first tensor of floating numbers in what a layer is given or returns."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return next((tensor for tensor in map(_first_tensor, value) if tensor is not None), None)
    return None
