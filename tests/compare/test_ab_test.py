"""A/B routing in predict: who goes where, each example once and by its model, and both arms' numbers."""

from __future__ import annotations

import json
import random
from itertools import chain
from typing import Any

import pytest
import torch
from fact_rows import facts
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from scipy import stats
from tiny import SENTENCES, tiny_causal_lm, tiny_tokenizer
from torch import Tensor
from trainers import quiet_trainer

from laser_callback import FactsDataModule, LaserModule, ProbesDataModule, reduced
from laser_callback.compare.ab_test import arm_of, part_of
from laser_callback.data.datamodule import TextWindows

PLAN = "2.mlp@0.05"


def module(**options: Any) -> LaserModule:
    return LaserModule(tiny_causal_lm(), tiny_tokenizer(), plan=PLAN, report=False, **options)


@pytest.fixture
def loaders(tmp_path):
    """Facts, text and probes."""
    tokenizer = tiny_tokenizer()
    data = FactsDataModule(facts(n=40), tokenizer, batch_size=9, rows_per_forward=7)
    data.setup()
    (tmp_path / "text.txt").write_text(" ".join(SENTENCES * 20))
    windows = TextWindows(tmp_path / "text.txt", tokenizer, window=32)
    text = torch.utils.data.DataLoader(windows, 4, collate_fn=windows.collate)
    probes = ProbesDataModule(
        [{"prompt": f"{i} {SENTENCES[i % 3]}", "should": "answer"} for i in range(10)], tokenizer, max_new_tokens=2
    )
    probes.setup()
    return [data.val_dataloader(), text, probes.val_dataloader()]


def test_an_id_decides_alone_and_a_larger_fraction_takes_nobody_back():
    ids = [f"user {i}" for i in range(4000)]
    shares = [sum(arm_of(i, fraction, 7) == "reduced" for i in ids) for fraction in (0, 0.1, 0.5, 1)]
    assert shares[0] == 0
    assert shares[-1] == 4000
    for share, fraction in zip(shares[1:3], (0.1, 0.5), strict=True):
        assert stats.binomtest(share, 4000, fraction).pvalue > 0.01
    tenth, half = ({i for i in ids if arm_of(i, fraction, 7) == "reduced"} for fraction in (0.1, 0.5))
    assert tenth < half
    assert half != {i for i in ids if arm_of(i, 0.5, 8) == "reduced"}


def test_each_example_gets_what_its_model_alone_says(loaders):
    routed = module(ab_fraction=0.4, ab_seed=3)
    alone = LaserModule(routed.model, routed.tokenizer)
    before = {name: value.clone() for name, value in routed.state_dict().items()}
    mixed = quiet_trainer().predict(routed, loaders)
    original = quiet_trainer().predict(alone, loaders)
    with reduced(routed.model, PLAN):
        cut = quiet_trainer().predict(alone, loaders)
    seen = 0
    for found, by_original, by_reduced in zip(*map(chain.from_iterable, (mixed, original, cut)), strict=True):
        assert found["id"] == by_original["id"]
        assert found["arm"] == [arm_of(i, 0.4, 3) for i in found["id"]]
        for name, values in by_original.items():
            for i, arm in enumerate(found["arm"]):
                expected = (values if arm == "original" else by_reduced[name])[i]
                if isinstance(values, Tensor):
                    torch.testing.assert_close(found[name][i], expected, rtol=1e-5, atol=1e-6, equal_nan=True)
                else:
                    assert found[name][i] == expected
        seen += len(found["id"])
    assert seen == sum(len(loader.dataset) for loader in loaders) == sum(routed.ab_result.examples.values())
    assert all(torch.equal(value, before[name]) for name, value in routed.state_dict().items())


def test_each_example_is_computed_once(loaders):
    routed = module(ab_fraction=0.5)
    rows = []
    hook = routed.model.model.layers[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    quiet_trainer().predict(routed, loaders[0])
    split = sum(rows)
    rows.clear()
    quiet_trainer().predict(LaserModule(routed.model, routed.tokenizer), loaders[0])
    hook.remove()
    assert split == sum(rows)


def test_both_arms_are_reported(loaders, tmp_path, capsys):
    routed = module(ab_fraction=0.5, ab_seed=1)
    routed.report = str(tmp_path / "ab.json")
    found = list(chain.from_iterable(quiet_trainer().predict(routed, loaders)))
    result = routed.ab_result
    by_arm: dict[str, list[float]] = {"original": [], "reduced": []}
    for batch in found:
        if "log_loss" in batch:
            for arm, value in zip(batch["arm"], batch["log_loss"].tolist(), strict=True):
                by_arm[arm].append(value)
    row = result["log_loss"]
    assert row.p == pytest.approx(stats.ttest_ind(*by_arm.values(), equal_var=False).pvalue)
    assert (row.n_original, row.n_reduced) == tuple(map(len, by_arm.values()))
    assert row.higher_is_better is False
    assert result["first_token_accuracy"].role == "primary"
    assert result["perplexity"].kind == "log_ratio"
    assert result["answer_rate"].n == 10
    with pytest.raises(KeyError, match="there are first_token_accuracy"):
        result["refusal_rate"]  # no probe is to be refused
    assert json.loads((tmp_path / "ab.json").read_text())["examples"] == result.examples
    shown = capsys.readouterr().out
    assert "first_token_accuracy*" in shown
    assert PLAN in shown


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    results = []
    for name, options in (("one", {}), ("two", {"devices": 2, "strategy": "ddp_spawn"})):
        routed = module(ab_fraction=0.5)
        routed.report = str(tmp_path / f"{name}.json")
        # Batches of one fact: each is computed in the same way, wherever it is.
        data = FactsDataModule(facts(n=11), routed.tokenizer, batch_size=1)
        quiet_trainer(**options).predict(routed, datamodule=data, return_predictions=False)
        results.append(json.loads((tmp_path / f"{name}.json").read_text()))
    one, two = results
    assert one["examples"] == two["examples"]
    assert sum(one["examples"].values()) == 11
    for row, same in zip(one["rows"], two["rows"], strict=True):
        assert row == {key: pytest.approx(value) for key, value in same.items()}


def test_the_whole_range_of_fractions(loaders):
    for fraction, arm in ((0, "original"), (1, "reduced")):
        routed = module(ab_fraction=fraction)
        batches = quiet_trainer().predict(routed, loaders[0])
        assert {a for batch in batches for a in batch["arm"]} == {arm}
        assert routed.ab_result.examples[arm] == 40
        assert routed.ab_result.rows == []


def test_an_error_in_the_reduced_pass_leaves_the_weights(loaders):
    routed = module(ab_fraction=1)
    before = {name: value.clone() for name, value in routed.model.state_dict().items()}

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    routed.model.model.layers[3].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        quiet_trainer().predict(routed, loaders[0])
    assert all(torch.equal(value, before[name]) for name, value in routed.model.state_dict().items())
    with pytest.raises(RuntimeError, match="no A/B result"):
        routed.ab_result  # noqa: B018


def test_parts_of_a_batch_make_the_batch(loaders):
    for loader in loaders:
        batch = next(iter(loader))
        size = len(batch["id"])
        chosen = sorted(random.Random(0).sample(range(size), size // 2))
        part = part_of(batch, chosen)
        assert part["id"] == [batch["id"][i] for i in chosen]
        if "chunks" in batch:
            rest = part_of(batch, [i for i in range(size) if i not in chosen])
            assert len(part["row_fact"]) + len(rest["row_fact"]) == len(batch["row_fact"])
            assert sum(len(chunk["input_ids"]) for chunk in part["chunks"]) == len(part["row_fact"])


def test_a_data_module_is_enough():
    routed = module(ab_fraction=0.5)
    batches = quiet_trainer().predict(routed, datamodule=FactsDataModule(facts(), routed.tokenizer, batch_size=5))
    assert [example for batch in batches for example in batch["id"]] == [row["id"] for row in facts()]
    assert sum(routed.ab_result.examples.values()) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ab_fraction": 1.5}, r"`ab_fraction` must be in \[0, 1\], got 1.5"),
        ({"ab_fraction": 0.5, "plan": None}, "needs one `plan`"),
        ({"ab_fraction": 0.5, "plan": {"a": PLAN, "b": "1.mlp@0.1"}}, "needs one `plan`"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        LaserModule(tiny_causal_lm(), tiny_tokenizer(), **{"plan": PLAN} | options)
