"""The keys under which a comparison is logged beside the module's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from laser_callback.compare.options import RunOptions
from laser_callback.compare.reduced_arm import ReducedArm
from laser_callback.results.examples import Logged


def published(
    reductions: Sequence[ReducedArm],
    original: Mapping[str, Logged],
    logged: Mapping[str, Mapping[str, Logged]],
    options: RunOptions,
) -> list[tuple[str, Tensor, str, Logged]]:
    """Of each plan what it logs and its difference to the original: name, value, the module's key, how it is logged.

    Args:
        reductions: the reduced arms.
        original: what the original has logged.
        logged: what each arm has, by the arm's key.
        options: of the comparison.

    Raises:
        MisconfigurationException: if a name is that of another value.
    """
    found: list[tuple[str, Tensor, str, Logged]] = []
    for reduction in reductions:
        if reduction.control:
            continue
        several = len(options.plans) > 1 or reduction.name != options.key_prefix
        prefix = f"{options.key_prefix}/{reduction.name}" if several else options.key_prefix
        for key, value in logged[reduction.key].items():
            found.append((f"{prefix}/{key}", value.value, key, value))
            if key in original:
                delta = value.value - original[key].value.to(value.value.device)
                found.append((f"{prefix}/delta/{key}", delta, key, value))
    taken = set(original)
    for name, *_ in found:
        if name in taken:  # Lightning would average the two without a word
            raise MisconfigurationException(
                f"LaserCallback would log {name!r}, but there is another value of this name: rename the module's "
                f"metric, or give LaserCallback another `key_prefix` than {options.key_prefix!r}"
            )
        taken.add(name)
    return found
