"""Random models that also take images or sound, with the vocabulary of the tiny tokenizer."""

from __future__ import annotations

from typing import Any

import transformers as hf
from language_models import SMALL, VOCABULARY, build
from transformers import PreTrainedModel

_SEES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_BLOCKS = {"depth": 2, "num_heads": 2, "patch_size": 4, "hidden_size": 16, "intermediate_size": 24}
_ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}}
_HEARS = {"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "d_model": 16, "num_mel_bins": 8}
_ONCE = {"image_token_index": VOCABULARY - 1}


def _says(kind: str, **more: Any) -> dict[str, Any]:
    return {"model_type": kind, **SMALL, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 1, **more}


def _sees(kind: str, **more: Any) -> dict[str, Any]:
    return {"model_type": kind, **_SEES, **more}


MULTIMODAL: dict[str, dict[str, Any]] = {
    "Llava": {"text_config": _says("llama"), "vision_config": _sees("clip_vision_model"), **_ONCE},
    "Gemma3": {
        "text_config": _says("gemma3_text"),
        "vision_config": _sees("siglip_vision_model"),
        "mm_tokens_per_image": 4,
        **_ONCE,
    },
    "Mistral3": {"text_config": _says("mistral"), "vision_config": _sees("pixtral", head_dim=8), **_ONCE},
    "Qwen2VL": {
        "text_config": _says("qwen2_vl_text", **_ROPE),
        "vision_config": {"depth": 4, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
    },
    "Qwen2_5_VL": {
        "text_config": _says("qwen2_5_vl_text", **_ROPE),
        "vision_config": {**_BLOCKS, "out_hidden_size": 32},
    },
    "Mllama": {
        "text_config": _says("mllama_text_model", cross_attention_layers=[0], **_ROPE),
        "vision_config": {
            **{k: v for k, v in _SEES.items() if k != "num_attention_heads"},
            "attention_heads": 2,
            "num_global_layers": 1,
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
        },
        **_ONCE,
    },
    "Idefics3": {"text_config": _says("llama"), "vision_config": _SEES, "image_token_id": VOCABULARY - 1},
    "Qwen2Audio": {
        "text_config": _says("qwen2"),
        "audio_config": {"model_type": "qwen2_audio_encoder", **_HEARS},
        "audio_token_index": VOCABULARY - 1,
    },
}
"""Two layers of text each. Qwen2VL has more that see; the first of Mllama is only gone through with an image."""


def multimodal(name: str) -> PreTrainedModel:
    kind = getattr(hf, f"{name}ForConditionalGeneration")
    return build(kind, kind.config_class(**MULTIMODAL[name]))


def paligemma() -> PreTrainedModel:
    config = hf.PaliGemmaConfig(
        text_config=_says("gemma"), vision_config=_sees("siglip_vision_model"), projection_dim=32, **_ONCE
    )
    return build(hf.PaliGemmaForConditionalGeneration, config)
