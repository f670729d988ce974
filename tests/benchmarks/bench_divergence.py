"""What the divergence of two models costs: memory and time at a vocabulary of 262,144 and 2,048 tokens of text.

    python tests/benchmarks/bench_divergence.py [--tokens 2048] [--vocabulary 262144] [--dtype bfloat16]

Two tensors of logits stand in for two models, of which one is kept as the original's. Printed are the bytes of what is
kept, which docs/costs-and-limits.md bounds by tokens x vocabulary x bytes of the logits' dtype, and how far the memory
of the process rises above both tensors while they are compared, which it bounds by 256 MiB. Beside it stands the
difference to one float64 computation of the whole on the first tokens.
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path

import torch

from laser_callback.compare import both

BOUND = 256 * 2**20
CHECKED = 64


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Peak(threading.Thread):
    """The most memory from its start to :meth:`end`, looked at every millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = resident()
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.001):
            self.most = max(self.most, resident())

    def end(self) -> int:
        self._over.set()
        self.join()
        return self.most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=262_144)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    generator = torch.Generator().manual_seed(0)
    original, other = (torch.empty(1, options.tokens, options.vocabulary, dtype=dtype) for _ in range(2))
    for token in range(options.tokens):  # one by one: their float32 would be the peak
        logits = 3 * torch.randn(options.vocabulary, generator=generator)
        original[0, token] = logits
        other[0, token] = logits + 0.1 * torch.randn(options.vocabulary, generator=generator)
    where = torch.ones(1, options.tokens, dtype=torch.bool)
    held = both.Both()
    held.begin()
    both.divergence(original, where)
    held.end()
    kept = sum(value.nbytes for value in held._kept)
    before, peak, begin = resident(), Peak(), time.perf_counter()
    peak.start()
    with held.of_arm():
        kl, same = both.divergence(other, where)
    seconds, above = time.perf_counter() - begin, peak.end() - before
    p, q = (logits[0, :CHECKED].double().log_softmax(-1) for logits in (original, other))
    error = float(((p.exp() * (p - q)).sum(-1) - kl[:CHECKED]).abs().max())
    print(f"{options.tokens:,} tokens x {options.vocabulary:,} in {options.dtype}, {torch.get_num_threads()} threads")
    print(f"kept of the original: {kept / 2**20:,.0f} MiB")
    print(f"above that and the arm's own logits: {above / 2**20:,.0f} MiB, {seconds:.1f} s")
    print(f"kl {float(kl.mean()):.6f}, agreement {float(same.float().mean()):.3f}, error to float64 {error:.1e}")
    assert kept == options.tokens * options.vocabulary * dtype.itemsize, "more is kept than the docs say"
    assert above <= BOUND, "more memory is used than the docs say"


if __name__ == "__main__":
    main()
