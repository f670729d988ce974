"""Draw an inspection: per kind the energy curves of all layers, and the effective rank by layer."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from laser_callback.plans.rank_rules import unit
from laser_callback.reports.drawing import styled
from laser_callback.reports.pictures import new_figure, save_figure
from laser_callback.spectra.inspection import RULES, InspectedMatrix, Inspection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 4
_MARKED = [rule for rule in RULES if rule != "entropy"]  # the effective rank has a panel of its own


def check_picture(path: Path) -> None:
    """Whether a picture can be drawn under this name, before the long work.

    Raises:
        ValueError: if ``path`` ends with anything but ``.svg``, ``.png`` or ``.pdf``.
    """
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise ValueError(f"the picture's name must end with .svg, .png or .pdf, got {path}")


def save_spectra(found: Inspection, path: Path) -> None:
    """Write the picture in the format that the ending of ``path`` names; raises as :func:`check_picture` does."""
    check_picture(path)
    with styled():
        save_figure(_figure(found), path)


def _figure(found: Inspection) -> Figure:
    import matplotlib
    from matplotlib.cm import ScalarMappable

    panels: dict[str, list[InspectedMatrix]] = {}
    stacks = {matrix.stack for matrix in found.matrices if matrix.kind}
    for matrix in found.matrices:
        kind = matrix.kind or "other"
        panels.setdefault(f"{matrix.stack}: {kind}" if len(stacks) > 1 else kind, []).append(matrix)
    colours = matplotlib.colormaps["viridis"]
    last = max((matrix.layer or 0 for matrix in found.matrices), default=0)

    columns = min(_COLUMNS, len(panels) + 1)
    rows = math.ceil((len(panels) + 1) / columns)
    figure = new_figure(3.4 * columns, 2.9 * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (title, members) in zip(axes, panels.items(), strict=False):
        for matrix in members:
            energy = (matrix.values / unit(matrix.values)).square().cumsum(0)
            rho = torch.arange(1, matrix.max_rank + 1) / matrix.max_rank
            colour = colours((matrix.layer or 0) / max(last, 1))
            axis.plot(100 * rho, 100 * energy / energy[-1].clamp_min(1e-300), color=colour, linewidth=0.8)
        for rule, style in zip(_MARKED, ("-", "--", "-.", ":"), strict=True):
            median = statistics.median(100 * matrix.ranks[rule] / matrix.max_rank for matrix in members)
            axis.axvline(median, color="black", linewidth=0.8, linestyle=style, label=rule)
        axis.set(title=title, xscale="log", xlim=(0.2, 100), ylim=(0, 100))
        axis.set(xlabel="rank kept, %", ylabel="squared norm kept, %")
        axis.set_xticks([1, 10, 100], ["1", "10", "100"])
    last_panel = axes[len(panels)]
    for title, members in panels.items():
        placed = sorted((m.layer, 100 * m.ranks["entropy"] / m.max_rank) for m in members if m.layer is not None)
        last_panel.plot(*zip(*placed, strict=True), marker=".", linewidth=0.8, label=title) if placed else None
    last_panel.set(title="effective rank (entropy)", xlabel="layer", ylabel="% of maximum rank", ylim=(0, 100))
    last_panel.legend(fontsize=6, ncols=2)
    for axis in axes[len(panels) + 1 :]:
        axis.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    scale = ScalarMappable(matplotlib.colors.Normalize(0, last), colours)
    figure.colorbar(scale, ax=axes, label="layer", shrink=0.6)
    return figure
