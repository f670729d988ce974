"""A model larger than the memory that it may have is exported: python tests/benchmarks/bench_streaming.py

A random Llama in bfloat16 (2,048 wide, 8,192 inside of the MLPs) in shards, in a temporary folder that is removed. The
export is a process of its own whose address space and data are limited (RLIMIT_AS, RLIMIT_DATA) to less than the
model's size. Its memory is the peak of what was resident, as the system reports it at its end (ru_maxrss of wait4); in
this are the libraries, so that the same export of a model of two narrow layers is measured first, and taken off. The
weights are read and not mapped: what the system keeps of files is not in it, and can be taken back at any time.

The bound: one shard, or four times the largest matrix in the float64 in which it is cut, whichever is larger.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from laser_callback.plans.plan import LaserPlan
from laser_callback.spectra.store import Spectra
from laser_callback.support.in_files import open_pretrained
from laser_callback.support.stored import Stored, contents, read_header
from laser_callback.surgery.recipe import Recipe

WIDTH, INNER = 2048, 8192


def config_of(layers: int, width: int = WIDTH, inner: int = INNER) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def write_checkpoint(folder: Path, config: LlamaConfig, shard_bytes: int) -> None:
    """As `save_pretrained` does it, of numbers that are made shard by shard."""
    folder.mkdir()
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in LlamaForCausalLM(config).state_dict().items()}
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    generator = torch.Generator().manual_seed(0)
    weight_map, total = {}, 0
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {
            name: torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
            for name in names
        }
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def export(model: Path, plan: str, output: Path, limit: int, cache: Path) -> tuple[int, float]:
    """In a process of its own: the peak of its resident memory in bytes, and seconds of its processor time."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    command = [sys.executable, "-c", "import sys; from laser_callback.cli.commands import main; sys.exit(main())"]
    command += ["export", "--model", str(model), "--plan", plan, "--output", str(output)]
    settings = {"LASER_CALLBACK_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    child = subprocess.Popen(command, env=os.environ | settings, preexec_fn=limited)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"the export failed: {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime


def tensors_of(folder: Path) -> dict[str, Stored]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in read_header(file)[0].items()}


def check(original: Path, written: Path, plan: str) -> None:
    """Untouched tensors are the same bytes, and cut ones what the cut makes of each alone, in memory."""
    before, after = tensors_of(original), tensors_of(written)
    cut = {f"{m.name}.weight": (m, r) for m, r in LaserPlan.parse(plan).resolve(open_pretrained(original))}
    same = all(
        bytes(a) == bytes(b)
        for name in before
        if name not in cut
        for a, b in zip(before[name].pieces(), after[name].pieces(), strict=True)
    )
    print(f"{len(before) - len(cut)} untouched tensors are the same bytes: {same}; names and order: ", end="")
    print(list(before) == list(after))
    spectra = Spectra()
    equal = [
        torch.equal(spectra.reduce(contents(before[name]), reduction, matrix.name), contents(after[name]))
        for name, (matrix, reduction) in cut.items()
    ]
    hashes = Recipe.of(str(written / "laser.json"))
    print(f"{len(cut)} cut tensors are those of a cut in memory: {all(equal)}; hashes in the recipe: ", end="")
    print(len(hashes.matrices) if isinstance(hashes, Recipe) else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=50)
    parser.add_argument("--shard", type=int, default=500, help="megabytes of a shard")
    parser.add_argument("--plan", default="10.fc_in@0.1, 20.fc_out@0.05, 30.q_proj@0.5, 40.mlp@0.1")
    parser.add_argument("--limit", type=int, default=5000, help="megabytes that the export may have")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_checkpoint(folder / "narrow", config_of(2, 64, 128), 10**9)
        write_checkpoint(folder / "original", config_of(arguments.layers), arguments.shard * 10**6)
        sizes = [file.stat().st_size for file in (folder / "original").glob("*.safetensors")]
        limit = arguments.limit * 10**6
        print(f"{sum(sizes) / 1e9:.2f} GB in {len(sizes)} shards, the largest {max(sizes) / 1e6:.0f} MB")
        print(f"limit of the export's address space and data: {limit / 1e9:.2f} GB")
        libraries, _ = export(folder / "narrow", "1.fc_in@0.1", folder / "no", limit, folder / "cache")
        begin = time.perf_counter()
        peak, processor = export(folder / "original", arguments.plan, folder / "cut", limit, folder / "cache")
        seconds = time.perf_counter() - begin
        bound = max(max(sizes), 4 * 8 * WIDTH * INNER)
        own = peak - libraries
        print(f"peak {peak / 1e6:.0f} MB, of which {libraries / 1e6:.0f} MB are libraries: {own / 1e6:.0f} MB")
        print(f"bound {bound / 1e6:.0f} MB: {own / bound:.2f} of it")
        print(f"{seconds:.0f} s, {processor:.0f} s of the processor")
        check(folder / "original", folder / "cut", arguments.plan)


if __name__ == "__main__":
    main()
