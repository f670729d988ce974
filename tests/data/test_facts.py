"""Facts: what is read, what is refused, how it is split."""

from __future__ import annotations

import csv
import json
import math
import random
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from laser_callback.data.facts import Fact, Neighbour, read_facts, sample_facts, split_facts

FACTS = [
    Fact("fr", "The capital of France is", "Paris", ("France's capital city is", "The city is"), ("Rome", "Paris")),
    Fact("jp", "The currency of Japan is the", "yen", subject="Japan", group="P38"),
    Fact(
        "br",
        'In "Brazil", people speak',
        "Portuguese today",
        ("People in Brazil speak",),
        group="P37",
        neighbours=(Neighbour("In Chile, people speak", "Spanish"), Neighbour("In Japan, people speak", "Japanese")),
    ),
]
SHARED = Path(__file__).parents[3] / "shared" / "data"


# ------------------------------------------------------------------------------------------------ reading


def test_all_formats_give_the_same_facts(tmp_path):
    records = [asdict(fact) for fact in FACTS]
    (tmp_path / "f.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    with (tmp_path / "f.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        for record in records:
            lists = {name: json.dumps(record[name]) for name in ("paraphrases", "choices", "answers", "neighbours")}
            writer.writerow(record | lists)
    assert read_facts(tmp_path / "f.jsonl") == read_facts(tmp_path / "f.csv") == FACTS


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([asdict(fact) for fact in FACTS]), tmp_path / "f.parquet")
    assert read_facts(tmp_path / "f.parquet") == FACTS


def test_defaults_come_from_meta_and_the_running_number(tmp_path):
    meta = {"subject": "A", "relation": "P1"}
    rows = [{"prompt": "A is", "answer": "b", "meta": meta}, {"prompt": "C is", "answer": "d"}]
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = read_facts(tmp_path / "f.jsonl")
    assert (first.id, first.subject, first.group) == ("1", "A", "P1")
    assert (second.id, second.subject, second.group) == ("2", "C is", "")


GOOD = '{"id": "x", "prompt": "p", "answer": "a"}'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"answer": "a"}', "`prompt` is missing"),
        ('{"prompt": "p"}', "`answer` is missing"),
        ('{"prompt": "p", "answer": ""}', "`answer` must be text"),
        ('{"prompt": "p", "answer": " a"}', "`answer` must be text without spaces around it"),
        ('{"prompt": "p ", "answer": "a"}', "`prompt` must be text that does not end in a space"),
        ('{"prompt": "p", "answer": 1992}', "`answer` must be a string, got 1992"),
        ('{"prompt": "p", "answer": "a", "paraphrases": "q"}', "`paraphrases` must be a list of strings, got 'q'"),
        ('{"prompt": "p", "answer": "a", "paraphrases": [1]}', "`paraphrases` must be a list of strings"),
        ('{"prompt": "p", "answer": "a", "choices": ["b", "c"]}', "`choices` must hold the answer 'a'"),
        ('{"prompt": "p", "answer": "a", "choices": ["a", "a"]}', "and another"),
        ('{"prompt": "p", "answer": "a", "meta": 3}', "`meta` must be an object, got 3"),
        ('{"prompt": "p", ', "invalid JSON"),
        (
            '{"prompt": "a \\ud800", "answer": "a"}',
            "`prompt` must be text in Unicode, got half of a",
        ),
        (
            '{"prompt": "p", "answer": "a", "choices": ["a", "\\udfff"]}',
            "`choices` must be text in Unicode",
        ),
        ('{"prompt": "p", "answer": "a", "neighbours": "q"}', "`neighbours` must be a list of prompts with answers"),
        ('{"prompt": "p", "answer": "a", "neighbours": ["q"]}', "`neighbours`, number 1: it must be an object"),
        (
            '{"prompt": "p", "answer": "a", "neighbours": [{"prompt": "q", "answer": "b"}, {"prompt": "q"}]}',
            "`neighbours`, number 2: `answer` is missing; it has ['prompt']",
        ),
        (
            '{"prompt": "p", "answer": "a", "neighbours": [{"prompt": "q ", "answer": "b"}]}',
            "`neighbours`, number 1: `prompt` must be text that does not end in a space",
        ),
        (
            '{"prompt": "p", "answer": "a", "neighbours": [{"prompt": "q", "answer": 3}]}',
            "`neighbours`, number 1: `answer` must be a string, got 3",
        ),
        ("[1]", "a row must be an object"),
        (GOOD, "`id` must be unique, got 'x' as in line 1"),
    ],
)
def test_malformed_rows_name_file_line_and_reason(tmp_path, line, reason):
    path = tmp_path / "facts.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read_facts(path)
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert reason in str(error.value)


def test_bad_files_are_errors(tmp_path):
    for name, text, message in [
        ("f.jsonl", "\n", "at least one fact, got none in .*f.jsonl"),
        ("f.txt", "", "must end in one of .jsonl, .csv, .parquet"),
        ("f.csv", "prompt,answer\np,a\np, q,a\n", "line 3: the row has more cells"),
        ("f.csv", "prompt,answer,choices\np,a,a|b\n", "line 2: invalid JSON"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_facts(tmp_path / name)


def test_parquet_without_pyarrow_names_the_cure(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "f.parquet").touch()
    with pytest.raises(ModuleNotFoundError, match="pip install pyarrow"):
        read_facts(tmp_path / "f.parquet")


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is absent")
def test_real_files():
    sizes = {path.stem: len(read_facts(path)) for path in SHARED.glob("*.jsonl")}
    assert sizes["pararel"] == 1500
    assert all(size >= 500 for size in sizes.values())


# ------------------------------------------------------------------------------------------------- splits


def many_facts():
    """600 facts: 4 groups of unequal size, every tenth subject (in one case or another) with two facts."""
    groups = random.Random(0).choices("ABCD", [8, 4, 2, 1], k=600)
    subject = lambda i: f"subject {i - 1}".upper() if i % 10 == 1 else f"subject {i}"  # noqa: E731
    return [Fact(str(i), f"prompt {i}", "a", subject=subject(i), group=group) for i, group in enumerate(groups)]


def test_split_is_disjoint_by_subject_stratified_and_independent_of_order():
    facts = many_facts()
    sizes = {"screen": 60, "race": 0.3, "confirm": 0.4}
    sets = split_facts(facts, sizes, seed=1)
    assert [len(owned) for owned in sets.values()] == pytest.approx([60, 180, 240], abs=1)
    owner: dict[str, str] = {}
    for name, owned in sets.items():
        assert all(owner.setdefault(fact.subject.casefold(), name) == name for fact in owned)
        assert [int(fact.id) for fact in owned] == sorted(int(fact.id) for fact in owned)
    for group, total in Counter(fact.group for fact in facts).items():
        share = [sum(fact.group == group for fact in owned) / total for owned in sets.values()]
        assert share == pytest.approx([0.1, 0.3, 0.4], abs=3 / total), group

    ids = {name: {fact.id for fact in owned} for name, owned in sets.items()}
    shuffled = split_facts(random.Random(1).sample(facts, len(facts)), sizes, seed=1)
    assert {name: {fact.id for fact in owned} for name, owned in shuffled.items()} == ids
    assert {fact.id for fact in split_facts(facts, sizes, seed=2)["confirm"]} != ids["confirm"]


def test_sample_is_exact_and_stratified():
    facts = many_facts()
    sample = sample_facts(facts, 100, seed=0)
    assert len(sample) == 100
    for group, total in Counter(fact.group for fact in facts).items():
        assert sum(fact.group == group for fact in sample) == pytest.approx(total / 6, abs=1.5)


@pytest.mark.parametrize("sizes", [{"a": 0.6, "b": 0.5}, {"a": 5}, {"a": -0.1}, {"a": math.nan}, {"a": 0.01, "b": 0.5}])
def test_impossible_sizes_are_errors(sizes):
    with pytest.raises(ValueError, match="`sizes` must"):
        split_facts(FACTS, sizes, seed=0)
