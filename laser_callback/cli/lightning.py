"""``laser-callback validate``, ``test`` and ``fit``: LightningCLI with a comparison.

The model and data classes are the user's own, as in any LightningCLI: ``model:``, ``data:`` and ``trainer:`` blocks in
a YAML file, or options. Added are the block ``laser:``, with the arguments of
:class:`~laser_callback.compare.LaserCallback`, and in ``fit`` a block ``cleanup:`` for a
:class:`~laser_callback.shipping.LaserCleanup`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from laser_callback.cli.command import Answer, json_numbers
from laser_callback.cli.mistakes import told_plainly
from laser_callback.cli.options import COMMON_OPTIONS, PlainHelp
from laser_callback.cli.quick.check import need_laser_plan
from laser_callback.compare.callback import LaserCallback
from laser_callback.compare.module import LaserModule
from laser_callback.data.datamodule import FactsDataModule
from laser_callback.data.lm_eval.source import is_lm_eval
from laser_callback.shipping.cleanup import LaserCleanup
from laser_callback.support.checkpoints import need_checkpoint
from laser_callback.support.files import need_files

__test__: dict[str, str] = {}  # the command `test` below is none of pytest's


def validate(arguments: list[str]) -> Answer:
    """Compare a plan with the original model in trainer.validate() of your own module and data."""
    return _run(validate, arguments)


def test(arguments: list[str]) -> Answer:
    """Compare a plan with the original model in trainer.test() of your own module and data."""
    return _run(test, arguments)


def fit(arguments: list[str]) -> Answer:
    """Train your own module, and compare a plan with the original model in each validation."""
    return _run(fit, arguments)


class LaserBlock(LaserCallback):
    """The ``laser:`` block: a LaserCallback whose plan may be left out where nothing is to be compared.

    A LaserModule is judged by what it would be judged by with a plan of its own, unless ``primary`` says otherwise.
    """

    def __init__(self, plan: str | Mapping[str, str] | None = None, **options: Any) -> None:
        super().__init__({} if plan is None else plan, **options)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.primary is None and isinstance(pl_module, LaserModule):
            self.primary = pl_module.claim
        super().setup(trainer, pl_module, stage)


class _SaveConfig(SaveConfigCallback):
    """Lightning's, whose refusal to overwrite an earlier run's file names cures that only its own users have."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        try:
            super().setup(trainer, pl_module, stage)
        except RuntimeError as error:
            if "to NOT exist" not in str(error):
                raise
            raise MisconfigurationException(
                f"{self.config_filename} of an earlier run is in {trainer.log_dir} already: remove it, or give this "
                "run a folder of its own, --trainer.default_root_dir=..., or a logger, which makes one"
            ) from error


class LaserCLI(LightningCLI):
    """LightningCLI for one subcommand.

    Args:
        function: of the command.
        arguments: what follows it on the command line.
    """

    def __init__(self, function: Callable[[list[str]], Answer], arguments: list[str]) -> None:
        self._command = command = function.__name__
        self._options: LightningArgumentParser
        evaluates = command != "fit"
        super().__init__(
            # A run that only evaluates leaves no files behind, unless it is asked to.
            save_config_callback=None if evaluates else _SaveConfig,
            trainer_defaults={
                "enable_progress_bar": sys.stdout.isatty(),
                "enable_model_summary": False,
                **({"logger": False} if evaluates else {}),
            },
            seed_everything_default=0,
            parser_kwargs={
                "prog": "laser-callback",
                "exit_on_error": False,
                "allow_abbrev": False,
                "formatter_class": PlainHelp,  # of the command as well
                command: {
                    "description": function.__doc__,
                    "epilog": COMMON_OPTIONS,
                    "exit_on_error": False,
                    "allow_abbrev": False,
                },
            },
            # The comparison's own table has all of Lightning's.
            args=[command, *(["--verbose=false"] if evaluates else []), *arguments],
        )

    @override
    def subcommands(self) -> dict[str, set[str]]:
        return {self._command: LightningCLI.subcommands()[self._command]}

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        self._options = parser
        parser.add_class_arguments(LaserBlock, "laser", instantiate=False, fail_untyped=False, sub_configs=True)
        if self._command == "fit":
            parser.set_defaults({"laser.loops": ("fit",)})
            parser.add_subclass_arguments(LaserCleanup, "cleanup", fail_untyped=False)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        with told_plainly(self._options):
            self.config = parser.parse_args(args)  # without the warning that `sys.argv` holds them too
        given = self.config[self._command].get("ckpt_path")
        if given is not None and str(given).endswith(".ckpt") and "://" not in str(given) and not os.path.isdir(given):
            need_checkpoint(given, "ckpt_path")  # it is no word such as `best`, and no folder of shards

    @override
    def before_instantiate_classes(self) -> None:
        # A model takes long to load: what can be wrong without it is said before.
        blocks = self.config[self._command]
        if isinstance(plan := blocks.laser.plan, (str, Mapping)):
            LaserBlock(plan)
        if self._command != "fit":
            need_laser_plan(plan)
        data = blocks.get("data")
        if data is not None and issubclass(resolve_name(data.class_path), FactsDataModule):
            given = {f"data.{name}": data.init_args.get(name) for name in ("path", "text")}
            is_file = {name: isinstance(one, (str, Path)) and not is_lm_eval(one) for name, one in given.items()}
            need_files(**{name: one for name, one in given.items() if is_file[name]})

    @override
    def instantiate_classes(self) -> None:
        with told_plainly(self._options):
            super().instantiate_classes()

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        blocks = self.config_init[self._command]
        callbacks: list[pl.Callback] = [] if blocks.laser.plan is None else [LaserBlock(**blocks.laser)]
        if (cleanup := blocks.get("cleanup")) is not None:
            callbacks.append(cleanup)
        self.trainer_defaults["callbacks"] = callbacks
        return super().instantiate_trainer(**kwargs)


def _run(function: Callable[[list[str]], Answer], arguments: list[str]) -> Answer:
    trainer = LaserCLI(function, arguments).trainer
    if not trainer.is_global_zero:
        return Answer()
    answer: dict[str, Any] = {"metrics": json_numbers(trainer.callback_metrics), "laser": _results(trainer)}
    if function is fit:
        answer["checkpoint"] = getattr(trainer.checkpoint_callback, "best_model_path", "") or None
        cleanups = [callback for callback in trainer.callbacks if isinstance(callback, LaserCleanup)]
        answer["cleanup"] = [cleanup.result.to_dict() for cleanup in cleanups]
    return Answer(answer)


def _results(trainer: pl.Trainer) -> dict[str, Any]:
    """What each LaserCallback found, by its ``key_prefix``."""
    results = {}
    for callback in trainer.callbacks:
        if isinstance(callback, LaserCallback):
            with suppress(RuntimeError):  # it has none: no validation ran, or it did in spawned processes
                results[callback.key_prefix] = callback.result.to_dict()
    return results
