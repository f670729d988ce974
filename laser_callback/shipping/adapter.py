"""A cut as an adapter: what is added to the original to have the other model, per request, in servers that load LoRA.

The difference that a cut makes is a matrix of low rank if the cut keeps much; in delta mode what is left of the
fine-tuning is one if the cut keeps little. Contract: an adapter is written where it has fewer numbers than the matrix;
else the cut is refused as an adapter, with the sizes. Original plus adapter, or in delta mode base plus adapter, is the
reduced model up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from laser_callback.compare.language_model import kind_of
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.short import brief
from laser_callback.shipping.thin import thin_factors, why_not_thin
from laser_callback.spectra.spectrum import refuse_out_of_range
from laser_callback.spectra.store import Spectra

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Module name -> (up, down), shapes (outputs, rank) and (rank, inputs): ``up @ down`` is added to its weight."""


def difference_of(model: PreTrainedModel, plan: LaserPlan, spectra: Spectra) -> Factors:
    """What the cut adds to each planned matrix of ``model``, or in delta mode of its base, as thin factors in float64.

    Raises:
        ValueError: if a matrix is not the whole weight of a linear layer, or its difference is no smaller than itself;
            in delta mode if fine-tuning has changed more than what is planned.
    """
    base = spectra.base if plan.cuts_delta else None
    if base is not None and not all(reduction.cut == "delta" for reduction in plan):
        raise ValueError("no one adapter is for the weights and for what fine-tuning has changed: split the plan")
    spectra = spectra.bringing(plan.directions)
    planned = spectra.settled(plan.resolve(model))
    if biases := [matrix.name for matrix, _ in planned if matrix.is_bias]:
        raise ValueError(f"`{biases[0]}` is a bias, which no adapter holds. Write the cut as dense instead")
    left = [] if base is None else base.changed_besides([matrix for matrix, _ in planned])
    if left:
        raise ValueError(
            f"base and adapter would not be the reduced model: fine-tuning has changed {len(left)} parameters besides "
            f"what the plan cuts, first `{left[0]}`. Cut them too, or write the cut as dense"
        )
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for matrix, reduction in planned:
        weight = matrix.value
        if base is None and spectra.changes_nothing(weight, reduction, matrix.name):
            continue
        if why := why_not_thin(matrix, reduction):
            raise ValueError(f"`{matrix.name}` cannot have an adapter: {why}. Write the cut as dense instead")
        spectrum = spectra.of(weight, matrix.name, reduction.cut)
        change = spectrum.gains(reduction) - (1 if base is None else 0)
        rank, own = int(((change != 0) & (spectrum.values > 0)).sum()), weight.numel()
        numbers = rank * sum(matrix.shape)
        if numbers >= own:
            part = "removes" if base is None else "leaves of the difference"
            raise ValueError(
                f"the part of `{matrix.name}` that {brief(reduction)} {part} has rank {rank}: as an adapter it takes "
                f"{numbers:,} numbers, and the matrix itself {own:,}. Write the cut as dense instead"
                + (" or factored" if base is None else "")
            )
        if rank:
            factors[matrix.name] = thin_factors(spectra.operand(weight, matrix.name, reduction.cut), spectrum, change)
    return factors


def save_adapter(model: PreTrainedModel, factors: Factors, folder: Path, base_name: str | None = None) -> None:
    """Write ``factors`` as a PEFT LoRA adapter of ``model``, which is not changed.

    Args:
        model: the base that the adapter is for.
        factors: what is added to its weights.
        folder: to write to; it is made.
        base_name: hub name of the base, if it has one.

    Raises:
        ModuleNotFoundError: if peft is not installed.
        ValueError: if there is nothing to add, or modules are of two kinds that no one adapter can have.
    """
    try:
        from peft import LoraConfig
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('adapters need peft: `pip install "laser-callback[adapter]"`') from error
    if not factors:
        raise ValueError("the plan changes no weights: there is nothing to put into an adapter")
    kinds = {type(model.get_submodule(name)).__name__ for name in factors}
    if len(kinds) > 1:
        raise ValueError(f"one adapter cannot be for layers of both {' and '.join(sorted(kinds))}: split the plan")
    ranks = {name: len(down) for name, (_, down) in factors.items()}
    most = max(ranks.values())
    different = {name: rank for name, rank in ranks.items() if rank != most}
    options: dict[str, Any] = {"task_type": "CAUSAL_LM"} if kind_of(type(model).__name__) == "causal" else {}
    tensors: dict[str, Tensor] = {}
    for name, (up, down) in factors.items():
        dtype = model.get_parameter(f"{name}.weight").dtype
        for letter, factor in (("A", down), ("B", up)):
            key = f"base_model.model.{name}.lora_{letter}.weight"
            tensors[key] = factor.to(device="cpu", dtype=dtype).contiguous()
            refuse_out_of_range(tensors[key], f"{name} in the adapter")
    folder.mkdir(parents=True, exist_ok=True)
    LoraConfig(
        r=most,
        lora_alpha=most,  # the factor alpha / r is 1
        rank_pattern=different,
        alpha_pattern=different,
        target_modules=sorted(factors),
        fan_in_fan_out="Conv1D" in kinds,
        base_model_name_or_path=base_name,
        inference_mode=True,
        **options,
    ).save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
