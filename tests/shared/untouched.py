"""That a module is as it was: weights, storage, versions, attributes, hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def snapshot(module: nn.Module) -> dict[str, Any]:
    return {
        "weights": {k: v.detach().clone() for k, v in module.state_dict().items()},
        "pointers": [p.data_ptr() for p in module.parameters()],
        "versions": [p._version for p in module.parameters()],
        # Attributes that an instance has beside its class': a patched hook or forward would show up here.
        "attributes": {name: sorted(vars(child)) for name, child in module.named_modules()},
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()],
    }


def assert_untouched(module: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(module)
    for name, value in before["weights"].items():
        assert torch.equal(after["weights"][name], value), name
    for key in ("pointers", "versions", "hooks"):
        assert after[key] == before[key], key
    for name, attributes in before["attributes"].items():
        new = set(after["attributes"][name]) - set(attributes)
        assert not {n for n in new if n == "forward" or n.startswith("on_") or n.endswith("_step")}, (name, new)
    assert not any(p.is_inference() for p in module.parameters())
