"""A batch's copy behaves as the batch, or the batch is refused with the place and the type of what cannot be copied."""

from __future__ import annotations

import array
import collections
import enum
import io
import types
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny import tiny_tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from transformers import BatchEncoding

from laser_callback.passes.copies import copy_batch


class Slotted:
    __slots__ = ("__own", "x")

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.__own = [x]


class Split(enum.Enum):
    VAL = 1


class Item:
    """Data beside a function, an enum and a tokenizer."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.split, self.function, self.tokenizer = x, Split.VAL, len, tiny_tokenizer()


@dataclass(frozen=True)
class Frozen:
    x: Tensor


@pytest.mark.parametrize(
    "build", [Slotted, Item, Frozen, lambda x: Frozen(Item(x))], ids=["slots", "item", "frozen", "nested"]
)
def test_objects_are_copied_with_their_data(build: Any) -> None:
    x = torch.zeros(3)
    value = build(x)
    new = copy_batch({"a": [value]})["a"][0]
    inner = new.x if isinstance(new.x, Tensor) else new.x.x
    inner.add_(1)
    assert x.tolist() == [0, 0, 0]
    assert type(new) is type(value)
    if isinstance(value, Slotted):
        assert new._Slotted__own[0] is new.x


@pytest.mark.parametrize(
    ("held", "where"),
    [
        (lambda: {"images": [(i for i in range(3))]}, r"`batch\['images'\]\[0\]` is a generator"),
        (lambda: [iter([1])], r"`batch\[0\]` is a list_iterator"),
        (lambda: Item(io.StringIO("x")), r"`batch.x` is a StringIO"),
        (lambda: (1, memoryview(b"x")), r"`batch\[1\]` is a memoryview"),
        (lambda: {"a": {}.values()}, r"`batch\['a'\]` is a dict_values"),
        (lambda: zip([1], [2], strict=True), "`batch` is a zip"),
    ],
)
def test_what_is_used_up_is_refused(held: Any, where: str) -> None:
    with pytest.raises(MisconfigurationException, match=where):
        copy_batch(held())


def test_views_of_one_storage_stay_views_of_one() -> None:
    data = torch.arange(10_000.0)
    batch = {"a": data[100:104], "b": data[102:108].view(2, 3), "bits": data[103:104].view(torch.int32)}
    new = copy_batch(batch)
    assert all(torch.equal(new[key], batch[key]) for key in batch)
    new["a"].zero_()
    assert new["b"].flatten()[:2].tolist() == [0, 0]
    assert new["bits"].tolist() == [0]
    assert data[100] == 100
    assert new["a"].untyped_storage().nbytes() < 100


def test_arrays_and_tensors_of_one_memory_stay_so() -> None:
    data = np.arange(10.0)
    raw = bytearray(8)
    batch = {
        "a": data[2:6],
        "back": data[5:3:-1],
        "tensor": torch.from_numpy(data)[3:],
        "raw": raw,
        "of raw": np.frombuffer(raw, np.uint8),
    }
    new = copy_batch(batch)
    assert all(np.array_equal(new[key], batch[key]) for key in batch)
    new["a"][1:] = -1
    new["of raw"][0] = 7
    assert new["tensor"].tolist() == [-1, -1, -1, 6, 7, 8, 9]
    assert new["back"].tolist() == [-1, -1]
    assert (new["raw"][0], raw[0], data[3]) == (7, 0, 3)
    z = torch.tensor([1 + 2j])
    assert copy_batch([z, z.conj()])[1].tolist() == [1 - 2j]


class _Made(list[Any]):
    def __init__(self, n: int) -> None:
        super().__init__([[n]])
        self.more = [n]


class _Pair(tuple[Any, ...]):
    def __new__(cls, a: Any, b: Any) -> Any:
        return super().__new__(cls, (a, b))


class _Guarded(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("immutable")


class _NoCopy:
    def __init__(self, x: Any) -> None:
        self.x = [x]

    def __copy__(self) -> Any:
        raise RuntimeError("no copy")

    __deepcopy__ = __reduce_ex__ = clone = __copy__  # type: ignore[assignment]


def _tagged(value: Any) -> Any:
    value.more = [1]
    return value


@pytest.mark.parametrize(
    "value",
    [
        _Made(3),
        _Pair([1], [2]),
        _Guarded(a=[1]),
        _NoCopy(1),
        _tagged(_Pair([1], [2])),
        _tagged(torch.ones(2)),
        _tagged(collections.OrderedDict(a=[1])),
        collections.defaultdict(list, a=[1]),
        collections.deque([[1]], maxlen=3),
        collections.Counter("aab"),
        collections.UserList([[1]]),
        collections.ChainMap({"a": [1]}),
        array.array("i", [1]),
        types.SimpleNamespace(a=[1]),
        np.array([[1], {"a": [2]}, None], dtype=object)[:2],
    ],
    ids=lambda value: type(value).__name__,
)
def test_copies_share_nothing_that_can_be_written_to(value: Any) -> None:
    new = copy_batch({"a": value})["a"]
    assert (type(new), new is value) == (type(value), False)
    assert vars(new).keys() == vars(value).keys() if hasattr(value, "__dict__") else not hasattr(new, "__dict__")
    lists = [[*v.__dict__.values()] if hasattr(v, "__dict__") else [*v] for v in (value, new)]
    for one, other in zip(*lists, strict=True):
        assert str(one) == str(other)
        assert one is not other or not isinstance(one, (list, dict))


def test_an_expanded_tensor_stays_expanded() -> None:
    value = torch.ones(1, 3).expand(4, 3)
    new = copy_batch([value])[0]
    assert new.stride() == value.stride()
    assert torch.equal(new, value)
    assert new.data_ptr() != value.data_ptr()


@pytest.mark.parametrize(
    "value",
    [
        torch.eye(3).to_sparse(),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        pack_sequence([torch.ones(3, 2), torch.ones(2, 2)]),
        BatchEncoding({"input_ids": torch.ones(2, 2)}),
        np.zeros(2, dtype=[("a", "f4"), ("b", "i4")]),
        np.array([[1], [2, 3]], dtype=object),
        bytearray(b"x"),
        {frozenset([1]), (1, 2)},
        [None, range(3), torch.empty(0), torch.device("cpu"), 1 + 2j],
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_kinds_of_data(value: Any) -> None:
    new = copy_batch([value])[0]
    assert type(new) is type(value)
    assert str(new) == str(value)


def test_pictures() -> None:
    image = pytest.importorskip("PIL.Image")
    value = image.new("RGB", (2, 2))
    new = copy_batch({"image": [value]})["image"][0]
    new.putpixel((0, 0), (9, 9, 9))
    assert value.getpixel((0, 0)) == (0, 0, 0)
