"""The gradient of a linear layer's weight as its two factors, from the layer's own backward pass.

With inputs x_t and gradients g_t of the outputs, of all positions t of a batch, G = dL/dW = sum_t g_t x_t'. A batch of
a few hundred positions says so in far fewer numbers than W has. What the screen asks, sigma_i u_i' G v_i, is then
sum_t (u_i' g_t) (sigma_i v_i' x_t): for that neither G nor its product with W is ever made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laser_callback.plans.matrices import WeightMatrix
from laser_callback.surgery.interception import Forward, Watch


@dataclass(frozen=True, eq=False)
class Outer:
    """A gradient G = outputs' @ inputs, shape (m, n).

    Attributes:
        outputs: gradients of the outputs, shape (positions, m).
        inputs: shape (positions, n).
        through: outputs @ W, shape (positions, n), for the W that the layer has: the gradient of its inputs.
    """

    outputs: Tensor
    inputs: Tensor
    through: Tensor | None = None

    def of(self, matrix: WeightMatrix) -> Outer:
        """The gradient of a matrix that is rows of W, or all of it."""
        if matrix.shape == (self.outputs.shape[1], self.inputs.shape[1]):
            return self
        return Outer(self.outputs.mT[matrix.index].mT, self.inputs)

    def tensor_split(self, blocks: int) -> tuple[Outer, ...]:
        """The gradients of groups of rows of W."""
        if blocks == 1:
            return (self,)
        return tuple(Outer(part, self.inputs) for part in self.outputs.tensor_split(blocks, 1))


Take = Callable[[nn.Parameter, Outer], bool]
"""Given a weight and a gradient of it, which it may refuse: then the weight gets it as ever."""


def watch(layers: Sequence[nn.Module], take: Take) -> Watch:
    """While it is open, ``take`` is given the gradients of these layers' weights in place of the weights' ``grad``.

    What else a weight does (tied to another layer, or read by hand) goes into its ``grad`` as ever, and so does all of
    it where a layer is compiled, traced or intercepted by others.
    """

    def see(layer: nn.Module, reason: str, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[0] if len(args) == 1 else kwargs.get("input")
        if reason or not isinstance(given, Tensor):
            return forward(*args, **kwargs)
        return _Linear.apply(given, layer.weight, layer.bias, take)

    return Watch(layers, see)


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether all that a layer does is ``F.linear`` of its weight."""
    return type(layer) is nn.Linear and "forward" not in vars(layer)


class _Linear(torch.autograd.Function):
    """``F.linear``, whose weight's gradient is given away as its factors."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: nn.Parameter, bias: Tensor | None, take: Take) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.take, ctx.parameter, ctx.bias_dtype = take, weight, None if bias is None else bias.dtype
        return F.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, of_outputs: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        wants_inputs, wants_weight, wants_bias, _ = ctx.needs_input_grad
        of_weight = of_bias = None
        rows, seen = of_outputs.reshape(-1, weight.shape[0]), inputs.reshape(-1, weight.shape[1])
        # Also where nothing in front of the layer asks for it: what is seen has the same bits whoever else is watched.
        of_inputs = (of_outputs @ weight.to(of_outputs.dtype)).to(inputs.dtype)
        if wants_bias:
            of_bias = rows.sum(0).to(ctx.bias_dtype)
        if wants_weight:
            through = of_inputs.reshape(-1, weight.shape[1])
            # Where the graph of the gradient is wanted, it is that of the weight's gradient, too.
            if torch.is_grad_enabled() or not ctx.take(ctx.parameter, Outer(rows, seen, through)):
                of_weight = (rows.mT @ seen.to(rows.dtype)).to(weight.dtype)
        return of_inputs if wants_inputs else None, of_weight, of_bias, None
