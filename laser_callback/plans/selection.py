"""Which matrices of a model a reduction names: by layer, kind or group, module name or regular expression."""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import overload

import regex
from typing_extensions import override

from laser_callback.plans.kinds import GROUPS, KINDS
from laser_callback.plans.matrices import WeightMatrix, describe
from laser_callback.plans.reduction import STACK, Reduction
from laser_callback.plans.stacks import plain_name
from laser_callback.support.reading import shown
from laser_callback.support.suggest import clipped, closest

_PATIENCE = 5
"""Seconds for one pattern on all names, of which a usual one takes milliseconds."""


class NoSuchMatrixError(ValueError):
    """A reduction matches no matrix of the model."""


class UncuttableError(ValueError, TypeError):
    """A reduction names what cannot be cut: it does not fit the model, because the weight is of the wrong sort."""


class Catalogue(Sequence[WeightMatrix]):
    """The matrices of a model, in its order, and where each is by what a reduction may call it.

    Made once for many reductions: each is then looked up, and none goes through all matrices.
    """

    def __init__(self, matrices: Sequence[WeightMatrix]) -> None:
        self._matrices = list(matrices)
        self.depth: Counter[str | None] = Counter()
        """Layers by stack."""
        # By word, stack and layer, and by whole name: positions.
        self._called: dict[str, dict[str | None, dict[int | None, list[int]]]] = {}
        self._named: dict[str, list[int]] = {}
        for position, matrix in enumerate(self._matrices):
            self.depth[matrix.stack] = max(self.depth[matrix.stack], 1 + (matrix.layer or 0))
            for word in _words(matrix):
                layers = self._called.setdefault(word, {}).setdefault(matrix.stack, {})
                layers.setdefault(matrix.layer, []).append(position)
            for name in _names(matrix):
                self._named.setdefault(name, []).append(position)

    @overload
    def __getitem__(self, index: int) -> WeightMatrix: ...
    @overload
    def __getitem__(self, index: slice) -> list[WeightMatrix]: ...
    @override
    def __getitem__(self, index: int | slice) -> WeightMatrix | list[WeightMatrix]:
        return self._matrices[index]

    @override
    def __len__(self) -> int:
        return len(self._matrices)

    def called(self, word: str) -> dict[str | None, dict[int | None, list[int]]]:
        """By stack and layer, the positions of the matrices of a kind or group, or whose module's name ends so."""
        return self._called.get(word, {})

    def stack_name(self, stack: str) -> str:
        """A stack's path behind what all stacks share, where that names it alone: the same in a model and around it."""
        stacks = [each for each in self.depth if each is not None]
        columns = zip(*(each.split(".") for each in stacks), strict=False)
        shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
        short = ".".join(stack.split(".")[shared:])
        alone = sum(f".{short}." in f".{each}." for each in stacks) == 1
        return short if alone and STACK.fullmatch(short) else stack

    def fitting(self, pattern: str) -> list[int]:
        """Positions of the matrices with a name that ``/pattern/`` fits."""
        return sorted({position for name in _fitting(pattern, self._named) for position in self._named[name]})


def select(matrices: Catalogue, reduction: Reduction) -> list[int]:
    """Positions of the matrices that a reduction names.

    Raises:
        NoSuchMatrixError: if it names none, or none in a layer of its range, with the part of it that is wrong.
        UncuttableError: if it names one with an obstacle.
        ValueError: if it fits several layer stacks, or a weight that is tied to others.
    """
    if reduction.layer is None:
        candidates = matrices.fitting(reduction.matrix[1:-1])
        if not candidates:
            raise _no_such_matrix(matrices, reduction, _instead(matrices, reduction))
    else:
        candidates = _in_layers(matrices, reduction, reduction.layer)
    if reduction.expert is not None:
        experts = [matrices[i].expert for i in candidates]
        candidates = [i for i in candidates if matrices[i].expert == reduction.expert]
        if not candidates:
            raise _no_such_matrix(matrices, reduction, f"expert {reduction.expert}: there are {_span(experts)}")
    if isinstance(reduction.layer, str) and reduction.layer != "*":
        with_it = {matrices[i].layer for i in candidates}
        if without := [layer for layer in _layers(reduction.layer, sys.maxsize) if layer not in with_it]:
            wanted = clipped(reduction.matrix) + ("" if reduction.expert is None else f"[{reduction.expert}]")
            raise _no_such_matrix(
                matrices, reduction, f"layer {_span(without)} of the range has no {wanted}, {_span(with_it)} has"
            )
    for i in candidates:
        if obstacle := matrices[i].obstacle:
            raise UncuttableError(f"the reduction {clipped(reduction)} cuts `{matrices[i].name}`: {obstacle}")
        if matrices[i].kind is None and not _names_all(reduction, matrices[i]):
            tied = [name.removesuffix(".weight") for name in matrices[i].parameter_names]
            pattern = "|".join(map(re.escape, tied))
            raise ValueError(
                f"the reduction {clipped(reduction)} would cut a tied weight, and with it each of {', '.join(tied)}: "
                f"to cut them all, name them all, /{pattern}/"
            )
    return candidates


def _in_layers(matrices: Catalogue, reduction: Reduction, layer: int | str) -> list[int]:
    called = matrices.called(reduction.matrix)
    if not called:
        raise _no_such_matrix(matrices, reduction, _instead(matrices, reduction))
    there = {stack: layers for stack, layers in called.items() if _matches_stack(stack, reduction)}
    if not there:
        if reduction.stack is not None:
            wrong = f"{clipped(reduction.matrix)} is not in {clipped(reduction.stack)}"
            raise _no_such_matrix(matrices, reduction, wrong)
        error = _no_such_matrix(matrices, reduction, f"{clipped(reduction.matrix)} is outside of all layers")
        by_name = replace(reduction, layer=None, matrix=_by_name(matrices, called))
        raise NoSuchMatrixError(f"{error}\nIt is cut by its name: {by_name}")
    found: dict[str | None, list[int]] = {}
    for stack, layers in there.items():
        if chosen := [i for each in _layers(layer, matrices.depth[stack]) for i in layers.get(each, ())]:
            found[stack] = chosen
    if not found:
        known = _span(each for layers in there.values() for each in layers)
        raise _no_such_matrix(matrices, reduction, f"layer {layer}: there are {known} with {clipped(reduction.matrix)}")
    if len(there) > 1:  # also where only the deeper one has the layer: -1 and * mean both, and so does the word
        names = ", ".join(sorted(map(str, there)))
        part = STACK.search(matrices.stack_name(min(map(str, found))))
        raise ValueError(
            f"the reduction {clipped(reduction)} fits several layer stacks ({names}): put the stack's name in front"
            + (f", e.g. {replace(reduction, stack=part[0])}" if part else "")
        )
    return next(iter(found.values()))


def _no_such_matrix(matrices: Sequence[WeightMatrix], reduction: Reduction, wrong: str) -> NoSuchMatrixError:
    return NoSuchMatrixError(
        f"the reduction {clipped(reduction)} matches no matrix of the model: {wrong}. It has:\n{describe(matrices)}"
    )


def _instead(matrices: Sequence[WeightMatrix], reduction: Reduction) -> str:
    """What could be meant by a kind or a name that the model does not have."""
    wanted = reduction.matrix
    without_kind = [matrix for matrix in matrices if matrix.kind is None and matrix.stack is not None]
    if wanted in (*KINDS, *GROUPS) and without_kind:
        first = without_kind[0]
        by_name = replace(reduction, layer=first.layer, matrix=first.path_in_layer)
        return f"none is known as {wanted}; those without a kind are cut by name, e.g. {by_name}"
    kinds = {matrix.kind for matrix in matrices if matrix.kind is not None}
    words = {*GROUPS, *kinds, *(matrix.path_in_layer for matrix in matrices)}
    return f"none is called {clipped(wanted)}{closest(wanted, sorted(words))}".rstrip("?")


def _by_name(matrices: Catalogue, called: dict[str | None, dict[int | None, list[int]]]) -> str:
    """The pattern of a matrix outside of all layers, with all names of a tied weight."""
    first = matrices[next(i for layers in called.values() for each in layers.values() for i in each)]
    return f"/{'|'.join(re.escape(name.removesuffix('.weight')) for name in first.parameter_names)}/"


def _span(numbers: Iterable[int | None]) -> str:
    """``0..29``; or one by one, where some are missing."""
    found = sorted({number for number in numbers if number is not None})
    if not found:
        return "none"
    whole = len(found) > 1 and len(found) == found[-1] - found[0] + 1
    return f"{found[0]}..{found[-1]}" if whole else ", ".join(map(str, found))


def _words(matrix: WeightMatrix) -> set[str]:
    """What stands for a matrix behind its layer: its kind, groups of kinds, and the ends of its module's name."""
    path = re.sub(r"\[.*", "", matrix.path_in_layer) or "weight"
    # `q_proj` of PEFT is a module around `q_proj.base_layer`: the name of the model as it was works too.
    ends = {each.split(".", start)[-1] for each in (path, plain_name(path)) for start in range(each.count(".") + 1)}
    return ends.difference(KINDS, GROUPS) | {
        word for word in (*KINDS, *GROUPS) if matrix.kind in GROUPS.get(word, (word,))
    }


def _names(matrix: WeightMatrix) -> set[str]:
    """What a pattern may fit: a module by its name or a parameter by any of its names, so that a tied weight is refused
    rather than not found.
    """
    tied = {name.removesuffix(".weight") for name in matrix.parameter_names}
    return {re.sub(r"\[\d+\]$", "", matrix.name), re.sub(r"\[.*", "", matrix.name)} | tied


def _names_all(reduction: Reduction, matrix: WeightMatrix) -> bool:
    """Whether a pattern names a tied weight by each of its names, and so means to cut all that share it."""
    names = [name.removesuffix(".weight") for name in matrix.parameter_names]
    return len(names) == 1 or (reduction.layer is None and len(_fitting(reduction.matrix[1:-1], names)) == len(names))


def _fitting(pattern: str, names: Collection[str]) -> list[str]:
    """Those of ``names`` that ``pattern`` fits wholly."""
    known = set(names)
    parts = re.split(r"(?<!\\)\|", pattern)
    literal = [re.sub(r"\\(.)", r"\1", part) for part in parts]
    if list(map(re.escape, literal)) == parts:  # names, as this package writes them: looked up, not tried on each
        return [name for name in dict.fromkeys(literal) if name in known]
    compiled, deadline = regex.compile(pattern), time.monotonic() + _PATIENCE
    try:
        # Python's own `re` cannot be stopped, and a pattern such as (\w+\.?)+x takes it longer than the sun has left.
        return [name for name in names if compiled.fullmatch(name, timeout=max(deadline - time.monotonic(), 1e-3))]
    except TimeoutError:
        raise ValueError(
            f"the pattern {shown(f'/{pattern}/')} takes more than {_PATIENCE} s on the model's names: it repeats what "
            r"repeats, as (\w+\.?)+ does; write each repetition once, e.g. [\w.]+"
        ) from None


def _matches_stack(stack: str | None, reduction: Reduction) -> bool:
    # `decoder` names the stack `model.decoder.layers`; `decoder.layers` and the full path do so too.
    return stack is not None and (reduction.stack is None or f".{reduction.stack}." in f".{stack}.")


def _layers(layer: int | str, depth: int) -> range:
    if layer == "*":
        return range(depth)
    if isinstance(layer, str):
        first, last = map(int, layer.split("-"))
        return range(first, last + 1) if last < depth else range(0)
    index = layer + depth if layer < 0 else layer
    return range(index, index + 1)
