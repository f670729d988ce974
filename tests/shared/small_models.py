"""Random models of transformers with few and narrow layers, a plan for the tiny Llama, and tokens for all of them."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import transformers as hf
from seeded import seeded
from tiny import tiny_causal_lm
from torch import Tensor, nn

PLAN = "1.fc_in@0.1, -1.attn@0.2, 0.fc_out@0.3:keep=tail, 3.fc_up@0.5:scale=-0.25"
IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])


def run(model: nn.Module) -> Tensor:
    """What the model says to ``IDS``."""
    with torch.no_grad():
        return model(IDS).logits


def gpt2(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Fused, transposed, with a tied output layer."""
    config = hf.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=3, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=1
    )
    return seeded(lambda: hf.GPT2LMHeadModel(config).eval().to(dtype))


def mixtral() -> nn.Module:
    """Three experts in each layer, in one parameter."""
    config = hf.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3,
    )  # fmt: skip
    return seeded(lambda: hf.MixtralForCausalLM(config).eval())


def t5() -> nn.Module:
    """Two layer stacks."""
    config = hf.T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    return seeded(lambda: hf.T5ForConditionalGeneration(config).eval())


class Wrapped(pl.LightningModule):
    """The tiny Llama in somebody's module, under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_causal_lm()
