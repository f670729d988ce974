"""Two processes on the CPU: keys with ``sync_dist``, global pairs, duplicates, unequal ranks, no deadlock.

Classes stand at module level because ``ddp_spawn`` pickles them; what happens in the children is asserted in them, and
an error there fails the parent.
"""

from __future__ import annotations

import json
import os
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from toy import CLASSES, OTHER, PLAN, Net, evaluate
from trainers import quiet_trainer

from laser_callback import LaserCallback, reduced
from laser_callback.results.comparison import LaserResult

N = 9  # odd: DistributedSampler repeats one example on the second rank
PARITY = 1e-6


class Examples(Dataset):
    def __init__(self, n: int = N) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(n, 4, 8, generator=generator)
        self.y = torch.randint(CLASSES, (n,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"x": self.x[i], "y": self.y[i], "id": f"example {i}"}


class Unequal(torch.utils.data.Sampler):
    """Seven examples for the first rank and two for the second: four batches and one."""

    def __iter__(self):
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else -1
        return iter({0: range(7), 1: range(7, N), -1: range(N)}[rank])

    def __len__(self) -> int:
        return len(list(iter(self)))


class Synced(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = Net()
            for parameter in self.net.parameters():
                if parameter.dim() == 2:
                    parameter.data.normal_(std=0.6)
        self.acc = MulticlassAccuracy(CLASSES, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch["x"]), batch["y"])

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        logits, y = self(batch["x"]), batch["y"]
        losses = F.cross_entropy(logits, y, reduction="none")
        self.log("loss", losses.mean(), sync_dist=True, batch_size=len(y))
        self.log("local", losses.mean(), batch_size=len(y))
        self.acc(logits, y)
        self.log("acc", self.acc)
        return {"id": batch["id"], "acc": logits.argmax(1) == y, "loss": losses, "logits": logits, "y": y}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def update(metrics: Any, outputs: Any, batch: Any) -> None:
    metrics.update(outputs["logits"], outputs["y"])


def comparable(result: LaserResult) -> dict[str, Any]:
    """What ranks must agree on: all but the clocks and values that are rank-local by the user's own choice."""
    found = result.to_dict()
    arms = [*found["arms"].values(), *(a for c in found["controls"].values() for a in c.values())]
    for arm in [*arms, *(one for control in arms for one in control["passes"])]:
        for clock in ("seconds", "factorise_seconds", "replay"):
            del arm[clock]
    del found["original_seconds"]
    return found


class Fit(pl.Callback):
    """Fits in the children when their evaluation is over: to start two processes is most of this file's time."""

    def __init__(self, folder: Any) -> None:
        self.folder = folder

    def teardown(self, trainer, pl_module, stage):
        os.environ.update(LOCAL_RANK=str(trainer.local_rank), NODE_RANK="0")  # this process is there: start no others
        fit_on_unequal_ranks(self.folder)
        for rank in (0, 1):
            validate_with_a_rank_without_batches(self.folder, rank)


def fit_on_unequal_ranks(folder: Any) -> None:
    """Ranks with four batches and one, the module wrapped by the strategy, two callbacks."""
    module, data = Synced(), Examples()
    laser = LaserCallback(PLAN, loops="fit", report=False)
    other = LaserCallback(OTHER, key_prefix="other", loops="fit", report=False)
    check = CheckInChild(laser, duplicates=0)
    strategy = DDPStrategy(process_group_backend="gloo")
    run = ddp(folder, strategy, laser, other, check, max_epochs=1, use_distributed_sampler=False)
    run.fit(module, DataLoader(data, 4), DataLoader(data, 2, sampler=Unequal()))
    metrics = run.callback_metrics
    assert check.checked == 1
    assert {"laser/loss", "laser/delta/acc", "other/acc"} <= set(metrics)
    # The weights after fit are those that validation saw at its end: all examples, in one process.
    for prefix, plan in (("laser", PLAN), ("other", OTHER)):
        with torch.no_grad(), reduced(module, plan):
            expected = float((module(data.x).argmax(1) == data.y).double().mean())
        assert float(metrics[f"{prefix}/acc"]) == pytest.approx(expected, rel=PARITY)
    assert not [layer for layer in module.net.modules() if "forward" in vars(layer)]


class Shard(IterableDataset):
    """The whole data on one rank, nothing on the other."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self):
        return iter(Examples() if torch.distributed.get_rank() == self.rank else ())


class Unsynced(Synced):
    """Logs in the step what the ranks need not agree on, and synchronises at the end, where all ranks come by."""

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        logits, y = self(batch["x"]), batch["y"]
        self.log("local", F.cross_entropy(logits, y), batch_size=len(y))
        self.acc.update(logits, y)
        return {"id": batch["id"], "acc": logits.argmax(1) == y}

    def on_validation_epoch_end(self) -> None:
        self.log("acc", self.acc.compute())
        self.acc.reset()


def validate_with_a_rank_without_batches(folder: Any, rank: int) -> None:
    module, data = Unsynced(), DataLoader(Shard(rank), 2)
    plain = ddp(folder, DDPStrategy(process_group_backend="gloo")).validate(module, data, verbose=False)[0]
    laser = LaserCallback(PLAN, report=False)
    run = ddp(folder, DDPStrategy(process_group_backend="gloo"), laser)
    logged = run.validate(module, data, verbose=False)[0]
    assert {key: logged[key] for key in plain} == plain
    assert set(logged) == {prefix + key for key in plain for prefix in ("", "laser/", "laser/delta/")}
    assert ("local" in plain) == (run.global_rank == rank)
    x, y = Examples().x, Examples().y
    with torch.no_grad(), reduced(module, PLAN):
        expected = float((module(x).argmax(1) == y).double().mean())
    assert logged["laser/acc"] == pytest.approx(expected, rel=PARITY)
    rows = laser.result.arms["laser"]
    assert (rows["acc"].n, rows["local"].n) == (N, (N + 1) // 2)  # examples, batches
    everyone: list[Any] = [None, None]
    torch.distributed.all_gather_object(everyone, comparable(laser.result))
    assert everyone[0] == everyone[1]


class CheckInChild(pl.Callback):
    """Runs after LaserCallback, in the children."""

    def __init__(self, laser: LaserCallback, duplicates: int, n: int = N) -> None:
        self.laser = laser
        self.duplicates = duplicates
        self.n = n
        self.weights: list[Tensor] = []
        self.checked = 0

    def on_validation_start(self, trainer, pl_module):
        self.weights = [p.detach().clone() for p in pl_module.parameters()]

    def on_validation_end(self, trainer, pl_module):
        if trainer.sanity_checking:
            return
        assert torch.distributed.get_world_size() == 2
        assert all(torch.equal(a, b) for a, b in zip(self.weights, pl_module.parameters(), strict=True))
        result = self.laser.result
        assert result.examples.duplicates == self.duplicates
        for arm in result.arms.values():
            assert arm["acc"].n == self.n
            assert arm["loss"].n == self.n
        ids = [i for batch in result.examples.batches for i in batch.described["original"]["id"]]
        assert sorted(ids) == sorted(f"example {i}" for i in range(self.n))
        everyone: list[Any] = [None, None]
        torch.distributed.all_gather_object(everyone, comparable(result))
        assert everyone[0] == everyone[1]
        self.checked += 1


def ddp(folder: Any, strategy: DDPStrategy, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    return quiet_trainer(*callbacks, devices=2, strategy=strategy, default_root_dir=folder, **options)


@pytest.mark.slow
def test_two_processes(trainer, tmp_path, capfd):
    """Sampler with a duplicate, two plans with controls, own metrics, JSON report; then, in the children, a fit."""
    module, data = Synced(), Examples()
    path = tmp_path / "result.json"
    own = {"f1": MulticlassF1Score(CLASSES, average="micro")}
    laser = LaserCallback(
        {"a": PLAN, "b": OTHER}, primary="acc", controls=True, report=path, metrics=own, update=update
    )
    strategy = DDPStrategy(start_method="spawn", process_group_backend="gloo")
    run = ddp(tmp_path, strategy, laser, CheckInChild(laser, duplicates=1), Fit(tmp_path))
    logged = run.validate(module, DataLoader(data, 2), verbose=False)[0]

    # One process over what both ranks saw: the sampler gives rank 0 the even examples, rank 1 the odd ones and 0 again.
    seen = torch.utils.data.Subset(data, [0, 2, 4, 6, 8, 1, 3, 5, 7, 0])
    plain = evaluate(trainer, module, data=DataLoader(seen, 2))
    assert logged["acc"] == pytest.approx(plain["acc"], rel=PARITY)
    for name, plan in (("a", PLAN), ("b", OTHER)):
        with reduced(module, plan):
            expected = evaluate(trainer, module, data=DataLoader(seen, 2))
        assert logged[f"laser/{name}/acc"] == pytest.approx(expected["acc"], rel=PARITY)
        # Lightning averages the ranks' means, each weighted alike.
        with reduced(module, plan), torch.no_grad():
            means = [F.cross_entropy(module(data.x[half]), data.y[half]) for half in ([0, 2, 4, 6, 8], [1, 3, 5, 7, 0])]
        assert logged[f"laser/{name}/loss"] == pytest.approx(float(sum(means) / 2), rel=1e-5)
        assert logged[f"laser/{name}/f1"] == pytest.approx(expected["acc"], rel=PARITY)  # micro F1 is accuracy
        for key in ("acc", "loss", "f1"):
            delta = logged[f"laser/{name}/{key}"] - logged[key]
            assert logged[f"laser/{name}/delta/{key}"] == pytest.approx(delta, abs=1e-6)

    # The table is over the nine examples, each once, whatever the ranks logged.
    report = json.loads(path.read_text())
    assert report["duplicates_removed"] == 1
    assert set(report["controls"]["a"]) == {"zeroed", "random", "noise"}
    (pooled,) = (row for row in report["arms"]["a"]["rows"] if row["metric"] == "f1")
    assert (pooled["unit"], pooled["n"], pooled["test"]) == ("batch", 6, "paired permutation")  # of both ranks
    with torch.no_grad():
        right = module(data.x).argmax(1) == data.y
        for name, plan in (("a", PLAN), ("b", OTHER)):
            with reduced(module, plan):
                cut = module(data.x).argmax(1) == data.y
            rows = {row["metric"]: row for row in report["arms"][name]["rows"]}
            assert rows["acc"]["n"] == N
            assert rows["acc"]["fixed"] == int((cut & ~right).sum())
            assert rows["acc"]["broken"] == int((right & ~cut).sum())
            assert rows["acc"]["original"] == pytest.approx(float(right.double().mean()))
            assert rows["acc"]["reduced"] == pytest.approx(float(cut.double().mean()))
            noises = []
            for one in report["controls"][name]["noise"]["passes"]:
                with reduced(module, one["plan"]):
                    noises.append((module(data.x).argmax(1) == data.y).double())
            noise = {row["metric"]: row for row in report["controls"][name]["noise"]["rows"]}["acc"]
            assert (noise["n"], len(noises)) == (N, 3)
            assert noise["reduced"] == pytest.approx(float(torch.stack(noises).mean()))
    with pytest.raises(RuntimeError, match="no result yet"):
        _ = laser.result  # it stayed in the children
    output = capfd.readouterr()
    assert output.out.count("* acc was declared beforehand") == 1  # printed by rank zero
    assert "1 duplicates of the distributed sampler removed" in output.out
    # Lightning's advice about `sync_dist` is for the user's own keys.
    assert "self.log('local', ..., sync_dist=True)" in output.err
    assert "self.log('laser" not in output.err
    assert "self.log('f1" not in output.err
