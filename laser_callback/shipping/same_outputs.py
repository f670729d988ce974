"""Do two models of transformers give the same? Made-up inputs for any, and a comparison bit for bit."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from laser_callback.passes.state import RandomState
from laser_callback.support.interrupts import whole
from laser_callback.support.settings import with_gradients
from laser_callback.support.suggest import clipped

_PROMPT, _NEW = 12, 6
"""Tokens of the made-up text, and tokens that are generated from it."""


def made_up_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two examples of random text, pixels or sound, as the model takes them, on its device; the same each time.

    Raises:
        ValueError: if it takes something else.
    """
    generator, config, main = torch.Generator().manual_seed(0), model.config, model.main_input_name
    if main == "input_ids":
        size = (2, _PROMPT)
        tokens = torch.randint(config.get_text_config().vocab_size, size, generator=generator)
        inputs = {main: tokens, "attention_mask": torch.ones(size, dtype=torch.long)}
        if hasattr(config, "vision_config") and not model.can_generate():  # CLIP takes both
            inputs["pixel_values"] = _pixels(config.vision_config, generator)
    elif main == "pixel_values":
        inputs = {main: _pixels(getattr(config, "vision_config", config), generator)}
    elif main == "input_features" and hasattr(config, "num_mel_bins"):  # Whisper: two frames become one position
        inputs = {main: torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)}
    else:
        raise ValueError(f"whether it gives the same cannot be tried: {type(model).__name__} takes {main}")
    if config.is_encoder_decoder:
        words = config.get_text_config(decoder=True).vocab_size
        inputs["decoder_input_ids"] = torch.randint(words, (2, _PROMPT // 2), generator=generator)
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


def _pixels(config: Any, generator: torch.Generator) -> Tensor:
    sides = config.image_size if isinstance(config.image_size, (list, tuple)) else [config.image_size] * 2
    return torch.randn(2, config.num_channels, *sides, generator=generator)


def outputs(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that the model returns, in eval mode, by name."""
    with _evaluated(model), with_gradients(False):
        return _tensors(model(**inputs))


def why_not_same(one: PreTrainedModel, other: PreTrainedModel, inputs: Mapping[str, Tensor]) -> str:
    """Why two models do not give the same bits, forwards and where they can, generating; empty if they do.

    Both are the same afterwards, and so are the global random generators.
    """
    for run in (outputs, *([_generated] if one.can_generate() else [])):
        start = RandomState.now()
        try:
            wanted = run(one, inputs)
            start.set()
            try:
                got = run(other, inputs)
            except Exception as error:  # each class has its own way to fail
                return f"the smaller model does not run: {short(error)}"
        except Exception as error:
            return f"the model does not run on made-up inputs: {short(error)}"
        finally:
            start.set()
        for name, tensor in wanted.items():
            here = got.get(name)
            if here is None or here.shape != tensor.shape:
                return f"the smaller model does not return the same `{name}`"
            if not torch.equal(here, tensor):
                apart = float((here.double() - tensor.double()).abs().max())
                return f"the smaller model gives other {name}, by up to {apart:.2g}: the place of a layer may matter"
    return ""


def _generated(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What it generates, greedily and with a key/value cache, and the logits that it has for each token."""
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=_NEW,
        min_new_tokens=_NEW,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    given = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    with _evaluated(model), with_gradients(False):
        return {
            f"generated {name}": value
            for name, value in _tensors(model.generate(**given, generation_config=settings)).items()
        }


def _tensors(output: Any, name: str = "output") -> dict[str, Tensor]:
    if isinstance(output, Tensor):
        return {name: output}
    if isinstance(output, Mapping):
        return {key: value for part, held in output.items() for key, value in _tensors(held, part).items()}
    if isinstance(output, (list, tuple)):
        return {key: x for i, held in enumerate(output) for key, x in _tensors(held, f"{name}[{i}]").items()}
    return {}  # a cache: what is made of it is compared


@whole
def _evaluated(model: nn.Module) -> Generator[None, None, None]:
    """Within: all modules are in eval mode, and transformers has no advice on how to generate."""
    modes, said = {module: module.training for module in model.modules()}, logging.get_verbosity()
    try:
        model.eval()
        logging.set_verbosity_error()
        yield
    finally:
        logging.set_verbosity(said)
        for module, mode in modes.items():
            module.training = mode


def short(error: Exception) -> str:
    """The first line of what an error says."""
    return clipped(str(error).strip().split("\n")[0].rstrip(".")) or type(error).__name__
