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

from safetensors.torch import save
from torch import Tensor

from laser_callback.support.checkpoints import read_tensors
from laser_callback.support.files import need_writable, write_atomically, write_json
from laser_callback.support.plain_json import plain
from laser_callback.support.reading import read_plain, shown, typed

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
        ValueError: if it holds steps of other settings, naming what differs, or something that is no journal.
        OSError: if it cannot be written.
    """

    def __init__(self, folder: str | Path | None, settings: Mapping[str, Any], resume: bool = False) -> None:
        self._folder = None if folder is None else Path(folder)
        self.restored: list[str] = []
        if self._folder is None:
            return
        state = self._folder / "settings.json"
        need_writable(folder=state)
        current = _as_json(settings)
        if state.exists():
            if not resume:
                raise FileExistsError(
                    f"`folder` {str(self._folder)!r} holds a run already: go on with it by resume=True (--resume), "
                    "or name another folder"
                )
            saved = read_plain(state, "folder", lambda data: typed(dict[str, Any], data))
            different = sorted(key for key in {*saved, *current} if saved.get(key) != current.get(key))
            if different:
                changes = (f"{k} ({shown(saved.get(k))} then, {shown(current.get(k))} now)" for k in different)
                raise ValueError(f"the run in {str(self._folder)!r} was made with other settings: {', '.join(changes)}")
        else:
            write_json(state, current)

    def step(
        self, name: str, compute: Callable[[], Step], make: Callable[[Any], Any] = lambda data: data
    ) -> tuple[Any, dict[str, Tensor]]:
        """The outcome of a step: read back, or computed and kept; either way as JSON gives it back.

        Args:
            name: of the step, and of its files.
            compute: gives the outcome.
            make: makes of the plain data what is wanted, or refuses them.

        Raises:
            ValueError: if the folder holds something else under this name.
        """
        if self._folder is None:
            data, tensors = compute()
            return make(_as_json(data)), tensors
        data_file, tensor_file = self._folder / f"{name}.json", self._folder / f"{name}.safetensors"
        if data_file.exists():
            self.restored.append(name)
            try:
                return read_plain(data_file, "folder", make), read_tensors(tensor_file, "folder")
            except (ValueError, FileNotFoundError) as error:
                raise ValueError(f"{error}; without {name}.json the step is done anew") from error
        data, tensors = compute()
        # The tensors first: a step counts as finished when its JSON is there.
        write_atomically(tensor_file, save({key: value.contiguous() for key, value in tensors.items()}))
        write_json(data_file, data)
        return make(_as_json(data)), tensors


def _as_json(data: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(plain(data)))
