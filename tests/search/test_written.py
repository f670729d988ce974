"""A search of answers that are written: who writes, how often, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny import SENTENCES, tiny_causal_lm, tiny_tokenizer
from trainers import quiet_trainer

from laser_callback import FactsDataModule, LaserModule, LaserSearch, reduced
from laser_callback.compare import writing
from laser_callback.data import ExampleSets, Generation
from laser_callback.reports import save_page
from laser_callback.reports.search_terminal import plain
from laser_callback.results import SearchResult
from laser_callback.shipping import LaserCleanup

TOKENIZER, BETTER = tiny_tokenizer(), "3.fc_up@0.5"
GENERATION = Generation(max_new_tokens=6, extract="([a-z]+)")


def data(model: Any, n: int = 160) -> FactsDataModule:
    """Facts whose answers are what the model writes under a plan, with a rationale that leads there."""
    rows = [{"id": f"f{i}", "prompt": f"{SENTENCES[i % 3][: 8 + (3 * i) % 40].strip()} {i}"} for i in range(n)]
    asked = FactsDataModule([row | {"answer": "x"} for row in rows], TOKENIZER, generation=GENERATION, batch_size=n)
    asked.setup()
    (batch,) = asked.val_dataloader()
    with torch.inference_mode(), reduced(model, BETTER):
        texts = writing.write(model, TOKENIZER, batch["asked"]).texts
    (scored,) = batch["asked"]["judged"](texts, batch)
    for row, one in zip(rows, scored.judged, strict=True):
        row["answer"] = one.said or "none"
    return FactsDataModule(rows, TOKENIZER, generation=GENERATION, batch_size=40)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many examples each call lets a model write to."""
    found: list[int] = []
    real = writing.write

    def write(model: Any, tokenizer: Any, asked: Any) -> Any:
        found.append(len(asked["input_ids"]))
        return real(model, tokenizer, asked)

    monkeypatch.setattr("laser_callback.compare.module.write", write)
    return found


def search(model: Any, facts: Any, **options: Any) -> LaserSearch:
    given = {"within": "*.mlp", "rhos": [0.5, 0.1], "candidates": 12, "strategies": "laser", "controls": False}
    return LaserSearch(LaserModule(model, TOKENIZER), facts, progress=False, **given | options)


def test_only_finalists_write(own_cache, written, tmp_path):
    model = tiny_causal_lm()
    found = search(model, data(model), folder=tmp_path / "run").run()
    assert found.objective == ("exact_match",)
    assert found.settings["loss"] == "log_loss"
    assert found.race.startswith(
        "candidates raced by log_loss of the answers that should be written; exact_match chose"
    )
    assert SearchResult.from_dict(found.to_dict()).race == found.race
    finalists = [c for c in found.candidates if c.gain is not None]
    others = [c for c in found.candidates if c.examples and c.gain is None]
    assert 0 < len(finalists) <= 6 < len(finalists) + len(others)
    assert all(c.loss is not None for c in (*finalists, *others))
    race, confirm = found.sets["race"], found.sets["confirm"]
    probes = 3 * 8 * 2  # three looks at what is logged: the last of them asks for the loss only
    last = race // 2 * (1 + len(finalists))
    confirmed = 2 * confirm * (found.found is not None)
    assert sum(written) <= probes - 16 + last + confirmed + 40 * (
        found.found is not None
    )  # a probe of the confirmation
    for text in (plain(found), (save_page(found, tmp_path / "p.html"), (tmp_path / "p.html").read_text())[1]):
        assert "raced by log_loss of the answers that should be written" in " ".join(text.split())
    again = search(model, data(model), folder=tmp_path / "run", resume=True).run()
    assert again.to_dict()["candidates"] == found.to_dict()["candidates"]


def test_what_is_better_is_found_and_confirmed(own_cache):
    model = tiny_causal_lm()
    found = search(model, data(model), within="3.fc_up", min_gain=0.5).run()
    assert str(found.found) == BETTER
    row = found.confirmed["laser"]["exact_match"]
    assert row.reduced > 0.85 > row.original
    assert (row.n, row.test) == (found.sets["confirm"], "exact McNemar")
    with reduced(model, BETTER):
        loader = ExampleSets.of(data(model)).loader("confirm")
        module = LaserModule(model, TOKENIZER)
        right = [module._written(batch, count=False)["exact_match"].values for batch in loader]
    assert torch.cat(right).mean() == row.reduced


def test_all_candidates_may_write(own_cache, written):
    model = tiny_causal_lm()
    found = search(model, data(model), race="exact_match").run()
    assert found.race == ""
    raced = [c for c in found.candidates if c.examples]
    assert all(c.gain is not None for c in raced)
    assert sum(written) > 36 * len(raced)


def test_the_loss_races_where_nothing_is_written(own_cache):
    model = tiny_causal_lm()
    rows = [{"prompt": f"{SENTENCES[i % 3][:9]} {i} is", "answer": ["yes", "no"][i % 2]} for i in range(120)]
    found = search(model, FactsDataModule(rows, TOKENIZER), race="soft_error").run()
    assert found.race.startswith("candidates raced by soft_error; first_token_accuracy chose")
    assert any(c.examples and c.gain is None for c in found.candidates)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"race": "answer_accuracy"}, "`race` must be 'exact_match' or 'log_loss', which this search measures, got"),
        ({"race": "log_loss", "method": "paper", "strategies": None}, "`race` must be 'exact_match'"),
        ({"objective": "answer_accuracy"}, "'answer_accuracy' is not logged"),
    ],
)
def test_what_cannot_be(own_cache, options, message):
    model = tiny_causal_lm()
    with pytest.raises(MisconfigurationException, match=message):
        search(model, data(model, 40), **options).run()


def test_prompts_without_room_are_refused_before_the_work(own_cache, written):
    model, tokenizer = tiny_causal_lm(), tiny_tokenizer()
    tokenizer.model_max_length = 10**30
    rows = [{"prompt": f"The {i} is", "answer": "a5"} for i in range(40)]
    facts = FactsDataModule(rows, tokenizer, generation=Generation(max_new_tokens=508))
    with pytest.raises(ValueError, match="leave room for the prompts in the model's context of 512"):
        LaserSearch(LaserModule(model, tokenizer), facts, progress=False).run()
    assert not written


def test_gates(own_cache):
    from laser_callback.shipping import StagedRollout

    model = tiny_causal_lm()
    staged = StagedRollout(
        LaserModule(model, TOKENIZER), [BETTER], ["exact_match: gain", "exact_match >= -0.02"], data(model, 60)
    )
    staged.run()
    assert staged.result.complete


def test_a_cleanup_is_judged_by_what_is_written(own_cache, tmp_path):
    """What training has left of the planted answers is found by the race's loss, and confirmed by what is written."""
    model = tiny_causal_lm()
    facts, own = data(model), [{"prompt": f"Word {i} is", "answer": "a"} for i in range(4)]
    training = FactsDataModule(own, TOKENIZER)
    training.setup()
    search = {"within": "3.fc_up", "rhos": [0.5], "candidates": 1, "controls": False, "min_gain": 0.5, "report": False}
    cleanup = LaserCleanup(data=facts, strategies="laser", **search)
    trainer = quiet_trainer(
        ModelCheckpoint(tmp_path, save_weights_only=False), cleanup, max_epochs=1, enable_checkpointing=True
    )
    trainer.fit(LaserModule(model, TOKENIZER, learning_rate=1e-9), training.train_dataloader())
    result = cleanup.result
    assert (str(result.plan), result.search.objective) == (BETTER, ("exact_match",))
    assert result.search.race.startswith("candidates raced by log_loss of the answers that should be written")
    row = result.confirmed["laser"]["exact_match"]
    assert row.reduced > 0.85 > row.original
    cleaned = LaserModule(tiny_causal_lm(), TOKENIZER)
    cleaned.load_state_dict(torch.load(result.checkpoint, weights_only=True)["state_dict"])
    (metrics,) = quiet_trainer().validate(cleaned, ExampleSets.of(facts).loader("confirm"), verbose=False)
    assert metrics["exact_match"] == pytest.approx(row.reduced)


def test_the_screen_never_writes():
    facts = data(tiny_causal_lm(), 40)
    sets = ExampleSets.of(facts)
    assert sets.writes
    wanted = {"screen": {}, "race": {"writes": True}, "confirm": {"writes": True}}
    for name in wanted:
        batch = next(iter(sets.loader(name)))
        assert bool(batch["asked"]) == bool(wanted[name])
    assert next(iter(sets.loader("race", [1, 2], writes=False)))["asked"] == {}
