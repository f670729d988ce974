"""Refuse a model whose weights are packed by a quantiser or sharded over devices: they are no matrices to factorise.

Contract: :func:`refuse_packed` looks at parameters and, since GPTQ and AWQ keep theirs there, at buffers. Its error
names the weight, what holds it, and what to do instead.
"""

from __future__ import annotations

import re

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


def refuse_packed(model: nn.Module) -> None:
    """Do nothing if all weights are ordinary tensors of 16 bits or more.

    Raises:
        TypeError: naming the first weight that is not, and the cure.
    """
    for path, module in model.named_modules():
        for name, tensor in module.named_parameters(recurse=False):
            if not is_lazy(tensor) and tensor.ndim >= 2 and not _is_ordinary(tensor.data):
                raise _error(module, f"{path}.{name}", tensor)
        for name, tensor in module.named_buffers(recurse=False):
            if tensor.ndim >= 2 and _PACKED_BUFFER.search(name) and not _is_ordinary(tensor):
                raise _error(module, f"{path}.{name}", tensor)


def _is_ordinary(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.is_floating_point() and tensor.element_size() >= 2


def _error(module: nn.Module, name: str, tensor: Tensor) -> TypeError:
    shown = f"{type(tensor).__name__} of {tensor.dtype} in {type(module).__name__}"
    classes = {f"{each.__module__}.{each.__qualname__}" for each in (type(tensor), type(tensor.data), type(module))}
    packer = " ".join([*classes, str(tensor.dtype), "gptq or awq" if name.endswith(".qweight") else ""])
    cure = next((cure for pattern, cure in _CURES if re.search(pattern, packer, re.IGNORECASE)), _OTHERWISE)
    return TypeError(f"the weight `{name.lstrip('.')}` is packed or sharded ({shown}), it has no matrix to cut: {cure}")
