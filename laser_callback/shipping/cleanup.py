"""LaserCleanup: after training, find out whether a cut makes the model better, and if so put it beside the checkpoints.

Contract: when ``trainer.fit`` has ended well, the weights that training gave are searched once. What is found must beat
the checkpoints of other epochs, too. What is accepted becomes a checkpoint of its own, with the numbers; the user's
checkpoints stay untouched, and so does the module, unless ``apply`` asks for the outcome. Trainer, module and process
group are left as they were found.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from typing_extensions import override

from laser_callback.compare.measure import Lab
from laser_callback.compare.module import LaserModule
from laser_callback.compare.trainer import check_strategy
from laser_callback.data.datamodule import FactsDataModule
from laser_callback.data.sets import ExampleSets
from laser_callback.plans.plan import LaserPlan
from laser_callback.reports.gate_terminal import print_cleanup
from laser_callback.results.cleanup import CleanupResult
from laser_callback.results.evidence import numbers_of
from laser_callback.results.other_tasks import TARGET
from laser_callback.results.search import SearchResult
from laser_callback.search.budget import OutOfTimeError
from laser_callback.search.screen import returned_loss
from laser_callback.search.search import LaserSearch
from laser_callback.search.strategies.base import Strategy
from laser_callback.search.strategies.registry import strategies_of
from laser_callback.shipping.contest import Contest
from laser_callback.shipping.gates import Gates, check_names, loaders_of
from laser_callback.shipping.rivals import Rival, rivals_of
from laser_callback.shipping.trained import (
    as_found,
    best_path,
    device_of,
    free_path,
    keeps_best,
    load_weights_to_clean,
    read_own,
    refuse_unreadable,
    save_cleaned,
)
from laser_callback.spectra.delta import BaseSource, BaseWeights, read_weights
from laser_callback.spectra.store import Spectra
from laser_callback.support.files import write_json
from laser_callback.support.merging import adapted_layers, merged, refuse_other_than_lora, refuse_unmergeable
from laser_callback.support.processes import on_first_rank, share_weights, waiting_group
from laser_callback.support.reading import shown
from laser_callback.surgery.recipe import Recipe
from laser_callback.surgery.record import recorded

STRATEGIES = ("delta", "delta-matrices", "laser")
_OWN = {"module", "data", "base", "folder", "resume", "spectra", "accelerator", "precision", "progress", "strategies"}
"""Arguments of the search that are not the user's here."""


class _Search(LaserSearch):
    """One that by default tries what a cleanup does, and goes on without those that have nothing to propose."""

    _default = STRATEGIES


class LaserCleanup(pl.Callback):
    """Search for a cut when training has ended, and save the model that it makes if it is shown to be better.

    Args:
        data: examples that training has not seen, as :class:`LaserSearch` takes them; by default the validation data.
            They are dealt to the sets of a search; ``ExampleSets.of(data, sizes=...)`` deals them otherwise. That
            training has chosen a checkpoint by them does no harm: it favours the model as it is.
        base: what the model was fine-tuned from, as :class:`~laser_callback.spectra.BaseWeights` takes it. For a model
            with LoRA by default the weights under it.
        strategies: what proposes cuts, as :class:`LaserSearch` takes it. By default three, of which those are left out,
            with a warning, that have nothing to propose. ``"delta"`` cuts the whole change of
            fine-tuning by one rule: up to 19 candidates, which need no gradient. ``"delta-matrices"`` cuts the
            change of one matrix, ``"laser"`` the weights of one, which needs no base. Embeddings, heads and biases stay
            as fine-tuned; ``"delta-all"`` includes those that the base has, too.
        gates: further demands, with data of their own, that what is confirmed must meet.
        also: data of other tasks by name, as gates take them: how the base, the fine-tuned and the cleaned model do
            there. It needs a base, and decides nothing.
        weights: clean those of the ``"best"`` checkpoint, or the ``"last"`` ones.
        folder: where the cleaned checkpoint and its report go; by default beside the checkpoints.
        apply: also put the outcome's weights into the module, on all processes.
        minutes: for the search; see :class:`LaserSearch`. The joint rules of ``"delta"`` race first. What is shown
            beside it takes a pass over the confirm set each, and another checkpoint one over the race set as well.
        seed: see :class:`LaserSearch`.
        report: print a table at the end.
        search: all other arguments of :class:`LaserSearch`, such as ``objective``, ``direction`` and ``constraints``.

    Raises:
        MisconfigurationException: for arguments that do not fit each other, the trainer or the module; what can be
            known before training is said before its first step.
        ValueError: for a base that does not fit the model, before training too.

    Checkpoints of other epochs that a ModelCheckpoint has kept race as well. If one of them is better than the best
    cut, it goes to confirmation in its place, and nothing is written: the verdict names it. Either way one comparison
    with the weights that were cleaned is confirmed, at its own level. With adapters the effective weights are cut; in
    the cleaned checkpoint they stand under adapters that add nothing, so that it loads into the same module.

    Example::

        cleanup = LaserCleanup(objective="val_acc", direction="max", base="base.ckpt")
        Trainer(callbacks=[ModelCheckpoint(monitor="val_acc", mode="max"), cleanup]).fit(module, datamodule=data)
        cleanup.result.verdict, cleanup.result.checkpoint
    """

    def __init__(
        self,
        data: pl.LightningDataModule | DataLoader[Any] | Mapping[str, DataLoader[Any]] | ExampleSets | None = None,
        *,
        base: BaseSource | None = None,
        strategies: str | Sequence[str | Strategy] | None = None,
        gates: Gates | None = None,
        also: Mapping[str, Any] | None = None,
        weights: Literal["best", "last"] = "best",
        folder: str | Path | None = None,
        apply: bool = False,
        minutes: float | None = None,
        seed: int = 0,
        report: bool = True,
        **search: Any,
    ) -> None:
        super().__init__()
        if weights not in ("best", "last"):
            raise MisconfigurationException(f"`weights` must be 'best' or 'last', got {weights!r}")
        possible = [field.name for field in fields(LaserSearch) if field.name not in _OWN]
        if unknown := set(search) - set(possible):
            raise MisconfigurationException(
                f"LaserCleanup has no argument {', '.join(sorted(unknown))}; those of the search are "
                f"{', '.join(possible)}"
            )
        also = dict(also or {})
        check_names("also", also)
        if TARGET in also:
            raise ValueError(f"`also` must have other names than {TARGET!r}, which is what was fine-tuned for")
        self.strategies = strategies
        self._needs = {
            need
            for strategy in strategies_of(STRATEGIES if strategies is None else strategies)
            for need in strategy.needs
        }
        self._needs_base = "base" in self._needs
        if base is not None and not self._needs_base and not also:
            raise MisconfigurationException(
                "`base` goes with `also`, or with a strategy that needs one, such as 'delta'"
            )
        self.data, self.base, self.gates, self.also = data, base, gates, also
        self.weights, self.folder, self.apply = weights, folder, apply
        self.minutes, self.seed, self.report = minutes, seed, report
        self.search = search  # alone: jsonargparse looks for it, and where it goes to
        self._sets: ExampleSets | None = None
        self._result: CleanupResult | None = None

    @property
    def result(self) -> CleanupResult:
        """The outcome of the latest training.

        Raises:
            RuntimeError: before one has ended (in the process that launched ``ddp_spawn`` workers, always: read the
                report's file there).
        """
        if self._result is None:
            raise RuntimeError("there is no result: `trainer.fit` has not ended here, or was a fast_dev_run")
        return self._result

    # ---- before training: whatever can be wrong ---------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._sets = None
        check_strategy(trainer)
        if trainer.fast_dev_run:
            rank_zero_warn("LaserCleanup does nothing in a fast_dev_run: there is no model worth cleaning")
        elif self.weights == "best" and not keeps_best(trainer):
            raise MisconfigurationException(
                "LaserCleanup(weights='best') needs a ModelCheckpoint that keeps a best one (`save_top_k`): add one to "
                "the trainer, or clean weights='last'"
            )

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
        # What the search will differentiate: the sanity check shows, ahead of hours of training, whether it is there.
        defaults = {"method": "screened", "screen_loss": None}
        differentiates = "gradient" in self._needs and all(
            self.search.get(name, default) == default for name, default in defaults.items()
        )
        if trainer.sanity_checking and differentiates and self.data is None and not isinstance(pl_module, LaserModule):
            returned_loss(outputs, self.search.get("loss") or "loss")

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first_seen = trainer.fast_dev_run  # which saves none
        if trainer.fast_dev_run:
            return
        self._result = None
        self._sets = self._example_sets(trainer)
        if self.search.get("objective") is None and not isinstance(pl_module, LaserModule):
            raise MisconfigurationException(
                "LaserCleanup's `objective` must name what to improve, and `direction` how: "
                "LaserCleanup(objective='val_acc', direction='max')"
            )
        if self._reads_back:
            refuse_unreadable(trainer, pl_module)
        refuse_unmergeable(pl_module)
        refuse_other_than_lora(pl_module)
        if (self._needs_base or self.also) and self.base is None and not adapted_layers(pl_module):
            raise MisconfigurationException(
                "LaserCleanup needs `base`, what the model was fine-tuned from (a folder, hub name, checkpoint or "
                "model); without one cut the weights, strategies='laser', and leave out `also`"
            )
        self._check_other_data(trainer)
        self._search(trainer, pl_module, {} if self._needs_base else None)
        if self.base is not None and trainer.is_global_zero:
            with merged(pl_module):
                BaseWeights(self.base, pl_module)

    def _check_other_data(self, trainer: pl.Trainer) -> None:
        """Whether there is something to look at, ahead of hours of training."""
        for name, data in self.also.items():
            if isinstance(data, pl.LightningDataModule) and data.trainer is None:
                data.trainer = trainer  # as for `data`
            try:
                loaders = loaders_of(data)
            except Exception as error:
                raise MisconfigurationException(f"`also[{name!r}]` cannot be set up: {error}") from error
            if not loaders or not all(isinstance(loader, DataLoader) for loader in loaders):
                raise MisconfigurationException(
                    f"`also[{name!r}]` must be a data module, a DataLoader or a list of them, got {shown(data)}"
                )

    @property
    def _reads_back(self) -> bool:
        """Whether a checkpoint will be read back."""
        return self.weights == "best" or self.apply

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # The first checkpoint shows what there is in them besides hyperparameters.
        if self._reads_back and not self._first_seen and best_path(trainer):
            self._first_seen = True
            refuse_unreadable(trainer, pl_module)

    def _example_sets(self, trainer: pl.Trainer) -> ExampleSets:
        data = self.data
        if data is None and isinstance(trainer.datamodule, FactsDataModule):
            raise MisconfigurationException(
                "a FactsDataModule trains and validates on the same facts: give LaserCleanup `data`, with facts that "
                "are not trained on"
            )
        if data is None:
            if trainer.val_dataloaders is None and trainer.enable_validation:  # none in the first epoch: not set up yet
                trainer.validating = True
                trainer.fit_loop.epoch_loop.val_loop.setup_data()
                trainer.training = True
            loaders = tree_leaves(trainer.val_dataloaders)  # a list or mapping of them, or one
            if len(loaders) > 1:
                raise MisconfigurationException(
                    f"`trainer.fit` has {len(loaders)} validation dataloaders: give LaserCleanup one of them as `data`"
                )
            data = next(iter(loaders), None)
        if data is None:
            raise MisconfigurationException(
                "LaserCleanup has no data to search on: give `trainer.fit` validation data, with "
                "limit_val_batches above 0, or LaserCleanup `data`"
            )
        if isinstance(data, pl.LightningDataModule) and data.trainer is None:
            data.trainer = trainer  # as for the trainer's own data: a FactsDataModule takes the tokenizer from there
        return data if isinstance(data, ExampleSets) else ExampleSets.of(data, seed=self.seed)

    # ---- after training ---------------------------------------------------------------------------------------------

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._sets is None:
            return
        with waiting_group() as group:
            result = self._result = on_first_rank(group, lambda: self._clean(trainer, pl_module))
            if self.apply and result.checkpoint is not None:
                if trainer.is_global_zero:
                    state = read_own(trainer, pl_module, result.checkpoint)["state_dict"]
                    pl_module.load_state_dict(state, strict=pl_module.strict_loading)
                share_weights(group, pl_module)
        if self.report and trainer.is_global_zero:
            print_cleanup(result)

    def _clean(self, trainer: pl.Trainer, module: pl.LightningModule) -> CleanupResult:
        """All of the work, in one process."""
        source = best_path(trainer) if self.weights == "best" else "last"
        rivals, note = rivals_of(trainer, module, source, self.data is not None)
        trained = copy.deepcopy(module.state_dict()) if self.weights == "best" or rivals else None
        with as_found(trainer, module, trained):
            checkpoint, source = load_weights_to_clean(trainer, module, self.weights)
            under = {name: parameter.data for name, parameter in module.named_parameters()}
            base = under if self.base is None else read_weights(self.base, module)
            result, accepted = self._judge(trainer, module, base, source, rivals)
            result.notes += [note] if note else []
            path = free_path(self._folder(trainer) / f"{Path(source).stem}.cleaned.ckpt")
            if isinstance(accepted, Rival):
                result.checkpoint = Path(accepted.path)
            elif accepted is not None:
                result.plan, result.checkpoint = accepted, path
                weights, result.recipe = self._effective(module, accepted, base, result.search)
                save_cleaned(checkpoint, module, weights, result.recipe, path)
            result.report = path.with_suffix(".json")
            write_json(result.report, result.to_dict())
        return result

    def _judge(
        self, trainer: pl.Trainer, module: pl.LightningModule, base: BaseSource, source: str, rivals: list[Rival]
    ) -> tuple[CleanupResult, LaserPlan | Rival | None]:
        """Search, and hold what is found against its rivals: the outcome, and what was accepted."""
        with merged(module):
            if self.gates is not None:  # ahead of hours of search
                lab = Lab(module, Spectra.default(), **device_of(trainer))
                self.gates.prepare(lab, LaserPlan([lab.targets(self.search.get("within", "*.all"))[0].at(0.0)]))
            search = self._search(trainer, module, base if self._needs_base else None, self.minutes)
            try:
                found = search.run()
            except OutOfTimeError as error:  # another checkpoint may still be better
                found = search.result
                found.reason = str(error)
            weights_of_base = BaseWeights(base, module) if self.also else None
        assert search.course is not None
        result = CleanupResult(source, found)
        contest = Contest(trainer, module, search.course, result)
        rival = contest.enter(rivals)
        chosen = rival or found.found
        passed = contest.confirm(rival) if rival is not None else contest.take_search()
        if passed and chosen is not None and self.gates is not None:
            passed = contest.passes(self.gates, chosen)
        contest.show(rivals)
        if weights_of_base is not None:
            contest.elsewhere(self.also, weights_of_base, None if result.confirmed is None else chosen)
        return result, chosen if passed else None

    def _effective(
        self, module: pl.LightningModule, plan: LaserPlan, base: BaseSource, search: SearchResult
    ) -> tuple[dict[str, Tensor], Recipe]:
        """What the planned parameters should hold under an accepted plan, and its recipe."""
        with merged(module):
            spectra = Spectra.default(BaseWeights(base, module) if self._needs_base else None)
            numbers = numbers_of(search, plan, None if spectra.base is None else spectra.base.digest)
            with recorded(module, plan, spectra, numbers=numbers) as (cut, recipe):
                planned = {id(matrix.parameter) for matrix, _ in cut.matrices}
                named = module.named_parameters(remove_duplicate=False)
                return {name: p.data for name, p in named if id(p) in planned}, recipe

    def _search(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        base: BaseSource | None,
        minutes: float | None = None,
    ) -> LaserSearch:
        assert self._sets is not None
        device = device_of(trainer)
        # All arguments that are not `self.search`, one by one: the rest is what a config file may say (jsonargparse).
        return _Search(
            module,
            self._sets,
            base=base,
            strategies=self.strategies,
            minutes=minutes,
            seed=self.seed,
            progress=self.report and trainer.progress_bar_callback is not None,
            accelerator=device["accelerator"],
            precision=device["precision"],
            spectra=None,
            folder=None,
            resume=False,
            **self.search,
        )

    def _folder(self, trainer: pl.Trainer) -> Path:
        beside = getattr(trainer.checkpoint_callback, "dirpath", None)
        return Path(self.folder or beside or trainer.default_root_dir)
