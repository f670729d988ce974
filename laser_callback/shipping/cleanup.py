"""LaserCleanup: after training, find out whether a cut makes the model better, and if so put it beside the checkpoints.

Contract: when ``trainer.fit`` has ended well, the weights that training gave are searched twice, in full mode and in
delta mode (the difference to the base alone). What is accepted becomes a checkpoint of its own, with the numbers; the
user's checkpoints stay untouched, and so does the module, unless ``apply`` asks for the cut. Trainer, module and
process group are left as they were found.
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
from torch.utils.data import DataLoader
from typing_extensions import override

from laser_callback.compare.callback import check_strategy
from laser_callback.compare.measure import Lab
from laser_callback.compare.module import LaserModule
from laser_callback.data.datamodule import FactsDataModule
from laser_callback.data.sets import ExampleSets
from laser_callback.plans.plan import LaserPlan
from laser_callback.reports.gate_terminal import print_cleanup
from laser_callback.results.cleanup import CleanupResult
from laser_callback.results.evidence import numbers_of
from laser_callback.search.screen import returned_loss
from laser_callback.search.search import LaserSearch
from laser_callback.search.strategies import strategies_of
from laser_callback.shipping.gates import Gates
from laser_callback.shipping.modes import MODES, accept, search_modes, spectra_of
from laser_callback.shipping.trained import (
    as_found,
    best_path,
    device_of,
    free_path,
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
from laser_callback.surgery.recipe import recorded

_OWN = {"module", "data", "base", "folder", "resume", "spectra", "accelerator", "precision", "progress"}
"""Arguments of the search that are not the user's here."""


class LaserCleanup(pl.Callback):
    """Search for a cut when training has ended, and save the model that it makes if it is shown to be better.

    Args:
        data: examples that training has not seen, as :class:`LaserSearch` takes them; by default the validation data.
            They are dealt to the sets of a search; ``ExampleSets.of(data, sizes=...)`` deals them otherwise. That
            training has chosen a checkpoint by them does no harm: it favours the model as it is.
        base: what the model was fine-tuned from, as :class:`~laser_callback.spectra.BaseWeights` takes it. For a model
            with LoRA by default the weights under it.
        modes: ``"full"`` cuts the weights, ``"delta"`` what fine-tuning has changed.
        gates: further demands, with data of their own, that a candidate must meet.
        weights: clean those of the ``"best"`` checkpoint, or the ``"last"`` ones.
        folder: where the cleaned checkpoint and its report go; by default beside the checkpoints.
        apply: also put the cleaned weights into the module, on all processes.
        minutes: for both searches together; see :class:`LaserSearch`. A mode that they do not suffice for is left out.
        seed: see :class:`LaserSearch`.
        report: print a table at the end.
        search: all other arguments of :class:`LaserSearch`, such as ``objective``, ``direction`` and ``constraints``.

    Raises:
        MisconfigurationException: for arguments that do not fit each other, the trainer or the module; what can be
            known before training is said before its first step.
        ValueError: for a base that does not fit the model, before training too.

    Each candidate is held to constraints and gates at their own level, not at a level that both share. With adapters
    the effective weights are cut; in the cleaned checkpoint they stand under adapters that add nothing, so that it
    loads into the same module.

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
        modes: Sequence[str] = MODES,
        gates: Gates | None = None,
        weights: Literal["best", "last"] = "best",
        folder: str | Path | None = None,
        apply: bool = False,
        minutes: float | None = None,
        seed: int = 0,
        report: bool = True,
        **search: Any,
    ) -> None:
        super().__init__()
        self.modes = (modes,) if isinstance(modes, str) else tuple(dict.fromkeys(modes))
        if not self.modes or set(self.modes) - set(MODES):
            raise MisconfigurationException(f"`modes` must be some of {', '.join(MODES)}, got {modes!r}")
        if weights not in ("best", "last"):
            raise MisconfigurationException(f"`weights` must be 'best' or 'last', got {weights!r}")
        if base is not None and "delta" not in self.modes:
            raise MisconfigurationException("`base` goes with the mode 'delta', which is not among `modes`")
        possible = [field.name for field in fields(LaserSearch) if field.name not in _OWN]
        if unknown := set(search) - set(possible):
            raise MisconfigurationException(
                f"LaserCleanup has no argument {', '.join(sorted(unknown))}; those of the search are "
                f"{', '.join(possible)}"
            )
        self.data, self.base, self.gates, self.weights, self.folder = data, base, gates, weights, folder
        self.apply, self.minutes, self.seed, self.report = apply, minutes, seed, report
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
        elif self.weights == "best" and trainer.checkpoint_callback is None:
            raise MisconfigurationException(
                "LaserCleanup(weights='best') needs a ModelCheckpoint: add one to the trainer, or clean weights='last'"
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
        differentiates = all(self.search.get(name, default) == default for name, default in defaults.items()) and any(
            "gradient" in strategy.needs for strategy in strategies_of(self.search.get("strategies", "laser"))
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
        if "delta" in self.modes and self.base is None and not adapted_layers(pl_module):
            raise MisconfigurationException(
                "LaserCleanup's mode 'delta' needs `base`, what the model was fine-tuned from (a folder, hub name, "
                "checkpoint or model); without one clean in one mode, modes='full'"
            )
        for mode in self.modes:
            self._search(trainer, pl_module, mode, {})
        if self.base is not None and trainer.is_global_zero:
            with merged(pl_module):
                BaseWeights(self.base, pl_module)

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
            data = trainer.val_dataloaders
            if isinstance(data, (list, tuple)) and len(data) == 1:
                data = data[0]
        if data is None:
            raise MisconfigurationException(
                "LaserCleanup has no data to search on: give `trainer.fit` validation data, or LaserCleanup `data`"
            )
        if isinstance(data, (list, tuple)):
            raise MisconfigurationException(
                f"`trainer.fit` has {len(data)} validation dataloaders: give LaserCleanup one of them as `data`"
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
        trained = copy.deepcopy(module.state_dict()) if self.weights == "best" else None
        with as_found(trainer, module, trained):
            checkpoint, source = load_weights_to_clean(trainer, module, self.weights)
            result, weights = self._effective(trainer, module, source)
            path = free_path(self._folder(trainer) / f"{Path(source).stem}.cleaned.ckpt")
            if result.recipe is not None:
                result.checkpoint = path
                save_cleaned(checkpoint, module, weights, result.recipe, path)
            result.report = path.with_suffix(".json")
            write_json(result.report, result.to_dict())
        return result

    def _effective(
        self, trainer: pl.Trainer, module: pl.LightningModule, source: str
    ) -> tuple[CleanupResult, dict[str, Tensor]]:
        """The outcome, and what it says the planned parameters should hold."""
        under = {name: parameter.data for name, parameter in module.named_parameters()}
        base = under if self.base is None else read_weights(self.base, module)
        with merged(module):
            result = self._judge(trainer, module, base, source)
            if result.mode is None or result.plan is None:
                return result, {}
            spectra = spectra_of(result.mode, module, base)
            digest = None if spectra.base is None else spectra.base.digest
            numbers = numbers_of(result.searches[result.mode], result.plan, digest)
            with recorded(module, result.plan, spectra, numbers=numbers) as (cut, result.recipe):
                planned = {id(matrix.parameter) for matrix, _ in cut.matrices}
                named = module.named_parameters(remove_duplicate=False)
                return result, {name: p.data for name, p in named if id(p) in planned}

    def _judge(self, trainer: pl.Trainer, module: pl.LightningModule, base: BaseSource, source: str) -> CleanupResult:
        """Search in each mode, then accept the best of what passes everything, or nothing."""
        lab = Lab(module, Spectra.default(), **device_of(trainer))
        if self.gates is not None:  # ahead of hours of search
            self.gates.prepare(lab, LaserPlan([lab.targets(self.search.get("within", "*.all"))[0].at(0.0)]))

        def search_in(mode: str, minutes: float | None) -> LaserSearch:
            return self._search(trainer, module, mode, base, minutes)

        result = CleanupResult(source, {})
        search_modes(result, self.modes, search_in, self.minutes)
        accept(result, lab, self.gates, base)
        return result

    def _search(
        self, trainer: pl.Trainer, module: pl.LightningModule, mode: str, base: BaseSource, minutes: float | None = None
    ) -> LaserSearch:
        assert self._sets is not None
        device = device_of(trainer)
        # All arguments that are not `self.search`, one by one: the rest is what a config file may say (jsonargparse).
        return LaserSearch(
            module,
            self._sets,
            base=base if mode == "delta" else None,
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
