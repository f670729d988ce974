"""Settings of the process, other for a while: whatever interrupts that, they are back.

The contexts of torch and of ``warnings`` change them for good if Ctrl-C strikes at their first or last step.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator

from laser_callback.support.interrupts import whole


@whole
def ignoring(*messages: str) -> Generator[None, None, None]:
    """Within: warnings that begin with one of these patterns are not shown."""
    with warnings.catch_warnings():
        for message in messages:
            warnings.filterwarnings("ignore", message=message)
        yield


@whole
def with_gradients(mode: bool) -> Generator[None, None, None]:
    """Within: gradients are recorded, or not."""
    import torch

    with torch.set_grad_enabled(mode):
        yield


@whole
def with_inference(mode: bool) -> Generator[None, None, None]:
    """Within: new tensors belong to inference mode, or are ordinary ones."""
    import torch

    with torch.inference_mode(mode):
        yield
