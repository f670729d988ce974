"""What a weight matrix is for, told by its name: one of seven kinds, those of the LASER paper's code.

Contract: :func:`kinds_of` answers from names and from which attributes exist; it looks at no value. A fused projection
has several kinds; which of its rows belong to which is the business of ``fused.py``. A name that is not understood has
no kind: such a matrix is cut only when it is named, and ``uncut.py`` says so. What families call their matrices is a
table, ``families.yaml``; the rules that need more than a name are here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from laser_callback.support.reading import read_table

if TYPE_CHECKING:  # the names of the kinds are read where there is no model
    from torch import nn

ATTENTION_KINDS = ("q_proj", "k_proj", "v_proj", "out_proj")
MLP_KINDS = ("fc_in", "fc_up", "fc_out")
KINDS = ATTENTION_KINDS + MLP_KINDS
WRITES = ("out_proj", "fc_out")
"""What writes to the residual stream: the last matrix of an attention, and of an MLP."""
GROUPS = {"attn": ATTENTION_KINDS, "mlp": MLP_KINDS, "writes": WRITES, "all": KINDS}

_FAMILIES = read_table("laser_callback.plans", "families.yaml")


def _kind_of_name(table: str) -> dict[str, str]:
    return {name: kind for kind, names in _FAMILIES[table].items() for name in names}


_NAMES, _IN_ATTENTION, _OUTSIDE_ATTENTION = map(_kind_of_name, ("names", "in_attention", "outside_attention"))
FUSED = {name: tuple(kinds.split()) for name, kinds in _kind_of_name("fused").items()}
LAYOUTS: dict[str, list[str]] = _FAMILIES["layouts"]


def kinds_of(in_layer: str, module: nn.Module, parent: nn.Module) -> tuple[str | None, ...]:
    """The kind of a matrix, ``(None,)`` where its name is not understood, several where it is fused.

    Args:
        in_layer: the module's path without its layer's path and without wrappers: ``mlp.down_proj``.
        module: the module that owns the parameter.
        parent: the module that owns ``module``.
    """
    from torch import nn

    parent_path, _, last = in_layer.rpartition(".")
    if "lora_" in in_layer or isinstance(module, nn.Embedding) or hasattr(module, "moe_num_experts"):
        return (None,)  # the last: DBRX stacks its experts in one 2-D parameter
    in_attention = re.search(r"attn|attention", parent_path.lower()) is not None
    if in_attention and last in _IN_ATTENTION:
        return (_IN_ATTENTION[last],)
    if last == "c_attn" and hasattr(parent, "q_attn"):  # GPT-2's cross-attention
        return ("k_proj", "v_proj")
    if last == "in_proj" and in_attention:  # DeBERTa; elsewhere it leads into a state-space model
        return ("q_proj", "k_proj", "v_proj")
    if last in FUSED:
        return FUSED[last]
    if last == "up_proj" and not hasattr(parent, "gate_proj"):
        return ("fc_in",)  # an MLP without a gate (MPT, Nemotron)
    if not in_attention:
        two = f"{parent_path.rpartition('.')[2]}.{last}"
        kind = _OUTSIDE_ATTENTION.get(last) or _OUTSIDE_ATTENTION.get(two)
        if kind:
            return (kind,)
    return (_NAMES.get(last),)
