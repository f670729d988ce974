"""Ship a reduced model: as a recipe, a dense model, a checkpoint, thin layers, an adapter, and the way back.

Contract: :func:`save_reduced` reads the original, which is the same afterwards, and writes one new file or folder,
wholly or not at all, with the plan, the hashes of the cut matrices, the numbers and the versions in it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

import lightning.pytorch as pl
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn
from transformers import PreTrainedModel
from typing_extensions import override

from laser_callback.compare.trainer import quiet_trainer
from laser_callback.plans.plan import LaserPlan
from laser_callback.reports.model_card import hub_name, model_card
from laser_callback.results.comparison import LaserResult
from laser_callback.results.evidence import numbers_of
from laser_callback.results.search import SearchResult
from laser_callback.shipping.adapter import difference_of, save_adapter
from laser_callback.shipping.factored_file import RANKS, WEIGHTS, save_factored_weights
from laser_callback.shipping.fewer_layers import dropped_layers, listed, save_without
from laser_callback.shipping.thin import Factored, factored
from laser_callback.shipping.undo import save_undo
from laser_callback.spectra.store import Spectra
from laser_callback.support.files import appearing
from laser_callback.support.in_files import in_memory, save_weights
from laser_callback.support.pretrained import pretrained_in, save_about
from laser_callback.support.progress import PhaseProgress
from laser_callback.surgery.recipe import Recipe, need_recipe_ending
from laser_callback.surgery.record import recorded

Form = Literal["recipe", "dense", "checkpoint", "factored", "adapter", "undo"]

RECIPE = "laser.json"
"""The recipe's name in a folder."""


class _How(TypedDict):
    """What :func:`recorded` takes besides model, plan and spectra."""

    numbers: Mapping[str, Any] | None
    exact: bool
    progress: PhaseProgress | None


def save_reduced(
    model: nn.Module,
    plan: LaserPlan | str | Mapping[str, Any],
    path: str | Path,
    form: Form = "dense",
    *,
    result: LaserResult | SearchResult | Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    spectra: Spectra | None = None,
    exact: bool = True,
    progress: PhaseProgress | None = None,
) -> Recipe:
    """Write what ``plan`` makes of ``model``, which stays as it is.

    Args:
        model: the original: a transformers model, or a module around one, in memory or as it lies in its files
            (:func:`laser_callback.support.open_pretrained`); any module for the forms ``recipe`` and ``undo``; a
            LightningModule for ``checkpoint`` and for ``factored`` with a path that ends in ``.ckpt``.
        plan: what to cut. A recipe's hashes are checked.
        path: of a new file or folder.
        form:

            - ``"recipe"``: a ``.json`` or ``.yaml`` of kilobytes, to be applied to the original.
            - ``"dense"``: a folder for ``from_pretrained``, as large as the original. Layers that the plan drops
              (``12.writes@0:bias=cut``) are left out if the model gives the same bits without them; else they stay,
              with zero matrices, and a warning says why.
            - ``"checkpoint"``: a Lightning checkpoint (weights, hyperparameters) for ``load_from_checkpoint``.
            - ``"factored"``: thin layers where they are smaller, for :func:`load_factored`.
            - ``"adapter"``: the difference to the original as a LoRA adapter for PEFT, where it is smaller; in delta
              mode what is left of the fine-tuning, as an adapter of the base.
            - ``"undo"``: the original bytes of the matrices that the cut overwrites, for :func:`restore`.
        result: the numbers to ship with it: of a comparison or a search that was about this plan.
        tokenizer: to put beside the weights; by default the ``tokenizer`` attribute of ``model``.
        spectra: where factorisations are looked up and kept.
        exact: demand the bits that a recipe has recorded; see :func:`laser_callback.surgery.apply`.
        progress: shown meanwhile.

    Returns:
        The cut, with hashes and numbers.

    Raises:
        FileExistsError: if there is something at ``path``.
        ValueError: if the model is not the recipe's, has no place for this form, or ``result`` is about another plan.

    Example::

        save_reduced(module, "28.fc_up@0.01", "smaller", result=found.result)
        save_reduced(module, "28.fc_up@0.01", "way-back.safetensors", "undo")
    """
    path, plan = Path(path), Recipe.of(plan)
    if form not in get_args(Form):
        raise ValueError(f"`form` must be one of {', '.join(get_args(Form))}, got {form!r}")
    spectra = Spectra() if spectra is None else spectra
    base = spectra.base.digest if spectra.base is not None and plan.cuts_delta else None
    numbers = None if result is None else numbers_of(result, plan, base)
    how: _How = {"numbers": numbers, "exact": exact, "progress": progress}
    if form == "undo":
        return save_undo(model, plan, path, spectra, **how)
    if form == "recipe":
        need_recipe_ending(path=path)
        with appearing(path) as file, recorded(model, plan, spectra, **how) as (_, recipe):
            recipe.to_file(file)
        return recipe
    if form == "checkpoint" or (form == "factored" and path.suffix == ".ckpt"):
        if not isinstance(model, pl.LightningModule):
            raise ValueError(
                f"`model` must be a LightningModule to be written as a checkpoint, got {type(model).__name__}"
            )
        write_checkpoint = _save_dense_checkpoint if form == "checkpoint" else _save_factored_checkpoint
        with appearing(path) as file:
            return write_checkpoint(model, plan, file, spectra, how)
    inner = pretrained_in(model)
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    write = {"dense": _save_dense, "factored": _save_factored, "adapter": _save_adapter}[form]
    with appearing(path) as folder:
        return write(inner, plan, folder, spectra, how, tokenizer)


# ---- folders ---------------------------------------------------------------------------------------------------------


def _save_dense(
    model: PreTrainedModel, plan: LaserPlan, folder: Path, spectra: Spectra, how: _How, tokenizer: Any
) -> Recipe:
    save_about(model, folder, tokenizer)  # what is refused, before the work
    notes = []
    with recorded(model, plan, spectra, **how) as (cut, recipe):
        dropped = dropped_layers(model, [matrix for matrix, _ in cut.matrices])
        reason = save_without(model, dropped, folder) if dropped else ""
        if reason or not dropped:
            save_weights(model, folder, how["progress"])
    if dropped:
        layers = listed(dropped)
        if reason:
            stayed = f"{layers} could not be left out: {reason}. What was cut to zero is there, as zeros"
            notes = [f"L{stayed[1:]}."]
            warnings.warn(stayed, stacklevel=3)
        else:
            recipe = Recipe(recipe, recipe.matrices, recipe.base, recipe.numbers, recipe.versions, dropped)
            notes = [
                f"Left out: {layers}, as the original counts them. With all that they write cut to zero they only hand "
                "on what they are given: without them the model gives the same, bit for bit."
            ]
    name = type(model).__name__
    usage = f'from transformers import {name}\n\nmodel = {name}.from_pretrained("this-folder")'
    _document(folder, model, recipe, title="A reduced model", usage=usage, library="transformers", notes=notes)
    return recipe


def _save_factored(
    model: PreTrainedModel, plan: LaserPlan, folder: Path, spectra: Spectra, how: _How, tokenizer: Any
) -> Recipe:
    save_about(model, folder, tokenizer)
    model = in_memory(model)  # thin layers are none of its files'
    with factored(model, plan, spectra, **how) as thin:
        _check_thin(thin)
        save_factored_weights(model, thin.ranks, folder / WEIGHTS)
    usage = 'from laser_callback import load_factored\n\nmodel = load_factored("this-folder")'
    notes = ["Some layers are two thin ones here, which are smaller and faster; `transformers` alone cannot load them."]
    notes += [f"`{name}` is dense: {reason}." for name, reason in thin.dense.items()]
    _document(
        folder,
        model,
        thin.recipe,
        title="A reduced model with thin layers",
        usage=usage,
        library="laser-callback",
        notes=notes,
        ranks=thin.ranks,
    )
    return thin.recipe


def _save_adapter(
    model: PreTrainedModel, plan: LaserPlan, folder: Path, spectra: Spectra, how: _How, tokenizer: Any
) -> Recipe:
    with recorded(model, plan, spectra, **how) as (_, recipe):
        pass
    base = spectra.base if plan.cuts_delta else None
    original = "original" if base is None else "base"
    name = hub_name(model.name_or_path if base is None else base.name)
    save_adapter(model, difference_of(model, plan, spectra), folder, name)
    usage = f'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained({original}, "this-folder")'
    notes = [f"The {original} with this adapter is the reduced model, up to rounding; without it, the {original}."]
    _document(folder, model, recipe, title="A rank reduction as an adapter", usage=usage, library="peft", notes=notes)
    return recipe


def _check_thin(thin: Factored) -> None:
    if not thin.layers:
        reasons = "; ".join(f"`{name}`: {reason}" for name, reason in thin.dense.items())
        raise ValueError(f"no matrix can be two thin layers ({reasons or 'the plan changes nothing'})")


def _document(folder: Path, model: PreTrainedModel, recipe: Recipe, **card: Any) -> None:
    recipe.to_file(folder / RECIPE)
    model_card(recipe, base=hub_name(model.name_or_path), **card).save(folder / "README.md")


# ---- checkpoints -----------------------------------------------------------------------------------------------------


class _With(TorchCheckpointIO):
    """Writes checkpoints with some content more."""

    def __init__(self, more: Mapping[str, Any]) -> None:
        super().__init__()
        self._more = more

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint({**checkpoint, **self._more}, path, storage_options)


def _save_dense_checkpoint(
    module: pl.LightningModule, plan: LaserPlan, file: Path, spectra: Spectra, how: _How
) -> Recipe:
    with recorded(module, plan, spectra, **how) as (_, recipe):
        _save_checkpoint(module, file, {"laser": recipe.to_dict()})
    return recipe


def _save_factored_checkpoint(
    module: pl.LightningModule, plan: LaserPlan, file: Path, spectra: Spectra, how: _How
) -> Recipe:
    with factored(module, plan, spectra, **how) as thin:
        _check_thin(thin)
        _save_checkpoint(module, file, {"laser": thin.recipe.to_dict(), RANKS: thin.ranks})
    return thin.recipe


def _save_checkpoint(module: pl.LightningModule, file: Path, more: Mapping[str, Any]) -> None:
    """As Lightning does it, but for the state of the training, which was of other weights."""
    with quiet_trainer("cpu", plugins=[_With(more)]) as trainer:
        trainer.strategy.connect(module)
        trainer.save_checkpoint(file, weights_only=True)
