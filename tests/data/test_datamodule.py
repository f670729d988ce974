"""Encoding and batches: what the model gets to see, and that it does not depend on the batch."""

from __future__ import annotations

import pickle

import pytest
import torch
from lightning.pytorch import LightningModule
from tiny import SENTENCES, tiny_causal_lm, tiny_tokenizer
from tokenizers import normalizers
from trainers import quiet_trainer

from laser_callback.data.datamodule import FactsDataModule, TextWindows
from laser_callback.data.encoding import FactCollator, encode_facts
from laser_callback.data.facts import Fact
from laser_callback.data.row_scores import AnswerScores, Role, score_rows
from laser_callback.data.scoring import METRICS

FACTS = [
    Fact("fr", "The capital of France is", "Paris", ("France's capital city is", "The city is"), ("Rome", "Paris")),
    Fact("jp", "The currency of Japan is the", "yen", subject="Japan", group="P38"),
    Fact("br", "In Brazil people speak", "Portuguese today", ("People in Brazil speak",), group="P37"),
    Fact("cl", "This claim is", "false", choices=("true", "false", "not known")),
] + [Fact(f"n{i}", f"Number {'x' * (i % 7)} {i} comes before", str(i + 1), (f"After {i} comes",)) for i in range(60)]


@torch.no_grad()
def score(model, batch):
    chunks = []
    for chunk in batch["chunks"]:
        logits = model(input_ids=chunk["input_ids"], attention_mask=chunk["attention_mask"]).logits
        picked = logits.gather(1, chunk["positions"][..., None].expand(-1, -1, logits.shape[-1]))
        chunks.append(score_rows(picked[chunk["target_mask"]], chunk["targets"], chunk["target_mask"], chunk["first"]))
    return AnswerScores.gather(chunks, batch)


@pytest.mark.parametrize("special", [{}, {"bos": True}, {"bos": True, "eos": True}])
def test_causal_rows_are_prompt_and_answer(special):
    tokenizer = tiny_tokenizer(**special)
    for item in encode_facts(FACTS, tokenizer, masked=False):
        fact = item.fact
        wrong = [choice for choice in fact.choices if choice != fact.answer]
        texts = [(prompt, fact.answer) for prompt in (fact.prompt, *fact.paraphrases)]
        texts += [(fact.prompt, choice) for choice in wrong]
        assert len(item.rows) == len(texts)
        for row, (prompt, answer) in zip(item.rows, texts, strict=True):
            whole = [*row.input_ids, row.targets[-1]]
            assert tokenizer.decode(whole) == "<s>" * ("bos" in special) + f"{prompt} {answer}"
            assert tokenizer.decode(row.targets) == f" {answer}"
            assert [whole[position + 1] for position in row.positions] == list(row.targets)
        roles = [Role.PROMPT] + [Role.PARAPHRASE] * len(fact.paraphrases) + [Role.CHOICE] * len(wrong)
        assert [row.role for row in item.rows] == roles


def test_masked_rows_have_one_mask_per_answer_token_and_a_full_stop():
    tokenizer = tiny_tokenizer(bos=True, eos=True, masked=True)
    for item in encode_facts(FACTS[:4], tokenizer, masked=True):
        for index, row in enumerate(item.rows):
            masks = "<mask>" * len(row.targets)
            prompt = item.fact.paraphrases[index - 1] if row.role == Role.PARAPHRASE else item.fact.prompt
            assert tokenizer.decode(row.input_ids) == f"<s>{prompt}{masks}.</s>"
            assert {row.input_ids[position] for position in row.positions} == {tokenizer.mask_token_id}
            assert len(set(row.positions)) == len(row.targets)


def test_bad_encodings_are_errors_that_name_the_fact():
    with pytest.raises(ValueError, match="must have a mask token"):
        encode_facts(FACTS, tiny_tokenizer(), masked=True)
    with pytest.raises(ValueError, match="at most 9 tokens, but the prompt 'In Brazil people speak' of fact 'br'"):
        encode_facts(FACTS, tiny_tokenizer(), masked=False, max_length=9)
    with pytest.raises(ValueError, match=r"at most 512 tokens.*fact 'long'"):
        encode_facts([Fact("long", "Q" * 600, "a")], tiny_tokenizer(), masked=False)
    silent = tiny_tokenizer()
    silent.backend_tokenizer.normalizer = normalizers.Replace(" yen", "")
    with pytest.raises(ValueError, match="the answer 'yen' of fact 'jp' has none"):
        encode_facts(FACTS, silent, masked=False)


@pytest.mark.parametrize("rows_per_forward", [1, 5, 64])
def test_scores_do_not_depend_on_the_batch(rows_per_forward):
    model, tokenizer = tiny_causal_lm(), tiny_tokenizer(bos=True)
    encoded = encode_facts(FACTS, tokenizer, masked=False)
    assert len(encoded) == 64
    collate = FactCollator(tokenizer.pad_token_id, rows_per_forward)
    batch = collate(encoded)
    assert max(len(chunk["input_ids"]) for chunk in batch["chunks"]) <= rows_per_forward
    together = score(model, batch)
    alone = [score(model, FactCollator(tokenizer.pad_token_id)([item])) for item in encoded]
    for name, cls in METRICS.items():
        expected = torch.cat([cls().per_fact(scores) for scores in alone])
        torch.testing.assert_close(cls().per_fact(together), expected, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)


def test_logits_at_answer_positions_give_the_likelihood_of_the_answer():
    """Without padding, chunks or positions: the likelihood of prompt + answer minus that of the prompt."""
    model, tokenizer = tiny_causal_lm(), tiny_tokenizer()
    scores = score(model, FactCollator(tokenizer.pad_token_id)(encode_facts(FACTS[:4], tokenizer, masked=False)))
    per_fact = METRICS["log_loss"]().per_fact(scores)
    for fact, loss in zip(FACTS[:4], per_fact.tolist(), strict=True):
        prompt, answer = tokenizer(fact.prompt)["input_ids"], tokenizer(f" {fact.answer}")["input_ids"]
        with torch.no_grad():
            log_probs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        expected = [-log_probs[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)]
        assert loss == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_windows_hold_the_whole_text_once(tmp_path):
    (tmp_path / "t.txt").write_text(text := " ".join(SENTENCES * 5))
    tokenizer = tiny_tokenizer(bos=True)
    windows = TextWindows(tmp_path / "t.txt", tokenizer, window=16)
    assert "".join(tokenizer.decode(item["input_ids"][1:]) for item in windows) == text
    assert all(item["input_ids"][0] == tokenizer.bos_token_id and len(item["input_ids"]) <= 16 for item in windows)
    batch = windows.collate([windows[0], windows[len(windows) - 1]])
    assert batch["attention_mask"].sum(1).tolist() == [16, len(windows[len(windows) - 1]["input_ids"])]
    assert batch["id"] == ["t.txt:0", f"t.txt:{len(windows) - 1}"]

    for bad in (2, 1000):
        with pytest.raises(ValueError, match="`window` must be between 3 and 512 tokens"):
            TextWindows(tmp_path / "t.txt", tokenizer, window=bad)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="`text` must have tokens to predict"):
        TextWindows(tmp_path / "empty.txt", tokenizer)


class Recorder(LightningModule):
    """Keeps the ids that it is shown."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen.setdefault(dataloader_idx, []).extend(batch["id"])


def test_data_module_in_a_trainer(tmp_path):
    (tmp_path / "t.txt").write_text(" ".join(SENTENCES * 20))
    trainer = quiet_trainer()

    def seen(path=FACTS, **kwargs):
        module = Recorder()
        trainer.validate(module, datamodule=FactsDataModule(path, tiny_tokenizer(), **kwargs), verbose=False)
        return module.seen

    everything = seen(text=tmp_path / "t.txt")
    assert everything[0] == [fact.id for fact in FACTS]
    assert everything[1] == [f"t.txt:{i}" for i in range(len(everything[1]))]
    sets = [seen(split=name, batch_size=5)[0] for name in ("screen", "race", "confirm", "guard")]
    assert sorted(id_ for ids in sets for id_ in ids) == sorted(everything[0])
    assert [len(ids) for ids in sets] == pytest.approx([6.4, 19.2, 25.6, 12.8], abs=1)
    assert len(seen(limit=10)[0]) == 10
    assert seen([{"prompt": "a", "answer": "b"}])[0] == ["1"]


def test_data_module_trains_shuffled_and_refuses_nonsense(tmp_path):
    data = FactsDataModule(FACTS, tiny_tokenizer())
    data.setup()
    torch.manual_seed(0)
    ids = [id_ for batch in data.train_dataloader() for id_ in batch["id"]]
    assert ids != [fact.id for fact in FACTS]
    assert sorted(ids) == sorted(fact.id for fact in FACTS)
    assert pickle.loads(pickle.dumps(data.collate)) == data.collate  # workers are sent the collator
    with pytest.raises(ValueError, match=r"`split` must be one of .*, got 'train'"):
        FactsDataModule(FACTS, tiny_tokenizer(), split="train")
    with pytest.raises(ValueError, match="`path`, item 1: `answer` is missing"):
        FactsDataModule([FACTS[0], {"prompt": "p"}], tiny_tokenizer()).setup()
    with pytest.raises(ValueError, match="`path` must hold at least one fact"):
        FactsDataModule([], tiny_tokenizer()).setup()
    with pytest.raises(ValueError, match="`text` must be None for a masked model"):
        FactsDataModule(FACTS, tiny_tokenizer(masked=True), text=tmp_path).setup()
