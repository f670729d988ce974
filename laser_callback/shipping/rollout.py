"""Staged rollout: put a plan into a model step by step, judge the gates after each, keep the last good stage.

The stages are declared beforehand and tested in their order, each at the gates' own level, until one does not pass:
what is then kept stands, without a correction for the number of stages, because no stage is tested after a failure
(fixed-sequence test; Maurer, Hothorn and Lehmacher 1995). Every stage is compared with the original, which it would
replace. Whatever happens, the model is afterwards as it was, bit by bit, unless it is asked to keep what was accepted.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from laser_callback.compare.measure import Lab
from laser_callback.compare.module import LaserModule
from laser_callback.data.example_set import fingerprints
from laser_callback.plans.plan import LaserPlan, check_base, check_directions
from laser_callback.plans.reduction import Reduction
from laser_callback.plans.short import brief
from laser_callback.results.comparison import LaserResult
from laser_callback.results.rollout import GainAt, RolloutResult
from laser_callback.shipping.gates import Gates, loaders_of
from laser_callback.spectra.store import Spectra
from laser_callback.stats.gain import Gain
from laser_callback.support.interrupts import catch_up, undisturbed
from laser_callback.support.journal import Journal, Step
from laser_callback.support.progress import PhaseProgress
from laser_callback.support.provenance import versions
from laser_callback.support.reading import Seconds, typed
from laser_callback.support.suggest import clipped
from laser_callback.surgery.recipe import Recipe, matrix_hash
from laser_callback.surgery.swap import reduced

STAGES = 8
"""So many stages at most, where nobody says which."""


def in_parts(plan: LaserPlan | str, most: int = STAGES) -> list[LaserPlan]:
    """Stages that add one part of the plan at a time, in its order.

    A part is one reduction. A plan of more than ``most`` reductions goes by layers: all neighbours that name the same
    layer are one part, and if these are still more, neighbouring parts are put together, as evenly as can be. The parts
    of a recipe are recipes.

    Args:
        plan: the last stage.
        most: so many stages at most; each takes an evaluation.

    Raises:
        ValueError: if ``most`` is less than 1.

    >>> [str(stage) for stage in in_parts("27.fc_in@0.01, 11.q_proj@0.05")]
    ['27.fc_in@0.01', '27.fc_in@0.01, 11.q_proj@0.05']
    >>> [str(stage) for stage in in_parts("0.fc_in@0.1, 0.fc_out@0.1, 1.fc_in@0.1", most=2)]
    ['0.fc_in@0.1, 0.fc_out@0.1', '0.fc_in@0.1, 0.fc_out@0.1, 1.fc_in@0.1']
    """
    if most < 1:
        raise ValueError(f"`most` must be at least 1, got {most}")
    plan = Recipe.of(plan)
    ends = list(range(1, len(plan) + 1))
    if len(ends) > most:
        sizes = [len(list(of_layer)) for _, of_layer in groupby(plan, _where)]
        ends = list(accumulate(sizes))
    count = min(most, len(ends))
    last = [ends[len(ends) * number // count - 1] for number in range(1, count + 1)]
    return [*(plan.part(plan.reductions[:end]) for end in last[:-1]), plan]


def _where(reduction: Reduction) -> tuple[Any, ...]:
    """The layer that it names; a pattern that names none stands for itself."""
    return reduction.stack, reduction.layer, None if reduction.layer is not None else reduction.matrix


def in_steps(plan: LaserPlan | str, rhos: Iterable[float]) -> list[LaserPlan]:
    """Stages that cut the whole plan deeper and deeper: at each rho, but no reduction below its own, then as planned.

    Biases are cut in a stage that cuts their matrix to nothing, and in no stage before.

    Raises:
        ValueError: if a rho is not in (0, 1), or the plan has a rule in place of a number, or cuts in the metric of
            the inputs: a recipe has no directions of another rho.

    >>> [str(stage) for stage in in_steps("27.fc_in@0.01, 11.q_proj@0.2", [0.1, 0.5])]
    ['27.fc_in@0.5, 11.q_proj@0.5', '27.fc_in@0.1, 11.q_proj@0.2', '27.fc_in@0.01, 11.q_proj@0.2']
    """
    plan = Recipe.of(plan)
    rhos = sorted(set(rhos), reverse=True)
    if not all(0 < rho < 1 for rho in rhos):
        raise ValueError(f"`rhos` must be between 0 and 1, got {rhos}")

    def at(reduction: Reduction, rho: float) -> Reduction:
        if isinstance(reduction.rho, str):
            raise ValueError(f"a plan cut in steps must have a number for each rho, got {clipped(reduction)}")
        if reduction.needs_inputs:
            raise ValueError(f"of {reduction} no other rho is known, so that it is not cut in steps: use `in_parts`")
        return reduction if rho <= reduction.rho else replace(reduction, rho=rho, bias="kept")

    stages = [LaserPlan(at(reduction, rho) for reduction in plan) for rho in rhos]
    return [stage for stage in stages if stage != plan] + [plan]


@dataclass
class _Measured:
    """The comparisons of a stage, by the name of the data."""

    results: dict[str, LaserResult]
    seconds: Seconds


@dataclass
class StagedRollout:
    """Roll a plan out in stages.

    Args:
        module: a :class:`LaserModule` (without a plan), or any LightningModule with a ``validation_step``.
        stages: the plans to go through, each whole; see :func:`in_parts` and :func:`in_steps`. One plan is one stage.
        gates: what is demanded of every stage, such as ``["first_token_accuracy: gain", "perplexity <= +2 %"]``, a
            mapping, or a YAML file; see :func:`~laser_callback.shipping.read_gates`.
        data: what ``trainer.validate`` takes, with examples that the plan was not chosen by.
        others: more such data by name, for gates such as ``safety/refusal_rate >= -0.05``.
        gain_at: demand the gains of ``"each"`` stage, or of the ``"last"`` only. Then the constraints alone decide
            whether the rollout goes on, and the original is kept unless the last stage passes all.
        apply: leave the last good stage in the module; :meth:`undo` takes it out again.
        controls: run the controls beside each stage.
        folder: keep each finished stage here; with ``resume`` go on from them.
        spectra: the store of factorisations; by default on this machine's disk.
        accelerator, precision: as in ``Trainer``, but "auto" takes CUDA or the CPU, and "cuda:1" names the device: it
            runs on one.
        progress: show progress on standard error.
        seed: of the random control and of the noise.

    Attributes:
        result: the outcome; after an interruption what there was by then.

    Raises:
        MisconfigurationException, ValueError, OSError: at once, or in :meth:`prepare`, naming the argument.

    Example::

        facts = FactsDataModule("facts.jsonl", module.tokenizer, text="text.txt")
        gates = ["first_token_accuracy: gain", "perplexity: ratio < 1.02", "safety/refusal_rate: delta > -0.05"]
        probes = ProbesDataModule("probes.jsonl", module.tokenizer)
        StagedRollout(module, in_parts(plan), gates, facts, others={"safety": probes}).run().log
    """

    module: pl.LightningModule
    stages: LaserPlan | str | Sequence[LaserPlan | str]
    gates: Any
    data: Any
    _: KW_ONLY
    others: Mapping[str, Any] | None = None
    gain_at: GainAt = "each"
    apply: bool = False
    controls: bool = False
    folder: str | Path | None = None
    resume: bool = False
    spectra: Spectra | None = None
    accelerator: str = "auto"
    precision: Any = None
    progress: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.module, LaserModule) and self.module.plan is not None:
            raise MisconfigurationException("`module` must have no plan of its own: the rollout puts the stages in")
        given = [self.stages] if isinstance(self.stages, (LaserPlan, str)) else self.stages
        plans = tuple(Recipe.of(stage) for stage in given)
        if not plans:
            raise ValueError("`stages` must hold at least one plan, got none")
        self._gates = Gates(self.gates, self.data, self.others, controls=self.controls, seed=self.seed)
        if self.gain_at not in ("each", "last"):
            raise ValueError(f"`gain_at` must be 'each' or 'last', got {self.gain_at!r}")
        if self.gain_at == "last" and not any(isinstance(gate, Gain) for gate in self._gates.gates):
            raise ValueError("`gain_at='last'` needs a gate that demands a gain, got none among `gates`")
        if self.folder is None and self.resume:
            raise ValueError("`resume` needs the `folder` of the rollout to go on with")
        self.result = RolloutResult(None, False, plans)
        self._applied: reduced | None = None
        self._hashes: list[str] = []
        self._lab: Lab | None = None

    def prepare(self) -> None:
        """Find everything that can be wrong, before the work.

        Raises:
            MisconfigurationException, ValueError: if a stage does not fit the model, or a gate cannot be judged.
            FileExistsError: if the folder holds a run and ``resume`` is false.
        """
        lab = Lab(self.module, self.spectra or Spectra.default(), self.accelerator, self.precision)
        if lab.spectra.base is None:
            check_base(self.result.declared, given=False)
        if lab.spectra.directions is None:
            check_directions(self.result.declared)
        for plan in self.result.declared:
            plan.check_weights([matrix for matrix, _ in plan.resolve(lab.matrices)], lab.spectra.base)
        self._gates.prepare(lab, self.result.declared[0])
        self.result.settings = {
            "gates": [str(gate) for gate in self._gates.gates],
            "declared": [str(plan) for plan in self.result.declared],
            "gain_at": self.gain_at,
            "controls": self.controls,
            "accelerator": self.accelerator,
            "precision": self.precision,
            "seed": self.seed,
            "versions": versions(),
        }
        if lab.spectra.base is not None:
            self.result.settings["base"] = lab.spectra.base.digest
        if self.folder is not None:
            parts = {name or "data": loaders_of(data) for name, data in self._gates.data.items()}
            self.result.settings["fingerprints"] = fingerprints(self.module, parts)
        self._journal = Journal(self.folder, self.result.settings, self.resume)
        asked = {name or "data": getattr(data, "provenance", {}) for name, data in self._gates.data.items()}
        self.result.settings = {**self.result.settings, "data": asked}  # told, and free to be elsewhere when resumed
        self._lab = lab

    def run(self) -> RolloutResult:
        """Roll out.

        Raises:
            As :meth:`prepare`, which is called unless it has been.
            KeyboardInterrupt: on Ctrl-C; :attr:`result`, and ``result.json`` in the folder, hold what there was.
        """
        self.undo()
        if self._lab is None:
            self.prepare()
        self.result = RolloutResult(None, False, self.result.declared, settings=self.result.settings)
        try:
            for number, plan in enumerate(self.result.declared, 1):
                if not self._passes(number, plan):
                    break
        except KeyboardInterrupt:
            self.result.interrupted = True
            self._write()
            raise
        self._write()
        if self.apply and self.result.plan is not None:
            assert self._lab is not None
            with reduced(self.module, self.result.plan, self._lab.spectra) as cut:
                hashes = [matrix_hash(matrix.value) for matrix, _ in cut.matrices]
            self._leave(cut, hashes)
        return self.result

    @undisturbed
    def _leave(self, cut: reduced, hashes: list[str]) -> None:
        """In the module, for :meth:`undo` to take out."""
        self._applied, self._hashes = cut.__enter__(), hashes
        cut.stay()
        catch_up()

    def undo(self, *, overwrite: bool = False) -> None:
        """Take out again what ``apply`` has left in the module; does nothing if there is nothing.

        Args:
            overwrite: also where the cut weights have changed since, in training: that is then lost.

        Raises:
            RuntimeError: if they have changed, and ``overwrite`` is false. The module is then untouched.
        """
        if self._applied is None:
            return
        pairs = zip(self._applied.matrices, self._hashes, strict=True)
        changed = [f"`{matrix.name}`" for (matrix, _), applied in pairs if matrix_hash(matrix.value) != applied]
        if changed and not overwrite:
            raise RuntimeError(
                f"{', '.join(changed)} changed since the rollout has cut them, as in training or by a later cut, "
                "which is to be undone first: the original weights would overwrite that. Keep the module as it is, or "
                "give it up by `undo(overwrite=True)`"
            )
        self._applied.restore()
        self._applied = None

    def _passes(self, number: int, plan: LaserPlan) -> bool:
        """Judge a stage; whether the rollout goes on."""
        seconds = 0.0

        def measured() -> dict[str, LaserResult]:
            nonlocal seconds
            results, seconds = self._measured(number, plan)
            return results

        verdict = self._gates.judge(plan, measured)
        return self.result.add(verdict, self._gates.gates, self.gain_at, seconds)

    def _measured(self, number: int, plan: LaserPlan) -> tuple[dict[str, LaserResult], float]:
        """The comparisons of a stage, made or read back."""
        assert self._lab is not None
        lab = self._lab

        def compute() -> Step:
            begin = time.perf_counter()
            with PhaseProgress(self.progress).phase(f"stage {number} of {len(self.result.declared)}: {brief(plan)}"):
                results = self._gates.measure(lab, plan)
            if self.folder is not None:
                for name, result in results.items():
                    result.examples.write(Path(self.folder) / f"{number}-{name or 'data'}.examples.jsonl")
            found = {name: result.to_dict() for name, result in results.items()}
            return {"results": found, "seconds": time.perf_counter() - begin}, {}

        found, _ = self._journal.step(f"{number}-stage", compute, partial(typed, _Measured))
        return found.results, found.seconds

    def _write(self) -> None:
        if self.folder is not None:
            self.result.to_json(Path(self.folder) / "result.json")
