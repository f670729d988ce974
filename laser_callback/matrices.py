"""Find the weight matrices of any model: where each one lives, in which layer, and of which kind.

Contract: :func:`find_matrices` walks any ``nn.Module`` and returns one :class:`WeightMatrix` per matrix, in the order
in which the model registers them. A matrix is a 2-D view of one parameter: the whole parameter (``nn.Linear``), its
transpose (GPT-2's ``Conv1D``), the rows of q, k or v inside a fused projection, or one expert of a 3-D expert tensor.
Nothing here computes with weights or changes them; truncation is in ``spectrum.py``, swapping in ``surgery.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

ATTENTION_KINDS = ("q_proj", "k_proj", "v_proj", "out_proj")
MLP_KINDS = ("fc_in", "fc_up", "fc_out")
KINDS = ATTENTION_KINDS + MLP_KINDS
GROUPS = {"attn": ATTENTION_KINDS, "mlp": MLP_KINDS, "all": KINDS}

# Last component of the module's name -> kind. Names that mean different things inside and outside of an attention
# block (GPT-2's `c_proj`, BERT's `dense`, T5's `wo`) are in the two tables below instead.
_NAMES = {
    "q_proj": ("q_proj", "query", "q", "q_lin", "wq", "to_q", "q_proj_weight"),
    "k_proj": ("k_proj", "key", "k", "k_lin", "wk", "to_k", "k_proj_weight"),
    "v_proj": ("v_proj", "value", "v", "v_lin", "wv", "to_v", "v_proj_weight"),
    "out_proj": ("o_proj", "out_proj", "out_lin"),
    "fc_in": ("gate_proj", "fc_in", "fc1", "c_fc", "dense_h_to_4h", "lin1", "linear1", "w1", "wi", "wi_0"),
    "fc_up": ("up_proj", "w3", "wi_1"),
    "fc_out": ("down_proj", "fc_out", "fc2", "dense_4h_to_h", "lin2", "linear2", "w2"),
}
_KIND_OF_NAME = {name: kind for kind, names in _NAMES.items() for name in names}
_IN_ATTENTION = dict.fromkeys(("c_proj", "dense", "proj", "o", "wo", "Wo"), "out_proj")
_OUTSIDE_ATTENTION = {
    **{"intermediate.dense": "fc_in", "ffn": "fc_in"},
    **dict.fromkeys(("c_proj", "wo", "Wo", "output.dense", "ffn_output"), "fc_out"),
}
_QKV = ("q_proj", "k_proj", "v_proj")
_FUSED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("query_key_value", "qkv_proj", "qkv", "c_attn", "Wqkv", "in_proj_weight"), _QKV),
    **dict.fromkeys(("gate_up_proj", "Wi"), ("fc_in", "fc_up")),
}
# Attention classes whose fused rows are (key/value head, its queries | k | v, head size), not q | k | v in blocks.
_PER_HEAD = ("NeoX", "Bloom", "Persimmon", "Falcon", "GPTBigCode", "MiniMaxLightning")
_UNKNOWN_LAYOUT = ("CodeGen",)  # interleaved over the shards it was trained on

_Index = tuple["int | slice | Tensor", ...]


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
        module: the module that owns the parameter, and ``attribute`` its name there.
    """

    name: str
    stack: str | None
    layer: int | None
    kind: str | None
    expert: int | None
    shape: tuple[int, int]
    parameter_names: tuple[str, ...]
    module: nn.Module = field(repr=False)
    attribute: str = field(repr=False)
    transposed: bool = field(default=False, repr=False)
    index: _Index = field(default=(), repr=False)

    @property
    def parameter(self) -> nn.Parameter:
        """The live parameter (looked up on each use: wrappers may replace the object)."""
        parameter = getattr(self.module, self.attribute)
        assert isinstance(parameter, nn.Parameter)
        return parameter

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
        matrix = parameter[self.index]
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
        is listed; what has no ``kind`` (routers, embeddings, heads, adapters) is only ever cut when named.

    Raises:
        TypeError: if a weight is packed (quantised) or sharded, so that it has no matrix to factorise.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(_clean(name))

    stacks = _layer_stacks(model)
    matrices: list[WeightMatrix] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not _holds_matrices(module, path, attribute, parameter):
                continue
            seen.add(id(parameter))
            _refuse_packed(module, path, attribute, parameter)
            stack, layer = _place(path, stacks)
            own_names = tuple(names[id(parameter)])
            matrices += _matrices_of(model, module, _clean(path), attribute, stack, layer, own_names)
    return matrices


def layer_stacks(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The model's layer stacks: path (as in :attr:`WeightMatrix.stack`) -> its layers in order, each layer once."""
    owners: dict[nn.Module, str] = {}
    for path, stack in _layer_stacks(model).items():
        for layer in _layers(stack).values():
            owners.setdefault(layer, _clean(path))
    stacks: dict[str, list[nn.Module]] = {}
    for layer, path in owners.items():
        stacks.setdefault(path, []).append(layer)
    return stacks


def describe(matrices: list[WeightMatrix]) -> str:
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
        lines.append(
            f"{stack}: layers {layers[0]}..{layers[-1]}, kinds {', '.join(kinds) or 'none known'}, "
            f"matrices {', '.join(shown)}"
        )
    return "\n".join(lines) or "the model has no weight matrices"


# ---- layer stacks ----------------------------------------------------------------------------------------------------


def _layer_stacks(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost lists of layers: a ModuleList inside a layer (experts, T5's sub-layers) is part of that layer."""
    if _is_stack(model):
        return {"": model}
    stacks: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        stacks |= {f"{name}.{path}".rstrip("."): stack for path, stack in _layer_stacks(child).items()}
    return stacks


def _layers(stack: nn.Module) -> dict[str, nn.Module]:
    """The layers by name, in order; unlike ``named_children`` also the second time that one is used."""
    return {name: layer for name, layer in stack._modules.items() if layer is not None}


def _is_stack(module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    layers = list(_layers(module).values())
    if not layers or not all(any(p.ndim >= 2 for p in layer.parameters()) for layer in layers):
        return False
    composite = all(any(True for _ in layer.children()) for layer in layers)
    alike = len({type(layer) for layer in layers}) == 1
    if isinstance(module, nn.Sequential):  # a Sequential is a stack (timm) only when it repeats one composite block
        return alike and composite and len(layers) > 1
    return alike or composite


def _place(path: str, stacks: dict[str, nn.Module]) -> tuple[str | None, int | None]:
    for stack, module in stacks.items():
        prefix = f"{stack}." if stack else ""
        if path.startswith(prefix) and path != stack:
            index = path.removeprefix(prefix).split(".", 1)[0]
            return _clean(stack), list(_layers(module)).index(index)
    return None, None


# ---- matrices of one parameter ---------------------------------------------------------------------------------------


def _holds_matrices(module: nn.Module, path: str, attribute: str, parameter: nn.Parameter) -> bool:
    if "bias" in attribute or is_lazy(parameter):  # expert biases are (experts, features): they only look like matrices
        return False
    return parameter.ndim == 2 or (
        parameter.ndim == 3 and ("expert" in f"{path}.{attribute}" or "Expert" in type(module).__name__)
    )


def _matrices_of(
    model: nn.Module,
    module: nn.Module,
    path: str,
    attribute: str,
    stack: str | None,
    layer: int | None,
    parameter_names: tuple[str, ...],
) -> Iterator[WeightMatrix]:
    parameter = getattr(module, attribute)
    name = path if path and attribute == "weight" else f"{path}.{attribute}".lstrip(".")
    kinds: tuple[str | None, ...] = (None,)
    experts: list[int | None] = list(range(parameter.shape[0])) if parameter.ndim == 3 else [None]
    if stack is not None:
        in_layer = name.removeprefix(f"{stack}.").partition(".")[2]  # a model may be called `attention_model`
        kinds = _kinds(model, name, in_layer, module)
        listed = re.search(r"\bexperts\.(\d+)\.", in_layer)
        if listed and parameter.ndim == 2:
            experts = [int(listed[1])]

    # Conv1D and some expert tensors keep (in, out); reading transposes, so that rows are always outputs.
    transposed = type(module).__name__ == "Conv1D" or (parameter.ndim == 3 and _is_transposed(module))
    out_axis_size = parameter.shape[-1] if transposed else parameter.shape[-2]
    in_size = parameter.shape[-2] if transposed else parameter.shape[-1]

    rows_of: dict[str | None, slice | Tensor] = {kinds[0]: slice(None)}
    if len(kinds) > 1:
        parts = _fused_rows(model, path, module, kinds, out_axis_size, in_size)
        rows_of = {None: slice(None)} if parts is None else dict(zip(kinds, parts, strict=True))

    for expert in experts:
        for kind, rows in rows_of.items():
            expert_index: _Index = () if expert is None or parameter.ndim == 2 else (expert,)
            index = (*expert_index, slice(None), rows) if transposed else (*expert_index, rows)
            count = len(range(*rows.indices(out_axis_size))) if isinstance(rows, slice) else len(rows)
            suffix = f"[{kind}]" if len(rows_of) > 1 else ""
            suffix += f"[{expert}]" if expert_index else ""
            yield WeightMatrix(
                name=name + suffix,
                stack=stack,
                layer=layer,
                kind=kind,
                expert=expert,
                shape=(count, in_size),
                parameter_names=parameter_names,
                module=module,
                attribute=attribute,
                transposed=transposed,
                index=index,
            )


def _kinds(model: nn.Module, name: str, in_layer: str, module: nn.Module) -> tuple[str | None, ...]:
    """The kind of the matrix ``name`` (``in_layer`` without its layer's path); several for a fused one, else one."""
    parent_path, _, last = _unwrapped(in_layer).rpartition(".")
    if "lora_" in in_layer or isinstance(module, nn.Embedding) or hasattr(module, "moe_num_experts"):
        return (None,)  # the last: DBRX stacks its experts in one 2-D parameter
    if last in _FUSED:
        return _FUSED[last]
    if last == "up_proj" and not hasattr(_submodule(model, _unwrapped(name).rpartition(".")[0]), "gate_proj"):
        return ("fc_in",)  # an MLP without a gate (MPT, Nemotron)
    in_attention = re.search(r"attn|attention", parent_path.lower()) is not None
    if in_attention and last in _IN_ATTENTION:
        return (_IN_ATTENTION[last],)
    if not in_attention:
        two = f"{parent_path.rpartition('.')[2]}.{last}"
        kind = _OUTSIDE_ATTENTION.get(last) or _OUTSIDE_ATTENTION.get(two)
        if kind:
            return (kind,)
    return (_KIND_OF_NAME.get(last),)


def _fused_rows(
    model: nn.Module, path: str, module: nn.Module, kinds: tuple[str | None, ...], out_size: int, in_size: int
) -> list[slice | Tensor] | None:
    """Which output rows belong to each kind; ``None`` where the layout is unknown (one matrix without a kind)."""
    if len(kinds) == 2:  # gate and up
        if "GptOss" in type(module).__name__ or not getattr(module, "is_concatenated", True):  # gate and up alternate
            return [slice(0, None, 2), slice(1, None, 2)]
        return [slice(0, out_size // 2), slice(out_size // 2, None)]

    parent_path = _unwrapped(path).rpartition(".")[0]
    owner = module if isinstance(module, nn.MultiheadAttention) else _submodule(model, parent_path)
    class_name, config = type(owner).__name__, getattr(owner, "config", None)
    heads = _first_int(owner, "num_heads", "num_attention_heads") or _first_int(config, "num_attention_heads")
    if any(name in class_name for name in _UNKNOWN_LAYOUT) or hasattr(owner, "q_attn"):
        return None  # with `q_attn` the fused weight is k | v: GPT-2's cross-attention
    if any(name in class_name for name in _PER_HEAD):
        kv_heads = _first_int(owner, "num_kv_heads", "kv_heads") or heads
        if not heads or not kv_heads or out_size % (heads + 2 * kv_heads):
            return None
        rows = torch.arange(out_size).view(kv_heads, heads // kv_heads + 2, -1)
        return [rows[:, :-2].reshape(-1), rows[:, -2].reshape(-1), rows[:, -1].reshape(-1)]
    sizes = [in_size] * 3
    if heads:
        kv_heads = _first_int(owner, "num_key_value_heads") or _first_int(config, "num_key_value_heads") or heads
        head_size = _first_int(owner, "head_dim") or _first_int(config, "head_dim") or in_size // heads
        grouped = [heads * head_size, kv_heads * head_size, kv_heads * head_size]
        sizes = grouped if sum(grouped) == out_size else sizes
    if sum(sizes) != out_size:
        return None
    bounds = [0, sizes[0], sizes[0] + sizes[1], out_size]
    return [slice(bounds[part], bounds[part + 1]) for part in range(3)]


def _is_transposed(module: nn.Module) -> bool:
    """Whether an expert module keeps (expert, in, out): its two shapes say so (Llama 4), or transformers does."""
    up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if isinstance(up, Tensor) and isinstance(down, Tensor) and up.ndim == down.ndim == 3:
        return up.shape[2] == 2 * down.shape[1]
    return bool(getattr(module, "is_transposed", False))


def _first_int(owner: object, *names: str) -> int | None:
    return next((value for name in names if isinstance(value := getattr(owner, name, None), int)), None)


def _refuse_packed(module: nn.Module, path: str, attribute: str, parameter: nn.Parameter) -> None:
    data = parameter.data
    if type(data) is torch.Tensor and data.is_floating_point() and data.element_size() >= 2:
        return
    packing = f"{type(parameter).__name__} of {data.dtype} in {type(module).__name__}"
    raise TypeError(
        f"The weight `{path}.{attribute}` is packed or sharded ({packing}), so it has no matrix to cut. "
        "Load the model without a quantization config (or call `model.dequantize()`), and gather sharded weights first."
    )


def _submodule(model: nn.Module, path: str) -> nn.Module:
    """``model.get_submodule`` for a cleaned path."""
    module = model
    for part in filter(None, path.split(".")):
        module = getattr(getattr(module, "_orig_mod", module), part)
    return getattr(module, "_orig_mod", module)


def _unwrapped(name: str) -> str:
    """The name without the component under which PEFT keeps a wrapped layer."""
    return name.removesuffix(".base_layer")


def _clean(name: str) -> str:
    """The name as the user wrote the model: without the wrapper that ``torch.compile`` puts in."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")
