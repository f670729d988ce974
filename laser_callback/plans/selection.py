"""Which matrices of a model a reduction names: by layer, kind or group, module name or regular expression."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from laser_callback.plans.kinds import GROUPS, KINDS
from laser_callback.plans.matrices import WeightMatrix, describe, plain_name
from laser_callback.plans.reduction import STACK, Reduction
from laser_callback.support.suggest import closest


class NoSuchMatrixError(ValueError):
    """A reduction matches no matrix of the model."""


def select(matrices: list[WeightMatrix], reduction: Reduction) -> list[int]:
    """Positions of the matrices that a reduction names.

    Raises:
        NoSuchMatrixError: if it names none, with the part of it that is wrong.
        ValueError: if it fits several layer stacks, or a weight that is tied to others.
    """
    candidates = [i for i, matrix in enumerate(matrices) if _matches_name(matrix, reduction)]
    if not candidates:
        raise _no_such_matrix(matrices, reduction, _instead(matrices, reduction))
    if reduction.layer is not None:
        candidates = [i for i in candidates if _matches_stack(matrices[i], reduction)]
        if not candidates:
            where = "outside of all layers" if reduction.stack is None else f"not in {reduction.stack}"
            raise _no_such_matrix(matrices, reduction, f"{reduction.matrix} is {where}")
        layers = [matrices[i].layer for i in candidates]
        depth: Counter[str | None] = Counter()
        for matrix in matrices:
            depth[matrix.stack] = max(depth[matrix.stack], 1 + (matrix.layer or 0))
        candidates = [i for i in candidates if matrices[i].layer in _layers(reduction.layer, depth[matrices[i].stack])]
        if not candidates:
            there = f"layer {reduction.layer}: there are {_span(layers)}"
            raise _no_such_matrix(matrices, reduction, f"{there} with {reduction.matrix}")
        stacks = {matrices[i].stack for i in candidates}
        if len(stacks) > 1:
            names = ", ".join(sorted(str(stack) for stack in stacks))
            part = STACK.search(min(map(str, stacks)))
            raise ValueError(
                f"the reduction {reduction} fits several layer stacks ({names}): put the stack's name in front"
                + (f", e.g. {replace(reduction, stack=part[0])}" if part else "")
            )
    if reduction.expert is not None:
        experts = [matrices[i].expert for i in candidates]
        candidates = [i for i in candidates if matrices[i].expert == reduction.expert]
        if not candidates:
            raise _no_such_matrix(matrices, reduction, f"expert {reduction.expert}: there are {_span(experts)}")
    for i in candidates:
        if matrices[i].kind is None and not _names_all(reduction, matrices[i]):
            tied = [name.removesuffix(".weight") for name in matrices[i].parameter_names]
            pattern = "|".join(map(re.escape, tied))
            raise ValueError(
                f"the reduction {reduction} would cut a tied weight, and with it each of {', '.join(tied)}: "
                f"to cut them all, name them all, /{pattern}/"
            )
    return candidates


def _no_such_matrix(matrices: list[WeightMatrix], reduction: Reduction, wrong: str) -> NoSuchMatrixError:
    return NoSuchMatrixError(
        f"the reduction {reduction} matches no matrix of the model: {wrong}. It has:\n{describe(matrices)}"
    )


def _instead(matrices: list[WeightMatrix], reduction: Reduction) -> str:
    """What could be meant by a kind or a name that the model does not have."""
    wanted = reduction.matrix
    without_kind = [matrix for matrix in matrices if matrix.kind is None and matrix.stack is not None]
    if wanted in (*KINDS, *GROUPS) and without_kind:
        first = without_kind[0]
        by_name = replace(reduction, layer=first.layer, matrix=first.path_in_layer)
        return f"none is known as {wanted}; those without a kind are cut by name, e.g. {by_name}"
    kinds = {matrix.kind for matrix in matrices if matrix.kind is not None}
    words = {*GROUPS, *kinds, *(matrix.path_in_layer for matrix in matrices)}
    return f"none is called {wanted}{closest(wanted, sorted(words))}".rstrip("?")


def _span(numbers: Iterable[int | None]) -> str:
    """``0..29``; or one by one, where some are missing."""
    found = sorted({number for number in numbers if number is not None})
    if not found:
        return "none"
    whole = len(found) > 1 and len(found) == found[-1] - found[0] + 1
    return f"{found[0]}..{found[-1]}" if whole else ", ".join(map(str, found))


def _matches_name(matrix: WeightMatrix, reduction: Reduction) -> bool:
    wanted = reduction.matrix
    if wanted.startswith("/"):
        # A module by its name or a parameter by any of its names: a tied weight is refused rather than not found.
        names = [re.sub(r"\[\d+\]$", "", matrix.name), re.sub(r"\[.*", "", matrix.name)]
        names += [name.removesuffix(".weight") for name in matrix.parameter_names]
        return any(re.fullmatch(wanted[1:-1], name) for name in names)
    if wanted in GROUPS:
        return matrix.kind in GROUPS[wanted]
    if wanted in KINDS:
        return matrix.kind == wanted
    path = re.sub(r"\[.*", "", matrix.path_in_layer) or "weight"
    # `q_proj` of PEFT is a module around `q_proj.base_layer`: the name of the model as it was works too.
    return any(f".{name}".endswith(f".{wanted}") for name in (path, plain_name(path)))


def _names_all(reduction: Reduction, matrix: WeightMatrix) -> bool:
    """Whether a pattern names a tied weight by each of its names, and so means to cut all that share it."""
    names = [name.removesuffix(".weight") for name in matrix.parameter_names]
    pattern = reduction.matrix[1:-1] if reduction.matrix.startswith("/") else ""
    return len(names) == 1 or all(re.fullmatch(pattern, name) for name in names)


def _matches_stack(matrix: WeightMatrix, reduction: Reduction) -> bool:
    if matrix.stack is None:
        return False
    # `decoder` names the stack `model.decoder.layers`; `decoder.layers` and the full path do so too.
    wanted = reduction.stack
    return wanted is None or f".{wanted}." in f".{matrix.stack}."


def _layers(layer: int | str, depth: int) -> range:
    if layer == "*":
        return range(depth)
    if isinstance(layer, str):
        first, last = map(int, layer.split("-"))
        return range(first, last + 1) if last < depth else range(0)
    index = layer + depth if layer < 0 else layer
    return range(index, index + 1)
