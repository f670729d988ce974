"""What a weight matrix is for, told by its name: one of seven kinds, those of the LASER paper's code.

Contract: :func:`kinds_of` answers from names and from which attributes exist; it looks at no value. A fused projection
has several kinds; which of its rows belong to which is the business of ``fused.py``. A name that is not understood has
no kind: such a matrix is cut only when it is named, and ``not_cut.py`` says so.
"""

from __future__ import annotations

import re

from torch import nn

ATTENTION_KINDS = ("q_proj", "k_proj", "v_proj", "out_proj")
MLP_KINDS = ("fc_in", "fc_up", "fc_out")
KINDS = ATTENTION_KINDS + MLP_KINDS
GROUPS = {"attn": ATTENTION_KINDS, "mlp": MLP_KINDS, "all": KINDS}

# Last component of the module's name -> kind. Names that mean different things inside and outside of an attention
# block (GPT-2's `c_proj`, BERT's `dense`, T5's `wo`, RWKV's `key`) are in the two tables below instead.
_NAMES = {
    "q_proj": "q_proj query query_proj q q_lin wq to_q q_proj_weight q_a_proj q_b_proj q_attn",  # DeepSeek: q_b(q_a(x))
    "k_proj": "k_proj key key_proj k k_lin wk to_k k_proj_weight",
    "v_proj": "v_proj value value_proj v v_lin wv to_v v_proj_weight",
    "out_proj": "o_proj out_proj out_lin",
    "fc_in": "gate_proj fc_in fc1 c_fc dense_h_to_4h lin1 linear1 w1 wi wi_0 intermediate_dense",
    "fc_up": "up_proj w3 wi_1",
    "fc_out": "down_proj fc_out fc2 dense_4h_to_h lin2 linear2 w2 output_linear output_dense",
}
_KIND_OF_NAME = {name: kind for kind, names in _NAMES.items() for name in names.split()}
_IN_ATTENTION = dict.fromkeys(("c_proj", "dense", "proj", "projection", "o", "wo", "Wo", "output"), "out_proj")
_IN_ATTENTION |= {"input_linear": "q_proj", "output_linear": "out_proj"}  # JetMoE's experts of queries
_OUTSIDE_ATTENTION = {
    **{"intermediate.dense": "fc_in", "ffn": "fc_in", "feed_forward.key": "fc_in", "feed_forward.value": "fc_out"},
    **{"ff.layer_1": "fc_in", "ff.layer_2": "fc_out"},  # XLNet
    **dict.fromkeys(("c_proj", "wo", "Wo", "output.dense", "ffn_output"), "fc_out"),
}
_QKV = ("q_proj", "k_proj", "v_proj")
FUSED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("query_key_value", "qkv_proj", "qkv", "c_attn", "Wqkv", "in_proj_weight"), _QKV),
    **dict.fromkeys(("kv_proj", "kv_b_proj"), ("k_proj", "v_proj")),
    **dict.fromkeys(("gate_up_proj", "Wi", "input_linear"), ("fc_in", "fc_up")),
}


def kinds_of(in_layer: str, module: nn.Module, parent: nn.Module) -> tuple[str | None, ...]:
    """The kind of a matrix, ``(None,)`` where its name is not understood, several where it is fused.

    Args:
        in_layer: the module's path without its layer's path and without wrappers: ``mlp.down_proj``.
        module: the module that owns the parameter.
        parent: the module that owns ``module``.
    """
    parent_path, _, last = in_layer.rpartition(".")
    if "lora_" in in_layer or isinstance(module, nn.Embedding) or hasattr(module, "moe_num_experts"):
        return (None,)  # the last: DBRX stacks its experts in one 2-D parameter
    in_attention = re.search(r"attn|attention", parent_path.lower()) is not None
    if in_attention and last in _IN_ATTENTION:
        return (_IN_ATTENTION[last],)
    if last == "c_attn" and hasattr(parent, "q_attn"):  # GPT-2's cross-attention
        return ("k_proj", "v_proj")
    if last == "in_proj" and in_attention:  # DeBERTa; elsewhere it leads into a state-space model
        return _QKV
    if last in FUSED:
        return FUSED[last]
    if last == "up_proj" and not hasattr(parent, "gate_proj"):
        return ("fc_in",)  # an MLP without a gate (MPT, Nemotron)
    if not in_attention:
        two = f"{parent_path.rpartition('.')[2]}.{last}"
        kind = _OUTSIDE_ATTENTION.get(last) or _OUTSIDE_ATTENTION.get(two)
        if kind:
            return (kind,)
    return (_KIND_OF_NAME.get(last),)
