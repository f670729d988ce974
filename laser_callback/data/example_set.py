"""One set of examples that are loaded one by one, in any order: a dataloader taken apart.

Contract: an :class:`ExampleSet` is places in a map-style dataset; whatever subset and order of them is asked for is
loaded with the collator, batch size and workers of the dataloader that it came from.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeAlias

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from laser_callback.data.encoding import EncodedFact, FactCollator
from laser_callback.data.facts import draw, subject_key
from laser_callback.support.hashing import content_hash

Loader: TypeAlias = DataLoader[Any]

MOST_COMPARED = 10_000
"""More examples than this are not loaded to see whether they are those of another set."""

_IN_ORDER = (SequentialSampler, RandomSampler, DistributedSampler, SubsetRandomSampler)


@dataclass(frozen=True, eq=False)
class ExampleSet:
    """Examples of a map-style dataset: their places in it, and how to load them.

    Attributes:
        dataset: what they are in.
        places: the index of each in the dataset.
        subjects: what each is about; those of one subject are not independent.
        groups: to stratify by.
        options: of the dataloader.
        whole: a dataloader that cannot be taken apart; nothing but it can then be loaded.
    """

    dataset: Any
    places: list[int]
    subjects: list[str]
    groups: list[str]
    options: Mapping[str, Any]
    whole: Loader | None = None

    def subset(self, positions: Sequence[int]) -> ExampleSet:
        """The examples at some positions, in the given order."""
        return replace(
            self,
            places=[self.places[i] for i in positions],
            subjects=[self.subjects[i] for i in positions],
            groups=[self.groups[i] for i in positions],
        )

    @property
    def writes(self) -> bool:
        """Whether answers to the examples are written."""
        collate = self.options.get("collate_fn")
        return isinstance(collate, FactCollator) and collate.generation is not None

    def loader(self, batches: int = 1, *, writes: bool = True) -> Loader:
        """The examples in order, in at least so many batches, as far as there are examples and they can be dealt.

        Without ``writes`` the model is not to write answers, where it otherwise is.
        """
        if self.whole is not None:
            return self.whole
        options = dict(self.options)
        if self.writes:
            options["collate_fn"] = replace(options["collate_fn"], writes=writes)
        if batches > 1:
            options["batch_size"] = min(options["batch_size"], max(len(self.places) // batches, 1))
        return DataLoader(Subset(self.dataset, self.places), **options)

    def spread(self, seed: str) -> list[int]:
        """All positions in a random order in which every stretch has each group's share; a subject's are neighbours."""
        members: dict[str, list[int]] = defaultdict(list)
        for position, subject in enumerate(self.subjects):
            members[subject].append(position)
        of_group: dict[str, list[str]] = defaultdict(list)
        for subject in sorted(members, key=lambda subject: draw(subject, seed)):
            of_group[self.groups[members[subject][0]]].append(subject)
        place: dict[str, float] = {}
        for group, subjects in of_group.items():
            offset = int(draw(group, seed)[:12], 16) / 16**12
            place.update({subject: (i + offset) / len(subjects) for i, subject in enumerate(subjects)})
        ordered = sorted(members, key=lambda subject: (place[subject], draw(subject, seed)))
        return [position for subject in ordered for position in members[subject]]

    def roots(self) -> set[tuple[int, int]]:
        """Each example as its place in the dataset that it comes from in the end; none if that is not known."""
        if self.whole is not None:
            return set()
        return {_root(self.dataset, place) for place in self.places}

    def contents(self) -> set[Hashable]:
        """What each example is, in whatever dataset: a fact by prompt and answer, what has an id by it and all else.

        Of examples that have none of these nothing is known: equal values may be two examples.
        """
        if self.whole is not None or not self.places or _content(self.dataset[self.places[0]]) is None:
            return set()
        return {_content(self.dataset[place]) for place in self.places} - {None}

    def fingerprints(self) -> list[str]:
        """What stands for all values of each example but its id; empty where there are many, or they are not loaded."""
        if self.whole is not None or len(self.places) > MOST_COMPARED:
            return []
        return [fingerprint([_without_id(self.dataset[place])]) for place in self.places]


def _without_id(item: Any) -> Any:
    return {key: value for key, value in item.items() if key != "id"} if isinstance(item, Mapping) else item


def _root(dataset: Any, place: int) -> tuple[int, int]:
    while isinstance(dataset, (Subset, ConcatDataset)):
        if isinstance(dataset, Subset):
            indices: Any = dataset.indices
            dataset, place = dataset.dataset, int(indices[place])
        else:
            part = bisect_right(dataset.cumulative_sizes, place)
            place -= dataset.cumulative_sizes[part - 1] if part else 0
            dataset = dataset.datasets[part]
    return id(dataset), place


def _content(item: Any) -> Hashable:
    if isinstance(item, EncodedFact):
        return item.fact.prompt, item.fact.answer
    if not isinstance(item, Mapping):
        return None
    if isinstance(item.get("prompt"), str) and isinstance(item.get("answer"), str):
        return item["prompt"], item["answer"]
    return None if item.get("id") is None else fingerprint([item])


def fingerprint(parts: Iterable[Any]) -> str:
    """16 hexadecimal digits that stand for all that is in nested collections, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        for leaf in pytree.tree_leaves(part):
            if isinstance(leaf, Tensor):
                leaf = content_hash(f"{leaf.dtype} {tuple(leaf.shape)}", leaf.detach().contiguous())
            digest.update(repr(leaf).encode())
    return digest.hexdigest()[:16]


def indivisible(loader: Loader) -> str:
    """Why examples of a dataloader cannot be loaded one by one; empty if they can."""
    dataset, batches = loader.dataset, loader.batch_sampler
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        return f"its dataset, {type(dataset).__name__}, is not map-style; use one with `__len__` and `__getitem__`"
    if batches is None:
        return "its dataset makes the batches (batch_size=None); let it make examples and the DataLoader the batches"
    if type(batches) is not BatchSampler:
        return (
            f"it has a batch sampler of its own, {type(batches).__name__}; use `batch_size`, and sort by length in "
            "`collate_fn`"
        )
    if not isinstance(batches.sampler, _IN_ORDER):
        return f"it has a sampler of its own, {type(batches.sampler).__name__}; leave it out, or use a torch Subset"
    return ""


def taken_apart(loader: Loader, groups: Sequence[str] | None, subjects: Sequence[Hashable] | None) -> ExampleSet:
    """All examples of a dataloader, to be loaded as it loads them, but in order.

    Its ``in_order=False`` is not kept: values are matched with examples by their order.
    """
    dataset: Any = loader.dataset
    batches: Any = loader.batch_sampler
    places = (
        sorted(batches.sampler.indices) if isinstance(batches.sampler, SubsetRandomSampler) else range(len(dataset))
    )
    labels: dict[str, list[Any] | None] = {"groups": _plain(groups), "subjects": _plain(subjects)}
    for name, values in labels.items():
        if values is not None and len(values) != len(dataset):
            raise ValueError(
                f"`{name}` must have one entry per example of the dataset, {len(dataset)}, got {len(values)}."
            )
    # A subject goes by the number of its first example, which is the same on every machine, as a hash is not.
    first: dict[Hashable, int] = {}
    numbers = [first.setdefault(subject, i) for i, subject in enumerate(labels["subjects"] or range(len(dataset)))]
    names = [""] * len(dataset) if labels["groups"] is None else [str(group) for group in labels["groups"]]
    options: dict[str, Any] = {
        "batch_size": batches.batch_size,
        "collate_fn": loader.collate_fn,
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
    }
    keys = [str(number) for number in numbers]
    if subjects is None and len(dataset) and isinstance(dataset[0], EncodedFact):  # facts have subjects of their own
        facts = [dataset[i].fact for i in range(len(dataset))]
        keys, names = [subject_key(fact) for fact in facts], [fact.group for fact in facts] if not groups else names
    return ExampleSet(dataset, list(range(len(dataset))), keys, names, options).subset([int(place) for place in places])


def kept_whole(name: str, loader: Loader) -> ExampleSet:
    """A dataloader that can only be used as it is."""
    try:
        count = len(loader.dataset)  # type: ignore[arg-type]
    except TypeError as error:
        raise MisconfigurationException(
            f"the set {name!r} must have a known number of examples: give its dataset a `__len__`"
        ) from error
    numbers = [str(i) for i in range(count)]
    return ExampleSet(loader.dataset, list(range(count)), numbers, [""] * count, {}, whole=loader)


def _plain(values: Any) -> list[Any] | None:
    """Labels as plain values: elements of a tensor are equal to none."""
    return None if values is None else list(values.tolist() if hasattr(values, "tolist") else values)


def fingerprints(module: pl.LightningModule, parts: Mapping[str, Iterable[Any]]) -> dict[str, str]:
    """Hashes of weights and buffers, and of every batch that each part's loaders give."""
    found = {"weights": fingerprint(chain(module.parameters(), module.buffers()))}
    return found | {name: fingerprint(chain.from_iterable(loaders)) for name, loaders in parts.items()}
