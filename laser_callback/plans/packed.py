"""Tell weights that are packed by a quantiser, sharded over devices, or no real numbers: none is a matrix to factorise.

Contract: :func:`obstacle_of` says for one tensor why it cannot be cut, and what to do instead. Since GPTQ and AWQ keep
their weights in buffers, :func:`packed_buffers` finds those.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# What the class of the tensor or of its module shows -> what to do. The first that fits.
_CURES = (
    ("DTensor", "gather sharded weights first (`parameter.full_tensor()`), or run on one device or with DDP"),
    ("bitsandbytes", "call `model.dequantize()`, or load it without a `quantization_config`"),
    ("gguf", "load it with `quantization_config=GgufConfig(dequantize=True)`"),
    ("mxfp4", "load it with `quantization_config=Mxfp4Config(dequantize=True)`"),
    ("compressed_tensors", "load it with `quantization_config=CompressedTensorsConfig(dequantize=True)`"),
    ("gptq|awq|hqq|quanto|torchao|aqlm|bitnet|eetq|higgs|fbgemm", "load the checkpoint that it was quantised from"),
    ("fp8|float8", "load it with `quantization_config=FineGrainedFP8Config(dequantize=True)`"),
)
_OTHERWISE = "load the model without a quantization config (or call `model.dequantize()`)"
_PACKED_BUFFER = re.compile(r"weight(?!.*scale)|^W_q$|^codes$")


def obstacle_of(module: nn.Module, name: str, tensor: Tensor) -> str | None:
    """Why ``tensor`` cannot be cut and what to do instead; ``None`` for an ordinary tensor of 16 bits or more.

    Args:
        module: the module that owns it.
        name: its whole name.
        tensor: a parameter or buffer that is initialised.
    """
    if _is_ordinary(tensor.data):
        return None
    shown = f"{type(tensor).__name__} of {tensor.dtype} in {type(module).__name__}"
    classes = {f"{each.__module__}.{each.__qualname__}" for each in (type(tensor), type(tensor.data), type(module))}
    packer = " ".join([*classes, str(tensor.dtype), "gptq or awq" if name.endswith(".qweight") else ""])
    cure = next((cure for pattern, cure in _CURES if re.search(pattern, packer, re.IGNORECASE)), None)
    if cure is None and type(tensor.data) is Tensor:
        if tensor.is_complex():
            return f"the weight `{name}` is complex ({shown}), which is not supported: only real weights can be cut"
        if tensor.dtype == torch.bool:
            return f"`{name}` holds truth values ({shown}): it is no weight to cut"
        if not tensor.is_floating_point():
            return (
                f"`{name}` holds integers ({shown}): it is no weight to cut; where they are a weight that a quantiser "
                f"has packed, {_OTHERWISE}"
            )
    return f"the weight `{name}` is packed or sharded ({shown}), it has no matrix to cut: {cure or _OTHERWISE}"


def packed_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers of a module that are its packed weights: a module with an ordinary weight has none."""
    if has_ordinary(module):
        return []
    return [
        (name, tensor)
        for name, tensor in module.named_buffers(recurse=False)
        if _PACKED_BUFFER.search(name) and not is_lazy(tensor) and tensor.ndim >= 2 and not _is_ordinary(tensor)
    ]


def has_ordinary(module: nn.Module) -> bool:
    """Whether a parameter of its own, and not one of biases, is an ordinary tensor of two or more dimensions."""
    return any(
        "bias" not in name and not is_lazy(parameter) and parameter.ndim >= 2 and _is_ordinary(parameter.data)
        for name, parameter in module.named_parameters(recurse=False)
    )


def _is_ordinary(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.is_floating_point() and tensor.element_size() >= 2
