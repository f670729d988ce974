"""What a model's weights look like: the spectrum of each matrix, and how much of it every rank rule keeps.

Contract: :func:`inspect_model` reads weights and changes nothing. It looks at no data: an even spectrum does not say
that a cut hurts, nor a steep one that it helps (that is what a search is for).
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from laser_callback.plans.rank_rules import rank_by, unit
from laser_callback.plans.reduction import part_of
from laser_callback.plans.target import RHOS, targets
from laser_callback.plans.uncut import NotCut, not_cut
from laser_callback.spectra.store import SIDE_BY_SIDE, Spectra
from laser_callback.support.progress import PhaseProgress
from laser_callback.support.stored import lies_in_file

RULES = ("entropy", "energy-0.9", "gavish-donoho", "marchenko-pastur", "laser-rmt")
"""The rules that are shown."""


@dataclass(frozen=True)
class InspectedMatrix:
    """One matrix and its spectrum. What is not listed is as in :class:`~laser_callback.plans.WeightMatrix`.

    Attributes:
        values: singular values, descending, float64, shape (min(m, n),), on the CPU.
        ranks: by rule of :data:`RULES`, how many of them it keeps. That of ``entropy`` is also called effective rank.
    """

    name: str
    stack: str | None
    layer: int | None
    kind: str | None
    expert: int | None
    shape: tuple[int, int]
    values: Tensor
    ranks: dict[str, int]

    @property
    def max_rank(self) -> int:
        """min(rows, columns)."""
        return min(self.shape)

    def energy(self, rho: float) -> float:
        """The share of the squared Frobenius norm that is left of the matrix cut at ``rho``, in [0, 1]."""
        rank = part_of(rho, self.max_rank)
        energy = (self.values / unit(self.values)).square()
        return float(energy[:rank].sum() / energy.sum()) if energy.sum() > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "name": self.name,
            "stack": self.stack,
            "layer": self.layer,
            "kind": self.kind,
            "expert": self.expert,
            "shape": list(self.shape),
            "norm": float((self.values / (scale := unit(self.values))).square().sum().sqrt() * scale),
            "largest": float(self.values[0]) if self.max_rank else None,
            "median": float(self.values.quantile(0.5)) if self.max_rank else None,
            "smallest": float(self.values[-1]) if self.max_rank else None,
            "energy": {str(rho): self.energy(rho) for rho in RHOS if rho > 0},
            "ranks": self.ranks,
        }


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect_model` found.

    Attributes:
        matrices: in the model's order.
        not_cut: the parameters that no kind or group of a plan reaches, and why.
        seconds: what it took.
        factorising: the part of it that was spent on factorising, or on reading what was factorised before.
        loaded: so many spectra were read from disk.
    """

    matrices: tuple[InspectedMatrix, ...]
    not_cut: tuple[NotCut, ...]
    seconds: float
    factorising: float
    loaded: int

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: all but the times."""
        return {
            "matrices": [matrix.to_dict() for matrix in self.matrices],
            "not_cut": [asdict(parameter) for parameter in self.not_cut],
        }


def inspect_model(
    model: nn.Module, within: str = "*.all", spectra: Spectra | None = None, progress: PhaseProgress | None = None
) -> Inspection:
    """Factorise the matrices of a model, one after the other, and apply every rule to each.

    Args:
        model: any module.
        within: which matrices, as plan text without rho, e.g. ``"20-29.mlp, *.q_proj"``.
        spectra: where factorisations are looked up and kept; in memory for this call by default.
        progress: shown meanwhile, with the time that is left.

    Raises:
        ValueError: if ``within`` matches nothing or what cannot be cut, or weights are not finite.
    """
    begin = time.perf_counter()
    spectra = spectra or Spectra()
    before, loaded = spectra.seconds, spectra.loaded
    progress = progress or PhaseProgress(enabled=False)
    found = [matrix for target in targets(model, within) for matrix in target.matrices]
    work = [float(max(matrix.shape)) * matrix.max_rank**2 for matrix in found]
    inspected = []
    with progress.phase(f"factorising {len(found)} matrices", sum(work)):
        for i, (matrix, amount) in enumerate(zip(found, work, strict=True)):
            if i % SIDE_BY_SIDE == 0 and not lies_in_file(matrix.parameter):
                spectra.ahead([(m.value, m.name, "weight") for m in found[i : i + SIDE_BY_SIDE]])
            values = spectra.of(matrix.value, matrix.name).values.cpu()
            ranks = {rule: rank_by(rule, values, matrix.shape) for rule in RULES}
            place = (matrix.name, matrix.stack, matrix.layer, matrix.kind, matrix.expert, matrix.shape)
            inspected.append(InspectedMatrix(*place, values, ranks))
            progress.advance(amount)
    left = tuple(not_cut(model))
    seconds = time.perf_counter() - begin
    return Inspection(tuple(inspected), left, seconds, spectra.seconds - before, spectra.loaded - loaded)
