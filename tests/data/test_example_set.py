"""python -m pytest tests/data/test_example_set.py: the sets of a search from any dataloader."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny import tiny_tokenizer
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from laser_callback import FactsDataModule
from laser_callback.data.example_set import taken_apart
from laser_callback.data.sets import ExampleSets


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 90

    def __getitem__(self, index):
        return index


class Stream(IterableDataset):
    def __init__(self, count: int | None = 5):
        self.count = count

    def __iter__(self):
        return iter(range(5))

    def __len__(self):
        if self.count is None:
            raise TypeError("unknown")
        return self.count


class OwnBatches(BatchSampler):
    pass


def double(batch):
    return [2 * x for x in batch]


def numbers(loader) -> list[int]:
    return [int(x) // 2 for batch in loader for x in batch]


def test_a_dataloader_is_split_by_index_and_loads_in_order_as_before():
    loader = DataLoader(Numbers(), 4, shuffle=True, collate_fn=double, drop_last=True, num_workers=0)
    subjects = torch.arange(90) // 3
    groups = ["odd" if s % 2 else "even" for s in subjects.tolist()]

    class Data(LightningDataModule):
        def setup(self, stage):
            assert stage == "validate"
            self.loader = loader

        def val_dataloader(self):
            return [self.loader]

    for data in (loader, Data()):
        sets = ExampleSets.of(data, groups=groups, subjects=subjects)
        found = {name: numbers(sets.loader(name)) for name in sets.sizes}
        assert sorted(x for part in found.values() for x in part) == list(range(90))  # drop_last drops nothing here
        assert list(sets.sizes.values()) == pytest.approx([9, 27, 36, 18], abs=2)
        assert all(part == sorted(part) for part in found.values())
        owners = defaultdict(set)
        for name, part in found.items():
            assert sum(groups[x] == "odd" for x in part) == pytest.approx(len(part) / 2, abs=3)
            for x in part:
                owners[x // 3].add(name)
        assert all(len(names) == 1 for names in owners.values())
        assert [len(batch) for batch in sets.loader("race", range(6))] == [4, 2]
        assert numbers(sets.loader("race", [5, 0])) == [found["race"][5], found["race"][0]]
    chosen = list(range(0, 90, 3))
    part = ExampleSets.of(DataLoader(Numbers(), 4, sampler=SubsetRandomSampler(chosen), collate_fn=double))
    assert sorted(x for name in part.sizes for x in numbers(part.loader(name))) == chosen


def test_options_of_a_dataloader_are_kept_but_for_the_order():
    options = {
        "batch_size": 4,
        "num_workers": 2,
        "collate_fn": double,
        "pin_memory": True,
        "timeout": 9,
        "prefetch_factor": 3,
        "persistent_workers": True,
    }
    kept = ExampleSets.of(DataLoader(Numbers(), in_order=False, **options)).loader("confirm")
    assert {name: getattr(kept, name) for name in options} == options
    assert kept.in_order  # values are matched with examples by it


def test_given_sets_are_taken_as_they_are():
    data = Numbers()
    loaders = {
        "race": DataLoader(Subset(data, range(40)), 4, shuffle=True, collate_fn=double),
        "confirm": DataLoader(
            Subset(data, range(40, 90)), batch_sampler=OwnBatches(SequentialSampler(range(50)), 5, False)
        ),
        "guard": DataLoader(Stream(), 2),
    }
    sets = ExampleSets.of(loaders)
    assert sets.sizes == {"screen": 40, "race": 40, "confirm": 50, "guard": 5}
    assert "none are set aside" in sets.notes[0]
    assert numbers(sets.loader("race")) == numbers(sets.loader("screen")) == list(range(40))
    assert sets.loader("confirm") is loaders["confirm"]
    assert sorted(i for part in sets.deal("race", [0.5, 0.5]) for i in part) == list(range(40))
    for call in (lambda: sets.deal("confirm", [1.0]), lambda: sets.loader("confirm", [0])):
        with pytest.raises(MisconfigurationException, match=r"'confirm' cannot be taken apart.*OwnBatches"):
            call()
    overlap = {"race": DataLoader(data, 4), "confirm": DataLoader(Subset(Subset(data, range(50, 90)), range(10)), 4)}
    with pytest.raises(ValueError, match="race and confirm share 10"):
        ExampleSets.of(overlap)
    # The screen may be a part of the race.
    assert ExampleSets.of({**loaders, "screen": DataLoader(Subset(data, range(9)), 3)}).sizes["screen"] == 9


def test_examples_with_an_id_are_the_same_where_all_else_is_too():
    def loader(ids, shift=0.0):
        return DataLoader([{"id": i, "x": torch.tensor([i + shift])} for i in ids], 4, collate_fn=list)

    with pytest.raises(ValueError, match="race and confirm share 2"):
        ExampleSets.of({"race": loader(range(8)), "confirm": loader(range(6, 16))})
    assert ExampleSets.of({"race": loader(range(8)), "confirm": loader(range(8), 0.5)}).sizes["confirm"] == 8
    # Without ids equal values may be two examples, such as rows of a table: that is told.
    told = "3 of 3 examples of the confirm set have all values of one of the race"
    assert told in ExampleSets.of({"race": DataLoader([1, 2, 3]), "confirm": DataLoader([1, 2, 3])}).notes[0]
    (note, _) = ExampleSets.of(
        {name: DataLoader([{"id": f"{name} {i}", "x": i} for i in range(9)]) for name in ("race", "confirm")}
    ).notes
    assert "9 of 9 examples" in note
    assert len(ExampleSets.of({"race": DataLoader([1, 2, 3]), "confirm": DataLoader([3, 4, 5])}).notes) == 1


def test_parts_of_one_dataset_are_found_in_whatever_is_around_them():
    data = Numbers()
    around = ConcatDataset([Subset(data, range(90, 95)), Subset(data, range(30))])
    with pytest.raises(ValueError, match="race and confirm share 30"):
        ExampleSets.of({"race": DataLoader(around, 4), "confirm": DataLoader(ConcatDataset([data]), 4)})


def test_subjects_of_facts_on_both_sides_are_told():
    rows = [{"prompt": f"the number {i} is", "answer": f"a{i}", "subject": f"s{i // 2}"} for i in range(40)]
    data = FactsDataModule(rows, tiny_tokenizer())
    data.setup("validate")

    def sets(*parts: range) -> ExampleSets:
        loaders = [DataLoader(Subset(data.encoded, part), 8, collate_fn=data.collate) for part in parts]
        return ExampleSets.of(dict(zip(("race", "confirm"), loaders, strict=True)))

    shared = sets(range(0, 40, 2), range(1, 40, 2))
    assert "20 of 20 subjects of the confirm set are in the race or the screen, too" in shared.notes[0]
    apart = sets(range(20), range(20, 40))
    assert len(apart.notes) == 1  # of the screen
    assert apart.subjects("confirm") == 10
    whole = ExampleSets.of(DataLoader(data.encoded, 8, collate_fn=data.collate), sizes={"race": 0.5, "confirm": 0.5})
    assert (whole.subjects("race"), whole.subjects("confirm")) == (10, 10), "facts of one subject stay together"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ExampleSets.of(DataLoader(Numbers()), groups=["a"]), ValueError, "`groups` .* 90, got 1"),
        (lambda: ExampleSets.of(Numbers()), TypeError, "got Numbers"),
        (lambda: ExampleSets.of(DataLoader(Stream())), MisconfigurationException, "not map-style.*give the sets"),
        (lambda: ExampleSets.of(DataLoader(Numbers(), None)), MisconfigurationException, "batch_size=None"),
        (
            lambda: ExampleSets.of(DataLoader(Numbers(), sampler=iter(range(3)))),
            MisconfigurationException,
            "a sampler of its own",
        ),
        (lambda: ExampleSets.of({"race": DataLoader(Numbers())}), ValueError, "none for confirm"),
        (lambda: ExampleSets.of({"rice": DataLoader(Numbers())}), ValueError, r"got \['rice'\]"),
        (
            lambda: ExampleSets.of({"race": DataLoader(Stream()), "confirm": DataLoader(Numbers())}),
            MisconfigurationException,
            "'race' is used in parts",
        ),
        (
            lambda: ExampleSets.of({"race": DataLoader(Numbers()), "confirm": DataLoader(Stream(None))}),
            MisconfigurationException,
            "`__len__`",
        ),
        (
            lambda: ExampleSets.of(
                {"race": DataLoader(Numbers()), "confirm": DataLoader(Numbers())}, sizes={"race": 1}
            ),
            ValueError,
            "must be left out",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_cure(make, error, message: str):
    with pytest.raises(error, match=message):
        make()


def test_several_validation_dataloaders_are_not_guessed_from():
    class Data(LightningDataModule):
        def val_dataloader(self):
            return [DataLoader(Numbers()), DataLoader(Numbers())]

    with pytest.raises(MisconfigurationException, match=r"got 2 of them.*\{'screen': loader"):
        ExampleSets.of(Data())


def test_batches_can_be_made_smaller_but_not_larger():
    whole = taken_apart(DataLoader(list(range(10)), batch_size=4), None, None)
    assert [len(batch) for batch in whole.loader()] == [4, 4, 2]
    assert [len(batch) for batch in whole.loader(batches=5)] == [2, 2, 2, 2, 2]
    assert [len(batch) for batch in whole.loader(batches=2)] == [4, 4, 2]
    assert len(whole.loader(batches=99)) == 10
