"""LaserCleanup at the end of a real training: what it accepts and writes, and that all else is as it was."""

from __future__ import annotations

import copy
import json
import math
import os
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from benchmarks.planted import Planted, plant
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from recall import AIM, Recall, all_examples, healthy
from tiny import tiny_causal_lm
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from laser_callback import FactsDataModule, LaserModule, LaserSearch
from laser_callback.results.cleanup import CleanupResult
from laser_callback.results.search import SearchResult
from laser_callback.shipping.cleanup import LaserCleanup
from laser_callback.shipping.gates import Gates
from laser_callback.support.processes import on_first_rank, share_weights, waiting_group

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]
SEARCH = {**AIM, "report": False}


class Tuning(Recall):
    """The planted model in training: so slowly that what is wrong with it stays. Counts with a torchmetric, too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.mean = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.losses(*batch).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        outcomes = super().validation_step(batch, batch_idx)
        self.mean(outcomes["val_loss"])
        self.log("mean", self.mean)
        return outcomes

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=1e-7)


@pytest.fixture(scope="module")
def planted() -> Planted:
    return plant(layers=2, subjects=16, steps=150, rank=3, tail=0.95)


@pytest.fixture
def loader(planted) -> DataLoader:
    return all_examples(planted)


def fit(folder: Any, module: pl.LightningModule, loader: DataLoader, *callbacks: pl.Callback, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    options = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "default_root_dir": folder, **quiet, **options}
    trainer = pl.Trainer(callbacks=list(callbacks), **options)
    trainer.fit(module, loader, loader)
    return trainer


def checkpoint(folder: Any, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder / "saved", monitor="val_acc", mode="max", save_top_k=-1, **options)


def accuracy(module: nn.Module, loader: DataLoader) -> float:
    prompts, objects = loader.dataset.tensors
    with torch.no_grad():
        logits = module.model(input_ids=prompts, logits_to_keep=1).logits[:, -1]
    return float((logits.argmax(-1) == objects).double().mean())


class Watch(pl.Callback):
    """Behind LaserCleanup: what it leaves behind when it has worked."""

    def __init__(self, cleanup: LaserCleanup) -> None:
        self.cleanup = cleanup
        self.seen: dict[str, Any] = {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = copy.deepcopy(pl_module.state_dict())
        self.metrics = dict(trainer.callback_metrics)
        self.random = torch.get_rng_state()
        folder = os.path.dirname(trainer.checkpoint_callback.best_model_path) if trainer.checkpoint_callback else None
        self.folder, self.files = folder, read_files(folder)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        files = read_files(self.folder)
        self.seen = {
            "weights": all(torch.equal(value, self.weights[k]) for k, value in pl_module.state_dict().items()),
            "metrics": self.metrics.keys() == dict(trainer.callback_metrics).keys()
            and all(trainer.callback_metrics[k] == v for k, v in self.metrics.items()),
            "random": torch.equal(self.random, torch.get_rng_state()),
            "files": all(files[name] == content for name, content in self.files.items()),
            "trainer": pl_module.trainer is trainer,
        }


def read_files(folder: str | None) -> dict[str, bytes]:
    if folder is None:
        return {}
    return {entry.name: open(entry.path, "rb").read() for entry in os.scandir(folder) if entry.is_file()}


# ---- what it accepts and writes --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_training_has_spoilt_is_cleaned_beside_the_checkpoints(tmp_path, planted, loader):
    module = Tuning(copy.deepcopy(planted.module.model))
    cleanup = LaserCleanup(base=healthy(planted), strategies="delta-matrices, laser", **SEARCH)
    watch = Watch(cleanup)
    saved = checkpoint(tmp_path)
    trainer = fit(tmp_path, module, loader, saved, cleanup, watch)
    result = cleanup.result
    assert set(watch.seen.values()) == {True}, watch.seen
    assert result.search.base is not None
    assert result.search.settings["strategies"] == ["delta-matrices", "laser"]
    assert result.source == saved.best_model_path
    assert result.checkpoint.parent == tmp_path / "saved"
    (found,) = result.plan
    assert (found.layer, found.matrix) == (planted.target.address["layer"], planted.target.address["matrix"])

    # The file is an ordinary checkpoint of the best epoch, with the cut weights and with what was done.
    content = torch.load(result.checkpoint, weights_only=True)
    best = torch.load(saved.best_model_path, weights_only=True)
    assert (content["epoch"], content["global_step"]) == (best["epoch"], best["global_step"])
    assert "optimizer_states" not in content
    changed = [k for k, value in content["state_dict"].items() if not torch.equal(value, best["state_dict"][k])]
    assert changed == [planted.target.matrices[0].parameter_names[0]]
    assert content["laser"] == result.recipe.to_dict()
    assert [m.name for m in result.recipe.matrices] == [planted.target.matrices[0].name]
    assert result.recipe.base == (result.search.base if found.cut == "delta" else None)

    before = trainer.validate(Tuning(copy.deepcopy(planted.module.model)), loader, saved.best_model_path)[0]["val_acc"]
    after = trainer.validate(Tuning(copy.deepcopy(planted.module.model)), loader, result.checkpoint)[0]["val_acc"]
    row = result.confirmed["laser"]["val_acc"]
    assert after - before == pytest.approx(row.delta, abs=0.06)  # of which the confirm set is four tenths

    report = json.loads(result.report.read_text())
    assert report["plan"] == report["tried"] == str(result.plan)
    assert report["confirmed"] == report["search"]["confirmed"]
    assert report["recipe"]["base"] == result.recipe.base
    assert CleanupResult.from_json(result.report).to_dict() == report


@pytest.mark.slow
def test_the_best_weights_are_cleaned_and_not_the_last(tmp_path, planted, loader):
    class Spoil(pl.Callback):
        """After the first epoch, whose checkpoint is the best."""

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.model.lm_head.weight.data.mul_(1e-3)  # the answers stay, so there is still something to clean

    for weights in ("best", "last"):
        module = Tuning(copy.deepcopy(planted.module.model))
        cleanup = LaserCleanup(strategies="laser", weights=weights, minutes=None, **SEARCH)
        watch = Watch(cleanup)
        saved = checkpoint(tmp_path / weights, filename="{epoch}")
        fit(tmp_path, module, loader, Spoil(), saved, cleanup, watch)
        assert set(watch.seen.values()) == {True}, watch.seen
        assert module.model.lm_head.weight.abs().max() < 0.01  # in memory are the last ones
        if weights == "best":
            assert cleanup.result.checkpoint.name == "epoch=0.cleaned.ckpt"
            content = torch.load(cleanup.result.checkpoint, weights_only=True)
            assert content["epoch"] == 0
            assert content["state_dict"]["model.lm_head.weight"].abs().max() > 0.1
        else:
            assert cleanup.result.source == "last"
            content = torch.load(cleanup.result.checkpoint, weights_only=True)
            assert content["state_dict"]["model.lm_head.weight"].abs().max() < 0.01


def test_a_healthy_model_is_kept(tmp_path, planted, loader):
    module = Tuning(healthy(planted))
    cleanup = LaserCleanup(strategies="laser", apply=True, **SEARCH)
    watch = Watch(cleanup)
    fit(tmp_path, module, loader, checkpoint(tmp_path), cleanup, watch)
    assert set(watch.seen.values()) == {True}, watch.seen
    assert cleanup.result.plan is cleanup.result.checkpoint is None
    assert cleanup.result.verdict.startswith("keep the model as trained: ")
    assert sorted(path.suffix for path in (tmp_path / "saved").iterdir()) == [".ckpt", ".ckpt", ".json"]


@pytest.mark.slow
def test_apply_puts_the_cleaned_weights_into_the_module(tmp_path, planted, loader):
    module = Tuning(copy.deepcopy(planted.module.model))
    before = accuracy(module, loader)
    cleanup = LaserCleanup(strategies="laser", weights="last", apply=True, folder=tmp_path / "cleaned", **SEARCH)
    fit(tmp_path, module, loader, cleanup, enable_checkpointing=False)
    content = torch.load(cleanup.result.checkpoint, weights_only=True)
    assert cleanup.result.checkpoint == tmp_path / "cleaned" / "last.cleaned.ckpt"
    assert all(torch.equal(value, content["state_dict"][k]) for k, value in module.state_dict().items())
    assert accuracy(module, loader) > before + 0.1
    # A second training writes beside it.
    again = LaserCleanup(strategies="laser", weights="last", folder=tmp_path / "cleaned", **SEARCH)
    fit(tmp_path, Tuning(copy.deepcopy(planted.module.model)), loader, again, enable_checkpointing=False)
    assert again.result.checkpoint.name == "last.cleaned-v1.ckpt"
    assert again.result.report.name == "last.cleaned-v1.json"


@pytest.mark.slow
def test_a_gate_that_does_not_hold_keeps_the_model(tmp_path, planted, loader):
    for demand, accepted in (("val_loss <= +50 %", True), ("val_loss <= -95 %", False)):
        module = Tuning(copy.deepcopy(planted.module.model))
        gates = Gates([demand], loader)
        cleanup = LaserCleanup(strategies="laser", weights="last", gates=gates, folder=tmp_path, **SEARCH)
        fit(tmp_path, module, loader, cleanup, enable_checkpointing=False)
        assert (cleanup.result.checkpoint is not None) == accepted
        assert cleanup.result.search.plan is not None
        assert (demand in cleanup.result.verdict) != accepted
        assert json.loads(cleanup.result.report.read_text())["gates"]["accepted"] == accepted


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lora_is_cleaned_under_the_adapters(tmp_path, planted, loader):
    """Adapters of rank 8 on a healthy model, one of which does harm."""
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["v_proj", "up_proj"])
    model = peft.get_peft_model(healthy(planted), config)
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer.lora_A["default"].weight.data.normal_(std=0.2)
        layer.lora_B["default"].weight.data.normal_(std=0.4)
        model.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight.data.normal_(std=0.01)
    fresh = Tuning(copy.deepcopy(model))
    module = Tuning(model)
    cleanup = LaserCleanup(strategies="delta-matrices", weights="best", **SEARCH)
    watch = Watch(cleanup)
    fit(tmp_path, module, loader, checkpoint(tmp_path), cleanup, watch)
    result = cleanup.result
    assert set(watch.seen.values()) == {True}, watch.seen
    (found,) = result.plan
    assert (found.layer, found.matrix) == (0, "v_proj")
    tried = {candidate.matrix for candidate in (next(iter(c.plan)) for c in result.search.candidates)}
    assert tried == {"v_proj", "fc_up"}
    raced = [c for c in result.search.candidates if c.examples and c.layer == 0 and c.kind == "v_proj"]
    assert max(cut.rank(64) for c in raced for cut in c.plan) < 8  # from there on nothing would be cut

    spoilt = accuracy(fresh, loader)
    fresh.load_state_dict(torch.load(result.checkpoint, weights_only=True)["state_dict"])
    cleaned = fresh.model.base_model.model.model.layers[0].self_attn.v_proj
    assert not cleaned.lora_B["default"].weight.any()
    assert found.rank(64) == 0  # back to the weights under the adapter
    assert torch.equal(cleaned.base_layer.weight, layer.base_layer.weight)
    best = torch.load(result.source, weights_only=True)["state_dict"]
    changed = [name for name, value in fresh.state_dict().items() if not torch.equal(value, best[name])]
    assert changed == ["model.base_model.model.model.layers.0.self_attn.v_proj.lora_B.default.weight"]
    row = result.confirmed["laser"]["val_acc"]
    assert accuracy(fresh.eval(), loader) - spoilt == pytest.approx(row.delta, abs=0.06)


def test_adapters_that_cannot_be_silenced_are_refused_before_training(tmp_path, planted, loader):
    model = peft.get_peft_model(healthy(planted), peft.LoraConfig(target_modules=["v_proj"], use_dora=True))
    with pytest.raises(ValueError, match=r"`model.*v_proj` has an adapter that is more than W \+ BA"):
        fit(tmp_path, Tuning(model), loader, LaserCleanup(weights="last", **SEARCH))


def test_adapters_on_tied_weights_are_refused_before_training(tmp_path, planted, loader):
    tied = healthy(planted)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    model = peft.get_peft_model(tied, peft.LoraConfig(target_modules=["lm_head", "v_proj"]))
    with pytest.raises(ValueError, match=r"adapter of `model.*lm_head` cannot be merged.*`model.*embed_tokens`"):
        fit(tmp_path, Tuning(model), loader, LaserCleanup(weights="last", **SEARCH), Trained())


# ---- objects in checkpoints ------------------------------------------------------------------------------------------


class Outer:
    class Inner:
        """Of a class that pickle finds by its outer one only."""


class Noted:
    pass


class Given(Tuning):
    def __init__(self, model: nn.Module, criterion: Any = None, note: Any = None) -> None:
        super().__init__(model)
        self.save_hyperparameters(ignore=["model", "note"])
        self.note = note

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["note"] = self.note


def test_hyperparameters_that_are_objects_are_read_back(tmp_path, planted, loader):
    module = Given(copy.deepcopy(planted.module.model), nn.MSELoss())
    cleanup = LaserCleanup(strategies="laser", apply=True, **SEARCH)
    fit(tmp_path, module, loader, checkpoint(tmp_path), cleanup)
    assert cleanup.result.checkpoint is not None
    content = torch.load(cleanup.result.checkpoint, weights_only=False)
    assert isinstance(content["hyper_parameters"]["criterion"], nn.MSELoss)
    assert all(torch.equal(value, content["state_dict"][name]) for name, value in module.state_dict().items())


def test_objects_that_will_not_be_read_back_are_told_before_training_or_by_the_first_checkpoint(
    tmp_path, planted, loader
):
    module = Given(planted.module.model, Outer.Inner())
    for options in ({}, {"weights": "last", "apply": True}):
        with pytest.raises(
            MisconfigurationException, match="are not loaded from a file: hyperparameter `criterion` of Gi"
        ):
            fit(
                tmp_path,
                module,
                loader,
                checkpoint(tmp_path),
                LaserCleanup(strategies="laser", **options, **SEARCH),
                Trained(),
            )
    module = Given(copy.deepcopy(planted.module.model), note=Noted())
    epochs: list[int] = []

    class Count(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            epochs.append(trainer.current_epoch)

    with pytest.raises(MisconfigurationException, match=r"not loaded from a file: `test_cleanup.Noted` in .*\.ckpt"):
        fit(
            tmp_path,
            module,
            loader,
            Count(),
            checkpoint(tmp_path),
            LaserCleanup(strategies="laser", **SEARCH),
            max_epochs=9,
        )
    assert epochs == [0]


# ---- several processes -----------------------------------------------------------------------------------------------


class InChildren(pl.Callback):
    """Behind LaserCleanup on both ranks: they agree, and can still talk to each other."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (cleanup,) = [callback for callback in trainer.callbacks if isinstance(callback, LaserCleanup)]
        everyone: list[Any] = [None, None]
        digest = [float(p.double().abs().sum()) for p in pl_module.parameters()]
        mine = (cleanup.result.verdict, str(cleanup.result.checkpoint), digest, len(trainer.val_dataloaders.dataset))
        torch.distributed.all_gather_object(everyone, mine)
        assert everyone[0] == everyone[1]
        content = torch.load(cleanup.result.checkpoint, weights_only=True)["state_dict"]
        assert all(torch.equal(value, content[name]) for name, value in pl_module.state_dict().items())
        assert pl_module.trainer is trainer


@pytest.mark.slow
def test_two_processes_wait_for_the_first_and_agree(tmp_path, planted, loader):
    module = Tuning(copy.deepcopy(planted.module.model))
    cleanup = LaserCleanup(strategies="laser", apply=True, **SEARCH)
    strategy = DDPStrategy(start_method="spawn", process_group_backend="gloo")
    saved = checkpoint(tmp_path)
    fit(tmp_path, module, loader, saved, cleanup, InChildren(), devices=2, strategy=strategy, max_epochs=1)
    (report,) = (tmp_path / "saved").glob("*.cleaned.json")
    found = json.loads(report.read_text())
    assert found["plan"] is not None
    assert sum(found["search"]["sets"].values()) == 400  # all examples, and not a rank's
    with pytest.raises(RuntimeError, match="has not ended here"):
        _ = cleanup.result


def fail() -> None:
    raise ValueError("no such gate")


def two_ranks(rank: int, folder: str) -> None:
    """In a child: what both ranks learn of work on the first, and that their group is whole again."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with waiting_group() as group:
        assert on_first_rank(group, torch.distributed.is_initialized) is False
        error = ValueError if rank == 0 else RuntimeError
        with pytest.raises(error, match="no such gate"):
            on_first_rank(group, fail)
        layer = nn.Linear(2, 2, bias=False)
        layer.weight.data.fill_(rank + 1)
        share_weights(group, layer)
        assert bool((layer.weight == 1).all())
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    assert total == 2
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_work_on_the_first_rank(tmp_path):
    torch.multiprocessing.spawn(two_ranks, args=(str(tmp_path),), nprocs=2)


# ---- what is said before the work ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategies": "full"}, "`strategies` must be of laser, .*got 'full'"),
        ({"strategies": ()}, "`strategies` must be one or more"),
        ({"weights": "first"}, "`weights` must be 'best' or 'last', got 'first'"),
        ({"strategies": "laser", "base": "x"}, "`base` goes with `also`, or with a strategy that needs one"),
        ({"also": {"a/b": None}}, "`also` must have names of at most 50"),
        ({"also": {"target": None}}, "`also` must have other names than 'target'"),
        ({"objectiv": "acc"}, "no argument objectiv; those of the search are objective, direction"),
        ({"accelerator": "cpu"}, "no argument accelerator"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        LaserCleanup(**arguments)


def test_no_result_yet():
    with pytest.raises(RuntimeError, match=r"`trainer.fit` has not ended here"):
        _ = LaserCleanup().result


class Trained(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        raise AssertionError("training has begun")


def other_shape(planted: Planted) -> nn.Module:
    return tiny_causal_lm()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ({}, {"enable_checkpointing": False}, MisconfigurationException, "needs a ModelCheckpoint"),
        ({}, {}, MisconfigurationException, "needs `base`.*without one cut the weights, strategies='laser'"),
        ({"strategies": "laser", "also": {"a": []}}, {}, MisconfigurationException, "needs `base`"),
        ({"base": tiny_causal_lm(), "also": {"a": []}}, {}, MisconfigurationException, r"`also\['a'\]` must be a data"),
        ({"base": tiny_causal_lm(), "also": {"a": 3}}, {}, MisconfigurationException, r"`also\['a'\]` must be a data"),
        ({"base": tiny_causal_lm()}, {}, ValueError, "`base` is not what the model was fine-tuned from"),
        ({"strategies": "laser", "candidates": 0}, {}, ValueError, "`candidates` must be an integer, at least 1"),
        ({"strategies": "laser"}, {"limit_val_batches": 0}, MisconfigurationException, "has no data to search on"),
        (
            {"strategies": "laser", "objective": None},
            {},
            MisconfigurationException,
            "`objective` must name what to improve",
        ),
    ],
)
def test_what_cannot_work_is_said_before_training(tmp_path, planted, loader, arguments, options, error, message):
    module = Tuning(copy.deepcopy(planted.module.model))
    cleanup = LaserCleanup(**{**SEARCH, **arguments})
    with pytest.raises(error, match=message):
        fit(tmp_path, module, loader, cleanup, Trained(), **options)


@pytest.mark.parametrize("needed", [True, False])
def test_a_step_without_a_loss_is_told_before_training(tmp_path, planted, loader, needed):
    class OutcomesOnly(Tuning):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return {"val_acc": super().validation_step(batch, batch_idx)["val_acc"]}

    other = {} if needed else {"screen_loss": lambda module, batch: module.training_step(batch, 0)}
    cleanup = LaserCleanup(strategies="laser", **{**SEARCH, "loss": None}, **other)
    message = "the screen has no loss" if needed else "training has begun"
    with pytest.raises((MisconfigurationException, AssertionError), match=message):
        fit(
            tmp_path,
            OutcomesOnly(copy.deepcopy(planted.module.model)),
            loader,
            cleanup,
            Trained(),
            num_sanity_val_steps=1,
        )


def test_several_validation_loaders_need_a_choice(tmp_path, planted, loader):
    class Two(Tuning):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
            return super().validation_step(batch, batch_idx)

    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(default_root_dir=tmp_path, callbacks=[LaserCleanup(strategies="laser", **SEARCH)], **options)
    with pytest.raises(MisconfigurationException, match="has 2 validation dataloaders"):
        trainer.fit(Two(copy.deepcopy(planted.module.model)), loader, [loader, loader])


def test_facts_that_are_trained_on_are_refused(tmp_path):
    from tiny import tiny_tokenizer

    module = LaserModule(tiny_causal_lm(), tiny_tokenizer())
    facts = [{"id": str(i), "prompt": f"The capital of land {i} is", "answer": "Rome"} for i in range(8)]
    data = FactsDataModule(facts, module.tokenizer)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    cleanup = LaserCleanup(strategies="laser", report=False)
    trainer = pl.Trainer(default_root_dir=tmp_path, callbacks=[cleanup, Trained()], max_epochs=1, **options)
    with pytest.raises(MisconfigurationException, match="trains and validates on the same facts"):
        trainer.fit(module, datamodule=data)


def test_fast_dev_run_and_validate_do_nothing(tmp_path, planted, loader):
    module = Tuning(copy.deepcopy(planted.module.model))
    cleanup = LaserCleanup(**SEARCH)
    with pytest.warns(UserWarning, match="LaserCleanup does nothing in a fast_dev_run"):
        trainer = fit(tmp_path, module, loader, cleanup, fast_dev_run=True)
    trainer.validate(module, loader)
    assert not list(tmp_path.glob("*.json"))
    with pytest.raises(RuntimeError, match="was a fast_dev_run"):
        _ = cleanup.result


def test_an_interrupted_search_leaves_the_module_as_trained(tmp_path, planted, loader, monkeypatch):
    module = Tuning(copy.deepcopy(planted.module.model))
    seen: dict[str, Any] = {}

    class Kept(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            seen["before"] = copy.deepcopy(pl_module.state_dict())
            pl_module.model.lm_head.weight.data.mul_(1.5)  # so that the last weights are not the best ones
            seen["before"] = copy.deepcopy(pl_module.state_dict())

        def on_exception(self, trainer, pl_module, exception):
            seen["after"] = copy.deepcopy(pl_module.state_dict())

    def interrupted(search: LaserSearch) -> SearchResult:
        raise KeyboardInterrupt

    monkeypatch.setattr(LaserSearch, "run", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, module, loader, checkpoint(tmp_path), LaserCleanup(strategies="laser", **SEARCH), Kept())
    assert all(torch.equal(value, seen["before"][name]) for name, value in seen["after"].items())
    assert not math.isnan(accuracy(module, loader))
    assert not list((tmp_path / "saved").glob("*cleaned*"))
