"""What a model has besides the matrices that are cut by kind, and why each of them is left alone.

Contract: every parameter of two or more dimensions is either covered by matrices with a kind or listed here, so that
nothing is skipped in silence. What is listed as ``by_name`` can be cut all the same, by a plan that names it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from laser_callback.plans.kinds import FUSED
from laser_callback.plans.matrices import WeightMatrix, find_matrices


@dataclass(frozen=True)
class NotCut:
    """A parameter that no kind or group of a plan reaches.

    Attributes:
        name: under which the model registers it first.
        shape: its shape; empty while it is not initialised.
        reason: why, in a few words.
        by_name: whether a plan can cut it by its name.
    """

    name: str
    shape: tuple[int, ...]
    reason: str
    by_name: bool


def not_cut(model: nn.Module) -> list[NotCut]:
    """The parameters with two or more dimensions that are not cut by kind, in registration order, tied ones once.

    Example:
        >>> for each in not_cut(nn.ModuleDict({"embed": nn.Embedding(9, 4), "patch": nn.Conv1d(2, 4, 3)})):
        ...     print(each.name, each.reason, each.by_name)
        embed.weight an embedding True
        patch.weight a convolution False
    """
    matrices = {id(matrix.module._parameters.get(matrix.attribute)): matrix for matrix in find_matrices(model)}
    found: list[NotCut] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            lazy = is_lazy(parameter)
            if id(parameter) in seen or not (lazy or parameter.ndim >= 2):
                continue
            seen.add(id(parameter))
            matrix = matrices.get(id(parameter))
            if matrix is None or matrix.kind is None or matrix.obstacle:
                name = f"{path}.{attribute}".lstrip(".")
                name = matrix.parameter_names[0] if matrix is not None else name
                shape = () if lazy else tuple(parameter.shape)
                by_name = matrix is not None and not matrix.obstacle
                found.append(NotCut(name, shape, _reason(module, attribute, parameter, matrix), by_name))
    return found


def _reason(module: nn.Module, attribute: str, parameter: nn.Parameter, matrix: WeightMatrix | None) -> str:
    if is_lazy(parameter):
        return "not initialised yet"
    if matrix is not None and matrix.obstacle:
        return matrix.obstacle.partition(":")[0]
    if parameter.numel() == max(parameter.shape):
        return "a vector"
    if "bias" in attribute:
        return "biases"
    if isinstance(module, _ConvNd):
        return "a convolution"
    if isinstance(module, ParametrizationList):
        return "behind a parametrization"
    if isinstance(module, nn.Embedding) or "embed" in f"{type(module).__name__}.{attribute}".lower():
        return "an embedding"
    if matrix is None:
        return f"{parameter.ndim} dimensions"
    name = matrix.name.rpartition(".")[2]
    if "lora_" in matrix.name:
        return "an adapter"
    if matrix.stack is None:
        return "outside of the layers"
    if re.search(r"router|\bgate$|_gate$", f"{type(module).__name__}.{matrix.path_in_layer}", re.IGNORECASE):
        return "a router or gate"
    if name in FUSED:
        return "fused in an order that is not known"
    return "no known kind"
