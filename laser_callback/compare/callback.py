"""LaserCallback: compare original and reduced model at the validate and test hooks of any LightningModule.

On each batch the user's own pass runs untouched; then, within the same hook, the weights are reduced, the user's step
runs once more on a copy of the batch with everything it writes to set apart (``arms.py``), and the weights are put
back. No reduced weight outlives a hook, so checkpoints, early stopping and weight averaging never see one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torchmetrics import Metric, MetricCollection
from typing_extensions import override

from laser_callback.compare import arms
from laser_callback.compare.options import RunOptions, UpdateFn, warn_early
from laser_callback.compare.run import ComparisonRun
from laser_callback.compare.trainer import check_strategy
from laser_callback.plans.plan import LaserPlan, check_base, check_directions
from laser_callback.plans.short import brief
from laser_callback.reports.loggers import publish
from laser_callback.reports.page import save_page
from laser_callback.reports.terminal import print_report
from laser_callback.results.comparison import LaserResult
from laser_callback.results.examples import DESCRIPTIONS, ORIGINAL
from laser_callback.spectra.delta import BaseSource, BaseWeights, read_weights
from laser_callback.spectra.store import Spectra
from laser_callback.support.files import need_writable, told_if_unwritten
from laser_callback.support.interrupts import is_of_handler
from laser_callback.surgery.recipe import Recipe

LOOPS = ("validate", "test", "fit")


class LaserCallback(pl.Callback):
    """Run the reduced model beside the original on the same batches and compare what they log.

    For each ``key`` that the module logs per epoch, ``laser/key`` and ``laser/delta/key`` (reduced minus original) are
    logged as well: they reach loggers, ``trainer.callback_metrics`` and the list that ``trainer.validate()`` returns.
    With several plans the keys are ``laser/<plan>/key`` and ``laser/<plan>/delta/key``. :attr:`result` holds intervals,
    p values and counts.

    Args:
        plan: what to cut: a :class:`LaserPlan`, its text, a plan file, or several of them by name.
        base: what the module was fine-tuned from, as :class:`~laser_callback.spectra.BaseWeights` takes it, for a plan
            that cuts the difference to it: ``27.fc_in@0.1:cut=delta``.
        loops: where to compare: ``"validate"``, ``"test"``, and ``"fit"`` for the validation inside of ``trainer.fit``:
            each of these is another look, so that their p values are exploratory.
        metrics: torchmetrics of your own, fed for both arms by ``update``; logged under their names.
        update: ``update(metrics, outputs, batch)``, called after each step with what the step returned.
        primary: the one key whose p value carries the claim; all others are Holm-adjusted. Where it is not logged,
            a warning says so as early as it can be known, and no row carries the claim.
        controls: also run three controls of each plan: its matrices zeroed, other matrices cut at the same rho, and its
            matrices with noise of the size of what is removed (three passes).
        key_prefix: first part of the logged keys.
        replay: do not recompute the layers in front of the first cut.
        resample: test logged torchmetrics that are no means. What each batch adds to F1, AUROC and the like is kept for
            that: at most 1 GiB.
        report: print the table at the end; a path ending in ``.json`` or ``.html`` also writes :attr:`result` there,
            and with ``.json`` the outcomes of each example beside it (``.examples.jsonl``). Each evaluation replaces
            the files: after ``fit`` they hold the latest validation.
        publish: send tables and pictures to the trainer's loggers as well (TensorBoard, CSV, Weights & Biases).
        seed: of the random control, of the noise, and of the exchanges that a test draws.
        on_error: in ``fit``, an exception of the comparison (a reduced pass that fails, a metric that refuses its
            values) costs this epoch's comparison and is a warning: ``"warn"``; or it stops training: ``"raise"``. In
            ``validate`` and ``test``, and with several processes, it is always raised.
        isolate: attributes of the module of which each arm gets a deep copy: what the two passes would both write to
            and this cannot tell apart by itself, such as the state of a library written in C.
        skip_isolation: compare although the evaluation step changes what cannot be kept apart, such as parameters.

    Raises:
        MisconfigurationException: for arguments that do not fit each other or the trainer; at the first batch, for a
            step that changes parameters, or writes to the weights that are cut.
        ReducedPassError: for what is raised in a plan's pass only.
        ValueError: before the first batch, in ``fit`` before training, for a plan or base that does not fit; at the
            first batch for weights that are not finite, or others than those of a recipe.

    Example::

        trainer = Trainer(callbacks=[LaserCallback("27.fc_in@0.01")])
        trainer.validate(module, datamodule=data)  # [{"acc": ..., "laser/acc": ..., "laser/delta/acc": ...}]
    """

    def __init__(
        self,
        plan: LaserPlan | str | Mapping[str, LaserPlan | str],
        *,
        base: BaseSource | None = None,
        loops: str | Iterable[str] = ("validate", "test"),
        metrics: MetricCollection | Metric | Mapping[str, Metric] | None = None,
        update: UpdateFn | None = None,
        primary: str | None = None,
        controls: bool = False,
        key_prefix: str = "laser",
        replay: bool = True,
        resample: bool = True,
        report: bool | str | Path = True,
        publish: bool = False,
        seed: int = 0,
        on_error: str = "warn",
        isolate: str | Iterable[str] = (),
        skip_isolation: bool = False,
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
        if isinstance(report, (str, Path)) and Path(report).suffix not in (".json", ".html"):
            raise MisconfigurationException(
                f"`report` must be a bool or a path ending in .json or .html, got {str(report)!r}"
            )
        if on_error not in ("warn", "raise"):
            raise MisconfigurationException(f"`on_error` must be 'warn' or 'raise', got {on_error!r}")
        self.on_error = on_error
        self.isolate = (isolate,) if isinstance(isolate, str) else tuple(isolate)
        self.skip_isolation = skip_isolation
        if base is not None:
            check_base(self.plans.values(), given=True)
        self.base = base
        self._base_weights: BaseSource | None = None  # read once for all runs
        self.metrics = None if metrics is None else _collection(metrics)
        self.update = update
        self.primary = primary
        self.controls = controls
        self.key_prefix = key_prefix
        self.replay = replay
        self.resample = resample
        self.report = report
        self.publish = publish
        self.seed = seed
        self._result: LaserResult | None = None
        self._run: ComparisonRun | None = None
        self._unprinted = False
        self._told_of_predict = False

    @property
    def _options(self) -> RunOptions:
        return RunOptions(
            self.plans,
            self.metrics,
            self.update,
            self.primary,
            self.controls,
            self.key_prefix,
            self.replay,
            self.seed,
            isolate=self.isolate,
            resample=self.resample,
            skip_isolation=self.skip_isolation,
        )

    def _options_for(self, module: pl.LightningModule) -> RunOptions:
        if self.base is None:
            options = self._options
            if options.spectra is None:  # those that are given say themselves what they lack
                check_base(self.plans.values(), given=False)
                check_directions(self.plans.values())
            return options
        check_directions(self.plans.values())
        self._base_weights = read_weights(self.base) if self._base_weights is None else self._base_weights
        return replace(self._options, spectra=Spectra(base=BaseWeights(self._base_weights, module)))

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
        """Whether to compare in what the trainer is running now."""
        return trainer.state.fn in self.loops

    # ---- hooks ------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "predict":
            _check_trainer(trainer, self)
            if isinstance(self.report, (str, Path)) and trainer.is_global_zero:
                need_writable(report=self.report)
        elif not self._told_of_predict:
            self._told_of_predict = True
            rank_zero_info(
                "LaserCallback compares nothing in `trainer.predict()`, where nothing is logged: these predictions are "
                "the original's. For the reduced model's, wrap it in `with laser_callback.reduced(module, plan)`."
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse now what would not fit at the first validation, when an epoch of training is behind it."""
        if not self.is_active(trainer, pl_module):
            return
        prunings = [callback for callback in trainer.callbacks if isinstance(callback, ModelPruning)]
        pruned = {place for callback in prunings for place in callback._parameters_to_prune or ()}
        self._options_for(pl_module)  # reads the base, and looks whether it is the module's
        for plan in self.plans.values():
            for matrix, reduction in plan.resolve(pl_module):
                if isinstance(plan, Recipe) and matrix.parameter.requires_grad:
                    raise MisconfigurationException(
                        f"the recipe is for `{matrix.name}` as it is now, and training changes that: give its plan "
                        f"alone, {brief(plan)!r}, or compare in `trainer.validate()`"
                    )
                if (matrix.module, matrix.attribute) in pruned:
                    raise MisconfigurationException(
                        f"the reduction {brief(reduction)} cuts `{matrix.name}`, which ModelPruning makes from "
                        "others from its first epoch on: leave it out of `parameters_to_prune`, or compare in "
                        "`trainer.validate()` when the pruning is permanent"
                    )

    @override
    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.is_active(trainer, pl_module):
            warn_early(self._options, trainer.callback_metrics, "the sanity check")

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._abandon()
        if trainer.sanity_checking or not self.is_active(trainer, pl_module):
            return
        stage = "test" if trainer.testing else "validation"
        if arms.uses_dataloader_iter(trainer):
            raise MisconfigurationException(
                f"LaserCallback cannot repeat a `{stage}_step(dataloader_iter)`: the iterator is used up by the first "
                f"pass. Give the module a `{stage}_step(batch, batch_idx)`."
            )
        self._result = None
        with self._giving_up(trainer):
            self._run = ComparisonRun(self._options_for(pl_module), trainer, pl_module, stage)
            self._run.listen(partial(self._ahead, trainer), partial(self._behind, trainer))

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._run is not None:
            self._run.take_batch(batch)

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
            self._run.take_outputs(outputs, batch_idx, dataloader_idx)

    def _ahead(self, trainer: pl.Trainer, hook: str) -> None:
        """Right ahead of each of the module's own hooks, and of its step."""
        if self._run is not None:
            with self._giving_up(trainer):
                self._run.ahead_of(hook)

    def _behind(self, trainer: pl.Trainer, hook: str) -> None:
        """Right behind it."""
        if self._run is not None:
            with self._giving_up(trainer):
                self._run.behind(hook)
                if hook.endswith("_epoch_end"):
                    self._finish(self._run, trainer)

    def _finish(self, run: ComparisonRun, trainer: pl.Trainer) -> None:
        """What is made of a run that has seen all batches."""
        self._result = run.finish()
        if self._result is None:
            rank_zero_warn("LaserCallback compared nothing: the evaluation had no batches")
            return
        self._unprinted = True
        with told_if_unwritten("the report of the comparison"):
            if isinstance(self.report, (str, Path)) and trainer.is_global_zero:
                _write(self._result, Path(self.report))
            if self.publish and trainer.is_global_zero:
                publish(self._result, trainer.loggers, trainer.global_step, self.key_prefix)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._abandon()
        if trainer.state.fn == "fit":
            self._print(trainer)  # here and not at the end of training

    on_test_start = on_validation_start
    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end
    on_test_end = on_validation_end

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._abandon()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._abandon()
        self._print(trainer)  # after Lightning's own table

    @contextmanager
    def _giving_up(self, trainer: pl.Trainer) -> Iterator[None]:
        """Around all that a comparison does: in training, what goes wrong there costs the comparison."""
        try:
            yield
        except Exception as error:
            # Of several processes others would wait for this one.
            if trainer.state.fn != "fit" or self.on_error == "raise" or trainer.world_size > 1 or is_of_handler(error):
                raise
            self._abandon()
            rank_zero_warn(
                f"LaserCallback gives up the comparison of epoch {trainer.current_epoch}, and training goes on "
                f"(`on_error='raise'` would stop it): {type(error).__name__}: {error}"
            )

    def _abandon(self) -> None:
        if self._run is not None:
            self._run.close()
            self._run = None

    def _print(self, trainer: pl.Trainer) -> None:
        if self._result is not None and self._unprinted and self.report and trainer.is_global_zero:
            print_report(self._result)
        self._unprinted = False


def _write(result: LaserResult, path: Path) -> None:
    if path.suffix == ".html":
        save_page(result, path)
    else:
        result.to_json(path)
        result.examples.write(path.with_suffix(".examples.jsonl"))


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_trainer(trainer: pl.Trainer, callback: LaserCallback) -> None:
    check_strategy(trainer)
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
    if not isinstance(plan, Mapping) or "reductions" in plan:
        return {key_prefix: Recipe.of(plan)}
    if not plan:
        raise MisconfigurationException("`plan` must hold at least one plan, got an empty mapping")
    reserved = ("delta", ORIGINAL, *DESCRIPTIONS)  # each a key of its own beside the plans'
    for name in plan:
        if not isinstance(name, str) or not name or "/" in name or "." in name or name in reserved:
            raise MisconfigurationException(
                f"a plan's name must be a word without '/' and '.', none of {', '.join(reserved)}, got {name!r}"
            )
    return {name: Recipe.of(value) for name, value in plan.items()}


def _collection(metrics: MetricCollection | Metric | Mapping[str, Metric]) -> MetricCollection:
    if isinstance(metrics, MetricCollection):
        return metrics
    # Without compute groups: they merge metrics whose states are equal after one batch, if only by chance.
    return MetricCollection(dict(metrics) if isinstance(metrics, Mapping) else metrics, compute_groups=False)
