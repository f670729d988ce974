"""LaserModule from one run to the next: no state is left, its callback makes room for others, bad input is refused."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from brute_force import assert_close, brute_force
from fact_rows import facts, run
from language_models import CAUSAL, SMALL, masked_lm
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny import SENTENCES, tiny_causal_lm, tiny_tokenizer
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertForSequenceClassification,
)

from laser_callback import FactsDataModule, LaserCallback, LaserModule, reduced
from laser_callback.data.datamodule import TextWindows

PLAN = "2.mlp@0.1"

# ---- state -----------------------------------------------------------------------------------------------------------


def test_metrics_start_from_zero_in_each_evaluation(trainer):
    """Metrics that were not logged, or not finished, leave nothing for the next evaluation."""
    expected = run(trainer, LaserModule(tiny_causal_lm(), tiny_tokenizer()), facts())

    module = LaserModule(tiny_causal_lm(), tiny_tokenizer(), plan=PLAN, report=False)
    run(trainer, module, facts(paraphrases=False))
    logged = run(trainer, module, facts())
    assert {k: v for k, v in logged.items() if not k.startswith("laser")} == expected

    class Interrupt(pl.Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            if batch_idx == 1:
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run(trainer, module, facts(), Interrupt(), batch_size=3)
    again = run(trainer, module, facts())
    assert again == logged


def test_validate_then_fit_then_test(trainer):
    module = LaserModule(tiny_causal_lm().train(), tiny_tokenizer(), plan=PLAN, report=False)
    rows = facts()
    first = run(trainer, module, rows)
    trainer(max_epochs=1).fit(module, datamodule=FactsDataModule(rows, module.tokenizer))
    assert run(trainer, module, rows)["log_loss"] != first["log_loss"]
    tested = run(trainer, module, rows, loop="test")
    assert set(tested) == set(first)
    module.model.eval()
    assert_close(tested, brute_force(module.model, module.tokenizer, rows)["metrics"])


def test_checkpoints_carry_the_model_alone(trainer, tmp_path):
    module = LaserModule(tiny_causal_lm().train(), tiny_tokenizer(), plan=PLAN, report=False, learning_rate=1e-2)
    fit = trainer(max_epochs=1)
    fit.fit(module, datamodule=FactsDataModule(facts(), module.tokenizer))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    keys = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert all(key.startswith("model.") for key in keys)
    other = LaserModule(tiny_causal_lm(seed=3), tiny_tokenizer(), plan=PLAN, report=False)
    data = FactsDataModule(facts(), module.tokenizer)
    logged = trainer().validate(other, datamodule=data, ckpt_path=tmp_path / "a.ckpt", verbose=False)[0]
    with reduced(module.model.eval(), PLAN):
        expected = brute_force(module.model, module.tokenizer, facts())
    assert_close(logged, expected["metrics"], "laser/")


# ---- its callback ----------------------------------------------------------------------------------------------------


def test_the_trainers_callback_takes_precedence(trainer):
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer(), plan=PLAN, report=False)
    theirs = LaserCallback({"a": "0.mlp@0.5", "b": "1.mlp@0.5"}, report=False)
    logged = run(trainer, module, facts(), theirs)
    assert {key.split("/")[1] for key in logged if key.startswith("laser")} == {"a", "b"}
    assert set(theirs.result.arms) == {"a", "b"}


class Other(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("x", self.layer(batch).mean(), batch_size=len(batch))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch)


def test_it_rests_for_other_modules(trainer):
    """The module's callback stays in the trainer's list: another module is then none of its business."""
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer(), plan=PLAN, report=False)
    shared = trainer()
    data = FactsDataModule(facts(), module.tokenizer)
    shared.validate(module, datamodule=data, verbose=False)
    ours = module.result
    other, loader = Other(), DataLoader(torch.ones(4, 2), 2)
    assert set(shared.validate(other, loader, verbose=False)[0]) == {"x"}
    assert set(shared.test(other, loader, verbose=False)[0]) == {"x"}
    assert len(shared.predict(other, loader)) == 2
    assert module.result is ours
    # A second LaserModule brings its own.
    second = LaserModule(tiny_causal_lm(), tiny_tokenizer(), plan="1.mlp@0.1", report=False)
    assert "laser/log_loss" in shared.validate(second, datamodule=data, verbose=False)[0]
    assert second.result is not ours
    assert module.result is ours
    assert len([c for c in shared.callbacks if isinstance(c, LaserCallback)]) == 1
    # And the first one may come back.
    assert "laser/log_loss" in shared.validate(module, datamodule=data, verbose=False)[0]
    assert module.result is not ours


def test_predict(trainer):
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer(), plan=PLAN, report=False)
    data = FactsDataModule(facts(), module.tokenizer, batch_size=5)
    shared = trainer()
    logged = shared.validate(module, datamodule=data, verbose=False)[0]
    predicted = shared.predict(module, data.val_dataloader())  # also on the trainer that holds its callback
    assert [i for output in predicted for i in output["id"]] == [row["id"] for row in facts()]
    assert all(isinstance(word, str) for output in predicted for word in output["prediction"])
    assert trainer().predict(module, data.val_dataloader())[0]["prediction"] == predicted[0]["prediction"]
    assert shared.validate(module, datamodule=data, verbose=False)[0] == logged  # predicting counts nowhere


def test_controls_and_several_plans(trainer):
    plans = {"a": PLAN, "b": "1.q_proj@0.3"}
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer(), plan=plans, controls=True, report=False)
    logged = run(trainer, module, facts())
    assert {"laser/a/log_loss", "laser/b/delta/log_loss"} <= set(logged)
    assert set(module.result.controls["b"]) == {"zeroed", "random", "noise"}


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "roberta"])
def test_the_longest_prompt_that_fits_and_one_token_more(trainer, name):
    masked = name in ("bert", "roberta")
    tokenizer = tiny_tokenizer(masked=masked)
    tokenizer.model_max_length = 10**6  # a tokenizer that does not know the model's context
    model = masked_lm(name) if masked else tiny_causal_lm() if name == "llama" else CAUSAL["gpt2"]()
    context = 512 if name == "llama" else 128
    letter = tokenizer("x", add_special_tokens=False)["input_ids"]
    assert len(letter) == 1
    extra = 1 if masked else -1  # the full stop; or the answer's last token, which is not part of the row
    answer = tokenizer(" of", add_special_tokens=False)["input_ids"]
    brief = {"id": "brief", "prompt": "x", "answer": "of"}
    for length, fits in ((context, True), (context + 1, False)):
        prompt = "x" * (length - len(answer) - extra)
        assert len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) == len(prompt)
        rows = [brief, {"id": "long", "prompt": prompt, "answer": "of"}]
        if fits:
            run(trainer, LaserModule(model, tokenizer), rows)
        else:
            with pytest.raises(ValueError, match=rf"{context + 1} tokens long.*context is {context}: .*long") as error:
                run(trainer, LaserModule(model, tokenizer), rows)
            assert "brief" not in str(error.value)


def test_perplexity_of_a_masked_model(trainer, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(SENTENCES))
    windows = TextWindows(tmp_path / "text.txt", tiny_tokenizer(), window=20)
    module = LaserModule(masked_lm("bert"), tiny_tokenizer(masked=True))
    with pytest.raises(MisconfigurationException, match="perplexity is defined for causal models"):
        trainer().validate(module, DataLoader(windows, 2, collate_fn=windows.collate), verbose=False)


def test_no_tokenizer():
    with pytest.raises(MisconfigurationException, match="`tokenizer` must be given"):
        LaserModule(tiny_causal_lm())


@pytest.mark.parametrize("kind", [BertForSequenceClassification, BertForPreTraining])
def test_not_a_language_model(kind):
    options = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
    with pytest.raises(MisconfigurationException, match=f"causal or masked language model, got {kind.__name__}"):
        LaserModule(kind(BertConfig(**options)), tiny_tokenizer(masked=True))


@pytest.mark.parametrize("masked", [False, True])
def test_from_a_folder(trainer, tmp_path, masked):
    model = masked_lm("roberta") if masked else tiny_causal_lm()
    model.save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer(masked=masked)
    tokenizer.save_pretrained(tmp_path / "model")
    plan = "1.mlp@0.1"
    module = LaserModule(str(tmp_path / "model"), plan=plan, report=False)
    assert module.masked == masked
    logged = run(trainer, module, facts(n=5))
    assert logged == run(trainer, LaserModule(model, tokenizer, plan=plan, report=False), facts(n=5))


def test_peft_model(trainer):
    peft = pytest.importorskip("peft")
    tokenizer = tiny_tokenizer()
    model = peft.get_peft_model(
        tiny_causal_lm(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    ).eval()
    module = LaserModule(model, tokenizer, plan=PLAN, report=False)
    rows = facts(n=6)
    logged = run(trainer, module, rows)
    with reduced(model, PLAN):
        assert_close(logged, brute_force(model, tokenizer, rows)["metrics"], "laser/")
