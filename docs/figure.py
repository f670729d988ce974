"""Draw ``how-laser-works.svg``: ``python docs/figure.py`` (needs the demo's model, whose numbers it shows)."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM

from laser_callback import LaserPlan
from laser_callback.data import demo_model_folder
from laser_callback.spectra import Spectrum

REDUCTION = "11.q_proj@0.05"
WIDTH, HEIGHT = 560, 500
STYLE = """
text { font: 15px system-ui, sans-serif; fill: #24292f } .small { font-size: 13px; fill: #57606a }
.kept { fill: #1f6feb } .keptText { fill: #0a50b8 } .dropped { fill: #d0d7de } .line { stroke: #57606a; fill: none }
.card { fill: #ffffff; stroke: #d0d7de }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .small { fill: #9da7b1 } .kept { fill: #4493f8 } .keptText { fill: #79b8ff }
.dropped { fill: #3d444d } .line { stroke: #9da7b1 } .card { fill: #161b22; stroke: #3d444d } }
"""


def main() -> None:
    """Factorise one matrix of the demo's model, and draw."""
    plan = LaserPlan.parse(REDUCTION)
    ((matrix, reduction),) = plan.resolve(AutoModelForCausalLM.from_pretrained(demo_model_folder()))
    weight = matrix.value
    sigma = Spectrum.of(weight).values.tolist()
    k, n = reduction.rank(matrix.max_rank), matrix.max_rank
    energy = sum(s * s for s in sigma[:k]) / sum(s * s for s in sigma)
    Path(__file__).with_name("how-laser-works.svg").write_text(svg(sigma, k, n, energy), encoding="utf-8")


def svg(sigma: list[float], k: int, n: int, energy: float) -> str:
    """The figure: layers, one matrix taken apart, and its singular values."""
    parts = [rect(0.5, 0.5, WIDTH - 1, HEIGHT - 1, "card", 8)]
    # The layers, with the one that is cut.
    for row in range(7):
        parts.append(rect(24, 48 + 24 * row, 76, 18, "kept" if row == 3 else "dropped", 3))
    parts += [text(62, 32, "the model", "middle"), text(62, 236, "layer 11 of 30", "middle", "small")]
    parts.append('<path class="line" d="M104 129 H140 m-7 -5 l7 5 l-7 5"/>')
    # W = U S V': what stays is shaded.
    top, side, thin = 82, 94, 14
    parts += [rect(150, top, side, side, "dropped"), text(197, 62, "W", "middle")]
    parts += [text(257, 134, "=", "middle")]
    parts += [rect(270, top, side, side, "dropped"), rect(270, top, thin, side, "kept"), text(317, 62, "U", "middle")]
    parts += [rect(372, top, 52, 52, "dropped"), rect(372, top, thin, thin, "kept"), text(398, 62, "Σ", "middle")]
    parts += [rect(432, top, side, side, "dropped"), rect(432, top, side, thin, "kept"), text(479, 62, "Vᵀ", "middle")]
    parts += [text(197, 200, f"{n} by {n}", "middle", "small")]
    parts += [text(270, 208, f"keep the first {k} of {n} directions,", "start", "keptText")]
    parts += [text(270, 230, "multiply back: same shape, lower rank")]
    # The spectrum.
    left, right, base, high = 40, WIDTH - 24, 446, 160
    peak = max(sigma)
    xs = [left + (right - left) * i / n for i in range(n)]
    ys = [base - high * s / peak for s in sigma]
    parts.append(area(xs[k - 1 :], ys[k - 1 :], base, "dropped"))
    parts.append(area(xs[:k], ys[:k], base, "kept"))
    parts += [
        text(left, 274, "singular values σ₁ ≥ σ₂ ≥ … of this matrix"),
        text(left + 60, 316, f"kept: {k} ({energy:.0%} of the squared norm)", "start", "keptText"),
    ]
    parts += [text(left + 110, 420, f"dropped: {n - k}", "middle")]
    parts += [
        f'<path class="line" d="M{left} {base} H{right}"/>',
        text(left, 468, "1", "middle", "small"),
        text(right, 468, str(n), "end", "small"),
    ]
    parts += [text(left + 40, 484, f"{REDUCTION}: layer 11, query matrix, 5 % of the rank", "start", "small")]
    title = f"LASER replaces a weight matrix by its truncated SVD: {k} of {n} singular values stay"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
    return "\n".join([head, f"<title>{title}</title>", f"<style>{STYLE}</style>", *parts, "</svg>\n"])


def rect(x: float, y: float, width: float, height: float, style: str, radius: int = 0) -> str:
    """A box."""
    return f'<rect class="{style}" x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}"/>'


def text(x: float, y: float, words: str, anchor: str = "start", style: str = "") -> str:
    """A line of text."""
    return f'<text class="{style}" x="{x}" y="{y}" text-anchor="{anchor}">{words}</text>'


def area(xs: list[float], ys: list[float], base: float, style: str) -> str:
    """What is under a curve."""
    curve = " ".join(f"L{x:.1f} {y:.1f}" for x, y in zip(xs, ys, strict=True))
    return f'<path class="{style}" d="M{xs[0]:.1f} {base} {curve} L{xs[-1]:.1f} {base} Z"/>'


if __name__ == "__main__":
    main()
