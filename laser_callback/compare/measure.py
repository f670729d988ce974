"""Run many candidates on the same examples, inside of Lightning, and keep what each example gave.

:class:`Lab` is the search's only way to the model. Candidates are the arms of one evaluation loop, so they see the same
batches, share the layers in front of their cuts, and whatever an ordinary LightningModule logs or returns can be an
objective. A plan that is in place already is the ``base``: candidates are added to it and compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from laser_callback.compare.alone import Run
from laser_callback.compare.callback import LaserCallback
from laser_callback.compare.options import RunOptions
from laser_callback.compare.run import ComparisonRun
from laser_callback.compare.trainer import left_as_found, quiet_trainer
from laser_callback.data.facts import draw
from laser_callback.plans.matrices import find_matrices
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.selection import Catalogue
from laser_callback.plans.stacks import layer_stacks
from laser_callback.plans.target import Target, targets
from laser_callback.results.comparison import LaserResult
from laser_callback.results.examples import ORIGINAL, Logged, PairedExamples
from laser_callback.spectra.store import Spectra
from laser_callback.stats.outcomes import Kind, Outcomes, as_float64
from laser_callback.surgery.swap import reduced

TENSOR_BYTES = 2**30
"""How much of reduced tensors a measurement holds; the others are rebuilt from their spectra on each batch."""


@dataclass(frozen=True, eq=False)
class Values:
    """One arm's value of one metric per unit: examples where the step returns them, else batches.

    Attributes:
        values: (n,) float64, NaN where a unit has none.
        weights: (n,) float64; examples in a batch where batches are the units, tokens of a perplexity, else ones.
        kind: as of :class:`~laser_callback.stats.Outcomes`; right or wrong is a mean here.
        clusters: (n,) int64, the same number for units that are not independent; ``None`` where all are.
    """

    values: Tensor
    weights: Tensor
    kind: Kind = "mean"
    clusters: Tensor | None = None

    @classmethod
    def of(cls, outcomes: Outcomes, clusters: Iterable[Hashable] | None = None) -> Values:
        """The same as float64, with weights; a cluster's number is that of its label in any other measurement too."""
        values = torch.from_numpy(as_float64(outcomes.values))
        kind: Kind = "mean" if outcomes.kind == "binary" else outcomes.kind
        given = outcomes.weights
        weights = torch.ones_like(values) if given is None else torch.from_numpy(as_float64(given))
        numbers = None if clusters is None else torch.tensor([int(draw(str(c), "cluster")[:13], 16) for c in clusters])
        return cls(values, weights, kind, numbers)

    @classmethod
    def join(cls, parts: Iterable[Values]) -> Values:
        """The units of several measurements, one after the other."""
        parts = list(parts)
        values, weights = (torch.cat([getattr(part, name) for part in parts]) for name in ("values", "weights"))
        clusters = [part.clusters for part in parts if part.clusters is not None]
        return cls(values, weights, parts[0].kind, torch.cat(clusters) if len(clusters) == len(parts) else None)


Table = dict[str, dict[str, Values]]
"""Arm -> metric -> values. The base is the arm ``"original"``; all arms have the same units in the same order."""


@dataclass
class Lab:
    """The module under test and how to run it.

    Args:
        module: any LightningModule.
        spectra: shared by all candidates.
        accelerator, precision: as in ``Trainer``, but "auto" takes CUDA or the CPU, and "cuda:1" names the device.
        on_arm: called after each arm's pass over a batch with the share of the model's layers that it had to compute.

    Attributes:
        matrices: of the module.
        logged: by the base, in the latest measurement.
        failed: why plans have no values, by name.
    """

    module: pl.LightningModule
    spectra: Spectra
    accelerator: str = "auto"
    precision: Any = None
    on_arm: Callable[[float], None] = lambda share: None
    matrices: Catalogue = field(init=False)  # looked up for each candidate
    logged: dict[str, Logged] = field(default_factory=dict, init=False)
    failed: dict[str, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.matrices = Catalogue(find_matrices(self.module))
        self._depth = {stack: len(layers) for stack, layers in layer_stacks(self.module).items()}

    def validate(
        self, loaders: Any, *callbacks: pl.Callback, inference_mode: bool = True, limit_batches: int | None = None
    ) -> list[Mapping[str, float]]:
        """``trainer.validate`` on one device, with nothing but the callbacks and what the module brings."""
        options = {"precision": self.precision, "inference_mode": inference_mode, "limit_val_batches": limit_batches}
        quiet = quiet_trainer(self.accelerator, callbacks=list(callbacks), **options)
        with quiet as trainer, left_as_found(trainer, self.module, callbacks):
            return list(trainer.validate(self.module, loaders, verbose=False))

    def measure(
        self,
        plans: Mapping[str, LaserPlan],
        loader: DataLoader[Any],
        keys: Iterable[str],
        base: LaserPlan | None = None,
    ) -> Table:
        """Values of ``keys`` on every example of ``loader``, of the base and of each plan on top of it.

        Args:
            plans: what each arm cuts in addition to ``base``.
            loader: the examples.
            keys: metrics that the module logs.
            base: what is in place.

        Raises:
            MisconfigurationException: for a key that is not logged, or is not a mean over examples or batches.
            ValueError: for a value of the original that is not finite.
        """
        names = {f"arm{number}": name for number, name in enumerate(plans)}
        shares = {arm: self.share(plans[name]) for arm, name in names.items()}
        measure = _Measure(
            {arm: plans[name] for arm, name in names.items()}, self.spectra, lambda arm: self.on_arm(shares[arm])
        )
        with self.base(base):
            self.validate(loader, measure)
        self.logged = measure.logged
        self.failed |= {names[arm]: str(error) for arm, error in measure.failed.items()}
        table: Table = {ORIGINAL: {}, **{name: {} for name in plans}}
        keys = list(keys)
        present = [key for key in keys if key in measure.logged]
        for key in present or keys:
            for arm, name in names.items():
                table[ORIGINAL][key], table[name][key] = measure.values(arm, key)
        for key in keys:
            if key not in present:  # of these examples none has it, such as paraphrases
                none = table[ORIGINAL][present[0]]
                for of_arm in table.values():
                    of_arm[key] = replace(none, values=torch.full_like(none.values, math.nan))
        return table

    def compare(
        self,
        plan: LaserPlan,
        loaders: Any,
        *,
        primary: str | None,
        controls: bool,
        seed: int = 0,
        limit_batches: int | None = None,
    ) -> LaserResult:
        """The original against one plan, with all statistics, as anyone would run it; or on the first batches only."""
        options = {"primary": primary, "controls": controls, "seed": seed}
        callback = _WithSpectra(plan, self.spectra, loops="validate", report=False, **options)
        self.validate(loaders, callback, limit_batches=limit_batches)
        return callback.result

    def alone(self, loaders: Any) -> Run:
        """What the module does as it stands, for ``compare.alone.paired``."""
        watch = _Alone(self.spectra)
        self.validate(loaders, watch)
        return Run(watch.logged, watch.examples)

    def base(self, plan: LaserPlan | None) -> AbstractContextManager[Any]:
        """Context in which ``plan`` is in place."""
        return nullcontext() if plan is None else reduced(self.matrices, plan, self.spectra)

    def targets(self, within: str, without: LaserPlan | None = None) -> list[Target]:
        """What may be cut ``within`` and not cut yet."""
        return targets(self.module, within, without or ())

    def alters(self, plan: LaserPlan) -> bool:
        """Whether it does more than round: the difference to a base may have a lower rank than a plan keeps."""
        return any(
            not self.spectra.changes_nothing(matrix.value, reduction, matrix.name)
            for matrix, reduction in self.spectra.settled(plan.resolve(self.matrices))
        )

    def share(self, plan: LaserPlan) -> float:
        """Share of the model's layers from the plan's first cut on: what a pass costs when the others are replayed."""
        first: dict[str, int] = {}
        for matrix, _ in plan.resolve(self.matrices):
            if matrix.stack is None or matrix.layer is None:
                return 1.0
            first[matrix.stack] = min(matrix.layer, first.get(matrix.stack, matrix.layer))
        # Stacks without a cut are counted as replayed: an encoder before a decoder.
        computed = sum(self._depth[stack] - layer for stack, layer in first.items())
        return computed / max(sum(self._depth.values()), 1)


class _WithSpectra(LaserCallback):
    """A LaserCallback that takes its factorisations from a store."""

    def __init__(self, plan: LaserPlan | Mapping[str, LaserPlan], spectra: Spectra, **arguments: Any) -> None:
        super().__init__(plan, **arguments)
        self._spectra = spectra

    @property
    @override
    def _options(self) -> RunOptions:
        return replace(super()._options, spectra=self._spectra)


class _Alone(_WithSpectra):
    """A LaserCallback without any arm, which keeps what the original did."""

    def __init__(self, spectra: Spectra) -> None:
        placeholder = LaserPlan.parse("*.all@0")  # `_options` ask for none
        super().__init__(placeholder, spectra, loops="validate", report=False)
        self.logged: dict[str, Logged] = {}
        self.examples = PairedExamples()

    @property
    @override
    def _options(self) -> RunOptions:
        return replace(super()._options, plans={}, replay=False, resample=False, watched=False)

    @override
    def _finish(self, run: ComparisonRun, trainer: pl.Trainer) -> None:
        self.logged, _ = run.end()
        self.examples = run.gathered()


class _Measure(_WithSpectra):
    """A LaserCallback for dozens of arms, which keeps the values and leaves out all statistics and logging."""

    def __init__(self, plans: Mapping[str, LaserPlan], spectra: Spectra, on_arm: Callable[[str], None]) -> None:
        super().__init__(plans, spectra, loops="validate", report=False)
        self._on_arm = on_arm
        self._examples = PairedExamples()
        self.failed: dict[str, Exception] = {}
        self._original: dict[str, Logged] = {}

    @property
    @override
    def _options(self) -> RunOptions:
        return replace(
            super()._options,
            tensor_bytes=TENSOR_BYTES,
            with_spectra=False,
            on_arm=self._on_arm,
            on_failure=self.failed.__setitem__,
            resample=False,
            watched=False,  # what is recommended is confirmed by a comparison that looks
        )

    @override
    def _finish(self, run: ComparisonRun, trainer: pl.Trainer) -> None:
        self._original, _ = run.end()
        self._examples = run.gathered()
        self._original = self._examples.with_both(ORIGINAL, self._original)

    @property
    def logged(self) -> dict[str, Logged]:
        """What the original logged."""
        return self._original

    def values(self, arm: str, key: str) -> tuple[Values, Values]:
        """The base's and an arm's values of ``key``."""
        if key not in self._original:
            raise MisconfigurationException(
                f"{key!r} is not logged by `validation_step`: it logs {', '.join(self._original) or 'nothing'}"
            )
        return values_of(self._examples, arm, key, self._original[key])


def values_of(examples: PairedExamples, arm: str, key: str, metric: Logged) -> tuple[Values, Values]:
    """The original's and an arm's values of a metric that the original has logged as ``key``.

    Raises:
        MisconfigurationException: if it is no mean over examples or batches.
        ValueError: if the original's value is not finite.
    """
    own = examples.values(ORIGINAL, key, metric)
    if own is None:
        raise MisconfigurationException(
            f"{key!r} is not a mean over examples or batches, so candidates cannot be compared by it while they "
            f"are run: return a 1-D tensor with one value per example under {key!r} from `validation_step`"
        )
    pair = examples.values(arm, key, metric)
    if pair is None or len(pair[0].values) != len(own[0].values):  # the cut has broken the model
        pair = own[0], replace(own[0], values=np.full_like(own[0].values, math.nan))
    clusters = examples.clusters(key, metric)
    before, after = (Values.of(outcomes, clusters) for outcomes in pair)
    present = before.values[~torch.isnan(before.values)]
    if not len(present) or not bool(torch.isfinite(present).all()):
        raise ValueError(f"{key!r} is not finite for the model as it is: nothing can be compared with that")
    return before, after
