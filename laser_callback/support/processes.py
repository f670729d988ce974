"""Several processes: gather from all; let the first work alone while the others wait, for as long as it takes.

Contract: within :func:`on_first_rank` the first process sees no process group, so that nothing in it (torchmetrics,
Lightning, a user's step) waits for processes that wait for it. The others wait in a group of their own, since that of
training gives up after half an hour and may know no CPU tensors. What the work returns, or that it failed, all learn.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from laser_callback.support.interrupts import whole

_PATIENCE = timedelta(days=30)

T = TypeVar("T")
Group = Any  # a torch ProcessGroup, or None where there is one process


@contextmanager
def waiting_group() -> Iterator[Group]:
    """A group of all processes that waits for days; ``None`` where there is one process."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield None
        return
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def on_first_rank(group: Group, work: Callable[[], T]) -> T:
    """What ``work`` returns on the first process, on all.

    Raises:
        RuntimeError: on the other processes, if it failed there. The first raises what ``work`` raised.
    """
    if group is None:
        return work()
    message: list[Any] = [None, None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            with _alone():
                message[0] = work()
        except Exception as error:
            failure, message[1] = error, f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(message, src=0, group=group)
    if failure is not None:
        try:
            raise failure
        finally:
            # Its traceback holds this frame, which holds it: a cycle that would keep the group beyond its end.
            del failure
    if message[1] is not None:
        raise RuntimeError(f"the first process failed: {message[1]}")
    result: T = message[0]
    return result


@whole
def _alone() -> Generator[None, None, None]:
    """Within: there is no process group."""
    world = dist.group.WORLD
    dist.group.WORLD = None
    try:
        yield
    finally:
        dist.group.WORLD = world


def share_weights(group: Group, model: nn.Module) -> None:
    """Give all processes the first one's parameters and buffers, in place."""
    if group is not None:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.data, src=0, group=group)


def gather(columns: Any) -> Sequence[Any]:
    """``columns`` of every rank, in rank order, on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return [columns]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, columns)
    return gathered
