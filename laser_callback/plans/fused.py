"""Which rows of a fused projection are q, k and v, or gate and up: as each architecture's own forward code splits them.

Contract: :func:`rows_of_kinds` returns for each kind the output rows that are its own; together they are all rows, none
twice. Where the layout is not known for sure it returns ``None``, and the projection stays one matrix without a kind.
Which classes have a layout of their own is in ``families.yaml``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from laser_callback.plans.kinds import LAYOUTS

Rows = slice | Tensor


def rows_of_kinds(
    kinds: tuple[str | None, ...], module: nn.Module, owner: nn.Module, out_size: int, in_size: int
) -> list[Rows] | None:
    """The output rows of each of ``kinds``, in their order: slices, or int64 tensors of row numbers.

    Args:
        kinds: what the projection is made of, from ``kinds.kinds_of``.
        module: the fused projection.
        owner: the module that calls it and splits its output: an attention or an MLP.
        out_size: the projection's output features.
        in_size: its input features.
    """
    if kinds == ("fc_in", "fc_up"):
        if _laid_out("alternating", module) or not getattr(module, "is_concatenated", True):
            return [slice(0, None, 2), slice(1, None, 2)]
        return _blocks([out_size // 2, out_size // 2], out_size)
    if kinds == ("k_proj", "v_proj"):
        return _keys_and_values(owner, out_size)
    return _queries_keys_values(owner, out_size, in_size)


def _keys_and_values(owner: nn.Module, out_size: int) -> list[Rows] | None:
    # Multi-head latent attention (DeepSeek): each head's keys (those without rotary position), then its values.
    if hasattr(owner, "kv_b_proj"):
        key_size, value_size = _first_int(owner, "qk_nope_head_dim"), _first_int(owner, "v_head_dim")
        if not key_size or not value_size or out_size % (key_size + value_size):
            return None
        rows = torch.arange(out_size).view(-1, key_size + value_size)
        return [rows[:, :key_size].reshape(-1), rows[:, key_size:].reshape(-1)]
    if _laid_out("halves", owner) or hasattr(owner, "q_attn"):  # the latter: GPT-2's cross-attention
        return _blocks([out_size // 2, out_size // 2], out_size)
    return None


def _queries_keys_values(owner: nn.Module, out_size: int, in_size: int) -> list[Rows] | None:
    if _laid_out("shards", owner):
        shards = _first_int(owner, "mp_num") or 4
        rows = torch.arange(out_size).view(shards, 3, -1)
        return [rows[:, part].reshape(-1) for part in (0, 2, 1)]
    config = getattr(owner, "config", None)
    heads = _first_int(owner, "num_heads", "num_attention_heads") or _first_int(config, "num_attention_heads")
    if _laid_out("per_head", owner):
        kv_heads = _first_int(owner, "num_kv_heads", "kv_heads") or heads
        if not heads or not kv_heads or out_size % (heads + 2 * kv_heads):
            return None
        rows = torch.arange(out_size).view(kv_heads, heads // kv_heads + 2, -1)
        return [rows[:, :-2].reshape(-1), rows[:, -2].reshape(-1), rows[:, -1].reshape(-1)]
    sizes = [in_size] * 3
    if heads:
        kv_heads = _first_int(owner, "num_key_value_heads") or _first_int(config, "num_key_value_heads") or heads
        head_size = _first_int(owner, "head_dim") or _first_int(config, "head_dim") or in_size // heads
        grouped = [heads * head_size, kv_heads * head_size, kv_heads * head_size]
        sizes = grouped if sum(grouped) == out_size else sizes
    return _blocks(sizes, out_size)


def _laid_out(layout: str, module: nn.Module) -> bool:
    return any(name in type(module).__name__ for name in LAYOUTS[layout])


def _blocks(sizes: list[int], out_size: int) -> list[Rows] | None:
    """One block of rows after the other."""
    if sum(sizes) != out_size:
        return None
    ends = [sum(sizes[: part + 1]) for part in range(len(sizes))]
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _first_int(owner: object, *names: str) -> int | None:
    return next((value for name in names if isinstance(value := getattr(owner, name, None), int)), None)
