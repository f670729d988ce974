"""Attention blocks, MLP blocks and layers left out."""

from __future__ import annotations

from collections.abc import Iterator

from laser_callback.passes.drops import droppable, layer_path
from laser_callback.plans.kinds import WRITES
from laser_callback.plans.matrices import WeightMatrix
from laser_callback.plans.reduction import Reduction
from laser_callback.results.candidates import Candidate
from laser_callback.search.sensitivities import View, Views
from laser_callback.search.strategies.base import Context, Need
from laser_callback.support.suggest import clipped


class Drop:
    """Leave a layer out, or its attention or its MLP (TALE, arXiv 2510.22767, one at a time).

    The matrices that write to the residual stream are cut to zero, and their biases with them: ``12.writes@0``. A layer
    is then the identity only where its writes are added to the residual stream and nothing follows. That is looked for,
    by running the model once; layers that are not, such as BERT's, which normalise behind the sum, are left alone.

    Several layers are dropped one after the other, by composing (``max_reductions``), as TALE's greedy search does.
    """

    name = "drop"
    needs: frozenset[Need] = frozenset({"gradient"})

    def views(self, context: Context) -> Views:
        """The weights that are cut, and their biases."""
        writes = [matrix for of_layer in _writes(context).values() for matrix in of_layer]
        return {View(): [each for matrix in writes for each in (matrix, matrix.bias) if each is not None]}

    def refusal(self, context: Context) -> str:
        """Why there is no layer that can be left out; empty if there is one."""
        writes = _writes(context)
        if not writes:
            return "no layer has all that it writes to the residual stream `within`"
        if context.run is None:
            return "there is no set `screen` to see it by"
        try:
            found = droppable(context.module, context.run)
        except Exception as error:  # a step may demand things of a model that does not hold without its layers
            return f"the step fails where no layer writes anything: {clipped(error)}"
        if any(layer in found.layers.get(stack, ()) for stack, layer in writes):
            return ""
        return next(filter(None, (found.reasons.get(layer_path(*key)) for key in writes)), "it has no such layers")

    def propose(self, context: Context) -> Iterator[Candidate]:
        """Each layer, and its attention and its MLP where it has both."""
        for (stack, layer), writes in _droppable(context).items():
            for word in _words(writes):
                yield context.candidate(self, _left_out(stack, layer, word, writes, context))

    def neighbours(self, leader: Candidate, context: Context, closest: bool) -> Iterator[Candidate]:
        """The layers before and behind, or close by: other parts of the same layer."""
        (reduction,) = leader.plan
        writes = _droppable(context)
        first = context.resolve(leader.plan)[0][0]
        stack, layer = next(key for key, matrices in writes.items() if first in matrices)
        near = (
            [(layer, word) for word in _words(writes[stack, layer])]
            if closest
            else [(layer - 1, reduction.matrix), (layer + 1, reduction.matrix)]
        )
        for other, word in near:
            if (other, word) != (layer, reduction.matrix) and word in _words(writes.get((stack, other), [])):
                yield context.candidate(self, _left_out(stack, other, word, writes[stack, other], context))


def _writes(context: Context) -> dict[tuple[str, int], list[WeightMatrix]]:
    """By stack and layer what writes to the residual stream, of the layers of which nothing is out of reach."""
    reachable = {matrix.name for target in context.targets for matrix in target.matrices}
    found: dict[tuple[str, int], list[WeightMatrix]] = {}
    for matrix in context.matrices:
        if matrix.kind in WRITES and matrix.stack is not None and matrix.layer is not None:
            found.setdefault((matrix.stack, matrix.layer), []).append(matrix)
    return {key: matrices for key, matrices in found.items() if all(m.name in reachable for m in matrices)}


def _droppable(context: Context) -> dict[tuple[str, int], list[WeightMatrix]]:
    """Of these the layers that hand on what they are given once their writes are zero."""
    assert context.run is not None
    found = droppable(context.module, context.run).layers
    return {(stack, layer): of for (stack, layer), of in _writes(context).items() if layer in found.get(stack, ())}


def _words(writes: list[WeightMatrix]) -> list[str]:
    """What of a layer can be named: its attention, its MLP, and both at once where it has both."""
    kinds = [kind for kind in WRITES if any(matrix.kind == kind for matrix in writes)]
    return [*kinds, "writes"] if len(kinds) > 1 else kinds


def _left_out(stack: str, layer: int, word: str, writes: list[WeightMatrix], context: Context) -> Reduction:
    several = len({matrix.stack for matrix in context.matrices if matrix.kind is not None}) > 1
    biased = any(matrix.bias is not None for matrix in writes if word in ("writes", matrix.kind))
    return Reduction(
        layer,
        word,
        0.0,
        stack=context.matrices.stack_name(stack) if several else None,
        bias="cut" if biased else "kept",
    )
