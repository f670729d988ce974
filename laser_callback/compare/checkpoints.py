"""Checkpoints that somebody writes in the middle of a reduced pass hold the original weights.

Signal handlers find them in place, since reduced passes step aside for them. Other threads (a timer, asynchronous
saving) do not wait, and a step may save by itself: for these, ``state_dict`` gives the originals.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from torch import Tensor, nn

from laser_callback.plans.matrices import WeightMatrix
from laser_callback.support.interrupts import whole


class OriginalsInCheckpoints:
    """What ``state_dict`` says while an arm's weights are reduced.

    Args:
        model: the module with all that share its parameters.
        matrices: what will be reduced, with the original weights in place.
    """

    def __init__(self, model: nn.Module, matrices: Sequence[WeightMatrix]) -> None:
        originals = {id(matrix.parameter): matrix.parameter.data for matrix in matrices}
        self._hooks: list[tuple[nn.Module, _Originals]] = []
        for module in model.modules():
            own = {name: originals[id(p)] for name, p in module._parameters.items() if id(p) in originals}
            if own:
                self._hooks.append((module, _Originals(own)))

    @whole
    def within(self) -> Generator[None, None, None]:
        """Around a pass."""
        handles = [module.register_state_dict_post_hook(hook) for module, hook in self._hooks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Originals:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        for name, tensor in self._tensors.items():
            if f"{prefix}{name}" in state_dict:
                state_dict[f"{prefix}{name}"] = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        return _Originals, ({},)  # a copy of the module has weights of its own
