"""The machine's row: the card, the versions, the cores. Fails where the device that was asked for is not there."""

from __future__ import annotations

import os
import platform

import torch
from device import DEVICE, ON_GPU
from models import ASSETS
from rows import row

from laser_callback.support.provenance import versions


def main() -> None:
    """Write the row."""
    if ON_GPU and not torch.cuda.is_available():
        raise SystemExit("LASER_TEST_DEVICE is cuda, and torch sees no CUDA device")
    row(
        "machine",
        device=torch.cuda.get_device_name(DEVICE) if ON_GPU else platform.processor() or platform.machine(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        assets=ASSETS.is_dir(),
        python=platform.python_version(),
        cuda=torch.version.cuda or "-",
        **versions(),
    )


if __name__ == "__main__":
    main()
