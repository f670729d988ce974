"""The finished steps of a long run, in a folder: what was computed once is read back.

A step is a name and a function; its outcome is plain data (JSON) and tensors (safetensors). An interrupted run that is
started again with the same settings reads the steps it had finished and computes the rest, so it ends as it would have
ended. Files appear wholly or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from laser_callback.support.files import write_atomically, write_json
from laser_callback.support.plain_json import strict

Step = tuple[dict[str, Any], dict[str, Tensor]]
"""Plain data and tensors."""


class Journal:
    """Steps kept in ``folder``, or only in memory.

    Args:
        folder: where to keep them; ``None`` keeps nothing.
        settings: whatever the outcome depends on, as plain data.
        resume: go on with what the folder holds.

    Raises:
        FileExistsError: if the folder holds steps and ``resume`` is false.
        ValueError: if it holds steps of other settings, naming what differs.
    """

    def __init__(self, folder: str | Path | None, settings: Mapping[str, Any], resume: bool = False) -> None:
        self._folder = None if folder is None else Path(folder)
        self.restored: list[str] = []
        if self._folder is None:
            return
        state = self._folder / "settings.json"
        current = json.loads(json.dumps(dict(settings)))
        if state.exists():
            if not resume:
                raise FileExistsError(
                    f"`folder` {str(self._folder)!r} holds a run already: go on with it by resume=True (--resume), "
                    "or name another folder"
                )
            saved = json.loads(state.read_text(encoding="utf-8"))
            different = sorted(key for key in {*saved, *current} if saved.get(key) != current.get(key))
            if different:
                shown = ", ".join(f"{key} ({saved.get(key)!r} then, {current.get(key)!r} now)" for key in different)
                raise ValueError(f"the run in {str(self._folder)!r} was made with other settings: {shown}")
        else:
            write_json(state, current)

    def step(self, name: str, compute: Callable[[], Step]) -> Step:
        """The outcome of a step: read back, or computed and kept; either way as JSON gives it back."""
        if self._folder is None:
            return _as_read(compute())
        data_file, tensor_file = self._folder / f"{name}.json", self._folder / f"{name}.safetensors"
        if data_file.exists():
            self.restored.append(name)
            return json.loads(data_file.read_text(encoding="utf-8")), load_file(tensor_file)
        data, tensors = _as_read(compute())
        # The tensors first: a step counts as finished when its JSON is there.
        write_atomically(tensor_file, save({key: value.contiguous() for key, value in tensors.items()}))
        write_json(data_file, data)
        return data, tensors


def _as_read(step: Step) -> Step:
    return json.loads(json.dumps(strict(step[0]))), step[1]
