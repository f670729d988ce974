"""A small classifier whose cut fixes some examples and breaks others, with texts nobody should trust; its search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from candidates import proposed
from torch import nn
from torch.utils.data import DataLoader
from trainers import quiet_trainer

from laser_callback import LaserCallback, reduced
from laser_callback.results.candidates import Estimate
from laser_callback.results.cleanup import CleanupResult, Contender
from laser_callback.results.comparison import LaserResult
from laser_callback.results.gates import GateVerdict
from laser_callback.results.other_tasks import TARGET, OtherTask
from laser_callback.results.search import Phase, SearchResult, Trade
from laser_callback.stats.judgement import Judgement
from laser_callback.stats.outcomes import PairedResult

PLAN = "1.mlp@0.1, 0.q_proj@0.25"
LABELS = ["</script>", "<b>", "$x^2$ & more", "الرياض", " ", "'\"`"]
HOSTILE = "</title></script><script>alert(1)</script><img src=x onerror=alert(2)>"
RIGHT_TO_LEFT = "\u202eevil\u202c"


class Classifier(pl.LightningModule):
    """Half of its labels are what it says itself, half are what it says with the cut in place."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
            self.model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 6))
            self.x = torch.randn(64, 3, 16)
        self.eval()
        with torch.no_grad():
            before = self(self.x)
            with reduced(self, PLAN):
                after = self(self.x)
        self.labels = torch.where(torch.arange(64) % 2 == 0, before, after)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)[:, -1].argmax(-1)

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        said = self(batch["x"])
        right = said == batch["label"]
        self.log("<i>acc</i>", right.float().mean(), batch_size=len(right))
        return {
            "<i>acc</i>": right,
            "id": batch["id"],
            "prompt": [f"{HOSTILE} {i} {RIGHT_TO_LEFT}" for i in batch["id"].tolist()],
            "answer": [LABELS[i] for i in batch["label"]],
            "prediction": [LABELS[i] for i in said],
        }

    def rows(self) -> DataLoader[Any]:
        rows = [{"x": x, "label": y, "id": i} for i, (x, y) in enumerate(zip(self.x, self.labels, strict=True))]
        return DataLoader(rows, batch_size=16)


def compared(plan: Any = PLAN, logger: Any = False, **options: Any) -> LaserResult:
    """A real comparison of the classifier with its cut."""
    callback = LaserCallback(plan, **{"primary": "<i>acc</i>", "controls": True, "report": False} | options)
    module = Classifier()
    quiet_trainer(callback, logger=logger).validate(module, module.rows(), verbose=False)
    return callback.result


def searched(confirmed: LaserResult | None = None) -> SearchResult:
    """A search of 3 layers, 2 kinds and what has no kind at 3 rhos, in two steps, with every status and gap."""
    found = [
        proposed(f"{layer}.{kind}@{rho}", score=0.01 * (rho - 0.05) * (1 + layer) * 2**place)
        for place, kind in enumerate(("q_proj", "fc_out"))
        for layer in range(3)
        for rho in (0.0, 0.1, 0.5)
    ]
    found += [proposed("/lstm.*<b>/@0.1", score=float("nan"))]
    for place, candidate in enumerate(found[:6]):
        candidate.examples, candidate.status, candidate.reason = 100, "dropped out", f"place {place} <i>of</i> 6"
        candidate.gain = Estimate(0.05 - 0.02 * place, 0.01 - 0.02 * place, 0.09 - 0.02 * place)
        candidate.loss = Estimate(-0.4 + 0.1 * place, -0.5 + 0.1 * place, -0.3 + 0.1 * place)
    found[0].status, found[0].reason = "chosen", ""
    found.append(proposed("1.q_proj@0.1", base="0.q_proj@0", score=-9.0, examples=100))
    plan = found[0].plan
    return SearchResult(
        plan,
        plan,
        f"it is right more often {HOSTILE}",
        ("<i>acc</i>",),
        found,
        [
            Trade(str(plan), 0.05, 0.013, True, True),
            Trade("0.q_proj@0.5", 0.01, 0.04),
            Trade("2.q_proj@0.1", 0.02, None),
        ],
        confirmed,
        None,
        [Judgement("perplexity <= +2 %", "perplexity", 32, 0.013, 0.031, "undecided", "96 windows decide it")],
        [Phase("screen", 24.84, 100, 300.0), Phase("race", 3725.0, 9600, 1800.4)],
        {"screen": 100, "race": 300, "confirm": 400, "guard": 200},
        {"strategies": ["laser"], "loss": "log_loss", "versions": {"torch": "2"}, "rhos": [0.0, 0.1, 0.5]},
        [f"few examples {HOSTILE}"],
    )


def cleaned(confirmed: LaserResult | None = None) -> CleanupResult:
    """A cleanup with contenders of all kinds, gates, and what it did to a damaged task and the target."""
    search = searched()
    found = str(search.found)

    def row(metric: str, before: float, after: float, p: float) -> PairedResult:
        ends = (after - before - 0.1, after - before + 0.1)
        return PairedResult(metric, "binary", 80, before, after, after - before, *ends, *ends, p, test="exact McNemar")

    return CleanupResult(
        "saved/epoch=1<b>.ckpt",
        search,
        [
            Contender("as trained", "saved/epoch=1<b>.ckpt", value=0.8, said_most=0.5, balanced=0.75),
            Contender("strategy", found, "laser", 0.05, 100, 0.9, 0.4, 0.85, confirmed=True),
            Contender("WiSE-FT", "*.all@0:scale=0.4,cut=delta", "delta", 0.02, 100, 0.85),
            Contender("checkpoint", "saved/epoch=0.ckpt", "", -0.01, 50, 0.7),
        ],
        found,
        confirmed,
        [Judgement("perplexity <= +2 %", "perplexity", 32, 0.013, 0.031, "undecided", "96 windows decide it")],
        GateVerdict(search.found, [Judgement("acc: gain", "acc", 80, 0.1, 0.05, "pass")], {}, "out of <i>time</i>"),
        [
            OtherTask(TARGET, row("acc", 0.5, 0.8, 0.001), row("acc", 0.8, 0.9, 0.01), 1),
            OtherTask("old <b>", row("acc", 0.9, 0.6, 0.001), row("acc", 0.6, 0.75, 0.02), 1),
        ],
        [f"a note {HOSTILE}"],
        "it is right more often",
        search.plan,
        checkpoint=Path("saved/epoch=1.cleaned.ckpt"),
    )
