"""python -m pytest tests/data/test_sets.py: who lands where, and that batches are what the data would have made."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from tiny import SENTENCES, tiny_tokenizer

from laser_callback.data.datamodule import FactsDataModule, TextWindows
from laser_callback.data.encoding import encode_facts
from laser_callback.data.facts import Fact, sample_facts
from laser_callback.data.sets import ExampleSets

GROUPS = random.Random(0).choices("ABCD", [8, 4, 2, 1], k=400)
# In file order all of a group stand together, and every fifth subject has two facts.
FACTS = [
    Fact(
        f"f{i}",
        f"Number {i} comes before",
        str(i + 1),
        (f"After {i} comes", f"{i} and then"),
        (str(i + 1), "no"),
        subject=f"s{i - 1}" if i % 5 == 1 else f"S{i}",
        group=group,
    )
    for i, group in enumerate(sorted(GROUPS))
]


def facts_data(facts=FACTS, **options) -> FactsDataModule:
    return FactsDataModule(facts, tiny_tokenizer(bos=True), **options)


def ids(loader) -> list[str]:
    return [name for batch in loader for name in batch["id"]]


def assert_equal_batches(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            if key == "chunks":
                assert len(one[key]) == len(other[key])
                for a, b in zip(one[key], other[key], strict=True):
                    assert all(torch.equal(a[name], b[name]) for name in a)
            else:
                assert str(one[key]) == str(other[key])


def test_facts_are_split_by_subject_and_batched_as_the_data_module_does():
    sets = ExampleSets.of(facts_data(batch_size=7, rows_per_forward=5), seed=3)
    assert list(sets.sizes.values()) == pytest.approx([40, 120, 160, 80], abs=1)
    by_id = {fact.id: fact for fact in FACTS}
    found = {name: ids(sets.loader(name)) for name in sets.sizes}
    assert sum(map(len, found.values())) == 400
    for one, other in combinations(found.values(), 2):
        subjects = [{by_id[i].subject.casefold() for i in names} for names in (one, other)]
        assert not subjects[0] & subjects[1]
    for name, names in found.items():
        assert len(names) == sets.sizes[name]
        for group, total in Counter(GROUPS).items():
            share = sum(by_id[i].group == group for i in names) / total
            assert share == pytest.approx(sets.sizes[name] / 400, abs=3 / total)
    own = facts_data([by_id[i] for i in found["race"]], batch_size=7, rows_per_forward=5)
    own.setup()
    assert_equal_batches(list(sets.loader("race")), list(own.val_dataloader()))
    backwards = [by_id[i] for i in found["race"]][:9][::-1]
    own = facts_data(backwards, batch_size=7, rows_per_forward=5)
    own.setup()
    assert_equal_batches(list(sets.loader("race", range(8, -1, -1))), list(own.val_dataloader()))

    again = ExampleSets.of(facts_data(random.Random(1).sample(FACTS, 400)), seed=3)
    assert all(set(ids(again.loader(name))) == set(found[name]) for name in found)
    assert set(ids(ExampleSets.of(facts_data(), seed=4).loader("race"))) != set(found["race"])
    assert sum(ExampleSets.of(facts_data(limit=100)).sizes.values()) == 100
    limited = ExampleSets.of(facts_data(limit=100, seed=5))
    assert {i for name in limited.sizes for i in ids(limited.loader(name))} == {
        fact.id for fact in sample_facts(FACTS, 100, 5)
    }


def test_screen_shows_each_fact_under_one_drawn_wording():
    sets = ExampleSets.of(facts_data(batch_size=400), sizes={"screen": 300, "race": 50, "confirm": 50})
    (batch,) = sets.loader("screen")
    by_id = {fact.id: fact for fact in FACTS}
    drawn = Counter()
    rows = {}
    for chunk in batch["chunks"]:
        for input_ids, mask in zip(chunk["input_ids"], chunk["attention_mask"], strict=True):
            rows[len(rows)] = tuple(input_ids[mask.bool()].tolist())
    assert len(rows) == len(batch["row_fact"]) == 300
    assert not batch["row_role"].any()
    for row, fact_number in enumerate(batch["row_fact"].tolist()):
        fact = by_id[batch["id"][fact_number]]
        wordings = [replace(fact, prompt=p, paraphrases=(), choices=()) for p in (fact.prompt, *fact.paraphrases)]
        encoded = encode_facts(
            [replace(w, id=str(i)) for i, w in enumerate(wordings)], tiny_tokenizer(bos=True), masked=False
        )
        (chosen,) = [i for i, item in enumerate(encoded) if item.rows[0].input_ids == rows[row]]
        drawn[chosen] += 1
    assert min(drawn.values()) > 70 and len(drawn) == 3  # noqa: PT018
    assert "guard" not in sets.sizes

    shared = ExampleSets.of(facts_data(), sizes={"race": 0.5, "confirm": 0.5})
    assert (shared.sizes["screen"], len(shared.notes)) == (100, 1)
    assert set(ids(shared.loader("screen"))) < set(ids(shared.loader("race")))


@pytest.mark.parametrize("parts", [[1.0], [0.6, 0.2, 0.2], [1 - sum([0.2] * 3), 0.2, 0.2, 0.2], [50, 10]])
def test_parts_and_every_stretch_of_them_have_each_groups_share(parts):
    sets = ExampleSets.of(facts_data(), sizes={"race": 0.7, "confirm": 0.3})
    by_id, names, total = {fact.id: fact for fact in FACTS}, ids(sets.loader("race")), sets.sizes["race"]
    race = [by_id[i] for i in names]
    shares = {group: count / total for group, count in Counter(fact.group for fact in race).items()}
    dealt = sets.deal("race", parts)
    assert [len(part) for part in dealt] == pytest.approx(
        [size if isinstance(size, int) else size * total for size in parts], abs=2
    )
    every = [position for part in dealt for position in part]
    assert len(every) == len(set(every))
    assert dealt == sets.deal("race", parts)
    owner = {}
    for number, part in enumerate(dealt):
        for position in part:
            assert owner.setdefault(race[position].subject.casefold(), number) == number
        for start, stop in ((0, len(part) // 2), (len(part) // 2, len(part)), (0, min(24, len(part)))):
            groups = Counter(race[i].group for i in part[start:stop])
            for group, share in shares.items():
                assert groups[group] == pytest.approx(share * (stop - start), abs=3)
        assert part != sorted(part)
        assert ids(sets.loader("race", part)) == [names[i] for i in part]


def test_race_has_windows_of_the_first_half_of_the_text_and_guard_of_the_second(tmp_path):
    (tmp_path / "t.txt").write_text(" ".join(SENTENCES) * 40)
    windows = TextWindows(tmp_path / "t.txt", tiny_tokenizer(bos=True), window=32)
    every = [f"t.txt:{i}" for i in range(len(windows))]
    sets = ExampleSets.of(facts_data(text=windows, batch_size=16), text_windows=1000)
    race, guard = ids(sets.text("race")), ids(sets.text("guard"))
    half = (len(every) - 1) // 2
    assert (race, guard) == (every[:half], every[-half:])  # and nobody the middle, between two neighbours
    assert sets.text("race").batch_size == 4
    few = ExampleSets.of(facts_data(text=windows), text_windows=3)
    six = [int(name.split(":")[1]) for name in sorted(ids(few.text("race")) + ids(few.text("guard")))]
    assert len(set(six)) == 6
    assert max(six) > 0.8 * len(windows)  # from all over the text
    assert ExampleSets.of(facts_data()).text("guard") is None
    with pytest.raises(ValueError, match="at least 5 windows"):
        ExampleSets.of(facts_data(text=TextWindows(tmp_path / "t.txt", tiny_tokenizer(), window=512)), text_windows=1)
    with pytest.raises(ValueError, match="'race' or 'guard'"):
        sets.text("screen")


def test_the_same_facts_in_two_data_modules_are_seen_by_their_content():
    def loader(facts, first=0):
        data = facts_data([replace(fact, id=str(i)) for i, fact in enumerate(facts, first)])
        data.setup()
        return data.val_dataloader()

    with pytest.raises(ValueError, match="sets without a common example, but race and confirm share 40"):
        ExampleSets.of({"race": loader(FACTS[:40]), "confirm": loader(FACTS[:40])})
    parts = {"race": FACTS[:40], "confirm": FACTS[40:80], "guard": FACTS[77:99]}
    with pytest.raises(ValueError, match="but confirm and guard share 3"):
        ExampleSets.of({name: loader(facts, i) for i, (name, facts) in enumerate(parts.items())})
    # Running numbers as ids, the same in each module, make no facts the same.
    apart = {"screen": FACTS[:5], "race": FACTS[:40], "confirm": FACTS[40:80]}
    assert ExampleSets.of({name: loader(facts) for name, facts in apart.items()}).sizes["screen"] == 5


def test_reference_split_is_the_first_fifth_in_file_order():
    sets = ExampleSets.reference(facts_data())
    assert sets.sizes == {"race": 80, "confirm": 320}
    assert ids(sets.loader("race")) + ids(sets.loader("confirm")) == [fact.id for fact in FACTS]
    with pytest.raises(ValueError, match="`name` must be one of race, confirm, got 'guard'"):
        sets.loader("guard")
    with pytest.raises(ValueError, match="at least 5"):
        ExampleSets.reference(facts_data(FACTS[:4]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExampleSets.of(facts_data(split="race")), "split=None"),
        (lambda: ExampleSets.of(facts_data(), groups=["a"]), "facts, which have their own"),
        (lambda: ExampleSets.of(facts_data(FACTS[:3])), "none for .* at least 10 subjects"),
        (lambda: ExampleSets.of(facts_data(), sizes={"race": 0.5, "test": 0.5}), r"\['test'\]"),
        (lambda: ExampleSets.of(facts_data(), sizes={"race": 0.5}), "none for confirm"),
        (lambda: ExampleSets.of(facts_data(), sizes={"race": 300, "confirm": 101}), "up to the 400"),
        (lambda: ExampleSets.of(facts_data()).deal("race", [0.8, 0.3]), "`parts` must fit 'race'"),
    ],
)
def test_what_facts_do_not_allow_is_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()
