"""What a model writes where the original has written before, against `generate` alone: tokens, texts, and why not."""

from __future__ import annotations

import inspect
import random
from typing import Any

import pytest
import torch
from language_models import CAUSAL, SMALL, build
from tiny import SENTENCES, tiny_causal_lm, tiny_tokenizer
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from laser_callback import reduced
from laser_callback.compare import lookup, writing
from laser_callback.data.encoding import pad
from laser_callback.surgery.replay import LayerReplay

TOKENIZER = tiny_tokenizer()
NEW = 24


def asked(new: int = NEW, stop: tuple[str, ...] = (), n: int = 7) -> dict[str, Any]:
    rows = [tuple(TOKENIZER(SENTENCES[i % 3][: 5 + 9 * i])["input_ids"]) for i in range(n)]
    mask = pad([(1,) * len(row) for row in rows], 0, "left")
    return {"input_ids": pad(rows, 2, "left"), "attention_mask": mask, "max_new_tokens": new, "stop": list(stop)}


def generated(model: Any, prompts: dict[str, Any]) -> list[list[int]]:
    """By `generate` alone, one row of it after the other, up to its end."""
    inputs = {name: prompts[name] for name in ("input_ids", "attention_mask")}
    ends = writing._end_tokens(model)
    new = model.generate(**inputs, max_new_tokens=prompts["max_new_tokens"], do_sample=False, pad_token_id=2)
    found = []
    for row in new[:, inputs["input_ids"].shape[1] :].tolist():
        length = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        for i in range(1, length + 1):
            if any(stop in TOKENIZER.decode(row[:i]) for stop in prompts["stop"]):
                length = i
                break
        found.append(row[:length])
    return found


def in_both(model: Any, plan: str, prompts: dict[str, Any], *plans: str) -> tuple[Any, Any, Any]:
    """What the original and a reduced model write in a comparison, and the report of the latter."""
    cuts = {name: reduced(model, name) for name in (plan, *plans)}
    replay = LayerReplay(model, {name: [matrix for matrix, _ in cut.matrices] for name, cut in cuts.items()})
    with torch.inference_mode():
        with replay.record():
            original = writing.write(model, TOKENIZER, prompts)
        written = {}
        for name, cut in cuts.items():
            with cut, LayerReplay.paused(), replay.replay(name):
                written[name] = writing.write(model, TOKENIZER, prompts)
        replay.forget()
    return original, written[plan], replay.reports[plan]


def alone(model: Any, plan: str, prompts: dict[str, Any]) -> list[list[int]]:
    with torch.inference_mode(), reduced(model, plan):
        return generated(model, prompts)


KINDS = {
    **{name: CAUSAL[name] for name in ("cohere", "granite", "gpt2")},
    "llama": tiny_causal_lm,
    "bloom": lambda: build(
        BloomForCausalLM, BloomConfig(vocab_size=SMALL["vocab_size"], hidden_size=32, n_layer=2, n_head=4)
    ),
    "qwen2": lambda: build(Qwen2ForCausalLM, Qwen2Config(**SMALL, tie_word_embeddings=True)),
}


@pytest.mark.parametrize("stop", [(), ("e",), ("the", "ai")])
@pytest.mark.parametrize("name", KINDS)
def test_both_write_what_generate_writes(name, stop):
    model, prompts = KINDS[name](), asked(stop=stop)
    plan = f"{model.config.num_hidden_layers - 1}.mlp@0.9"
    original, written, report = in_both(model, plan, prompts)
    with torch.inference_mode():
        assert original.tokens == generated(model, prompts)
    assert written.tokens == alone(model, plan, prompts)
    assert written.tokens != original.tokens
    drafts = report.further["written"]
    assert not drafts.alone
    assert drafts.texts == 7
    assert drafts.same == sum(map(list.__eq__, written.tokens, original.tokens))
    assert drafts.taken + drafts.written == sum(map(len, written.tokens))
    assert drafts.taken > 0
    if name == "bloom":  # which returns the weights of its attention
        assert dict(report.reasons) == {"written tokens: it returns more than its hidden states": 1}
    else:
        assert (report.replayed > 0, report.run, dict(report.reasons)) == (True, 0, {})
    for text, tokens in zip(written.texts, written.tokens, strict=True):
        assert not any(mark in text for mark in stop)
        assert TOKENIZER.decode(tokens, skip_special_tokens=True).startswith(text)


@pytest.mark.parametrize(
    "plan", ["3.mlp@0.95", "2.fc_in@0.8", "0.q_proj@0.9", "3.fc_up@0.99, 1.k_proj@0.99", "3.fc_in@0"]
)
@pytest.mark.parametrize("new", [1, 2, 16, 17, 60])
def test_whatever_is_cut_and_however_long(plan, new):
    model, prompts = tiny_causal_lm(3), asked(new)
    original, written, report = in_both(model, plan, prompts, "1.mlp@0.5", "3.q_proj@0.5")
    assert written.tokens == alone(model, plan, prompts)
    before = 0 if plan.startswith("0.") else 1
    assert (report.replayed > 0) == bool(before)
    assert {len(row) for row in original.tokens} != {new} or new < 20  # some end by themselves


def test_small_blocks_of_logits_change_nothing(monkeypatch):
    model, prompts = tiny_causal_lm(), asked(40)
    expected = in_both(model, "3.mlp@0.97", prompts)[1]
    monkeypatch.setattr(writing, "LOGITS_BYTES", 4 * model.config.vocab_size * 5)
    again = in_both(model, "3.mlp@0.97", prompts)[1]
    assert again.tokens == expected.tokens == alone(model, "3.mlp@0.97", prompts)


def test_nothing_that_the_cut_leaves_as_it_is_is_written_again():
    model, calls = tiny_causal_lm(), []
    model.lm_head.register_forward_hook(lambda _, __, output: calls.append(output.shape[1]))
    prompts = asked(33)
    replay = LayerReplay(model, {"a": [matrix for matrix, _ in reduced(model, "3.mlp@1").matrices]})
    with torch.inference_mode():
        with replay.record():
            original = writing.write(model, TOKENIZER, prompts)
        calls.clear()
        with replay.replay("a"):
            again = writing.write(model, TOKENIZER, prompts)
    assert again.tokens == original.tokens
    assert len(calls) == 2  # of 16 tokens, and of the 17 that are left
    assert str(replay.reports["a"]).endswith(
        f"7 of 7 continuations are the original's, of which {sum(calls)} tokens were taken over and 0 written"
    )


def penalised() -> Any:
    model = tiny_causal_lm()
    model.generation_config.repetition_penalty = 1.3
    return model


ODD = {
    "mamba": (
        lambda: build(
            MambaForCausalLM, MambaConfig(vocab_size=SMALL["vocab_size"], hidden_size=32, num_hidden_layers=2)
        ),
        "1.all@0.5",
        "its cache, a DynamicCache of LinearAttentionLayer, cannot be cut back to a token"
        if "cache" in inspect.signature(MambaForCausalLM.forward).parameters
        else "its `forward` takes no cache by name",
    ),
    "sliding": (
        lambda: build(MistralForCausalLM, MistralConfig(**SMALL, sliding_window=16)),
        "1.mlp@0.9",
        "its cache, a DynamicCache of DynamicSlidingWindowLayer, cannot be cut back to a token",
    ),
    "penalty": (penalised, "3.mlp@0.9", "its generation config has repetition_penalty"),
}


@pytest.mark.parametrize("name", ODD)
def test_models_that_write_alone_say_so(name):
    make, plan, reason = ODD[name]
    model, prompts = make(), asked()
    original, written, report = in_both(model, plan, prompts)
    with torch.inference_mode():
        assert original.tokens == generated(model, prompts)
    assert written.tokens == alone(model, plan, prompts)
    assert report.further["written"].alone == {reason: 7}
    assert f"7 were written alone: {reason}" in str(report)


def test_what_the_generation_config_has_beside():
    """Greedy is greedy, and the model's own stop texts are stop texts."""
    model, prompts = tiny_causal_lm(), asked()
    expected, _, _ = in_both(model, "3.mlp@0.9", asked(stop=("e", "ai")))
    for name, value in {
        "num_return_sequences": 2,
        "num_beams": 3,
        "do_sample": True,
        "stop_strings": ["ai", "e"],
    }.items():
        setattr(model.generation_config, name, value)
    original, written, report = in_both(model, "3.mlp@0.9", prompts)
    assert original.tokens == expected.tokens
    assert original.texts == expected.texts
    assert not any(mark in text for mark in ("e", "ai") for text in (*original.texts, *written.texts))
    assert not report.further["written"].alone


def test_what_alters_logits_is_known():
    """Each processor that the installed version makes of a generation config is by a field that is known here."""
    from transformers import GenerationConfig

    model = tiny_causal_lm()
    config = GenerationConfig(do_sample=False, max_new_tokens=5, eos_token_id=1, pad_token_id=2)
    values: dict[str, Any] = {
        "min_length": 3,
        "min_new_tokens": 3,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
    }
    values |= {"bad_words_ids": [[5]], "suppress_tokens": [4], "begin_suppress_tokens": [4], "forced_eos_token_id": 1}
    values |= {"remove_invalid_values": True, "exponential_decay_length_penalty": (2, 1.1), "forced_bos_token_id": 0}
    values |= {"sequence_bias": [[[3], 1.0]], "encoder_repetition_penalty": 1.1, "encoder_no_repeat_ngram_size": 2}
    values |= {"guidance_scale": 1.5, "watermarking_config": {"greenlist_ratio": 0.5}}
    assert set(values) == set(writing._ALTERING)
    for name, value in values.items():
        model.generation_config = GenerationConfig(**{name: value})
        assert writing._obstacle(model) == f"its generation config has {name}"
    model.generation_config = config
    assert writing._obstacle(model) == ""


def test_near_ties_are_counted():
    model, prompts = tiny_causal_lm(), asked(12)
    with torch.no_grad():  # two tokens with the same logits
        model.lm_head.weight[200:] = model.lm_head.weight[:-200].clone()[: len(model.lm_head.weight) - 200]
    original, written, report = in_both(model, "3.mlp@0.9", prompts)
    assert original.near_ties.sum() > 0
    assert written.near_ties.sum() > 0
    assert f"; {written.near_ties.sum()} near ties" in str(report)
    logits = torch.tensor([[1.0, 5.0, 5.0], [1.0, 5.0, 5.0 + 1e-6], [1.0, 5.0, 5.1], [-1e6, 5.1, 5.0]])
    before = logits.clone()
    assert [found.tolist() for found in writing.greedy(model, logits)] == [[1, 2, 2, 1], [True, True, False, True]]
    assert torch.equal(logits, before)
    ruled_out = torch.tensor([[5.0, 5.1, -torch.inf], [5.0, 5.0, -torch.inf], [-torch.inf, 5.0, -torch.inf]])
    assert writing.greedy(model, ruled_out)[1].tolist() == [False, True, False]
    assert writing.greedy(model.to(torch.bfloat16), logits)[1].all()


# ---- several tokens to a call ----------------------------------------------------------------------------------------

POSITIONS = {  # given positions, and some that the model has from the mask
    **{name: KINDS[name] for name in ("llama", "gpt2", "bloom")},
    "opt": lambda: build(
        OPTForCausalLM,
        OPTConfig(
            vocab_size=SMALL["vocab_size"], hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64
        ),
    ),
}


@pytest.mark.parametrize("share", [0.0, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("name", POSITIONS)
def test_whatever_is_proposed(name, share, monkeypatch):
    """Proposed is what the row will write, but that a share of the tokens is another."""
    model, prompts, draw = POSITIONS[name](), asked(40, stop=("ai",)), random.Random(0)
    plan = f"{model.config.num_hidden_layers - 1}.mlp@0.7"
    expected = alone(model, plan, prompts)
    masks = prompts["attention_mask"].bool()
    rows = [row[mask].tolist() for row, mask in zip(prompts["input_ids"], masks, strict=True)]
    whole = [row + new for row, new in zip(rows, expected, strict=True)]

    def ahead(text: lookup.Text, most: int) -> list[int]:
        there = text._tokens
        (row, *_) = (row for row in whole if row[: len(there)] == there)
        right = row[len(there) : len(there) + draw.randint(0, most)]
        return [token if draw.random() < share else abs(token - 1) for token in right]

    monkeypatch.setattr(lookup.Text, "ahead", ahead)
    monkeypatch.setattr(lookup, "_worth", lambda proposed: max(there for _, there in proposed))
    _, written, report = in_both(model, plan, prompts)
    assert written.tokens == expected
    assert not written.near_ties.any()
    drafts = report.further["written"]
    assert not drafts.alone
    assert drafts.proposed < drafts.written
    assert (drafts.proposed > 0) == (share > 0)


def test_what_repeats_takes_few_calls():
    model, prompts, calls = tiny_causal_lm(), asked(60), []
    replay = LayerReplay(model, {"a": [matrix for matrix, _ in reduced(model, "*.all@0").matrices]})
    with torch.inference_mode():
        with replay.record():
            writing.write(model, TOKENIZER, prompts)
        model.lm_head.register_forward_hook(lambda *_: calls.append(1))
        with reduced(model, "*.all@0"), replay.replay("a"):
            written = writing.write(model, TOKENIZER, prompts)
    few = len(calls)
    assert written.tokens == alone(model, "*.all@0", prompts)
    assert max(map(len, written.tokens)) == 60 > 2 * few
    drafts = replay.reports["a"].further["written"]
    assert str(drafts).endswith(
        f" and {drafts.written} written, {drafts.proposed} of them read ahead, as they had followed before"
    )
    assert drafts.written < 2 * drafts.proposed


def test_no_position_is_beyond_the_context(monkeypatch):
    """The longest row ends with the last position that there is, when much is still proposed for the others."""
    prompts = asked(30)
    length = prompts["input_ids"].shape[1]
    config = GPT2Config(
        vocab_size=SMALL["vocab_size"], n_embd=32, n_layer=2, n_head=4, n_positions=length + 30 - 1, bos_token_id=0
    )
    model = build(GPT2LMHeadModel, config)
    expected = alone(model, "1.mlp@0.9", prompts)
    longest = prompts["input_ids"][-1].tolist() + expected[-1]

    def ahead(text: lookup.Text, most: int) -> list[int]:
        there = text._tokens
        right = longest[len(there) : len(there) + most]
        return right if there[:length] == longest[:length] else [3] * most

    monkeypatch.setattr(lookup.Text, "ahead", ahead)
    monkeypatch.setattr(lookup, "_worth", lambda proposed: max(there for _, there in proposed))
    _, written, report = in_both(model, "1.mlp@0.9", prompts)
    assert written.tokens == expected
    assert {len(row) for row in expected} == {30}
    assert report.further["written"].proposed > 20


def test_what_texts_go_on_with():
    places: lookup.Places = {}
    lookup.Text(places, [5, 6, 7, 8, 9])
    text = lookup.Text(places, [1, 2, 6, 7])
    assert text.ahead(2) == [8, 9]
    assert text.ahead(4) == [8, 9, 8, 9]  # at its end a text is taken to go on as from there
    assert text.ahead(0) == []
    assert text.right == 0.5
    text.ahead(2)
    text.append(8)
    assert text.right == pytest.approx(0.6)
    text.append(3)
    assert text.right == pytest.approx(0.48)
    text.append(4)  # of which nothing was said
    assert text.right == pytest.approx(0.48)
    assert text.ahead(3) == []
    text.append(1)
    assert text.ahead(3) == [2, 6, 7]
    other = lookup.Text(places, [8, 3])
    assert other.ahead(2) == [4, 1]  # the later place


def test_what_a_call_should_read():
    assert lookup._worth([(0.0, 9)] * 4) == 0
    assert lookup._worth([(1.0, 9)] * 4) == 9
    assert lookup._worth([(1.0, 0)] * 4) == 0
    assert lookup._worth([(0.9, 15)]) > lookup._worth([(0.9, 15)] * 16) > lookup._worth([(0.3, 15)] * 16)


# ---- when the layers in front of the cut are computed ----------------------------------------------------------------


def test_other_weights_in_front_are_computed():
    model, prompts = tiny_causal_lm(), asked()
    replay = LayerReplay(model, {"a": [matrix for matrix, _ in reduced(model, "3.mlp@0.9").matrices]})
    with torch.inference_mode():
        with replay.record():
            writing.write(model, TOKENIZER, prompts)
        weight = model.model.layers[1].mlp.up_proj.weight
        weight.data = 1.2 * weight.data
        with replay.replay("a"):
            written = writing.write(model, TOKENIZER, prompts)
        assert written.tokens == generated(model, prompts)
    assert replay.reports["a"].replayed == 0
    assert dict(replay.reports["a"].reasons) == {"written tokens: what it holds differs between the arms": 1}


def test_an_embedding_that_is_cut_is_read_ahead_of_the_layers():
    model = KINDS["qwen2"]()
    prompts = asked()
    weight = model.lm_head.weight
    replay = LayerReplay(model, {"a": []})
    replay._outside["a"] = frozenset({id(weight)})  # the head, which is the embedding, too
    with torch.inference_mode():
        with replay.record():
            writing.write(model, TOKENIZER, prompts)
        before = weight.clone()
        weight.data += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        with replay.replay("a"):
            written = writing.write(model, TOKENIZER, prompts)
        assert written.tokens == generated(model, prompts)
        weight.data.copy_(before)
    assert dict(replay.reports["a"].reasons) == {"written tokens: what is cut is read ahead of the layers, too": 1}


def test_other_inputs_of_the_first_layer_are_noticed():
    model, prompts = KINDS["gpt2"](), asked()
    replay = LayerReplay(model, {"a": [matrix for matrix, _ in reduced(model, "1.mlp@0.9").matrices]})
    with torch.inference_mode():
        with replay.record():
            writing.write(model, TOKENIZER, prompts)
        model.transformer.wpe.weight.data.mul_(1.5)
        with replay.replay("a"):
            written = writing.write(model, TOKENIZER, prompts)
        assert written.tokens == generated(model, prompts)
    assert replay.reports["a"].replayed == 0
    assert "its inputs differ between the arms" in str(replay.reports["a"])


def test_a_hook_inside_of_a_layer_hears_every_token():
    model, heard = tiny_causal_lm(), []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: heard.append(1))
    original, written, report = in_both(model, "3.mlp@0.9", asked())
    assert written.tokens == alone(model, "3.mlp@0.9", asked())
    assert report.replayed == 0
    assert "a forward hook listens inside of it" in str(report)
    assert heard
    assert original.tokens != written.tokens


def test_other_prompts_are_written_alone():
    model = tiny_causal_lm()
    replay = LayerReplay(model, {"a": [matrix for matrix, _ in reduced(model, "3.mlp@0.9").matrices]})
    with torch.inference_mode():
        with replay.record():
            writing.write(model, TOKENIZER, asked(n=3))
        with replay.replay("a"):
            written = writing.write(model, TOKENIZER, asked(n=4))
            assert written.tokens == generated(model, asked(n=4))
    assert dict(replay.reports["a"].further["written"].alone) == {"the original has not": 4}
