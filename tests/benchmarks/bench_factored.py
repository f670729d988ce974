"""Two thin layers against the dense one: python tests/benchmarks/bench_factored.py [--model]

Per shape and rho: bytes, and the time of a call with one token (decoding) and with 256, both layers in turn in one run.
So many copies of each layer take turns that their weights do not fit into the processor's caches, as in a model. The
break-even rho is where the thin layers stop being faster; the package makes layers thin up to MAX_SHARE of the numbers.
With --model, the same for SmolLM2-135M under a wide plan.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from laser_callback.data.demo_model import demo_model_folder
from laser_callback.shipping.thin import MAX_SHARE, FactoredLinear, factored
from laser_callback.support.pretrained import load_pretrained

SHAPES = [(576, 192), (576, 576), (1536, 576), (4096, 1024), (2048, 2048), (8192, 2048), (4096, 11008)]
RHOS = [0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6]
TOKENS = (1, 256)
CACHES = 256 * 2**20  # bytes, more than the caches of a server's processor


def copies(make: Callable[[], nn.Module]) -> list[nn.Module]:
    first = make()
    size = sum(p.nbytes for p in first.parameters())
    return [first, *(make() for _ in range(min(-(-CACHES // max(size, 1)), 400) - 1))]


def medians(sides: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Median time of a call of each, called in turn."""
    for side in sides:
        side()
    times: list[list[float]] = [[] for _ in sides]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for own, side in zip(times, sides, strict=True):
            begin = time.perf_counter()
            side()
            own.append(time.perf_counter() - begin)
    return [statistics.median(own) for own in times]


def shapes(selected: Sequence[tuple[int, int]], rhos: Sequence[float], seconds: float) -> None:
    print(
        f"float32, {torch.get_num_threads()} threads; times dense / thin; thin layers are chosen up to {MAX_SHARE:.0%}"
    )
    for rows, columns in selected:
        dense = itertools.cycle(copies(lambda r=rows, c=columns: nn.Linear(c, r, bias=False)))
        faster: dict[int, list[float]] = {tokens: [] for tokens in TOKENS}
        shares = []
        for rho in rhos:
            rank = max(int(rho * min(rows, columns)), 1)
            thin = itertools.cycle(
                copies(lambda m=rows, n=columns, k=rank: FactoredLinear(torch.randn(m, k), torch.randn(k, n) / n**0.5))
            )
            shares.append(rank * (rows + columns) / (rows * columns))
            cells = []
            for tokens in TOKENS:
                inputs = torch.randn(tokens, columns)
                slow, fast = medians(
                    [lambda x=inputs, d=dense: next(d)(x), lambda x=inputs, t=thin: next(t)(x)], seconds
                )
                faster[tokens].append(slow / fast)
                cells.append(f"{tokens:3} tokens {1e3 * slow:8.3f} / {1e3 * fast:8.3f} ms, {slow / fast:5.2f} x")
            chosen = "thin" if shares[-1] <= MAX_SHARE else "dense"
            print(f"{rows:5} x {columns:5}  rho {rho:4}  bytes 1/{1 / shares[-1]:.1f}  {'  '.join(cells)}  {chosen}")
        for tokens, gains in faster.items():
            beaten = next((rho for rho, gain in zip(rhos, gains, strict=True) if gain < 1), None)
            slowest = min((gain for gain, share in zip(gains, shares, strict=True) if share <= MAX_SHARE), default=None)
            where = f"slower from rho {beaten} on" if beaten else f"faster up to rho {rhos[-1]}"
            least = "-" if slowest is None else f"{slowest:.2f} x"
            print(f"{rows:5} x {columns:5}  {tokens:3} tokens: {where}; least gain where chosen {least}")


@torch.inference_mode()
def model(plan: str, seconds: float) -> None:
    slow, fast = (load_pretrained(demo_model_folder(print)) for _ in range(2))
    with factored(fast, plan) as thin:
        thin.keep()
    sizes = [sum(p.nbytes for p in one.parameters()) for one in (slow, fast)]
    print(
        f"SmolLM2-135M, {plan}: {len(thin.layers)} layers thin, {len(thin.dense)} dense; "
        f"bytes {sizes[0]:,} / {sizes[1]:,}"
    )
    layers = [sum(p.nbytes for p in one.model.layers.parameters()) for one in (slow, fast)]
    print(f"  without the vocabulary's matrix {layers[0]:,} / {layers[1]:,}, 1/{layers[0] / layers[1]:.1f}")
    prompt = torch.randint(10, 1000, (1, 256), generator=torch.Generator().manual_seed(0))
    for name, call, tokens in (
        ("prefill, 256 tokens", lambda one: one(prompt, use_cache=False, logits_to_keep=1), 256),
        ("decode, 32 tokens", lambda one: one.generate(prompt[:, :8], max_new_tokens=32, min_new_tokens=32), 32),
    ):
        times = medians([lambda c=call: c(slow), lambda c=call: c(fast)], seconds * 10)
        rates = " / ".join(f"{tokens / taken:,.0f}" for taken in times)
        print(f"  {name}: {rates} tokens/s, {times[0] / times[1]:.2f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="to time each pair for, at least")
    parser.add_argument("--shape", type=int, nargs=2, action="append", help="rows and columns, instead of all shapes")
    parser.add_argument("--rho", type=float, nargs="+", default=RHOS)
    parser.add_argument("--model", action="store_true", help="the whole model instead of single matrices")
    parser.add_argument("--plan", default="*.all@0.05")
    arguments = parser.parse_args()
    if arguments.model:
        model(arguments.plan, arguments.seconds)
    else:
        shapes(arguments.shape or SHAPES, arguments.rho, arguments.seconds)


if __name__ == "__main__":
    main()
