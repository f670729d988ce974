"""The control that is noise: of which size, what its mean is of, and whether a cut is better than it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassF1Score
from toy import CLASSES, PLAN, Toy, evaluate, make_data, oracle
from trainers import quiet_trainer

from laser_callback import BaseWeights, LaserCallback, LaserPlan, Spectra, reduced
from laser_callback.compare import noise_plan, zeroed_plan
from laser_callback.compare.controls import control_plans
from laser_callback.reports.row_text import ahead_text, verdict
from laser_callback.reports.terminal import plain
from laser_callback.results.comparison import ArmResult, LaserResult
from laser_callback.stats import Outcomes, PairedResult, compare

# ---- the noise -------------------------------------------------------------------------------------------------------


def moved(module: nn.Module, plan: LaserPlan, spectra: Spectra | None = None) -> dict[str, Tensor]:
    """What a plan adds to each weight, in float64."""
    before = {name: parameter.detach().clone().double() for name, parameter in module.named_parameters()}
    with reduced(module, plan, spectra):
        return {name: p.detach().double() - before[name] for name, p in module.named_parameters()}


@pytest.mark.parametrize(
    "cut",
    [
        "1.mlp@0.1",
        "*.attn@0",
        "0.fc_in@0.3:keep=tail, 2.fc_out@0.5:scale=-1",
        "1.fc_in@0.2:band=0.4",
        "1.mlp@0.3:of=entries",
        "1.mlp@0.3:of=reference",
        "1.mlp@0.25:blocks=2",
        "1.fc_in@0.25:norm=whole",
        "1.fc_in@0:bias=cut",
        "*.mlp@global-2",
        "1.fc_in@1, 1.fc_out@0.2",
    ],
)
def test_it_is_as_large_as_what_the_cut_removes(cut: str) -> None:
    module, plan = Toy(), LaserPlan.parse(cut)
    removed, first, second = (moved(module, one) for one in (plan, noise_plan(plan, 1), noise_plan(plan, 2)))
    for name, part in removed.items():
        assert float(first[name].norm()) == pytest.approx(float(part.norm()), rel=1e-5), name
        if part.any() and part.numel() > 1:
            assert not torch.equal(first[name], second[name]), name
            assert abs(float(F.cosine_similarity(first[name].ravel(), part.ravel(), 0))) < 0.6, name
    again = moved(module, noise_plan(plan, 1))
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_of_a_difference_to_a_base_it_is_as_large_as_what_is_cut_of_that() -> None:
    module, base = Toy(seed=1), Toy(seed=0)
    for mine, theirs in zip(module.parameters(), base.parameters(), strict=True):
        mine.data = theirs.data + 0.01 * mine.data
    spectra = Spectra(base=BaseWeights(base, module))
    plan = LaserPlan.parse("1.mlp@0.1:cut=delta")
    removed, noise = (moved(module, one, spectra) for one in (plan, noise_plan(plan, 1)))
    for name, part in removed.items():
        assert float(noise[name].norm()) == pytest.approx(float(part.norm()), rel=1e-4), name
    assert 0 < float(removed["net.encoder.layers.1.linear1.weight"].norm()) < 0.2


@pytest.mark.parametrize("scale", [0.0, 1e-200, 1.0, 1e200])
def test_no_weight_is_too_small_or_too_large(scale: float) -> None:
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = LaserPlan.parse("0.fc_in@0.5")
    (cut,), (noise,) = plan, noise_plan(plan, 7)
    removed, added = ((Spectra().reduce(scale * weight, one) - scale * weight) for one in (cut, noise))
    unit = scale or 1.0
    assert float((added / unit).norm()) == pytest.approx(float((removed / unit).norm()), rel=1e-9)
    assert bool(added.any()) == bool(scale)


@pytest.mark.parametrize("seed", [0, 1, -5, 10**12])
def test_its_seeds_follow_the_seed_and_are_part_of_a_plan(seed: int) -> None:
    plans = control_plans(Toy(), LaserPlan.parse(PLAN), seed, None)
    noises = [plans[name] for name in ("noise 1", "noise 2", "noise 3")]
    assert list(plans) == ["zeroed", "random", "noise 1", "noise 2", "noise 3"]
    assert len({str(plan) for plan in noises}) == 3
    assert all(LaserPlan.parse(str(plan)) == plan for plan in noises)
    others = control_plans(Toy(), LaserPlan.parse(PLAN), seed + 1, None)
    assert not {str(plan) for plan in noises} & {str(plan) for plan in others.values()}


@pytest.mark.parametrize("cut", ["1.writes@0", "1.fc_in@k0, 1.fc_out@0:bias=cut", "1.fc_in@0:of=entries"])
def test_a_plan_that_zeroes_its_matrices_is_no_control_of_itself(cut: str) -> None:
    module, plan = Toy(), LaserPlan.parse(cut)
    own, zeroed = (moved(module, one) for one in (plan, zeroed_plan(plan)))
    assert all(torch.equal(own[name], zeroed[name]) for name in own)
    assert "zeroed" not in control_plans(module, plan, 0, None)


@pytest.mark.parametrize("cut", ["1.writes@0:scale=0.5", "1.writes@0, 1.q_proj@0.1", "1.fc_in@0:keep=tail"])
def test_a_plan_that_leaves_something_has_its_matrices_zeroed(cut: str) -> None:
    assert "zeroed" in control_plans(Toy(), LaserPlan.parse(cut), 0, None)


def test_the_report_says_that_a_dropped_layer_has_no_zeroed_control(trainer: Any) -> None:
    callback = LaserCallback("1.writes@0", controls=True, report=False)
    evaluate(trainer, Toy(), callback)
    result = callback.result
    assert list(result.controls["laser"]) == ["random", "noise"]
    assert "zeroed control of 1.writes@0 (the plan itself sets its matrices to zero)" in plain(result)
    assert "same matrix zeroed" not in plain(result)


# ---- the mean of the passes ------------------------------------------------------------------------------------------


class Measured(Toy):
    """Logs what has a mean over examples, over batches and none; of clusters, and with its own weights."""

    clustered = True

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.f1 = MulticlassF1Score(CLASSES, average="macro")

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, y = batch
        logits = self(x)
        nll, right = F.cross_entropy(logits, y, reduction="none").double(), logits.argmax(1) == y
        self.f1(logits, y)
        self.log("f1", self.f1, on_epoch=True)
        self.log("loss", nll.mean(), batch_size=len(y))
        self.log("entropy", torch.distributions.Categorical(logits=logits).entropy().mean(), batch_size=len(y))
        self.log("acc", right.float().mean(), batch_size=len(y))
        found = {"loss": nll, "acc": right, "perplexity": Outcomes(nll, torch.arange(1.0, 1 + len(y)), "log_ratio")}
        return found | ({"cluster": [f"{batch_idx}-{i // 2}" for i in range(len(y))]} if self.clustered else {})


def noisy(module: pl.LightningModule, data: Any = None, plan: str = PLAN, **options: Any) -> tuple[Any, ArmResult]:
    """The result of a comparison with controls, and the noise in it."""
    callback = LaserCallback(plan, **{"controls": True, "report": False} | options)
    quiet_trainer(callback).validate(module, make_data(48) if data is None else data, verbose=False)
    return callback.result, callback.result.controls["laser"]["noise"]


def outcomes(result: LaserResult, arm: str, metric: str) -> Tensor:
    return torch.cat([torch.as_tensor(b.outcomes[arm][metric].values) for b in result.examples.batches]).double()


def passes(result: LaserResult, metric: str) -> Tensor:
    return torch.stack([outcomes(result, f"laser.noise {number}", metric) for number in (1, 2, 3)])


def assert_same(row: PairedResult, expected: PairedResult) -> None:
    for field in ("original", "reduced", "delta", "lower", "upper", "lower90", "p"):
        assert getattr(row, field) == pytest.approx(getattr(expected, field), rel=1e-9, abs=1e-12), field
    assert (row.n, row.test, row.unit, row.examples) == (expected.n, expected.test, expected.unit, expected.examples)


def test_each_pass_is_what_a_run_with_this_plan_gives(trainer: Any) -> None:
    module = Toy()
    callback = LaserCallback(PLAN, controls=True, report=False)
    evaluate(trainer, module, callback)
    noise = callback.result.controls["laser"]["noise"]
    runs = [oracle(trainer, module, one.plan) for one in noise.passes]
    assert [one.plan for one in noise.passes] == [f"{PLAN}:noise={seed}" for seed in (1, 2, 3)]
    assert len({run["loss"] for run in runs}) == 3
    for key in ("loss", "acc"):
        for one, run in zip(noise.passes, runs, strict=True):
            assert one[key].reduced == pytest.approx(run[key], rel=1e-5)
        assert noise[key].reduced == pytest.approx(sum(run[key] for run in runs) / 3, rel=1e-5)


def test_its_interval_is_of_the_mean_of_each_example() -> None:
    module = Measured()
    module.clustered = False
    result, noise = noisy(module)
    before, cut = (outcomes(result, arm, "loss") for arm in ("original", "laser"))
    mean = passes(result, "loss").mean(0)
    for row, one, other in ((noise["loss"], before, mean), (noise.ahead_in("loss"), mean, cut)):
        expected = stats.ttest_rel(other.numpy(), one.numpy())
        assert (row.metric, row.n, row.test) == ("loss", 48, "paired t")
        assert row.delta == pytest.approx(float((other - one).mean()))
        assert row.p == pytest.approx(expected.pvalue)
        assert (row.lower, row.upper) == pytest.approx(tuple(expected.confidence_interval()))
    # Not the mean of three tests, each with as wide an interval.
    assert not any(one["loss"].p == pytest.approx(noise["loss"].p, rel=0.01) for one in noise.passes)


def test_clusters_are_respected_and_a_mean_of_right_and_wrong_is_a_share() -> None:
    result, noise = noisy(Measured())
    clusters = [label for batch in result.examples.batches for label in batch.described["original"]["cluster"]]
    before, cut, mean = outcomes(result, "original", "acc"), outcomes(result, "laser", "acc"), passes(result, "acc")
    assert 0 < float((mean.mean(0) % 1).count_nonzero()) < 48
    own = compare("acc", Outcomes(before), Outcomes(mean.mean(0)), clusters=clusters)
    ahead = compare("acc", Outcomes(mean.mean(0)), Outcomes(cut), clusters=clusters)
    rows = noise["acc"], noise.ahead_in("acc")
    for row, expected in zip(rows, (own, ahead), strict=True):
        assert_same(row, expected)
        assert (row.unit, row.n, row.kind, row.higher_is_better) == ("cluster", 24, "binary", True)
        assert row.fixed is None


class Perplexed(Measured):
    """Logs its perplexity."""

    def on_validation_epoch_start(self) -> None:
        self.seen: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        found = super().validation_step(batch, batch_idx)
        ratio = found["perplexity"]
        self.seen.append(torch.stack([ratio.values * ratio.weights, ratio.weights], 1))
        return found

    def on_validation_epoch_end(self) -> None:
        total, weight = torch.cat(self.seen).sum(0)
        self.log("perplexity", (total / weight).exp())


def test_perplexities_have_the_mean_of_their_logarithms() -> None:
    result, noise = noisy(Perplexed())
    each = torch.tensor([one["perplexity"].reduced for one in noise.passes], dtype=torch.float64)
    row = noise["perplexity"]
    assert row.kind == "log_ratio"
    assert row.reduced == pytest.approx(float(each.log().mean().exp()), rel=1e-6)
    assert row.reduced != pytest.approx(float(each.mean()), rel=1e-4)
    assert row.note == "; ".join(filter(None, [noise.passes[0]["perplexity"].note, "mean of 3 passes"]))
    ahead = noise.ahead_in("perplexity")
    assert ahead.delta == pytest.approx(result["laser"]["perplexity"].reduced / row.reduced - 1)
    assert ahead.lower is not None
    assert ahead.higher_is_better is False


def test_batches_are_units_where_no_example_has_a_value() -> None:
    result, noise = noisy(Measured())
    row = noise["entropy"]
    assert (row.unit, row.n) == ("batch", 12)
    arms = ["original", *(f"laser.noise {number}" for number in (1, 2, 3))]
    sums = torch.tensor([[batch[arm]["entropy"][0] for batch in result.examples.means] for arm in arms]).double()
    before, after = (Outcomes(values / 4, torch.full((12,), 4.0)) for values in (sums[0], sums[1:].mean(0)))
    assert_same(row, replace(compare("entropy", before, after), unit="batch"))


def test_what_is_no_mean_over_examples_has_no_interval() -> None:
    result, noise = noisy(Measured())
    row = noise["f1"]
    assert row.reduced == pytest.approx(sum(one["f1"].reduced for one in noise.passes) / 3)
    assert (row.lower, row.p, row.test) == (None, None, "not tested")
    assert row.note == "not an average over examples; mean of 3 passes"
    ahead = noise.ahead_in("f1")
    assert ahead.delta == pytest.approx(result["laser"]["f1"].reduced - row.reduced)
    assert ahead_text(ahead) == "whether the cut is better is not tested"


# ---- better than noise, or not ---------------------------------------------------------------------------------------


class Planted(pl.LightningModule):
    """Knows the right answer by one strong direction, and is misled by many weak ones; or is right once it is moved."""

    def __init__(self, moved: bool) -> None:
        super().__init__()
        self.moved = moved
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(16, 16, bias=False))])
            q, _ = torch.linalg.qr(torch.randn(16, 16))
        self.layers[0][0].weight.data = q @ torch.diag(torch.tensor([3.0] + [1.5] * 15)) @ q.T
        self.direction = q[:, 0].clone()
        self.register_buffer("kept", self.layers[0][0].weight.detach().clone())

    def validation_step(self, x: Tensor, batch_idx: int) -> dict[str, Tensor]:
        right = x @ self.direction > 0
        if self.moved:
            right = torch.full_like(right, not torch.equal(self.layers[0][0].weight, self.kept))
            right[::8] = False
        else:
            right = (self.layers[0](x).sum(1) > 0) == (right == bool(self.direction.sum() > 0))
        self.log("acc", right.float().mean(), batch_size=len(x))
        self.log("norm", self.layers[0](x).norm(), batch_size=len(x))
        return {"acc": right}


def planted(moved: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[LaserResult, ArmResult, PairedResult]:
    """A comparison whose cut gains accuracy, with its noise, and the cut's accuracy beside that of the noise."""
    monkeypatch.setattr("laser_callback.compare.run.control_plans", without_random)
    x = torch.randn(240, 16, generator=torch.Generator().manual_seed(1))
    result, noise = noisy(Planted(moved), DataLoader(x, 40), "/layers.0.0/@k1", primary="acc")
    assert result["laser"]["acc"].verdict == "better"
    row = noise.ahead_in("acc")
    assert row is not None
    return result, noise, row


def test_a_cut_that_is_better_than_noise_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    result, noise, row = planted(False, monkeypatch)
    assert result["laser"]["acc"].reduced == 1
    assert row.lower is not None
    assert 0 < row.lower < row.delta == pytest.approx(1 - noise["acc"].reduced)
    assert ahead_text(row) == "the cut is better"
    assert verdict(result, "laser").endswith("(the cut is better)")
    told = " ".join(plain(result, 80).split())
    assert "control, noise of the same size, 3 seeds: acc " in told
    assert f"; the cut is better: +{row.delta:.1%} [+" in told


def test_a_cut_that_gains_no_more_than_noise_is_not_said_to_be_better(monkeypatch: pytest.MonkeyPatch) -> None:
    result, noise, row = planted(True, monkeypatch)
    assert noise["acc"].delta == result["laser"]["acc"].delta == 0.875
    assert (row.delta, row.p) == (0, 1)
    assert verdict(result, "laser").endswith("noise of the same size +87.5% (the cut is not shown to be better)")


def without_random(model: nn.Module, plan: LaserPlan, seed: int, base: Any) -> dict[str, LaserPlan]:
    """The model has one matrix."""
    return {f"noise {number}": noise_plan(plan, number) for number in (1, 2, 3)}


# ---- models that break, files ----------------------------------------------------------------------------------------


class Fragile(Toy):
    """Does not bear noise: a matrix that has its whole rank, and is not its own."""

    raises = True

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        found = super().validation_step(batch, batch_idx)
        rank = int(torch.linalg.matrix_rank(self.net.encoder.layers[1].linear1.weight.detach()))
        is_noisy = rank == 8 and not torch.equal(self.net.encoder.layers[1].linear1.weight, self.kept)
        if is_noisy and self.raises:
            raise ValueError("Input contains NaN.")
        loss = torch.full((len(batch[1]),), math.nan if is_noisy else 1.0)
        self.log("fragile", loss.mean(), batch_size=len(loss))
        return found | {"fragile": loss}

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", self.net.encoder.layers[1].linear1.weight.detach().clone())


def test_noise_that_breaks_the_step_is_told_and_says_nothing_of_the_plan(trainer: Any) -> None:
    callback = LaserCallback(PLAN, controls=True, report=False)
    evaluate(trainer, Fragile(), callback)
    assert list(callback.result.controls["laser"]) == ["zeroed", "random"]
    for number in (1, 2, 3):
        told = callback.result.not_compared[f"noise {number} control of laser"]
        assert f":noise={number}" in told
        assert "fails on batch 0, where the original's does not: ValueError: Input contains NaN." in told
    assert callback.result["laser"]["acc"].n == 10


def test_of_noise_that_gives_no_number_this_is_the_finding() -> None:
    module = Fragile()
    module.raises = False
    result, noise = noisy(module, primary="fragile")
    assert noise["fragile"].test == "not tested"
    assert math.isnan(noise["fragile"].reduced)
    assert "the reduced model's value is nan: there is nothing to test" in noise["fragile"].note
    assert noise.ahead_in("fragile") is None
    assert noise["acc"].lower is not None
    assert "noise of the same size gives nan" in verdict(result, "laser")


def test_a_file_holds_the_passes_and_reads_back(tmp_path: Any) -> None:
    result, noise = noisy(Measured(), report=str(tmp_path / "r.json"))
    read = LaserResult.from_json(tmp_path / "r.json")
    assert read.to_dict() == result.to_dict()
    again = read.controls["laser"]["noise"]
    assert [one.plan for one in again.passes] == [f"{PLAN}:noise={seed}" for seed in (1, 2, 3)]
    assert again.rows == noise.rows
    assert again.ahead == noise.ahead
    turned = result.directed({"loss": True}).controls["laser"]["noise"]
    assert all(row.higher_is_better for arm in (turned, *turned.passes) for row in arm.rows if row.metric == "loss")
    assert all(row.higher_is_better for row in turned.ahead if row.metric == "loss")
    lines = [json.loads(line) for line in (tmp_path / "r.examples.jsonl").read_text().splitlines()]
    assert {"laser.noise 1", "laser.noise 2", "laser.noise 3"} < set(lines[0])
