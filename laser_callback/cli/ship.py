"""``laser-callback export``, ``apply`` and ``restore``: write what a plan makes of a model, and take it back."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from transformers import AutoProcessor, PreTrainedModel

from laser_callback.cli.command import Answer, notes
from laser_callback.plans.plan import check_base, check_directions
from laser_callback.results.search import SearchResult, result_of
from laser_callback.shipping.export import Form, save_reduced
from laser_callback.shipping.fewer_layers import listed
from laser_callback.shipping.undo import restore as restore_model
from laser_callback.spectra.delta import BaseWeights
from laser_callback.spectra.store import Spectra
from laser_callback.support.files import appearing, need_files
from laser_callback.support.in_files import open_pretrained, save_dense
from laser_callback.support.pretrained import load_tokenizer
from laser_callback.support.progress import PhaseProgress
from laser_callback.support.reading import read_plain
from laser_callback.surgery.recipe import Recipe, need_recipe_ending


def export(
    *,
    model: str,
    output: Path,
    plan: str | None = None,
    form: Form = "dense",
    result: Path | None = None,
    base: str | None = None,
    allow_missing: bool = False,
) -> Answer:
    """Write what a plan makes of a model; a folder of safetensors is read and written matrix by matrix.

    Args:
        model: the original: a folder, a hub name, or a .gguf file.
        output: a new file or folder.
        plan: a plan's file (.yaml, .json, .txt) or its text; by default the one that the result recommends.
        form: recipe, dense, factored, adapter or undo.
        result: the JSON file of a search or a comparison of this plan, for the model card.
        base: for a plan that cuts the difference to what the model was fine-tuned from, as in 27.fc_in@0.1:cut=delta:
            that model's folder, hub name or checkpoint.
        allow_missing: go on with a model of which weights are missing: they are random, and a warning names them.
    """
    numbers = None if result is None else read_plain(result, "result", result_of)
    searched = numbers if isinstance(numbers, SearchResult) else None
    wanted = searched.plan if plan is None and searched is not None else plan
    if wanted is None:
        reason = "" if searched is None else f": {searched.reason}"
        raise ValueError(f"`--plan` is missing, and no result recommends one{reason}")
    chosen = Recipe.of(wanted)
    if form == "recipe":
        need_recipe_ending(output=output)
    check_base([chosen], base is not None)
    check_directions([chosen])
    with notes():
        original, spectra = _original(model, base, allow_missing, output)
        done = save_reduced(
            original,
            chosen,
            output,
            form,
            result=numbers,
            tokenizer=_tokenizer(model),
            spectra=spectra,
            progress=PhaseProgress(),
        )
    return _answer(f"wrote {form}", output, done)


def apply(
    *, model: str, recipe: Path, output: Path, exact: bool = True, base: str | None = None, allow_missing: bool = False
) -> Answer:
    """Apply a recipe to the model that it was made for, matrix by matrix, and write the reduced model for transformers.

    Args:
        model: the original: a folder, a hub name, or a .gguf file.
        recipe: as "export" has written it.
        output: a new folder.
        exact: demand the recorded bits; "false" accepts rounding of another processor or number of threads.
        base: what the model was fine-tuned from, if the recipe cuts the difference to it.
        allow_missing: go on with a model of which weights are missing: they are random, and a warning names them.
    """
    need_files(recipe=recipe)
    plan = Recipe.from_file(recipe)
    if not isinstance(plan, Recipe):
        raise ValueError(f"{recipe} is a plan without hashes, not a recipe: use `laser-callback export --plan`")
    check_base([plan], base is not None)
    with notes():
        original, spectra = _original(model, base, allow_missing, output)
        how = {"tokenizer": _tokenizer(model), "spectra": spectra, "exact": exact, "progress": PhaseProgress()}
        with _about(recipe):
            done = save_reduced(original, plan, output, **how)
    return _answer("wrote the reduced model", output, done)


def restore(*, model: str, undo: Path, output: Path, allow_missing: bool = False) -> Answer:
    """Give a cut model its original weights back, bit for bit, matrix by matrix.

    Args:
        model: folder of the reduced model.
        undo: as "export --form undo" has written it.
        output: a new folder.
        allow_missing: go on with a model of which weights are missing: they are random, and a warning names them.
    """
    need_files(undo=undo)
    progress = PhaseProgress()
    with notes(), appearing(output) as folder:
        reduced = open_pretrained(model, allow_missing, folder.parent)
        with _about(undo):
            recipe = restore_model(reduced, undo, progress=progress)
        save_dense(reduced, folder, _tokenizer(model), progress)
    return _answer("wrote the original", output, recipe)


def _original(model: str, base: str | None, allow_missing: bool, output: Path) -> tuple[PreTrainedModel, Spectra]:
    """The model, and the spectra of its weights, or of their difference to what it was fine-tuned from."""
    beside = next(folder for folder in output.absolute().parents if folder.is_dir())
    original = open_pretrained(model, allow_missing, beside)
    spectra = Spectra.default(None if base is None else BaseWeights(base, original))
    return original, spectra.sparing(original)


@contextmanager
def _about(file: Path) -> Iterator[None]:
    """Within: what does not fit the model is said of the file."""
    try:
        yield
    except ValueError as error:
        if file.name in str(error):
            raise
        raise ValueError(f"{file.name}: {error}") from error


def _tokenizer(model: str) -> Any:
    """What makes inputs for the model: with a processor of images or sound, where it has one that loads here."""
    if not model.endswith(".gguf"):
        with suppress(OSError, ValueError, ImportError):
            return AutoProcessor.from_pretrained(model)  # the tokenizer where a model takes text only
    try:
        return load_tokenizer(model)
    except (OSError, ValueError):
        if os.path.isfile(model) or any(Path(model).glob("tokenizer*")):
            raise  # there is one, and it is broken
        print(f"note: {model} has no tokenizer, so none is written", file=sys.stderr)
        return None


def _answer(what: str, path: Path, recipe: Recipe) -> Answer:
    files = [path] if path.is_file() else list(path.iterdir())
    size = sum(file.stat().st_size for file in files)
    without = f", without {listed(recipe.left_out)}" if recipe.left_out else ""
    print(f"{what}: {path}, {decimal(size)}{without}")
    return Answer({"path": str(path), "bytes": size, "recipe": recipe.to_dict()})
