"""Pairs, rows, priors, files and the report: from what a step returned to what a reader sees."""

from __future__ import annotations

import json
import uuid
from collections import UserDict
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from paired import bools, described, log, pair, together
from scipy import stats
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DistributedSampler

from laser_callback.results.comparison import ArmResult, adjust_together
from laser_callback.results.examples import PairedExamples
from laser_callback.results.returned import ORIGINAL, read_returned
from laser_callback.stats.constraint import Constraint
from laser_callback.stats.outcomes import Outcomes
from laser_callback.stats.paired import compare

# ---- pairs -----------------------------------------------------------------------------------------------------------


def test_flips_by_hand():
    examples = together(
        pair({"acc": bools("0011")}, {"acc": bools("1101")}, 4),  # fixed, fixed, broken, same
        pair({"acc": bools("100")}, {"acc": bools("010")}, 3),  # broken, fixed, same
    )
    (row,) = examples.rows("laser", {"acc": log(3 / 7, "acc")}, {"acc": log(4 / 7, "acc")})
    assert (row.n, row.fixed, row.broken, row.test) == (7, 3, 2, "exact McNemar")
    assert (row.original, row.reduced) == pytest.approx((3 / 7, 4 / 7))
    assert row.p == pytest.approx(stats.binomtest(3, 5).pvalue)
    assert row.higher_is_better


def test_pairs_are_found_by_name_and_dataloader():
    first = pair(
        {"acc": bools("01"), "loss": torch.tensor([1.0, 2.0])}, {"acc": bools("11"), "loss": torch.ones(2)}, 2, 0
    )
    second = pair({"acc": bools("111")}, {"acc": bools("100")}, 3, 1)
    examples = together(first, second)
    keys = {
        "acc/dataloader_idx_0": log(0.5, "acc", 0),
        "acc/dataloader_idx_1": log(1.0, "acc", 1),
        "acc": log(0.8, "acc"),  # over both
        "loss/dataloader_idx_0": log(1.5, "loss", 0),
        "other": log(3.0, "other"),
        "only_original": log(3.0, "only_original"),
    }
    reduced = {key: value for key, value in keys.items() if key != "only_original"}
    rows = {row.metric: row for row in examples.rows("laser", keys, reduced)}
    assert set(rows) == set(reduced)
    assert (rows["acc/dataloader_idx_0"].n, rows["acc/dataloader_idx_0"].fixed) == (2, 1)
    assert (rows["acc/dataloader_idx_1"].n, rows["acc/dataloader_idx_1"].broken) == (3, 2)
    assert (rows["acc"].n, rows["acc"].fixed, rows["acc"].broken) == (5, 1, 2)
    assert rows["loss/dataloader_idx_0"].test == "paired t"
    assert rows["other"].test == "not tested"


@pytest.mark.filterwarnings("ignore:`group`")
def test_what_counts_as_an_outcome():
    output = {
        "wrong_length": torch.ones(3),
        "matrix": torch.ones(2, 2),
        "scalar": torch.tensor(1.0),
        "text": ["a", "b"],
        "half": torch.tensor([1.5, 2.5], dtype=torch.bfloat16),
        "weighted": Outcomes(torch.tensor([1.0, 2.0]), torch.tensor([3, 1])),
        "id": torch.tensor([7, 8]),
        "cluster": ["x", "x"],
        "group": "no list",
    }
    (batch,) = pair(output, output, 2).batches
    assert set(batch.outcomes[ORIGINAL]) == {"half", "weighted"}
    assert batch.outcomes[ORIGINAL]["half"].values.tolist() == [1.5, 2.5]
    assert batch.described[ORIGINAL] == {"id": [7, 8], "cluster": ["x", "x"]}
    assert batch.unused["wrong_length"] == "3 values for 2 examples"
    for nothing in (None, torch.tensor(1.0), [torch.ones(2)]):
        assert pair(nothing, nothing, 2).batches[0].outcomes == {ORIGINAL: {}, "laser": {}}
    # A mapping that is no dict, as transformers returns them.
    assert "half" in pair(UserDict(output), UserDict(output), 2).batches[0].outcomes[ORIGINAL]


@dataclass
class Output:
    acc: Any
    loss: Any = None


class Named(NamedTuple):
    loss: Any
    acc: Any


MADE = {
    "bool": lambda x: {"acc": x},
    "integers": lambda x: {"acc": x.long()},
    "bytes": lambda x: {"acc": x.to(torch.uint8)},
    "a list": lambda x: {"acc": x.tolist()},
    "a list of integers": lambda x: {"acc": x.int().tolist()},
    "a tuple of tensors": lambda x: {"acc": tuple(x)},
    "a list of NumPy's": lambda x: {"acc": list(x.numpy())},
    "a column": lambda x: {"acc": x[:, None]},
    "a column of a column": lambda x: {"acc": x[:, None, None]},
    "a list of columns": lambda x: {"acc": x[:, None].tolist()},
    "an array": lambda x: {"acc": x.numpy()},
    "a dataclass": lambda x: Output(x),
    "a named tuple": lambda x: Named(torch.tensor(0.0), x),
    "nested": lambda x: {"loss": torch.tensor(0.0), "metrics": {"acc": x}},
    "nested dataclasses": lambda x: {"out": Output(x.long())},
    "beside a loss": lambda x: (torch.tensor(0.0), {"acc": x}),
    "a mapping for each": lambda x: [{"acc": one} for one in x.tolist()],
    "squeezed": lambda x: {"acc": x[:, None].squeeze()},
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_right_and_wrong_may_come_in_any_form(make):
    parts = [pair(make(bools(b)), make(bools(a)), len(b)) for b, a in [("0011", "1101"), ("100", "010"), ("0", "1")]]
    examples = PairedExamples().merge([together(*parts)])
    (row,) = examples.rows("laser", {"acc": log(3 / 8, "acc")}, {"acc": log(5 / 8, "acc")})
    assert (row.n, row.fixed, row.broken, row.test, row.note) == (8, 4, 2, "exact McNemar", "")


@pytest.mark.parametrize("logged", ["metrics/acc", "metrics.acc", "metrics_acc", "acc"])
def test_a_part_may_be_logged_under_any_usual_name(logged):
    output = {"metrics": {"acc": bools("01")}, "id": ["a", "b"]}
    (row,) = pair(output, output, 2).rows("laser", {logged: log(0.5, logged)}, {logged: log(0.5, logged)})
    assert (row.n, row.test) == (2, "exact McNemar")


REFUSED = {
    "of shape (4, 3)": torch.ones(4, 3),
    "of shape (1, 4)": torch.ones(1, 4),
    "a list of tensors": [torch.ones(2)] * 4,
    "unequal parts": [[1], [1, 2], [1], [1]],
    "dtype <U1": list("abcd"),
    "dtype complex64": torch.ones(4, dtype=torch.complex64),
    "type set": {1, 2, 3, 4},
    "5 values for 4 examples": torch.ones(5),
    "torch.sparse_coo": torch.ones(4).to_sparse(),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_outcome_is_said(reason):
    output = {"acc": REFUSED[reason], "id": list("abcd")}
    examples = pair(output, output, 4)
    examples.means.append({arm: {"acc": (2.0, 4)} for arm in (ORIGINAL, "laser")})
    (row,) = examples.rows("laser", {"acc": log(0.5, "acc")}, {"acc": log(0.5, "acc")})
    assert "under this name is not one outcome per example" in row.note
    assert reason in row.note
    assert row.n == 1


def test_one_number_for_the_batch_needs_no_words():
    for loss in (torch.tensor(1.0), torch.ones(1), 1.0, [1.0]):
        output = {"loss": loss, "acc": bools("0011")}
        examples = pair(output, output, 4)
        examples.means.append({arm: {"loss": (4.0, 4)} for arm in (ORIGINAL, "laser")})
        (row,) = examples.rows("laser", {"loss": log(1.0, "loss")}, {"loss": log(1.0, "loss")})
        assert row.note.removeprefix("one independent unit has no variance; ") == "unit: the batch"


def test_some_batches_are_never_examples_where_others_are_not():
    parts = [pair({"acc": bools("0011")}, {"acc": bools("1111")}, 4), pair({}, {}, 3)]
    parts += [pair({"acc": bools("0011")}, {"acc": bools("111")}, 4)]
    for number, note in [(2, "1 of 2 batches came without one"), (3, "3 values of the reduced model for 4 examples")]:
        examples = together(*parts[:number])
        examples.means = [{arm: {"acc": (2.0, b.size)} for arm in (ORIGINAL, "laser")} for b in examples.batches]
        (row,) = examples.rows("laser", {"acc": log(0.5, "acc")}, {"acc": log(0.5, "acc")})
        assert row.n == number
        assert note in row.note
        assert "unit: the batch" in row.note


@pytest.mark.parametrize("second", [torch.tensor([1.0, 0.5]), torch.tensor([1, 0]), torch.tensor([3, 0])])
@pytest.mark.parametrize("swap", [False, True])
def test_batches_and_arms_may_differ_in_their_type(second, swap):
    parts = [pair({"acc": bools("01")}, {"acc": bools("11")}, 2), pair({"acc": bools("01")}, {"acc": second}, 2)]
    parts.append(pair({"acc": second}, {"acc": bools("11")}, 2))
    examples = together(*(reversed(parts) if swap else parts))
    (row,) = examples.rows("laser", {"acc": log(0.5, "acc")}, {"acc": log(0.5, "acc")})
    assert row.n == 6
    assert row.test == ("exact McNemar" if second.tolist() == [1, 0] else "paired t")
    assert examples.values("laser", "acc", log(0.5, "acc"))


def test_outcomes_that_are_no_pairs_are_said():
    weighted, ratio = Outcomes(torch.ones(2), torch.ones(2)), Outcomes(torch.ones(2), torch.ones(2), "log_ratio")
    for after, note in [
        (Outcomes(torch.ones(2), torch.tensor([1.0, 2.0])), "other weights for the reduced model"),
        (ratio, "different kinds: log_ratio, mean"),
    ]:
        (row,) = pair({"x": weighted}, {"x": after}, 2).rows("laser", {"x": log(1.0, "x")}, {"x": log(1.0, "x")})
        assert note in row.note
        assert row.test == "not tested"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("all_of_them", [True, False])
@pytest.mark.parametrize("per_example", [True, False])
def test_a_model_that_the_cut_broke_is_a_row_without_a_test(value, all_of_them, per_example):
    before, after = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([value] * (3 if all_of_them else 1) + [2.5] * 2)[:3]
    examples = pair({"loss": before} if per_example else {}, {"loss": after} if per_example else {}, 3)
    examples.means.append({ORIGINAL: {"loss": (6.0, 3)}, "laser": {"loss": (float(after.sum()), 3)}})
    (row,) = examples.rows("laser", {"loss": log(2.0, "loss")}, {"loss": log(float(after.mean()), "loss")})
    assert (row.test, row.p, row.original) == ("not tested", None, 2.0)
    assert f"the reduced model's value is {value:g}" in row.note
    assert Constraint.parse("loss <= +9").judge(row).verdict == "fail"
    assert examples.values("laser", "loss", log(2.0, "loss")) is not None


@pytest.mark.parametrize("per_example", [True, False])
def test_a_key_without_a_value_in_any_batch(per_example):
    nan = float("nan")
    output = {"f1": torch.full((3,), nan)} if per_example else {}
    examples = pair(output, output, 3)
    examples.means.append({arm: {"f1": (nan, 3)} for arm in (ORIGINAL, "laser")})
    (row,) = examples.rows("laser", {"f1": log(nan, "f1")}, {"f1": log(nan, "f1")})
    assert (row.test, row.verdict) == ("not tested", "not tested")
    assert "no unit has a value in both arms" in row.note
    adjust_together([ArmResult("1.mlp@0.1", [row], {}, "off", 1.0, 0.1)], "f1")


def test_what_is_returned_and_not_logged():
    output = {"acc": bools("0011"), "loss": torch.ones(4), "label": torch.arange(4), "logits": torch.ones(4, 3)}
    examples = together(pair(output, {**output, "acc": bools("1111")}, 4), pair(output, output, 4))
    found = examples.returned(ORIGINAL)
    rows = examples.rows("laser", found, examples.returned("laser"))
    assert [(row.metric, row.n, row.original, row.reduced) for row in rows] == [
        ("acc", 8, 0.5, 0.75),
        ("loss", 8, 1, 1),
    ]
    assert not any(row.note for row in rows)
    assert set(examples.to_rows()[0][ORIGINAL]) == {"acc", "loss"}  # labels are no outcomes
    several = together(pair(output, output, 4, 0), pair(output, output, 4, 1))
    assert list(several.returned(ORIGINAL))[::2] == ["acc/dataloader_idx_0", "acc/dataloader_idx_1"]


def test_outcomes_are_copies():
    kept, used = torch.tensor([1.0, 2.0]), Outcomes(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
    examples = pair({"a": kept, "b": used}, {"a": kept, "b": used}, 2)
    kept.zero_()
    used.values.zero_()
    assert used.weights is not None
    used.weights.zero_()
    for outcomes in examples.batches[0].outcomes[ORIGINAL].values():
        assert outcomes.values.tolist() == [1.0, 2.0]
        assert outcomes.weights is None or outcomes.weights.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "ids",
    [["b", "c"], ("b", "c"), torch.tensor([2, 3]), np.array([2, 3]), np.array(["b", "c"]), list(torch.tensor([2, 3]))],
)
def test_duplicates_by_id(ids):
    other = [2, 1] if not isinstance(ids[0], str) else ["b", "a"]
    first = pair({"id": ids, "acc": bools("10")}, {"acc": bools("01")}, 2)
    second = pair({"id": other, "acc": bools("11")}, {"acc": bools("10")}, 2)  # its first was seen on the first rank
    merged = PairedExamples().merge([first, second])
    assert merged.duplicates == 1
    (row,) = merged.rows("laser", {"acc": log(0.0, "acc")}, {"acc": log(0.0, "acc")})
    assert (row.n, row.fixed, row.broken) == (3, 1, 2)
    assert [b.size for b in merged.batches] == [2, 1]
    json.dumps([b.described for b in merged.batches])  # plain values


def test_one_id_in_two_dataloaders_is_two_examples():
    parts = [pair({"id": ["a"], "acc": bools("1")}, {"acc": bools("1")}, 1, index) for index in (0, 1)]
    assert PairedExamples().merge(parts).duplicates == 0


@pytest.mark.parametrize(
    ("second", "n"),
    [
        ({"id": list("cab"), "acc": bools("010"), "prompt": list("zxy")}, 3),  # the same, in another order
        ({"id": list("cad"), "acc": bools("011"), "prompt": list("zxw")}, 4),  # two of them, and one that is new
        ({"id": list("cab"), "acc": bools("011"), "prompt": list("zxy")}, 6),  # another outcome,
        ({"id": list("cab"), "acc": bools("010"), "prompt": list("zxw")}, 6),  # another prompt:
    ],  # ids that are running numbers of each dataloader's own
)
def test_the_same_examples_in_two_dataloaders_count_once(second, n):
    first = {"id": list("abc"), "acc": bools("100"), "prompt": list("xyz")}
    examples = together(
        pair(first, {"acc": bools("110")}, 3, 0),
        pair(second, {"acc": bools("011")}, 3, 1),
    )
    (row,) = examples.rows("laser", {"acc": log(0.5, "acc")}, {"acc": log(0.5, "acc")})
    assert row.n == n


def test_without_ids_nothing_is_removed():
    parts = [pair({"acc": bools("10")}, {"acc": bools("10")}, 2) for _ in range(2)]
    merged = PairedExamples().merge(parts)
    assert (merged.duplicates, sum(b.size for b in merged.batches)) == (0, 4)


def test_a_batch_of_duplicates_only():
    part = pair({"id": ["a"], "acc": bools("1")}, {"acc": bools("1")}, 1)
    merged = PairedExamples().merge([part, part])
    (row,) = merged.rows("laser", {"acc": log(0.0, "acc")}, {"acc": log(0.0, "acc")})
    assert (row.n, merged.duplicates) == (1, 1)


IDS = [
    uuid.UUID(int=5),
    b"a",
    datetime(2026, 1, 1),
    Path("a/b"),
    Decimal("1.5"),
    ["document", 3],
    {"document": 3},
    "\ud800",
    torch.tensor([1, 2]),
    np.array([1, 2]),
    np.int64(7),
    None,
]


@pytest.mark.parametrize("example_id", IDS, ids=str)
def test_anything_may_be_an_id_or_a_cluster(example_id):
    part = pair({"id": [example_id, "b"], "cluster": [example_id, 3], "acc": bools("10")}, {"acc": bools("01")}, 2)
    again = pair({"id": ["c", example_id], "cluster": [3, example_id], "acc": bools("10")}, {"acc": bools("01")}, 2)
    merged = PairedExamples().merge([part, again])
    (row,) = merged.rows("laser", {"acc": log(0.0, "acc")}, {"acc": log(0.0, "acc")})
    assert (merged.duplicates, row.n) == (1, 2)
    assert "3 examples in 2 clusters" in row.note


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ids_that_start_anew_in_each_batch_remove_nothing(ranks):
    parts = [pair({"id": [0, 1, 2, 3], "acc": bools("1010")}, {"acc": bools("1111")}, 4) for _ in range(8)]
    with pytest.warns(UserWarning, match="`id` must be another for each example, but '0' comes again"):
        merged = PairedExamples().merge([together(*parts[i::ranks]) for i in range(ranks)])
    (row,) = merged.rows("laser", {"acc": log(0.5, "acc")}, {"acc": log(1.0, "acc")})
    assert (merged.duplicates, row.n, row.fixed) == (0, 32, 16)


@pytest.mark.parametrize("n", [5, 6, 7, 8, 3, 1])
def test_what_a_sampler_adds_is_removed_and_no_more(n, recwarn):
    ranks = []
    for rank in range(4):
        places = list(DistributedSampler(range(n), 4, rank, shuffle=False))
        output = {"id": [f"e{i}" for i in places], "acc": torch.ones(len(places)).bool()}
        ranks.append(pair(output, output, len(places)))
    merged = PairedExamples().merge(ranks)
    assert (merged.duplicates, sum(b.size for b in merged.batches)) == (-n % 4, n)
    assert not recwarn


def test_clusters():
    examples = together(
        pair({"acc": bools("0011"), "cluster": list("aabb")}, {"acc": bools("1011")}, 4),
        pair({"acc": bools("10"), "cluster": list("bc")}, {"acc": bools("01")}, 2),
    )
    (row,) = examples.rows("laser", {"acc": log(1 / 2, "acc")}, {"acc": log(2 / 3, "acc")})
    expected = compare("acc", Outcomes.of(bools("001110")), Outcomes.of(bools("101101")), clusters=list("aabbbc"))
    assert row == expected
    assert (row.n, row.fixed, row.broken) == (3, 2, 1)
    assert row.note == "6 examples in 3 clusters"


IMAGES = [torch.ones(3, 4, 4)] * 8
SENTENCES = pack_sequence([torch.ones(4, 2), torch.ones(3, 2), torch.ones(3, 2)])


@pytest.mark.parametrize(
    ("output", "batch", "expected"),
    [
        ({"id": ["a", "b"]}, torch.ones(5, 2), 2),
        ({"id": torch.tensor([1, 2, 3])}, None, 3),
        ({"id": np.array([1, 2, 3])}, torch.ones(5, 2), 3),
        (None, (torch.ones(5, 2), torch.ones(3)), 5),
        (None, {"scalar": torch.tensor(1.0), "x": [torch.ones(4)]}, 4),
        (None, UserDict({"x": torch.ones(6, 1)}), 6),
        (None, ["text"], 1),
        ({"acc": torch.ones(8)}, (IMAGES, torch.ones(8)), 8),
        ({"acc": torch.ones(8)}, IMAGES, 8),
        ({"acc": torch.ones(8), "loss": torch.ones(1)}, IMAGES, 8),
        ({"acc": torch.ones(1)}, (IMAGES[:1], torch.ones(1)), 1),
        ({"acc": torch.ones(3)}, SENTENCES, 3),
        ({"acc": torch.ones(3), "ppl": torch.ones(10)}, (SENTENCES, torch.ones(3)), 3),
        ({"acc": torch.ones(8), "id": ["a"]}, torch.ones(8), 8),
        ({"id": list("abc"), "token_acc": torch.ones(40)}, torch.ones(3, 20), 3),
        ({"acc": torch.ones(2)}, {"graph": object()}, 2),
        ({"acc": torch.ones(0)}, torch.ones(4), 0),
    ],
)
@pytest.mark.filterwarnings("ignore:`id`")
def test_the_number_of_examples(output, batch, expected):
    assert read_returned({ORIGINAL: output}, batch).size == expected


def test_a_batch_that_holds_nothing_of_the_length_is_doubted():
    output = {"acc": torch.ones(10)}
    for batch, doubt in [
        (torch.ones(8, 3), True),
        (IMAGES, True),
        (torch.ones(2, 10), True),
        ((3, torch.ones(10)), False),
    ]:
        examples = PairedExamples()
        examples.add({ORIGINAL: output, "laser": output}, batch, None)
        (row,) = examples.rows("laser", {"acc": log(1.0, "acc")}, {"acc": log(1.0, "acc")})
        assert row.n == 10
        assert ("10 outcomes for a batch in which nothing has this length" in row.note) == doubt


def test_descriptions_that_do_not_fit_are_told_once():
    with pytest.warns(
        UserWarning, match="`id`, as the step returns it, is not used: .*8 examples, got 1 of them"
    ) as told:
        together(*(pair({"acc": torch.ones(8), "id": ["a"]}, {"acc": torch.ones(8)}, 8) for _ in range(2)))
    assert len(told) == 2  # of two runs
    examples = PairedExamples()
    output = {"acc": bools("1"), "id": "a", "answer": "Paris", "prediction": "Rome"}
    examples.add({ORIGINAL: output, "laser": output}, torch.ones(1), None)  # one example needs no list
    assert examples.batches[0].described[ORIGINAL] == {"id": ["a"], "answer": ["Paris"], "prediction": ["Rome"]}


# ---- the unit is the batch -------------------------------------------------------------------------------------------


def test_batch_means_are_weighted_by_their_size():
    examples = PairedExamples()
    before, after, sizes = [1.0, 2.0, 4.0], [0.5, 2.5, 1.0], [4, 4, 1]
    for b, a, size in zip(before, after, sizes, strict=True):
        examples.add({ORIGINAL: None, "laser": None}, torch.empty(size), None)
        examples.means.append({ORIGINAL: {"loss": (b * size, size)}, "laser": {"loss": (a * size, size)}})
    (row,) = examples.rows("laser", {"loss": log(16 / 9, "loss")}, {"loss": log(13 / 9, "loss")})
    assert row.note == "unit: the batch"
    assert (row.n, row.test) == (3, "cluster-robust t")
    assert (row.original, row.reduced) == pytest.approx((16 / 9, 13 / 9))
    # The jackknife by hand; all sums are multiples of 1, half of which is the continuity correction.
    w, d = np.array(sizes, float), np.array(after) - np.array(before)
    ratio = (w * d).sum() / w.sum()
    without = np.array([np.average(np.delete(d, i), weights=np.delete(w, i)) for i in range(3)])
    error, df, half = np.sqrt(2 / 3 * ((without - ratio) ** 2).sum()), w.sum() ** 2 / (w**2).sum() - 1, 0.5 / w.sum()
    assert row.delta == pytest.approx(ratio)
    assert row.p == pytest.approx(2 * stats.t.sf((abs(ratio) - half) / error, df))
    assert row.lower == pytest.approx(ratio - stats.t.ppf(0.975, df) * error - half)


def test_batches_that_cannot_be_paired_are_left_out():
    examples = PairedExamples()
    for means in (
        {ORIGINAL: {"loss": (4.0, 4)}, "laser": {"loss": (2.0, 4)}},
        {ORIGINAL: {"loss": (9.0, 3)}, "laser": {"loss": (4.0, 2)}},  # not the same examples
        {ORIGINAL: {"loss": (0.0, 0)}, "laser": {"loss": (0.0, 0)}},  # not logged in this batch
        {ORIGINAL: {}, "laser": {"loss": (4.0, 2)}},
        {ORIGINAL: {"loss": (1.0, 1)}, "laser": {}},
        {ORIGINAL: {"loss": (2.0, 4)}, "laser": {"loss": (2.0, 4)}},
    ):
        examples.add({ORIGINAL: None, "laser": None}, torch.empty(4), None)
        examples.means.append(means)
    (row,) = examples.rows("laser", {"loss": log(1.0, "loss")}, {"loss": log(1.0, "loss")})
    assert (row.n, row.original, row.reduced) == (2, 0.75, 0.5)
    assert row.note == "3 of 5 batches left out: logged in one arm only; unit: the batch"


def test_not_a_mean():
    examples = pair({"x": torch.ones(3)}, {"x": torch.ones(3)}, 3)
    examples.means.append({ORIGINAL: {}, "laser": {}})
    (row,) = examples.rows("laser", {"f1": log(0.5, "f1", better=True)}, {"f1": log(0.75, "f1")})
    assert (row.test, row.verdict, row.n, row.delta) == ("not tested", "not tested", 3, 0.25)
    assert (row.p, row.lower, row.kind) == (None, None, None)
    assert row.note == "not an average over examples"
    assert row.higher_is_better


def test_a_key_that_is_logged_as_something_else():
    """Beyond rounding, and in either arm; weights count as they do in the row."""
    weights = torch.tensor([3, 1])
    before, after = (Outcomes(torch.tensor(values), weights) for values in ([1.0, 4.0], [2.0, 5.5]))  # 1.75, 2.875
    examples = pair({"x": before}, {"x": after}, 2)

    def note(original: float, reduced: float) -> str:
        (row,) = examples.rows("laser", {"x": log(original, "x")}, {"x": log(reduced, "x")})
        return row.note

    assert note(1.75, 2.875) == note(1.7501, 2.8749) == ""
    assert note(2.5, 3.5) == "logged as 2.5 and 3.5 (reduced): not the mean over these examples"
    assert note(1.75, 3.5) == "logged as 1.75 and 3.5 (reduced): not the mean over these examples"
    assert note(float("nan"), 2.875) == "logged as nan and 2.875 (reduced): not the mean over these examples"


def test_outcomes_absent_everywhere_fall_back():
    nothing = torch.full((2,), float("nan"))
    examples = pair({"x": nothing}, {"x": nothing}, 2)
    examples.means.append({ORIGINAL: {"x": (4.0, 2)}, "laser": {"x": (2.0, 2)}})
    (row,) = examples.rows("laser", {"x": log(2.0, "x")}, {"x": log(1.0, "x")})
    assert row.note.endswith("unit: the batch")


# ---- priors ----------------------------------------------------------------------------------------------------------


def test_priors():
    def batch(answers, before, after, group):
        right = [[a == said for a, said in zip(answers, arm, strict=True)] for arm in (before, after)]
        one = described(answers, before, group=group) | {"acc": torch.tensor(right[0])}
        return pair(one, described([], after) | {"acc": torch.tensor(right[1])}, len(answers))

    examples = together(
        batch(["yes", "no"], ["no", "no"], ["yes", "yes"], ["g", "h"]),
        batch(["yes", "no"], ["no", "no"], ["yes", "no"], ["g", "g"]),
    )
    logged = {"acc": log(0.5, "acc")}, {"acc": log(0.75, "acc")}
    checks = examples.priors("laser", *logged)["acc"]
    assert (checks.metric, checks.n, checks.delta) == ("acc", 4, 0.25)  # 2 of 4, then 3 of 4
    assert checks.top_predictions == {"original": [("no", 4)], "reduced": [("yes", 3), ("no", 1)]}
    assert checks.constant_answer == 0.5  # both groups are small, and taken together
    assert pair({"acc": bools("1")}, {"acc": bools("1")}, 1).priors("laser", *logged) == {}


def test_each_metric_is_checked_by_what_it_looks_at():
    chosen = {"prediction/choice": ["a", "b"], "answer/choice": ["a", "a"], "choice": bools("10")}
    one = {"answer": ["x", "y"], "prediction": ["x", "z"], "acc": bools("10"), **chosen}
    two = {"prediction": ["x", "y"], "acc": bools("11"), "loss": torch.full((2,), 0.25), **chosen}
    examples = pair(one | {"loss": torch.ones(2)}, two, 2)
    logged = {name: log(0.5, name) for name in ("acc", "choice", "loss")}
    checks = examples.priors("laser", logged, logged)
    assert set(checks) == {"acc", "choice"}
    assert checks["choice"].top_predictions["reduced"] == [("a", 1), ("b", 1)]
    assert checks["acc"].top_predictions["reduced"] == [("x", 1), ("y", 1)]
    (row, _) = examples.to_rows()
    assert row["laser"]["prediction/choice"] == "a"
    assert row["answer/choice"] == "a"


def test_predictions_as_a_mapping_by_metric():
    one = {"choice": bools("10"), "answer": {"choice": ["a", "a"]}, "prediction": {"choice": ["a", "b"]}}
    two = {"choice": bools("11"), "prediction": {"choice": ["a", "a"]}, "acc": bools("11")}
    examples = pair(one | {"acc": bools("10")}, two, 2)
    logged = {name: log(0.5, name) for name in ("acc", "choice")}
    checks = examples.priors("laser", logged, logged)
    assert set(checks) == {"choice"}, "nothing is said of what the other metric looks at"
    assert checks["choice"].top_predictions == {"original": [("a", 1), ("b", 1)], "reduced": [("a", 2)]}
    assert (checks["choice"].matched, checks["choice"].delta) == (1.0, 0.5)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_write_jsonl(tmp_path):
    examples = PairedExamples()
    outputs = {
        ORIGINAL: {
            "id": ["ä", "b"], "answer": ["x", "y"], "prediction": ["x", "é"],
            "acc": bools("10"), "loss": torch.tensor([0.5, float("nan")]),
        },
        "a": {"prediction": ["x", "y"], "acc": bools("11"), "loss": torch.tensor([0.25, float("inf")])},
        "a.zeroed": {"acc": bools("00"), "loss": torch.tensor([1.0, float("-inf")])},
    }  # fmt: skip
    examples.add(outputs, torch.empty(2), None)
    examples.add({arm: {"acc": bools("1")} for arm in outputs}, torch.empty(1), None)
    path = tmp_path / "deep" / "examples.jsonl"
    examples.write(path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines[0] == {
        "id": "ä",
        "answer": "x",
        "original": {"acc": 1.0, "loss": 0.5, "prediction": "x"},
        "a": {"acc": 1.0, "loss": 0.25, "prediction": "x"},
        "a.zeroed": {"acc": 0.0, "loss": 1.0},
    }
    assert lines[1]["original"] == {"acc": 0.0, "loss": None, "prediction": "é"}
    assert lines[1]["a"]["loss"] is None
    assert lines[2] == {arm: {"acc": 1.0} for arm in outputs}
    assert [p.name for p in path.parent.iterdir()] == ["examples.jsonl"]
