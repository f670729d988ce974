"""Whether a reduced pass uses the weights that were put in place, or only seems to.

A swap can go unseen: features that were computed before and kept, a graph that was captured or frozen, weights that the
step itself writes (weight averaging for half of the step), weights brought in by hooks. The pass then computes what the
original does, and "no difference" would be a wrong claim.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from laser_callback.support.interrupts import undisturbed, whole
from laser_callback.surgery.replayable import Onlooker, bit_sums
from laser_callback.surgery.swap import reduced


class Watch:
    """What happens to an arm's reduced weights, seen from below autograd and autocast, where kernels are called.

    Args:
        cut: the arm's, in place.
    """

    def __init__(self, cut: reduced) -> None:
        matrices = [matrix for matrix, _ in cut.matrices]
        self._cut = cut
        self._names: dict[int, list[str]] = {}
        for matrix in matrices:
            self._names.setdefault(id(matrix.parameter), []).append(f"`{matrix.name}`")
        self._parameters = {id(matrix.parameter): matrix.parameter for matrix in matrices}
        self._unused = dict.fromkeys(self._names)
        self._written: dict[int, None] = {}
        self._sums: dict[int, Tensor] = {}

    @property
    def unused(self) -> list[str]:
        """Names of matrices that no pass has read so far."""
        return [name for key in self._unused for name in self._names[key]]

    @property
    def written(self) -> list[str]:
        """Names of those that a pass has written to, or exchanged."""
        return [name for key in self._written for name in self._names[key]]

    @whole
    def passing(self) -> Generator[None, None, None]:
        """Around a pass, with the reduced weights in place."""
        with _as_written(), _Dispatch(self):
            yield

    def compare_contents(self) -> None:
        """With the reduced weights in place: whether they are what they were when this was first called."""
        for key, parameter in self._parameters.items():
            now = bit_sums(parameter)
            if not torch.equal(self._sums.setdefault(key, now), now):
                self._written[key] = None

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], where: dict[int, int]) -> None:
        """Hear of one call of an operator. ``where`` are the places in memory of the weights, by the parameter's id."""
        if self._cut.is_suspended:  # this call is a signal handler's
            return
        by_memory = {memory: key for key, memory in where.items()}
        for tensor in _tensors((args, kwargs)):
            key = by_memory.get(_memory(tensor))
            if key is not None:
                self._unused.pop(key, None)
            elif id(tensor) in where and self._parameters[id(tensor)] is tensor:
                self._written[id(tensor)] = None  # it points at other memory now
        for tensor in _written_by(func, args):
            key = by_memory.get(_memory(tensor))
            if key is not None:
                self._written[key] = None


class _Dispatch(Onlooker):
    supports_higher_order_operators = True

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch
        self._where = {key: _memory(parameter) for key, parameter in watch._parameters.items()}

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._watch.called(func, args, kwargs or {}, self._where)
        return func(*args, **(kwargs or {}))


def _as_written() -> AbstractContextManager[Any]:
    """Compiled functions run as they were written: torch.compile skips for good what it first meets under a mode."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def may_keep_weights() -> bool:
    """Whether code has been compiled in this process: it may hold weights of its own, as frozen graphs do."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and bool(dynamo.counters["stats"])


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def _memory(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # no memory of its own: fake, functional, sparse
        return 0


class WritesRefused(AbstractContextManager[None]):
    """Around hooks of a reduced arm: what they write to parameters is undone, and refused.

    Weight averaging that a module does by itself exchanges all weights in the hook at the start of an evaluation, and
    puts them back in the one at its end. Done twice, the second would put back what the first has made of them.

    Args:
        module: whose parameters.
        cure: what to do instead.

    Raises:
        MisconfigurationException: at the end, naming the first of the parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters = dict(module.named_parameters())
        self._before: list[tuple[str, Tensor, int | None]] = []
        self._where: dict[int, list[Tensor]] = {}  # by place in memory, which several may share
        self._saved: dict[int, list[Tensor]] = {}
        self._mode = _Saving(self)
        self._as_written = _as_written()

    @undisturbed
    def __enter__(self) -> None:
        self._before = [(name, p.data, _version(p)) for name, p in self._parameters.items()]
        for _, data, _ in self._before:
            self._where.setdefault(_memory(data), []).append(data)
        self._as_written.__enter__()
        self._mode.__enter__()

    def save(self, tensor: Tensor) -> None:
        """Ahead of a write to ``tensor``."""
        memory = _memory(tensor)
        if memory in self._where and memory not in self._saved:
            self._saved[memory] = [data.clone() for data in self._where[memory]]

    @undisturbed
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        self._mode.__exit__(kind, error, traceback)
        self._as_written.__exit__(kind, error, traceback)
        written = [n for n, data, version in self._before if self._is_other(self._parameters[n], data, version)]
        for name, data, _ in self._before:
            self._parameters[name].data = data
        for memory, contents in self._saved.items():
            for data, content in zip(self._where[memory], contents, strict=True):
                data.copy_(content)
        if written and kind is None:
            more = f" and {len(written) - 1} more" if written[1:] else ""
            raise MisconfigurationException(
                f"a hook at the start or the end of the evaluation writes to `{written[0]}`{more}, as weight averaging "
                "does: original and reduced model would write to the same weights. They are as they were. Put such "
                "weights in place before the evaluation, as Lightning's WeightAveraging callback does"
            )

    def _is_other(self, parameter: Tensor, data: Tensor, version: int | None) -> bool:
        moved = parameter.data_ptr() != data.data_ptr() or version != _version(parameter)
        return moved or _memory(data) in self._saved


class _Saving(Onlooker):
    def __init__(self, refused: WritesRefused) -> None:
        super().__init__()
        self._refused = refused

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _written_by(func, args):
            self._refused.save(tensor)
        return func(*args, **(kwargs or {}))


def _written_by(func: Any, args: tuple[Any, ...]) -> Iterator[Tensor]:
    """The tensors that an operator writes to."""
    schema = getattr(func, "_schema", None)  # operators of higher order have none, and write to nothing
    for argument, value in zip(schema.arguments if schema else (), args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(value)
