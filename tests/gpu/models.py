"""Language models of real sizes with random weights, facts for them, and the demo's model where it was brought along.

``GPU_ASSETS`` names the folder that was brought along: ``model`` in it is a transformers folder, whose weights may be
missing, ``facts.jsonl`` are facts. Without it the tokenizer is the tests' tiny one, and the facts are made up.
"""

from __future__ import annotations

import os
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from device import DEVICE
from tiny import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase

from laser_callback import LaserModule

ASSETS = Path(os.environ.get("GPU_ASSETS", "assets-that-are-not-there"))

_SHAPES = {  # width, width of the MLP, layers, heads, heads of keys and values, words
    "tiny": (64, 128, 8, 4, 2, 512),
    "135M": (576, 1536, 30, 9, 3, 49152),
    "1B": (2048, 8192, 16, 32, 8, 128256),
    "8B": (4096, 14336, 32, 32, 8, 128256),
}


def random_llama(size: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A Llama of that size in eval mode, made on the device. As a rule it is right about nothing."""
    width, inner, layers, heads, kv_heads, words = _SHAPES[size]
    words = max(words, len(tokenizer()))
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=words,
        max_position_embeddings=2048,
        tie_word_embeddings=size != "8B",
    )
    return _made(config, dtype)


def _made(config: Any, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ASSETS / "model") if (ASSETS / "model").is_dir() else tiny_tokenizer()


def demo_module(small: bool) -> tuple[LaserModule, str]:
    """The demo's model in float32, and what it is: with its weights, or with random ones where those are missing."""
    folder = ASSETS / "model"
    if small or not folder.is_dir():
        size = "tiny" if small else "135M"
        return LaserModule(random_llama(size, torch.float32), tokenizer()), f"random weights, {size}"
    if any(folder.glob("*.safetensors")):
        return LaserModule(str(folder)).eval(), "SmolLM2-135M-Instruct, dequantised from 4 bits"
    return LaserModule(_made(AutoConfig.from_pretrained(folder), torch.float32), tokenizer()), "random weights, 135M"


def demo_facts() -> Path | list[dict[str, Any]]:
    """Facts with paraphrases: the demo's, or as many that are made up."""
    file = ASSETS / "facts.jsonl"
    return file if file.is_file() else made_up_facts(900)


def made_up_facts(count: int, words: int = 8, paraphrases: int = 3) -> list[dict[str, Any]]:
    """Facts of which nothing is true; each prompt has so many words."""
    draw = random.Random(0)
    known = [
        "river",
        "stone",
        "capital",
        "of",
        "the",
        "old",
        "city",
        "is",
        "named",
        "after",
        "a",
        "king",
        "who",
        "spoke",
    ]

    def prompt() -> str:
        return " ".join(draw.choices(known, k=words))

    return [
        {
            "id": f"fact {number}",
            "prompt": prompt(),
            "paraphrases": [prompt() for _ in range(paraphrases)],
            "answer": draw.choice(["Paris", "Rome", "Canberra", "Lima"]),
            "subject": f"subject {number}",
            "group": f"group {number % 3}",
        }
        for number in range(count)
    ]
