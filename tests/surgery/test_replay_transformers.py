"""Layer replay in transformers' models: caches of all kinds, captured outputs, encoders, shared layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from packaging.version import Version
from replayed import Replayed, assert_same
from seeded import seeded
from tiny import tiny_causal_lm
from torch import Tensor, nn
from versions import TRANSFORMERS

from laser_callback.surgery.replayable import GOES_ON


def _cache_content(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


def test_a_dynamic_cache_is_filled_layer_by_layer_as_without_replay(ids: Tensor) -> None:
    model = tiny_causal_lm()

    def step() -> Any:
        out = model(ids)
        return out.logits, _cache_content(out.past_key_values)

    replayed = Replayed(model)
    _, content = replayed.once(step)
    assert len(content) == 4
    assert replayed.report().replayed == 3


def test_all_hidden_states_are_bit_identical(ids: Tensor) -> None:
    model = tiny_causal_lm()
    replayed = Replayed(model)
    replayed.once(lambda: tuple(model(ids, output_hidden_states=True).hidden_states))
    by_hooks = Version("5.2") > TRANSFORMERS  # which change what they hold
    assert replayed.report().replayed == (0 if by_hooks else 3)


def test_a_cache_that_already_holds_something(ids: Tensor) -> None:
    """The prefill is replayed, and what follows is run; the cache that the user hands over is extended."""
    model = tiny_causal_lm()

    def step() -> Any:
        cache = hf.DynamicCache(config=model.config)
        first = model(ids[:, :4], past_key_values=cache).logits
        second = model(ids[:, 4:], past_key_values=cache).logits
        return first, second, _cache_content(cache)

    replayed = Replayed(model)
    replayed.once(step)
    assert replayed.report().replayed == 3
    assert replayed.report().reasons == {GOES_ON: 3}


def test_a_cache_that_is_filled_before_the_step(ids: Tensor) -> None:
    model = tiny_causal_lm()
    with torch.no_grad():
        prefix = model(ids).past_key_values
    replayed = Replayed(model)
    replayed.once(lambda: model(ids, past_key_values=copy.deepcopy(prefix)).logits)
    assert replayed.report().replayed == 0


def test_changing_cached_keys_in_place_does_not_reach_the_record(ids: Tensor) -> None:
    model = tiny_causal_lm()

    def step() -> Any:
        cache = model(ids).past_key_values
        content = _cache_content(cache)
        for layer in cache.layers:
            layer.keys.zero_()
        return content

    replayed = Replayed(model, second="3.fc_out@0.2")
    replayed.once(step)
    assert_same(replayed.reduced(step, "second"), replayed.computed(step, "second"))
    assert replayed.report("second").replayed == 3


def test_a_static_cache_is_not_replayed(ids: Tensor) -> None:
    model = tiny_causal_lm()

    def step() -> Tensor:
        cache = hf.StaticCache(config=model.config, max_cache_len=8)
        return model(ids, past_key_values=cache).logits

    replayed = Replayed(model)
    replayed.once(step)
    assert replayed.report().reasons == {"its cache is a StaticCache": 3}


@pytest.mark.parametrize("window", [4, 32])  # shorter and longer than the 6 tokens
def test_a_cache_with_a_sliding_window(window: int, ids: Tensor) -> None:
    config = hf.Gemma2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=window,
    )
    model = seeded(lambda: hf.Gemma2ForCausalLM(config).eval())

    def step() -> Any:
        out = model(ids)
        cache = out.past_key_values
        content, lengths = _cache_content(cache), [layer.get_seq_length() for layer in cache.layers]
        return out.logits, content, lengths, model(ids[:, :2], past_key_values=cache).logits

    replayed = Replayed(model)
    replayed.once(step)
    assert replayed.report().replayed == 3
    assert replayed.report().reasons == {GOES_ON: 3}


def test_states_of_a_convolution_are_not_lost(ids: Tensor) -> None:
    """LFM2 mixes convolutions, whose states have no length, with attention."""
    config = hf.Lfm2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
        conv_L_cache=3,
        pad_token_id=0,
    )
    model = seeded(lambda: hf.Lfm2ForCausalLM(config).eval())

    def step() -> Any:
        first = model(ids[:, :5])
        second = model(ids[:, 5:], past_key_values=first.past_key_values)
        return first.logits, second.logits, model.generate(ids, max_new_tokens=3, do_sample=False)

    replayed = Replayed(model, "3.fc_out@0.2")
    replayed.once(step)
    report = replayed.report()
    assert report.run > 0
    assert all("cache" in reason.lower() for reason in report.reasons)
    if Version("5.20") <= TRANSFORMERS:  # what it is called differs by version
        assert "its cache holds a LinearAttentionLayer" in report.reasons


def test_captured_outputs_count_as_hooks_only_while_captured(ids: Tensor) -> None:
    """The naive version loses the attentions of the layers it skips."""
    model = tiny_causal_lm()
    model.set_attn_implementation("eager")
    replayed = Replayed(model)
    for _ in range(2):  # the first time installs transformers' capturing hooks
        got = replayed.once(lambda: tuple(model(ids, output_attentions=True).attentions))
        assert len(got) == 4
    assert replayed.report().reasons == {"a forward hook listens inside of it": 6}
    replayed.once(lambda: model(ids).logits)
    assert replayed.report().replayed == 3


def _t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=300,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=3,
        num_decoder_layers=3,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return seeded(lambda: hf.T5ForConditionalGeneration(config).eval())


def test_a_cut_encoder_replays_no_decoder_layer(ids: Tensor) -> None:
    model = _t5()
    replayed = Replayed(model, "encoder.2.mlp@0.1")
    replayed.once(lambda: model(ids, labels=ids, use_cache=False).logits)
    assert replayed.report().replayed == 2  # of the encoder
    assert replayed.report().reasons == {"its inputs differ between the arms": 3}


def test_a_cut_decoder_replays_the_whole_encoder(ids: Tensor) -> None:
    model = _t5()
    replayed = Replayed(model, "decoder.1.mlp@0.1")
    replayed.once(lambda: model(ids, labels=ids, use_cache=False).logits)
    assert (replayed.report().replayed, replayed.report().run) == (4, 0)
    replayed.once(lambda: model(ids, labels=ids).logits)
    assert replayed.report().reasons == {"its cache is a EncoderDecoderCache": 1}


def test_albert_shares_one_layer(ids: Tensor) -> None:
    config = hf.AlbertConfig(
        vocab_size=300,
        hidden_size=32,
        embedding_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
    )
    model = seeded(lambda: hf.AlbertForMaskedLM(config).eval())
    cut = Replayed(model, "0.mlp@0.2")
    cut.once(lambda: model(ids).logits)
    assert cut.report().replayed == 0
    outside = Replayed(model, "/predictions.dense/@0.2")
    outside.once(lambda: model(ids).logits)
    assert (outside.report().replayed, outside.report().run) == (3, 0)
