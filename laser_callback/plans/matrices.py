"""Find the weight matrices of any model: where each one lives, in which layer, and of which kind.

Contract: :func:`find_matrices` walks any ``nn.Module`` and returns one :class:`WeightMatrix` per matrix, in the order
in which the model registers them. A matrix is a 2-D view of one parameter: the whole parameter (``nn.Linear``), its
transpose (GPT-2's ``Conv1D``), the rows of q, k or v inside a fused projection, or one expert of a 3-D expert tensor.
Nothing here computes with weights or changes them; truncation is in ``spectrum.py``, swapping in ``surgery.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from laser_callback.plans.fused import Rows, rows_of_kinds
from laser_callback.plans.kinds import KINDS, kinds_of
from laser_callback.plans.packed import has_ordinary, obstacle_of, packed_buffers
from laser_callback.plans.stacks import clean_name, passes_through, place_of, plain_name, stacks_by_path, submodule
from laser_callback.support.stored import Stored, contents, place

_Index = tuple[int | Rows | None, ...]


@dataclass(frozen=True, eq=False)
class WeightMatrix:
    """One weight matrix of a model: a 2-D view of (a part of) one parameter.

    Attributes:
        name: the module's path, e.g. ``model.layers.27.mlp.gate_proj``; parts of a fused parameter and single experts
            carry a suffix, e.g. ``...attn.c_attn[q_proj]``, ``...experts.down_proj[3]``.
        stack: path of the layer stack (``model.layers``), or ``None`` outside of any stack.
        layer: index in the stack, or ``None``.
        kind: one of :data:`KINDS`, or ``None`` for what is only cut when named (routers, heads, embeddings).
        expert: index of the expert in a 3-D expert tensor or in a list of experts, or ``None``.
        shape: (rows, columns); rows are output features, also where the parameter is stored transposed.
        parameter_names: every name under which the parameter is registered (several when it is tied).
        passes: how often a forward pass goes through it; more than once where layers share their weights.
        is_bias: it is the :attr:`bias` of another.
        module: the module that owns the parameter, and ``attribute`` its name there.
        obstacle: why it cannot be cut and what to do instead, or ``None``. A plan that names it is refused.
    """

    name: str
    stack: str | None
    layer: int | None
    kind: str | None
    expert: int | None
    shape: tuple[int, int]
    parameter_names: tuple[str, ...]
    passes: int
    module: nn.Module = field(repr=False)
    attribute: str = field(repr=False)
    transposed: bool = field(default=False, repr=False)
    index: _Index = field(default=(), repr=False)
    obstacle: str | None = field(default=None, repr=False)
    is_bias: bool = field(default=False, repr=False)

    @property
    def bias(self) -> WeightMatrix | None:
        """What the layer adds to the matrix' outputs, as a matrix of one column, or ``None`` where it adds nothing."""
        names = (self.attribute.replace("weight", "bias"), f"{self.attribute}_bias", "in_proj_bias")
        # The last is of an `nn.MultiheadAttention` with `kdim`: three weights, and one bias of all.
        for name in names[: 3 if isinstance(self.module, nn.MultiheadAttention) and self.kind else 2]:
            tensor = getattr(self.module, name, None)
            if name != self.attribute and isinstance(tensor, Tensor):
                break
        else:
            return None
        rows = self.index[-1]
        if name == "in_proj_bias" and self.attribute != "in_proj_weight":
            start = ("q_proj", "k_proj", "v_proj").index(str(self.kind)) * self.shape[0]
            rows = slice(start, start + self.shape[0])
        place = (*self.index[: -2 if self.transposed else -1], rows, None)
        whole = f"{self.name}.bias"
        obstacle = obstacle_of(self.module, whole, tensor)
        if not isinstance(tensor, nn.Parameter) or tensor.ndim != len(place) - 1:
            obstacle = f"`{whole}` is no parameter with one number for each output: it can only be kept, bias=kept"
        return replace(
            self,
            name=whole,
            kind=None,
            shape=(self.shape[0], 1),
            parameter_names=tuple(f"{one.removesuffix(self.attribute)}{name}" for one in self.parameter_names),
            attribute=name,
            transposed=False,
            index=place,
            obstacle=obstacle,
            is_bias=True,
        )

    @property
    def parameter(self) -> nn.Parameter:
        """The live parameter (looked up on each use: wrappers may replace the object)."""
        parameter = getattr(self.module, self.attribute)
        assert isinstance(parameter, nn.Parameter)
        return parameter

    @property
    def value(self) -> Tensor:
        """The matrix as it is now, shape ``self.shape``, outside of autograd.

        A view where one exists; of a parameter that lies in a file, a copy that is read at each use.
        """
        where = place(self.parameter)
        if isinstance(where, Stored) and len(where.shape) == 3 and isinstance(self.index[0], int):
            return self._oriented(where[self.index[0]].read()[self.index[1:]])  # and not the other experts
        return self.read(contents(where))

    @property
    def max_rank(self) -> int:
        """min(rows, columns)."""
        return min(self.shape)

    @property
    def path_in_layer(self) -> str:
        """The name without the layer's path: ``mlp.gate_proj``. The whole name outside of a stack."""
        layer = f"{self.stack}.{self.layer}".lstrip(".")
        return self.name if self.stack is None else self.name.removeprefix(layer).lstrip(".")

    def read(self, parameter: Tensor) -> Tensor:
        """The matrix inside ``parameter`` (any shape) as a tensor of shape ``self.shape``; a view where one exists."""
        return self._oriented(parameter[self.index])

    def _oriented(self, matrix: Tensor) -> Tensor:
        return matrix.mT if self.transposed else matrix

    def write(self, parameter: Tensor, value: Tensor) -> None:
        """Put ``value``, shape ``self.shape``, into its place inside ``parameter``, in place."""
        parameter[self.index] = (value.mT if self.transposed else value).to(parameter.dtype)


def find_matrices(model: nn.Module) -> list[WeightMatrix]:
    """List the weight matrices of a model.

    Args:
        model: any module: a transformers model, a LightningModule around one, or plain PyTorch.

    Returns:
        One entry per matrix, in registration order. Tied parameters appear once, with all their names. Everything 2-D
        is listed; what has no ``kind`` (routers, embeddings, heads, adapters) is only ever cut when named, and what has
        an ``obstacle`` (packed, sharded, complex, made from others, in the memory of another) not at all.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(clean_name(name))

    stacks, shared = stacks_by_path(model), _shared_memory(model)
    matrices: list[WeightMatrix] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        for attribute, tensor, obstacle in _weights(path, module):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            stack, layer = place_of(path, stacks)
            whole = f"{clean_name(path)}.{attribute}".lstrip(".")
            called = [clean_name(path) if path and attribute == "weight" else whole]
            if obstacle and path and attribute != "weight" and not has_ordinary(module):
                called.append(clean_name(path))  # what is packed goes by any attribute's name: it is what its module is
            owned = (
                attribute,
                tensor,
                obstacle or shared.get(id(tensor)),
                stack,
                layer,
                (*names.get(id(tensor), [whole]),),
            )
            for name in called:
                matrices += _matrices_of(model, module, clean_name(path), name, *owned)
    return matrices


def _shared_memory(model: nn.Module) -> dict[int, str]:
    """By ``id`` of a parameter that lies in the memory of others, which are other objects: what to do about it."""
    placed: dict[int, list[tuple[int, int, int, str]]] = {}
    for name, parameter in model.named_parameters():
        if type(parameter.data) is not Tensor or is_lazy(parameter) or parameter.is_meta or not parameter.numel():
            continue
        first = parameter.data_ptr()
        steps = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
        memory = parameter.untyped_storage().data_ptr()
        end = first + (steps + 1) * parameter.element_size()
        placed.setdefault(memory, []).append((first, end, id(parameter), clean_name(name)))
    shared: dict[int, str] = {}
    for members in placed.values():
        for first, end, key, _ in members if len(members) > 1 else ():
            others = [
                f"`{name}`" for start, stop, other, name in members if other != key and start < end and first < stop
            ]
            if others:
                shared[key] = (
                    f"its memory is also that of {', '.join(others)}: tie them, so that both are one parameter, or "
                    "give each its own, `weight.data = weight.data.clone()`"
                )
    return shared


def same_name(one: str, other: str) -> bool:
    """Whether two names can be of one matrix: a module around the model puts its own name in front."""
    longer, shorter = (one, other) if len(one) > len(other) else (other, one)
    return longer == shorter or longer.endswith(f".{shorter}")


def known_as(name: str, known: Iterable[str]) -> str | None:
    """Which of the ``known`` names is that of the matrix ``name``; ``None`` if it is none of them, or any of several.

    >>> known_as("2.0", ["0", "2.0"]), known_as("net.2.0", ["0", "2.0"]), known_as("0", ["1.0", "2.0"])
    ('2.0', '2.0', None)
    """
    # Of names within names, as `nn.Sequential` has them, the one with the least in front.
    found = sorted((abs(len(each) - len(name)), each) for each in known if same_name(each, name))
    alone = len(found) == 1 or (len(found) > 1 and found[0][0] < found[1][0])
    return found[0][1] if alone else None


def describe(matrices: Sequence[WeightMatrix]) -> str:
    """What exists, in a few lines, for error messages."""
    lines = []
    by_stack: dict[str | None, list[WeightMatrix]] = {}
    for matrix in matrices:
        by_stack.setdefault(matrix.stack, []).append(matrix)
    for stack, members in by_stack.items():
        if stack is None:
            shown = [m.name for m in members[:8]] + (["..."] if len(members) > 8 else [])
            lines.append(f"outside of the layers: {', '.join(shown)}")
            continue
        layers = sorted({m.layer for m in members if m.layer is not None})
        kinds = [kind for kind in KINDS if any(m.kind == kind for m in members)]
        paths = sorted({re.sub(r"\[.*", "", m.path_in_layer) for m in members})
        shown = paths[:12] + (["..."] if len(paths) > 12 else [])
        passes = max(m.passes for m in members)
        shared = f" (shared: one runs {passes} times)" if passes > 1 else ""
        lines.append(
            f"{stack}: layers {layers[0]}..{layers[-1]}{shared}, kinds {', '.join(kinds) or 'none known'}, "
            f"matrices {', '.join(shown)}"
        )
    return "\n".join(lines) or "the model has no weight matrices"


# ---- matrices of one parameter ---------------------------------------------------------------------------------------


def _weights(path: str, module: nn.Module) -> Iterator[tuple[str, Tensor, str | None]]:
    """The tensors of a module that are matrices or hold some, by attribute; and why they cannot be cut."""
    made = _made(module)
    for attribute, parameter in module.named_parameters(recurse=False):
        if "bias" in attribute or is_lazy(parameter):  # expert biases, (experts, features), only look like matrices
            continue
        if isinstance(module, ParametrizationList) or any(attribute.startswith(f"{name}_") for name in made):
            continue  # a part of what another weight is made from
        obstacle = obstacle_of(module, f"{clean_name(path)}.{attribute}".lstrip("."), parameter)
        experts = parameter.ndim == 3 and ("expert" in f"{path}.{attribute}" or "Expert" in type(module).__name__)
        if parameter.ndim == 2 or experts or (obstacle and parameter.ndim > 2):
            yield attribute, parameter, obstacle
    for attribute, tensor in packed_buffers(module):
        yield attribute, tensor, obstacle_of(module, f"{clean_name(path)}.{attribute}".lstrip("."), tensor)
    for attribute, (like, cure) in made.items():
        if like is not None and like.ndim == 2:
            yield attribute, like, f"it is no parameter, but made from others in each pass. Make it one first: {cure}"


def _made(module: nn.Module) -> dict[str, tuple[Tensor | None, str]]:
    """The tensors of a module that are made anew in each pass -> one of their shape, and how to make them parameters.

    These are what weight or spectral normalisation, other parametrizations, and pruning that is not made permanent
    leave under the name of the weight. None is computed here, for spectral normalisation counts its passes.
    """
    made: dict[str, tuple[Tensor | None, str]] = {}
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            like = getattr(module, f"{hook.name}_v")
            made[hook.name] = like, f"torch.nn.utils.remove_weight_norm(module, {hook.name!r})"
        elif isinstance(hook, SpectralNorm):
            like = getattr(module, f"{hook.name}_orig")
            made[hook.name] = like, f"torch.nn.utils.remove_spectral_norm(module, {hook.name!r})"
        elif isinstance(hook, BasePruningMethod):
            name = hook._tensor_name
            made[name] = getattr(module, f"{name}_orig"), f"torch.nn.utils.prune.remove(module, {name!r})"
    for attribute, parts in getattr(module, "parametrizations", {}).items():
        last = [None, *parts.parameters(recurse=False)][-1]
        made[attribute] = last, f"torch.nn.utils.parametrize.remove_parametrizations(module, {attribute!r})"
    return made


def _matrices_of(
    model: nn.Module,
    module: nn.Module,
    path: str,
    name: str,
    attribute: str,
    parameter: Tensor,
    obstacle: str | None,
    stack: str | None,
    layer: int | None,
    parameter_names: tuple[str, ...],
) -> Iterator[WeightMatrix]:
    parent = submodule(model, plain_name(path).rpartition(".")[0])
    passes = 1 if stack is None else passes_through(model, stack, parameter_names)
    in_layer = "" if stack is None else name.removeprefix(f"{stack}.").partition(".")[2]
    kinds: tuple[str | None, ...] = (None,)
    if stack is not None:  # only within its layer, since a model may be called `attention_model`
        kinds = kinds_of(plain_name(in_layer), module, parent)

    # Conv1D and some expert tensors keep (in, out); reading transposes, so that rows are always outputs.
    transposed = type(module).__name__ == "Conv1D" or (parameter.ndim == 3 and _is_transposed(module))
    out_size, in_size = parameter.shape[-2:][:: -1 if transposed else 1]
    parts: list[Rows] | None = [slice(None)]
    if obstacle:
        parts = [slice(None) for _ in kinds]  # which rows are whose is not asked
    elif len(kinds) > 1:
        owner = module if isinstance(module, nn.MultiheadAttention) else parent
        parts = rows_of_kinds(kinds, module, owner, out_size, in_size)
    if parts is None:
        kinds, parts = (None,), [slice(None)]

    listed = re.search(r"\bexperts\.(\d+)\.", in_layer)
    experts = range(parameter.shape[0]) if parameter.ndim == 3 else [int(listed[1]) if listed else None]
    for expert in experts:
        place: _Index = (expert,) if parameter.ndim == 3 and expert is not None else ()
        for kind, rows in zip(kinds, parts, strict=True):
            suffix = f"[{kind}]" if len(kinds) > 1 else ""
            yield WeightMatrix(
                name=name + suffix + (f"[{expert}]" if place else ""),
                stack=stack,
                layer=layer,
                kind=kind,
                expert=expert,
                shape=(len(range(*rows.indices(out_size))) if isinstance(rows, slice) else len(rows), in_size),
                parameter_names=parameter_names,
                passes=passes,
                module=module,
                attribute=attribute,
                transposed=transposed,
                index=(*place, slice(None), rows) if transposed else (*place, rows),
                obstacle=obstacle,
            )


def _is_transposed(module: nn.Module) -> bool:
    """Whether an expert module keeps (expert, in, out): its two shapes say so (Llama 4), or transformers does."""
    up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if isinstance(up, Tensor) and isinstance(down, Tensor) and up.ndim == down.ndim == 3:
        return up.shape[2] == 2 * down.shape[1]
    return bool(getattr(module, "is_transposed", False))
