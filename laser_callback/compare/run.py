"""One evaluation loop with its reduced arms, from its first hook to its last.

:class:`ComparisonRun` is what :class:`~laser_callback.compare.LaserCallback` drives from Lightning's hooks. Around
each step of the user it records the original's layer calls, runs every reduced arm on a copy of the batch, and collects
what the arms returned; at the end of the epoch it publishes the arms' results and compares them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils import _pytree as pytree
from torchmetrics import MetricCollection

from laser_callback.compare import arms
from laser_callback.compare.both import Both, beside
from laser_callback.compare.controls import control_plans, why_missing
from laser_callback.compare.options import RunOptions, warn_early, warn_if_absent
from laser_callback.compare.pooled import PooledStates
from laser_callback.compare.reduced_arm import ReducedArm, published
from laser_callback.passes.copies import copy_batch
from laser_callback.passes.metric_states import Added
from laser_callback.passes.state import RandomState, Start
from laser_callback.passes.windows import Windows
from laser_callback.plans.matrices import find_matrices
from laser_callback.plans.plan import LaserPlan
from laser_callback.results.comparison import ArmResult, LaserResult, adjust_together
from laser_callback.results.controls import control_results
from laser_callback.results.examples import ORIGINAL, Logged, PairedExamples
from laser_callback.spectra.cut import cut_spectra
from laser_callback.spectra.store import Spectra
from laser_callback.support.interrupts import is_of_handler
from laser_callback.support.processes import gather
from laser_callback.support.provenance import provenance
from laser_callback.surgery.replay import LayerReplay, ReplayReport
from laser_callback.surgery.swap import reduced


class ComparisonRun:
    """The comparison in one evaluation loop that has just started.

    Raises:
        ValueError: if a plan does not fit the module.
    """

    def __init__(self, options: RunOptions, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self.options = options
        self.trainer = trainer
        self.module = module
        self.stage = stage
        self._start_rng = RandomState.now()
        matrices = find_matrices(module)
        self._spectra = options.spectra or Spectra()
        self._start = Start(module, arms.around(trainer), options.isolate, options.skip_isolation)
        self._windows = Windows(self._start, arms.others_write(trainer, module))
        self._states = PooledStates(module, options.resample, options.seed)
        self._no_control: dict[str, str] = {}  # and why
        self._reductions = [
            ReducedArm(
                name,
                control,
                reduced(matrices, plan, self._spectra.bringing(base.directions)),  # of which noise needs its size
                arms.Arm(trainer, module, stage, self._start, self._windows),
                self._states.kept,
            )
            for name, base in options.plans.items()
            for control, plan in self._with_controls(base)
        ]
        self.examples = PairedExamples()
        self._both = Both()
        self._original_seconds = 0.0
        self._held: dict[ReducedArm, int] = {}
        self._failed: list[ReducedArm] = []
        self._late: list[Exception] = []  # of hooks that the original has not run by then
        self._unused: dict[str, str] = {}
        self._broken: dict[str, str] = {}  # controls that fail, and how: that says nothing of the plan
        self._original_means: dict[str, tuple[float, float]] = {}
        self._metrics = self.options.new_metrics(self.module.device)
        self._recording: Any = None
        self._moments: arms.Moments | None = None
        self._begun = False

    def listen(self, ahead: Callable[[str], None], behind: Callable[[str], None]) -> None:
        """From now on tell of each hook of the module's own, and of its step, until :meth:`close`.

        They are to call :meth:`ahead_of` and :meth:`behind`.
        """
        self._moments = arms.Moments(self.trainer, self.module, self.stage, ahead, behind)
        self._moments.install()

    def ahead_of(self, hook: str) -> None:
        """Right ahead of one of the module's own hooks, when all callbacks have had their turn; or of its step."""
        if hook == f"{self.stage}_step":  # nobody has had a turn since the hook before it
            return
        self._windows.close(hook)
        if hook == f"on_{self.stage}_start":
            self._start_rng = RandomState.now()
        elif hook == f"on_{self.stage}_batch_start":
            self._before_step()
        elif hook == f"on_{self.stage}_batch_end":
            self._reduced_steps()
        elif hook == f"on_{self.stage}_epoch_end":
            self._before_epoch_end()

    def behind(self, hook: str) -> None:
        """Right behind one of them, before a callback has its turn."""
        if hook == f"{self.stage}_step":
            self._after_step()
        if hook != f"on_{self.stage}_batch_start":
            self._windows.open()

    def _with_controls(self, plan: LaserPlan) -> Iterable[tuple[str, LaserPlan]]:
        yield "", plan
        if self.options.controls:
            controls = control_plans(self.module, plan, self.options.seed, self._spectra.base)
            self._no_control |= why_missing(plan, controls)
            yield from controls.items()

    def _begin_arms(self) -> None:
        """Factorise, on every rank, also on one that gets no batch.

        Not before the first batch: a checkpoint or weight averaging may change the weights after `setup`.
        """
        if self._begun:
            return
        self._begun = True
        for reduction in self._reductions:
            begin = time.perf_counter()
            for tensor in reduction.cut.prepare():
                if self.trainer.world_size > 1:  # one factorisation for all ranks, whatever their hardware
                    torch.distributed.broadcast(tensor, src=0)
            self._hold(reduction)
            reduction.factorise_seconds = time.perf_counter() - begin
            if self.options.with_spectra and not reduction.control:
                reduction.spectra = cut_spectra(reduction.cut.matrices, self._spectra)
            reduction.metrics = self.options.new_metrics(self.module.device)
        if self.options.spectra is None:
            self._spectra.forget()
        if self.options.replay:
            cuts = {r.key: [matrix for matrix, _ in r.cut.matrices] for r in self._reductions}
            self._replay: LayerReplay | None = LayerReplay(self.module, cuts)
        else:
            self._replay = None
        self._start.first_batch()
        hooks = [f"on_{self.stage}_{hook}" for hook in ("start", "epoch_start")]
        if not any(is_overridden(hook, self.module) or self._windows.heard.get(hook) for hook in hooks):
            return
        rng = RandomState.now()
        self._start.ahead()
        for reduction in self._running():
            self._start_rng.set()
            try:
                with self._failing(reduction, "at the start"):
                    with reduction.active():
                        reduction.arm.start()
                    self._hold(reduction)
            finally:
                rng.set()
        self._start.after()

    def take_batch(self, batch: Any) -> None:
        """What the next step will be given."""
        self._batch = batch

    def take_outputs(self, outputs: Any, batch_idx: int, dataloader_idx: int) -> None:
        """What the original's step has returned, before all callbacks have had it."""
        self._returned = pytree.tree_map(lambda leaf: leaf, outputs), batch_idx, dataloader_idx

    def _before_step(self) -> None:
        """Ahead of the user's pass."""
        self._raise_late()
        self._begin_arms()
        self._close_means()
        if len(self.examples.batches) == 1:
            self._look_for_primary()
        self._batch = copy_batch(self._batch)
        self._start.ahead()
        self._states.begin()
        self._rng = RandomState.now()
        if self._replay is not None:
            self._recording = self._replay.record()  # known before it begins: an interrupt may come in between
            self._recording.__enter__()
        if self._reductions:
            self._both.begin()
        self._begin = time.perf_counter()

    def _after_step(self) -> None:
        """Right after the user's pass."""
        self._original_seconds += time.perf_counter() - self._begin
        self._both.end()
        if self._recording is not None:
            self._recording.__exit__(None, None, None)
        self._start.after(first=not self.examples.batches)

    def _reduced_steps(self) -> None:
        """Ahead of the last hook of the user's pass: the reduced passes on copies of the same batch."""
        outputs, batch_idx, dataloader_idx = self._returned
        self._start.look()
        index = arms.sequential_dataloader_idx(self.trainer, dataloader_idx)
        collected: dict[str, Any] = {ORIGINAL: beside(outputs, self._both.original)}
        means: dict[str, Any] = {}
        after = RandomState.now()
        states: dict[str, Added] = {ORIGINAL: self._update_own(ORIGINAL, self._metrics, outputs)}
        try:
            for reduction in self._running():
                begin = time.perf_counter()
                self._rng.set()
                with self._failing(reduction, f"on batch {batch_idx}"):
                    twin = reduction.twin() if self.options.watched else None
                    with self._both.of_arm() as of_both:
                        output = self._pass(reduction, batch_idx, index)
                    reduction.seconds += time.perf_counter() - begin
                    own = self._update_own(reduction.key, reduction.metrics, output)
                    states[reduction.key] = reduction.states | own
                    collected[reduction.key] = beside(output, of_both)
                    self._hold(reduction)
                    if self.options.on_arm is not None:
                        self.options.on_arm(reduction.key)
                    means[reduction.key] = reduction.growth
                    if self.options.watched and not reduction.is_settled:
                        self._look_for_difference(reduction, twin, outputs, output, batch_idx, index)
        finally:
            after.set()
            self._both.forget()
            if self._replay is not None:
                self._replay.forget()
        self._start.check()
        self.examples.add(collected, self._batch, index)
        self.examples.means.append(means)
        self._states.kept.batches.append(states)
        self._batch = None
        del self._returned

    def _pass(self, reduction: ReducedArm, batch_idx: int, index: int | None) -> Any:
        """One reduced pass on a copy of the batch."""
        before = arms.running_means(reduction.arm.results)
        output = reduction.run(copy_batch(self._batch), batch_idx, index, self._replaying(reduction))
        reduction.growth = arms.growth(before, arms.running_means(reduction.arm.results))
        return output

    def _replaying(self, reduction: ReducedArm, report: ReplayReport | None = None) -> AbstractContextManager[None]:
        return nullcontext() if self._replay is None else self._replay.replay(reduction.key, report)

    def _look_for_difference(
        self, reduction: ReducedArm, twin: arms.Arm | None, outputs: Any, output: Any, batch_idx: int, index: int | None
    ) -> None:
        original = arms.growth(self._original_means, arms.running_means(self._results))
        if reduction.compare(original, outputs, output) and twin is not None:
            self._rng.set()
            replaying = self._replaying(reduction, ReplayReport())
            with self._both.of_arm():
                reduction.probe(twin, copy_batch(self._batch), batch_idx, index, replaying)

    def _running(self) -> list[ReducedArm]:
        return [reduction for reduction in self._reductions if reduction not in self._failed]

    @contextmanager
    def _failing(self, reduction: ReducedArm, where: str) -> Iterator[None]:
        """Around what an arm runs: its exceptions name the plan, and stop the arm or the run."""
        try:
            yield
        except Exception as error:
            if is_of_handler(error):
                raise
            if isinstance(error, StopIteration):  # contextlib takes an error that it causes for its own
                error = RuntimeError(repr(error))
            named = reduction.named(error, where)
            self._failed.append(reduction)
            if self.options.on_failure is not None:
                self.options.on_failure(reduction.key, named)
            elif reduction.control and self.trainer.world_size == 1:
                self._broken[reduction.key] = str(named)
            elif reduction.arm.hook.endswith("batch_end"):  # let the original's raise it, if it does
                named.__cause__ = error
                self._late.append(named)
            else:
                raise named from error

    def _raise_late(self) -> None:
        for error in self._late:
            raise error

    def _before_epoch_end(self) -> None:
        """Ahead of the module's own hook; :meth:`finish` follows it."""
        self._raise_late()
        self._begin_arms()
        self._close_means()
        self._rng = RandomState.now()

    def finish(self) -> LaserResult | None:
        """After the module's own hook: end the reduced arms, publish their keys, compare.

        Returns ``None`` if no rank had a batch.
        """
        metrics = arms.logged_metrics(self._results)
        original, logged = self.end()
        ranks = gather((self.examples, original, logged, self._states.portable(metrics)))
        examples = self.examples.merge(rank[0] for rank in ranks)
        if not examples.batches:
            return None
        both = {key: examples.with_both(key, value) for key, value in logged.items()}
        for item in published(self._reductions, original, both, self.options):
            arms.publish(self.trainer, self.module, *item)
        for _, others_original, others_logged, _ in ranks:  # a rank without batches has logged nothing
            original = others_original | original
            logged = {key: others_logged[key] | value for key, value in logged.items()}
        original = examples.with_both(ORIGINAL, original)
        logged = {key: examples.with_both(key, value) for key, value in logged.items()}
        examples.pooled = self._states.evidence(rank[3] for rank in ranks)
        return self._compare(examples, original, logged)

    def end(self) -> tuple[dict[str, Logged], dict[str, dict[str, Logged]]]:
        """After the module's own hook: end the reduced arms. Returns what the original and each arm logged."""
        others = arms.others_keys(self.trainer, self.options.key_prefix)
        original = {k: v for k, v in arms.logged(self._results).items() if not k.startswith(others)}
        own = arms.own_logged(self._metrics, taken=original)
        after = RandomState.now()
        self._start.ahead()
        logged: dict[str, dict[str, Logged]] = {}
        for reduction in self._running():
            self._rng.set()
            try:
                with self._failing(reduction, "at the end"):
                    with reduction.active():
                        logged[reduction.key] = reduction.arm.end()
                    logged[reduction.key] |= arms.own_logged(reduction.metrics)
                    self._hold(reduction)
                    why = reduction.why_not()
                    if why:
                        self._unused[reduction.key] = why
                        logged[reduction.key] = {}
            finally:
                after.set()
        self._start.after()
        logged |= {key: {} for key in self._broken}
        for key, value in own.items():
            arms.publish(self.trainer, self.module, key, value.value, key, value)
        return original | own, logged

    def gathered(self) -> PairedExamples:
        """The examples of all ranks, each once."""
        return self.examples.merge(gather(self.examples))

    def close(self) -> None:
        """Leave nothing behind, whatever state the run is in."""
        if self._recording is not None:
            self._recording.close()
        self._both.forget()
        if self._moments is not None:
            self._moments.remove()
        for reduction in self._reductions:
            reduction.cut.restore()

    @property
    def _results(self) -> Any:
        return self.trainer._results

    # ---- details ----------------------------------------------------------------------------------------------------

    def _hold(self, reduction: ReducedArm) -> None:
        """Of many arms keep the reduced tensors that were used last, as far as there is room."""
        if math.isinf(self.options.tensor_bytes):
            return
        self._held.pop(reduction, None)
        self._held[reduction] = sum(tensor.nbytes for tensor in reduction.cut.prepare())
        while sum(self._held.values()) > self.options.tensor_bytes:
            oldest = next(iter(self._held))
            del self._held[oldest]
            oldest.cut.forget()

    def _close_means(self) -> None:
        """The previous batch's share of the original's running means (its last hook has only now run)."""
        if not self.examples.means:
            return
        now = arms.running_means(self._results)
        self.examples.means[-1][ORIGINAL] = arms.growth(self._original_means, now)
        self._original_means = now
        self._states.close()

    def _look_for_primary(self) -> None:
        """After the first batch, where no other batch and no hook at the end of the epoch should log other keys."""
        one_loader = arms.sequential_dataloader_idx(self.trainer, 0) is None
        keys = arms.logged_keys(self._results)  # without any, what the step returns is compared
        if keys and one_loader and not is_overridden(f"on_{self.stage}_epoch_end", self.module):
            warn_early(self.options, keys, "the first batch")

    def _update_own(self, arm: str, metrics: MetricCollection | None, outputs: Any) -> Added:
        if metrics is None or self.options.update is None:
            return {}
        recorder = self._states.of_own(arm, metrics)
        self.options.update(metrics, outputs, copy_batch(self._batch))
        return recorder.added()

    def _compare(
        self, examples: PairedExamples, original: dict[str, Logged], logged: dict[str, dict[str, Logged]]
    ) -> LaserResult:
        reasons = dict.fromkeys(arms.logged_on_step_only(self._results), "logged per step only")
        if not original:
            original = examples.returned(ORIGINAL)
            logged = {key: {} if key in self._unused else examples.returned(key) for key in logged}
            why = "a barebones Trainer logs nothing" if self.trainer.barebones else "the module logs nothing per epoch"
            found = "only what the step returns is compared" if original else "the step returns no outcomes per example"
            reasons["what is logged"] = f"{why}: {found}"
        results: dict[str, ArmResult] = {}
        for reduction in self._reductions:
            results[reduction.key] = ArmResult(
                plan=str(reduction.cut.plan),
                rows=examples.rows(reduction.key, original, logged[reduction.key]),
                prior_checks=examples.priors(reduction.key, original, logged[reduction.key]),
                replay=str(self._replay.reports[reduction.key]) if self._replay is not None else "off",
                seconds=reduction.seconds,
                factorise_seconds=reduction.factorise_seconds,
                spectra=reduction.spectra,
            )
        plans = {r.name: results[r.key] for r in self._reductions if not r.control}
        broken = [r for r in self._reductions if r.key in self._broken]
        reasons |= self._no_control
        reasons |= {f"{r.control} control of {r.name}": self._broken[r.key] for r in broken}
        passes: dict[str, dict[str, dict[str, ArmResult]]] = {}  # by plan, control and key
        for r in self._reductions:
            # The mean of those passes that worked would leave out the worst.
            if r.control and (r.name, r.group) not in [(b.name, b.group) for b in broken]:
                passes.setdefault(r.name, {}).setdefault(r.group, {})[r.key] = results[r.key]
        controls = {n: control_results(examples, n, plans[n], of, original, logged) for n, of in passes.items()}
        keys = dict.fromkeys(row.metric for arm in plans.values() for row in arm.rows)
        primary = self.options.primary if self.options.primary in keys else None
        warn_if_absent(self.options.primary, keys, "this evaluation")
        if self.trainer.state.fn != "fit":  # else each validation is another look, and claims nothing
            adjust_together(list(plans.values()), primary)
        reasons |= {f"plan {name}": self._unused[name] for name in plans if name in self._unused}
        if not self._unused:
            reasons |= {k: "not logged by the module" for k in original if not any(k in a for a in logged.values())}
        return LaserResult(
            plans,
            controls,
            primary,
            self._original_seconds,
            reasons,
            replace(examples, pooled=None),
            provenance(self.trainer, self.module, self.options.seed),
            None if self._spectra.base is None else self._spectra.base.digest,
        )
