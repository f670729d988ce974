"""LaserCallback: compare original and reduced model at the validate and test hooks of any LightningModule.

On each batch the user's own pass runs untouched; then, within the same hook, the weights are reduced, the user's step
runs once more on a copy of the batch with everything it writes to set apart (``arms.py``), and the weights are put
back. No reduced weight outlives a hook, so checkpoints, early stopping and weight averaging never see one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torchmetrics import Metric, MetricCollection
from typing_extensions import override

from laser_callback import arms
from laser_callback.controls import random_plan, zeroed_plan
from laser_callback.examples import ORIGINAL, PairedExamples, example_count
from laser_callback.plan import LaserPlan
from laser_callback.replay import LayerReplay
from laser_callback.report import print_report
from laser_callback.result import ArmResult, LaserResult, adjust_together
from laser_callback.surgery import reduced

LOOPS = ("validate", "test", "fit")
UpdateFn = Callable[[MetricCollection, Any, Any], None]


class LaserCallback(pl.Callback):
    """Run the reduced model beside the original on the same batches and compare what they log.

    For each ``key`` that the module logs per epoch, ``laser/key`` and ``laser/delta/key`` (reduced minus original) are
    logged as well: they reach loggers, ``trainer.callback_metrics`` and the list that ``trainer.validate()`` returns.
    With several plans the keys are ``laser/<plan>/key`` and ``laser/<plan>/delta/key``. :attr:`result` holds intervals,
    p values and counts.

    Args:
        plan: what to cut: a :class:`LaserPlan`, its text, a plan file, or several of them by name.
        loops: where to compare: ``"validate"``, ``"test"``, and ``"fit"`` for the validation inside of ``trainer.fit``.
        metrics: torchmetrics of your own, fed for both arms by ``update``; logged under their names.
        update: ``update(metrics, outputs, batch)``, called after each step with what the step returned.
        primary: the one metric whose p value carries the claim; all others are Holm-adjusted.
        controls: also run two controls of each plan: its matrices zeroed, and other matrices cut at the same rho.
        key_prefix: first part of the logged keys.
        replay: do not recompute the layers in front of the first cut.
        report: print the table at the end; a path ending in ``.json`` also writes :attr:`result` there.
        seed: of the random control.

    Raises:
        MisconfigurationException: for arguments that do not fit each other or the trainer.
        ValueError: for a plan that does not fit the model, at the first batch; the model is then untouched.

    Example::

        trainer = Trainer(callbacks=[LaserCallback("27.fc_in@0.01")])
        trainer.validate(module, datamodule=data)  # [{"acc": ..., "laser/acc": ..., "laser/delta/acc": ...}]
    """

    def __init__(
        self,
        plan: LaserPlan | str | Mapping[str, LaserPlan | str],
        *,
        loops: Iterable[str] = ("validate", "test"),
        metrics: MetricCollection | Metric | Mapping[str, Metric] | None = None,
        update: UpdateFn | None = None,
        primary: str | None = None,
        controls: bool = False,
        key_prefix: str = "laser",
        replay: bool = True,
        report: bool | str | Path = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.plans = _named_plans(plan, key_prefix)
        self.loops = (loops,) if isinstance(loops, str) else tuple(loops)
        if not self.loops or set(self.loops) - set(LOOPS):
            raise MisconfigurationException(f"`loops` must be some of {', '.join(LOOPS)}, got {loops!r}")
        if (metrics is None) != (update is None):
            raise MisconfigurationException("`metrics` and `update` are given together or not at all")
        if not key_prefix or key_prefix.strip("/") != key_prefix:
            raise MisconfigurationException(
                f"`key_prefix` must be non-empty, without slashes around, got {key_prefix!r}"
            )
        if isinstance(report, (str, Path)) and Path(report).suffix != ".json":
            raise MisconfigurationException(f"`report` must be a bool or a path ending in .json, got {str(report)!r}")
        self.metrics = None if metrics is None else _collection(metrics)
        self.update = update
        self.primary = primary
        self.controls = controls
        self.key_prefix = key_prefix
        self.replay = replay
        self.report = report
        self.seed = seed
        self._result: LaserResult | None = None
        self._run: _Run | None = None
        self._unprinted = False

    @property
    def result(self) -> LaserResult:
        """The outcome of the latest evaluation.

        Raises:
            RuntimeError: before one has finished (in the process that launched ``ddp_spawn`` workers, always: give
                ``report="result.json"`` there).
        """
        if self._result is None:
            raise RuntimeError("there is no result yet: `trainer.validate()` or `trainer.test()` has not finished here")
        return self._result

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(key_prefix=self.key_prefix)

    def is_active(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Whether to compare in the evaluation that is running now."""
        return not trainer.sanity_checking and trainer.state.fn in self.loops

    # ---- hooks ------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        _check_trainer(trainer, self)
        if stage == "predict":
            raise MisconfigurationException(
                "LaserCallback has nothing to compare in `trainer.predict()`: predictions are not logged. "
                "Use `validate` or `test`, or wrap `predict` in `with laser_callback.reduced(module, plan)`."
            )

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(trainer, pl_module, "validation")

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._run is not None:
            self._run.before_step(batch)

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._run is not None:
            self._run.after_step(outputs, batch_idx, dataloader_idx)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(pl_module)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._abandon()
        if trainer.state.fn == "fit":
            self._print(trainer)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(trainer, pl_module, "test")

    @override
    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    @override
    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(pl_module)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._abandon()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._abandon()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._abandon()
        self._print(trainer)  # after Lightning's own table, when no progress bar is live

    # ---- steps ------------------------------------------------------------------------------------------------------

    def _start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._abandon()
        if not self.is_active(trainer, pl_module):
            return
        if arms.uses_dataloader_iter(trainer):
            raise MisconfigurationException(
                f"LaserCallback cannot repeat a `{stage}_step(dataloader_iter)`: the iterator is used up by the first "
                f"pass. Give the module a `{stage}_step(batch, batch_idx)`."
            )
        self._result = None
        self._run = _Run(self, trainer, pl_module, stage)

    def _end(self, pl_module: pl.LightningModule) -> None:
        run = self._run
        if run is None:
            return
        if not run.has_data:
            rank_zero_warn("LaserCallback compared nothing: the evaluation had no batches")
            return

        def finish() -> None:
            self._result = run.finish()
            self._unprinted = True
            if isinstance(self.report, (str, Path)) and run.trainer.is_global_zero:
                self._result.to_json(self.report)

        run.before_epoch_end(finish)

    def _abandon(self) -> None:
        if self._run is not None:
            self._run.close()
            self._run = None

    def _print(self, trainer: pl.Trainer) -> None:
        if self._result is not None and self._unprinted and self.report and trainer.is_global_zero:
            print_report(self._result, trainer.progress_bar_callback if trainer.state.fn == "fit" else None)
        self._unprinted = False


class _Reduction:
    """One reduced arm in a run: its plan, its cut, Lightning's state for it, and its clock."""

    def __init__(self, name: str, control: str, plan: LaserPlan, arm: arms.Arm) -> None:
        self.name = name  # of the plan
        self.control = control  # "", "zeroed" or "random"
        self.plan = plan
        self.arm = arm
        self.cut: reduced
        self.replay: LayerReplay
        self.metrics: MetricCollection | None = None
        self.seconds = 0.0
        self.factorise_seconds = 0.0

    @property
    def key(self) -> str:
        return f"{self.name}.{self.control}" if self.control else self.name


class _Run:
    """One evaluation loop, from its start to its last hook."""

    def __init__(self, callback: LaserCallback, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self.callback = callback
        self.trainer = trainer
        self.module = module
        self.stage = stage
        self.has_data = False
        self._start_rng = arms.RandomState.now()
        self._reductions = [
            _Reduction(name, control, plan, arms.Arm(trainer, module, stage))
            for name, base in callback.plans.items()
            for control, plan in self._with_controls(base)
        ]
        self._examples = PairedExamples()
        self._original_seconds = 0.0
        self._original_means: dict[str, tuple[float, float]] = {}
        self._metrics = self._new_metrics()
        self._recording = ExitStack()
        self._undo_hook: Callable[[], None] | None = None

    def _with_controls(self, plan: LaserPlan) -> Iterable[tuple[str, LaserPlan]]:
        yield "", plan
        if self.callback.controls:
            yield "zeroed", zeroed_plan(plan)
            yield "random", random_plan(self.module, plan, self.callback.seed)

    def _new_metrics(self) -> MetricCollection | None:
        # Fresh in each run: states made under inference mode cannot be updated outside of it.
        if self.callback.metrics is None:
            return None
        metrics = self.callback.metrics.clone().to(self.module.device)
        metrics.reset()
        return metrics

    def _first_batch(self) -> None:
        """Factorise. Not earlier: a checkpoint or weight averaging may change the weights after `setup`."""
        self.has_data = True
        for reduction in self._reductions:
            begin = time.perf_counter()
            reduction.cut = reduced(self.module, reduction.plan)
            for tensor in reduction.cut.prepare():
                if self.trainer.world_size > 1:  # one factorisation for all ranks, whatever their hardware
                    torch.distributed.broadcast(tensor, src=0)
            reduction.factorise_seconds = time.perf_counter() - begin
            reduction.metrics = self._new_metrics()
        if self.callback.replay:
            cuts = {r.key: [matrix for matrix, _ in r.cut.matrices] for r in self._reductions}
            self._replay: LayerReplay | None = LayerReplay(self.module, cuts)
        else:
            self._replay = None
        rng = arms.RandomState.now()
        for reduction in self._reductions:
            self._start_rng.set()
            try:
                with reduction.cut:
                    reduction.arm.start()
            finally:
                rng.set()

    def before_step(self, batch: Any) -> None:
        """Ahead of the user's pass."""
        if not self.has_data:
            self._first_batch()
        else:
            self._close_means()
        self._batch = arms.copy_data(batch)
        self._rng = arms.RandomState.now()
        self._size = 0
        if self._replay is not None:
            self._recording.enter_context(self._replay.record())
        self._begin = time.perf_counter()

    def after_step(self, outputs: Any, batch_idx: int, dataloader_idx: int) -> None:
        """After the user's pass: the reduced passes on copies of the same batch."""
        self._original_seconds += time.perf_counter() - self._begin
        self._recording.close()
        index = arms.sequential_dataloader_idx(self.trainer, dataloader_idx)
        collected = {ORIGINAL: outputs}
        means: dict[str, dict[str, tuple[float, float]]] = {}
        after = arms.RandomState.now()
        self._update_own(self._metrics, outputs)
        try:
            for reduction in self._reductions:
                begin = time.perf_counter()
                before = arms.running_means(reduction.arm.results)
                self._rng.set()
                with ExitStack() as stack:
                    stack.enter_context(reduction.cut)
                    if self._replay is not None:
                        stack.enter_context(self._replay.replay(reduction.key))
                    output = reduction.arm.step(arms.copy_data(self._batch), batch_idx, index)
                reduction.seconds += time.perf_counter() - begin
                self._update_own(reduction.metrics, output)
                collected[reduction.key] = output
                means[reduction.key] = _growth(before, arms.running_means(reduction.arm.results))
        finally:
            after.set()
            if self._replay is not None:
                self._replay.forget()
        size = example_count(outputs, self._batch)
        self._examples.add(collected, size, index)
        self._examples.means.append(means)
        self._batch = None

    def before_epoch_end(self, finish: Callable[[], None]) -> None:
        """Ahead of the module's own hook; ``finish`` follows it."""
        self._close_means()
        self._rng = arms.RandomState.now()
        self._undo_hook = arms.call_after_hook(self.module, f"on_{self.stage}_epoch_end", finish)

    def finish(self) -> LaserResult:
        """After the module's own hook: end the reduced arms, publish their keys, compare."""
        original = arms.logged(self._results)
        own = self._own_logged(self._metrics)
        for key in own:
            if key in original:
                raise MisconfigurationException(f"`metrics` has the name {key!r}, which the module logs itself")
        after = arms.RandomState.now()
        logged: dict[str, dict[str, arms.Logged]] = {}
        for reduction in self._reductions:
            self._rng.set()
            try:
                with reduction.cut:
                    logged[reduction.key] = reduction.arm.end() | self._own_logged(reduction.metrics)
            finally:
                after.set()
        for key, value in own.items():
            arms.publish(self.trainer, self.module, key, value.value, key, value)
        original |= own
        self._publish(original, logged)
        return self._compare(original, logged)

    def close(self) -> None:
        """Leave nothing behind, whatever state the run is in."""
        self._recording.close()
        if self._undo_hook is not None:
            self._undo_hook()
        for reduction in self._reductions:
            if hasattr(reduction, "cut"):
                reduction.cut.restore()

    @property
    def _results(self) -> Any:
        return self.trainer._results

    # ---- details ----------------------------------------------------------------------------------------------------

    def _close_means(self) -> None:
        """The previous batch's share of the original's running means (its last hook has only now run)."""
        now = arms.running_means(self._results)
        self._examples.means[-1][ORIGINAL] = _growth(self._original_means, now)
        self._original_means = now

    def _update_own(self, metrics: MetricCollection | None, outputs: Any) -> None:
        if metrics is not None and self.callback.update is not None:
            self.callback.update(metrics, outputs, arms.copy_data(self._batch))

    def _own_logged(self, metrics: MetricCollection | None) -> dict[str, arms.Logged]:
        if metrics is None:
            return {}
        return {
            name: arms.Logged(torch.as_tensor(value), name, None, True, False, metrics[name].higher_is_better)
            for name, value in metrics.compute().items()
        }

    def _publish(self, original: dict[str, arms.Logged], logged: dict[str, dict[str, arms.Logged]]) -> None:
        for reduction in self._reductions:
            if reduction.control:
                continue
            several = len(self.callback.plans) > 1 or reduction.name != self.callback.key_prefix
            prefix = f"{self.callback.key_prefix}/{reduction.name}" if several else self.callback.key_prefix
            for key, value in logged[reduction.key].items():
                arms.publish(self.trainer, self.module, f"{prefix}/{key}", value.value, key, value)
                if key in original:
                    delta = value.value - original[key].value.to(value.value.device)
                    arms.publish(self.trainer, self.module, f"{prefix}/delta/{key}", delta, key, value)

    def _compare(self, original: dict[str, arms.Logged], logged: dict[str, dict[str, arms.Logged]]) -> LaserResult:
        examples = self._examples.merge(arms.gather(self._examples))
        results: dict[str, ArmResult] = {}
        for reduction in self._reductions:
            results[reduction.key] = ArmResult(
                plan=str(reduction.plan),
                rows=examples.rows(reduction.key, original, logged[reduction.key]),
                prior_checks=examples.priors(reduction.key),
                replay=str(self._replay.reports[reduction.key]) if self._replay is not None else "off",
                seconds=reduction.seconds,
                factorise_seconds=reduction.factorise_seconds,
            )
        plans = {r.name: results[r.key] for r in self._reductions if not r.control}
        controls: dict[str, dict[str, ArmResult]] = {}
        for reduction in self._reductions:
            if reduction.control:
                controls.setdefault(reduction.name, {})[reduction.control] = results[reduction.key]
        adjust_together(list(plans.values()), self.callback.primary)
        reasons = dict.fromkeys(arms.logged_on_step_only(self._results), "logged per step only")
        compared = {key for arm in logged.values() for key in arm}
        reasons |= {key: "not logged by the module" for key in original if key not in compared}
        return LaserResult(plans, controls, self.callback.primary, self._original_seconds, reasons, examples)


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_trainer(trainer: pl.Trainer, callback: LaserCallback) -> None:
    strategy = trainer.strategy
    # By exact class: subclasses shard or live on devices whose parameters do not follow a pointer swap.
    if type(strategy) not in (SingleDeviceStrategy, DDPStrategy):
        raise MisconfigurationException(
            f"LaserCallback supports single devices and DDP, got {type(strategy).__name__}: parameters that are "
            "sharded or flattened do not follow a swap. Evaluate with `Trainer(devices=1)` or `strategy='ddp'`."
        )
    for other in trainer.callbacks:
        if isinstance(other, LaserCallback) and other is not callback and other.key_prefix == callback.key_prefix:
            raise MisconfigurationException(
                f"two LaserCallbacks have the key_prefix {callback.key_prefix!r}: give one another `key_prefix`, or "
                "give one callback both plans: LaserCallback({'a': ..., 'b': ...})"
            )
    for other in trainer.callbacks:
        monitor = getattr(other, "monitor", None)
        watches = isinstance(monitor, str) and monitor.startswith(f"{callback.key_prefix}/")
        if watches and trainer.state.fn == "fit" and "fit" not in callback.loops:
            raise MisconfigurationException(
                f"{type(other).__name__} monitors {monitor!r}, but LaserCallback does not run in fit: add 'fit' to "
                f"its `loops`, got {callback.loops}"
            )


def _named_plans(plan: Any, key_prefix: str) -> dict[str, LaserPlan]:
    if not isinstance(plan, Mapping) or set(plan) == {"reductions"}:
        return {key_prefix: LaserPlan.of(plan)}
    if not plan:
        raise MisconfigurationException("`plan` must hold at least one plan, got an empty mapping")
    for name in plan:
        if not isinstance(name, str) or not name or "/" in name or "." in name or name in ("delta", ORIGINAL):
            raise MisconfigurationException(
                f"a plan's name must be a word without '/' and '.', not 'delta' or 'original', got {name!r}"
            )
    return {name: LaserPlan.of(value) for name, value in plan.items()}


def _collection(metrics: MetricCollection | Metric | Mapping[str, Metric]) -> MetricCollection:
    if isinstance(metrics, MetricCollection):
        return metrics
    return MetricCollection(dict(metrics) if isinstance(metrics, Mapping) else metrics)


def _growth(
    before: Mapping[str, tuple[float, float]], after: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    zero = (0.0, 0.0)
    return {key: (s - before.get(key, zero)[0], w - before.get(key, zero)[1]) for key, (s, w) in after.items()}
