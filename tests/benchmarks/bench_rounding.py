"""What it costs to round a reduced matrix to its weight's dtype: python tests/benchmarks/bench_rounding.py

SmolLM2-135M-Instruct. For each dtype the weights are those of the model in that dtype, as a user loads it. Per matrix:
the error |cast(W_k) - W_k| / |W_k| in the Frobenius norm, where W_k is the float64 result, beside what the cut itself
removes, |W - W_k| / |W|; and the rank of cast(W_k), counted as singular values above the float32 resolution. For the
model: what rounding W_k alone does to the loss on sentences about the world, all other weights and the arithmetic in
float32, beside what the cut does.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from laser_callback import LaserPlan, find_matrices, reduced
from laser_callback.data.demo_model import demo_model_folder
from laser_callback.data.worldfacts import world_facts
from laser_callback.spectra.spectrum import Spectrum

RHOS = (0.01, 0.1, 0.5)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def relative(error: Tensor, of: Tensor) -> float:
    return float(torch.linalg.norm(error.double()) / torch.linalg.norm(of.double()))


def of_matrices(model: nn.Module, layers: list[int]) -> None:
    print(f"means over all kinds, layers {layers}\ndtype     rho   removed  rounding error  rank wanted -> found")
    matrices = [m for m in find_matrices(model) if m.kind and m.layer in layers]
    for dtype in DTYPES:
        rows: dict[float, list[tuple[float, float, int, int]]] = {rho: [] for rho in RHOS}
        for matrix in matrices:
            weight = matrix.value.to(dtype)
            spectrum = Spectrum.of(weight)
            for rho, row in rows.items():
                rank = int(rho * matrix.max_rank)
                exact = spectrum.truncate(weight, rank)
                cast = exact.to(dtype)
                values = Spectrum.of(cast).values
                resolution = values[0] * max(cast.shape) * torch.finfo(torch.float32).eps
                found = int((values > resolution).sum())
                row.append((relative(weight - exact, weight), relative(cast - exact, exact), rank, found))
        for rho, row in rows.items():
            removed, error, wanted, found = (sum(column) / len(row) for column in zip(*row, strict=True))
            name = str(dtype).removeprefix("torch.")
            print(f"{name:9} {rho:<5} {removed:.4f}   {error:.2e}        {wanted:.0f} -> {found:.0f}", flush=True)


@torch.no_grad()
def loss(model: nn.Module, batches: list[Tensor]) -> float:
    """Mean over batches of equally long sentences, nats per token."""
    return sum(float(model(ids, labels=ids, use_cache=False).loss) for ids in batches) / len(batches)


@torch.no_grad()
def of_the_model(model: nn.Module, batches: list[Tensor], plan: str) -> None:
    before = loss(model, batches)
    cut = reduced(model, LaserPlan.parse(plan))
    with cut:
        exact = loss(model, batches)
        print(f"\n{plan}: loss {before:.5f}, cut {exact:.5f} ({exact - before:+.5f})")
        for dtype in DTYPES[1:]:
            kept = [matrix.parameter.data for matrix, _ in cut.matrices]
            for matrix, _ in cut.matrices:
                matrix.parameter.data = matrix.parameter.data.to(dtype).float()
            print(f"  W_k rounded to {str(dtype).removeprefix('torch.'):9} {loss(model, batches) - exact:+.5f}")
            for (matrix, _), data in zip(cut.matrices, kept, strict=True):
                matrix.parameter.data = data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[11, 28])
    parser.add_argument("--sentences", type=int, default=64)
    options = parser.parse_args()
    folder = demo_model_folder(print)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    of_matrices(model, options.layers)

    by_length: dict[int, list[list[int]]] = {}
    for fact in world_facts()[:: max(1, len(world_facts()) // options.sentences)]:
        ids = tokenizer(f"{fact['prompt']} {fact['answer']}.")["input_ids"]
        by_length.setdefault(len(ids), []).append(ids)
    batches = [torch.tensor(sentences) for sentences in by_length.values()]
    for plan in ("28.fc_up@0.01", "11.q_proj@0.05", "20-27.mlp@0.5"):
        of_the_model(model, batches, plan)


if __name__ == "__main__":
    main()
