"""What an evaluation step has returned, read as one outcome per example.

A mapping, a dataclass or a named tuple, nested or in a tuple with a loss, names outcomes and descriptions. An outcome
is one number or bool per example: a tensor, an array, a list, a column, or :class:`Outcomes`. Contract: nothing that
may have been meant as an outcome is passed over without a reason to tell, and the number of examples is the length that
the outcomes share.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from laser_callback.stats.outcomes import Outcomes, as_float64
from laser_callback.support.plain_json import label, text_of

DESCRIPTIONS = ("id", "cluster", "group", "prompt", "answer", "prediction", "continuation")
ORIGINAL = "original"


@dataclass
class Returned:
    """One batch, all arms.

    Attributes:
        size: the number of examples.
        outcomes: by arm and name, one per example.
        described: by arm and description, one per example.
        single: by arm and name, where the batch is one example: what is an outcome if it is one in other batches.
        unused: by name, why what was returned is no outcome per example; empty for one number for the whole batch.
        integers: names of whole numbers, which may be labels: they are outcomes where they are logged.
        doubt: why the outcomes may not be of examples.
    """

    size: int
    outcomes: dict[str, dict[str, Outcomes]] = field(default_factory=dict)
    described: dict[str, dict[str, list[Hashable]]] = field(default_factory=dict)
    single: dict[str, dict[str, Outcomes]] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    integers: set[str] = field(default_factory=set)
    doubt: str = ""


def read_returned(outputs: Mapping[str, Any], batch: Any) -> Returned:
    """Read what each arm's step has returned for one batch."""
    named = {arm: dict(_named(output)) for arm, output in outputs.items()}
    integers: set[str] = set()
    values = {
        arm: {
            name: _outcomes(name, value, integers) for name, value in by_name.items() if not _describes(name, by_name)
        }
        for arm, by_name in named.items()
    }
    labels = {
        arm: {
            name: _labels(value)
            for name, value in by_name.items()
            # The examples are the same for all arms.
            if value is not None and _describes(name, by_name) and (arm == ORIGINAL or is_own(name))
        }
        for arm, by_name in named.items()
    }
    original = values.get(ORIGINAL, {}).values()
    inside = list(_lengths(batch))
    counts = [len(value.values) for value in original if isinstance(value, Outcomes)]
    described = [len(values) for values in labels.get(ORIGINAL, {}).values() if values is not None]
    size = _size(counts, described, inside)
    found = Returned(size, integers=integers)
    for arm, by_name in values.items():
        found.outcomes[arm], found.single[arm], found.described[arm] = {}, {}, {}
        for name, value in by_name.items():
            if isinstance(value, str):
                found.unused.setdefault(name, value)
            elif isinstance(value, Outcomes) and len(value.values) == size:
                found.outcomes[arm][name] = value
            elif isinstance(value, Outcomes) and len(value.values) != 1:
                owner = "" if arm == ORIGINAL else " of the reduced model"
                found.unused.setdefault(name, f"{len(value.values)} values{owner} for {size} examples")
            else:
                found.unused.setdefault(name, "")
                if size == 1 and isinstance(value, _Single):
                    found.single[arm][name] = value.outcomes
        for name, listed in labels[arm].items():
            listed = [label(named[arm][name])] if listed is None and size == 1 else listed
            if listed is not None and len(listed) == size:
                found.described[arm][name] = listed
            else:
                got = type(named[arm][name]).__name__ if listed is None else f"{len(listed)} of them"
                found.unused.setdefault(name, f"it must have one entry for each of the {size} examples, got {got}")
    if size in counts and size not in described and inside and size not in inside:
        found.doubt = f"the step returned {size} outcomes for a batch in which nothing has this length"
    return found


def is_own(name: str) -> bool:
    """Whether a description is an arm's own: a ``prediction``, that of one metric, or a ``continuation``."""
    return name.partition("/")[0] in ("prediction", "continuation")


def of_metric(described: Mapping[str, Any], name: str, metric: str) -> Any:
    """The answers or predictions that a metric looks at: its own, or else those of all."""
    return described.get(f"{name}/{metric}", described.get(name))


def _describes(name: str, names: Collection[str]) -> bool:
    """Whether a name describes the examples; of an answer or prediction of one metric the metric is there, too."""
    what, _, metric = name.partition("/")
    return name in DESCRIPTIONS or (what in ("answer", "prediction") and metric in names)


def _size(counts: Sequence[int], described: Sequence[int], inside: Sequence[int]) -> int:
    """The number of examples of a batch.

    Args:
        counts: lengths of the outcomes. A single number may be of the whole batch, and decides nothing by itself.
        described: lengths of the descriptions.
        inside: lengths of what is in the batch.
    """
    votes = Counter([*described, *(count for count in counts if count != 1)])
    if votes:
        return max(votes, key=lambda n: (n in described and n in counts, n in inside, votes[n]))
    return 1 if counts and 1 in inside else next(iter(inside), 1)


def _lengths(batch: Any) -> Iterator[int]:
    """The lengths of what is in a batch: of all tensors and arrays, then of all lists."""
    lists: list[int] = []

    def inside(value: Any) -> Iterator[int]:
        if _is_tensor(value) or isinstance(value, np.ndarray):
            if value.ndim:
                yield value.shape[0]
            return
        if isinstance(value, list):
            lists.append(len(value))
        items = value if isinstance(value, (list, tuple)) else _fields(value).values()
        for item in items:
            if not isinstance(item, (str, int, float)):
                yield from inside(item)

    yield from inside(batch)
    yield from lists


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, (type, Outcomes))


def _fields(value: Any) -> Mapping[Any, Any]:
    """The parts of a mapping, a dataclass or a named tuple; of anything else none."""
    if isinstance(value, Mapping):
        return value
    if _is_record(value):
        return {part.name: getattr(value, part.name) for part in dataclasses.fields(value)}
    return value._asdict() if isinstance(value, tuple) and hasattr(value, "_asdict") else {}


def _named(output: Any) -> Iterator[tuple[str, Any]]:
    """Everything that an output names; what stands in a part of it by the names of both, ``part/name``."""
    if isinstance(output, (list, tuple)) and not _fields(output):
        found: dict[str, list[Any]] = {}
        for name, value in (pair for item in output for pair in _named(item)):
            found.setdefault(name, []).append(value)
        # A name that comes once is that of the whole batch, beside a loss; else each example has a mapping.
        yield from ((name, values[0] if len(values) == 1 else values) for name, values in found.items())
    for name, value in _fields(output).items():
        inner = dict(_named(value)) if _fields(value) else {}
        yield from ((key if key in DESCRIPTIONS else f"{text_of(name)}/{key}", item) for key, item in inner.items())
        if not inner:
            yield text_of(name), value


def name_in(name: str, names: Sequence[str]) -> str:
    """What a key that is logged as ``name`` was returned as: the same, or its end or another spelling of a part's."""
    spellings = [key for key in names if "/" in key and name in (key.replace("/", "."), key.replace("/", "_"))]
    spellings += [key for key in names if key.endswith(f"/{name}")]
    return name if name in names or len(spellings) != 1 else spellings[0]


# ---- values ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Single:
    """One number without a dimension."""

    outcomes: Outcomes


def _outcomes(name: str, value: Any, integers: set[str]) -> Outcomes | _Single | str | None:
    """A value as outcomes, as copies: a step may go on using its tensors, and views would keep whole batches alive.

    Bool, and integers that are all 0 or 1, are right or wrong; any other number is a mean. What is no outcome is a
    reason.
    """
    if value is None:
        return None
    if isinstance(value, Outcomes):
        values, weights = (None if v is None else np.array(as_float64(v)) for v in (value.values, value.weights))
        return dataclasses.replace(value, values=values, weights=weights)
    array = _array(value)
    if isinstance(array, str):
        return array
    whole = array.dtype.kind in "iu"
    right_or_wrong = array.dtype.kind == "b" or (whole and bool(np.isin(array, (0, 1)).all()))
    if whole:
        integers.add(name)
    found = Outcomes(array.reshape(-1).astype(np.float64), kind="binary" if right_or_wrong else "mean")
    return found if array.ndim else _Single(found)


def _array(value: Any) -> Any:
    """Numbers, one per example, as an array of NumPy; or why they are none."""
    if isinstance(value, (list, tuple)):
        items = [item.item() if _is_array(item) and _count(item) == 1 else item for item in value]
        if any(_is_array(item) for item in items):
            return f"it is a {type(value).__name__} of tensors"
        try:
            value = np.asarray(items)
        except ValueError:
            return f"it is a {type(value).__name__} of unequal parts"
    if not isinstance(value, (bool, int, float)) and not hasattr(value, "__array__"):
        return f"it is of type {type(value).__name__}"
    if not _has_elements(value):
        return f"it is a tensor of {value.dtype} and {value.layout}"
    array: Any = value if _is_array(value) else np.asarray(value)
    if array.ndim and _count(array) != array.shape[0]:  # looked at before anything is copied
        return f"it is of shape {tuple(array.shape)}"
    if _is_tensor(array):
        array = array.detach().cpu()
        array = (array.double() if array.is_floating_point() else array).numpy()
    return array if array.dtype.kind in "biuf" else f"it is of dtype {array.dtype}"


def _is_tensor(value: Any) -> bool:
    """Whether it is a tensor of torch; where nobody has imported torch there is none."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_array(value: Any) -> bool:
    return _is_tensor(value) or isinstance(value, (np.ndarray, np.generic))


def _has_elements(value: Any) -> bool:
    """Whether a tensor, or anything else, has all of its elements one by one."""
    if not _is_tensor(value):
        return True
    return not (value.is_nested or value.is_quantized or value.is_meta) and str(value.layout) == "torch.strided"


def _count(item: Any) -> int:
    return item.numel() if _is_tensor(item) else int(item.size)


def _labels(values: Any) -> list[Hashable] | None:
    """A tensor, array or sequence as plain values, which compare by what they are; ``None`` if it is none of these."""
    if not _has_elements(values):
        return None
    if _is_array(values) and values.ndim and _count(values) == len(values):
        values = values.reshape(-1)  # a column
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        return None
    return [label(value) for value in values]
