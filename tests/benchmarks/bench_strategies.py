"""Each strategy alone, on the same footing: python tests/benchmarks/bench_strategies.py DATA_FOLDER

Every strategy searches the same splits (--seeds) of ParaRel, CounterFact, WikidataQA and the world facts with the same
budget: 40 candidates and the default race, in which it may propose neighbours. What it finds is confirmed on the same
examples, which nothing was chosen by. No constraint takes part: what a plan does to running text is measured beside it,
on 8 windows of 256 tokens of wikitext2.txt.

Columns of the table
    first token   right answers of the confirm set before and after, with the 95 % interval of the change, the facts
                  fixed and broken, and the exact p value over subjects
    race          the change on the race examples that chose the plan: what a method would report that tests on what it
                  chose by
    - laser       the change ahead of the strategy ``laser`` on the same examples, with interval and p value
    perplexity    relative change; KL is the mean divergence of the next token, original from reduced, in nats
    verdict       the search's: whether the plan is recommended, or the prior check or p value forbids it
    CPU s         seconds of the process' CPU, so that they can be compared on a machine that does other work as well;
                  with the factorisations of the weights in the cache, if an earlier search has left them there
    passes        examples that the race has computed, each counted by the share of the layers that ran

A strategy *wins* on a split where its plan is recommended and no other strategy's is shown to be better (p <= .05). It
is ahead of ``laser`` where it is shown to be better than that. Neither is corrected for the number of strategies.

Each finished (data, seed, strategy) is a line of --results: a later call goes on with what is missing, and prints all.
DATA_FOLDER holds pararel.jsonl and so on in this package's facts format. SmolLM2-135M, dequantised from 4 bits.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_search import PROTOTYPE, sets_of
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from laser_callback import LaserModule, LaserPlan, LaserSearch, reduced
from laser_callback.data.datamodule import TextWindows
from laser_callback.data.demo_model import demo_model_folder
from laser_callback.data.sets import ExampleSets
from laser_callback.plans import brief
from laser_callback.results.comparison import LaserResult
from laser_callback.results.search import SearchResult
from laser_callback.spectra.store import Spectra
from laser_callback.stats.outcomes import Outcomes, PairedResult
from laser_callback.stats.paired import compare

NAMES = ("laser", "drop", "components", "whitened", "blocks", "laser-rmt", "reference", "late-mlp", "random")
CANDIDATES = 40
WINDOWS = 8
KEY = "first_token_accuracy"
COLUMNS = (
    "strategy", "found", "first token", "race", "- laser", "log loss", "perplexity", "KL", "verdict", "CPU s", "passes"
)  # fmt: skip
COUNTED = ("strategy", "splits", "recommended", "of these, text within 5 %", "ahead of laser, behind it", "wins", "on")

Row = dict[str, Any]


def searched(module: LaserModule, sets: ExampleSets, strategy: str, seed: int, text: TextWindows) -> Row:
    """What one strategy finds on one split, and what that does."""
    options: dict[str, Any] = {"constraints": [], "controls": False, "progress": False}
    search = LaserSearch(module, sets, strategies=[strategy], candidates=CANDIDATES, seed=seed, **options)
    begin = time.process_time()
    try:
        result = search.run()
    except MisconfigurationException as refusal:  # nothing to propose for this model
        return {"recommended": False, "reason": str(refusal)}
    row: Row = {
        "recommended": result.plan is not None,
        "reason": result.reason,
        "seconds": round(time.process_time() - begin, 1),
        "passes": round(sum(p.whole_passes for p in result.phases if p.name in ("race", "refine"))),
        "proposed": len(result.candidates),
        "raced": sum(candidate.examples > 0 for candidate in result.candidates),
    }
    if result.found is None:
        return row
    perplexity, divergence = fluency(module, result.found, text)
    row |= {"found": str(result.found), "perplexity": perplexity, "divergence": divergence, "race": gain_of(result)}
    return row if result.confirmed is None else row | confirmed(result.confirmed)


def gain_of(result: SearchResult) -> float | None:
    """On the race examples of the plan that they chose."""
    gains = [candidate.gain for candidate in result.candidates if candidate.status == "chosen"]
    return gains[0].delta if gains and gains[0] is not None else None


def confirmed(result: LaserResult) -> Row:
    """The numbers of the confirm set, and whose answers are right, by which strategies are compared."""
    row, loss, checks = result["laser"][KEY], result["laser"]["log_loss"], result["laser"].prior_checks[KEY]
    examples = sorted(result.examples.to_rows(), key=lambda example: example["id"])
    subjects = {subject: number for number, subject in enumerate(dict.fromkeys(e["cluster"] for e in examples))}
    return {
        "confirmed": {name: getattr(row, name) for name in ("n", "original", "reduced", "lower", "upper", "p")},
        "flips": [row.fixed, row.broken],
        "log_loss": [loss.original, loss.reduced],
        "doubt": checks.doubt,
        "right": "".join(str(int(example["laser"][KEY])) for example in examples),
        "subjects": [subjects[example["cluster"]] for example in examples],
    }


@torch.no_grad()
def fluency(module: LaserModule, plan: LaserPlan, text: TextWindows) -> tuple[float, float]:
    """The relative change of the perplexity, and the mean divergence of the next token."""
    windows = [torch.tensor([text[i * len(text) // WINDOWS]["input_ids"]]) for i in range(WINDOWS)]

    def log_probs() -> list[torch.Tensor]:
        return [module.model(input_ids=window).logits[0, :-1].log_softmax(-1) for window in windows]

    module.eval()
    before = log_probs()
    with reduced(module, plan, Spectra.default()):
        after = log_probs()
    changes, divergences = [], []
    for window, old, new in zip(windows, before, after, strict=True):
        changes.append((old - new).gather(1, window[0, 1:, None]))
        divergences.append((old.exp() * (old - new)).sum(-1))
    return float(torch.cat(changes).mean().exp() - 1), float(torch.cat(divergences).mean())


# ---- the table -------------------------------------------------------------------------------------------------------


def ahead(one: Row, other: Row) -> PairedResult | None:
    """What ``one`` has right more than ``other``, on the same examples; ``None`` where either has found nothing."""
    if "right" not in one or "right" not in other:
        return None
    assert one["subjects"] == other["subjects"], "the confirm sets differ"
    before, after = (Outcomes(torch.tensor([*map(float, row["right"])]), kind="binary") for row in (other, one))
    return compare(KEY, before, after, clusters=one["subjects"])


def winners(rows: Iterable[Row]) -> list[str]:
    """Whose plan is recommended, and shown to be worse than no other's."""
    rows = list(rows)

    return [row["strategy"] for row in rows if row["recommended"] and not any(beats(other, row) for other in rows)]


def beats(one: Row, other: Row) -> bool:
    """Whether ``one`` is shown to be right more often."""
    found = ahead(one, other)
    return found is not None and found.delta > 0 and found.p is not None and found.p <= 0.05


def cells(row: Row, laser: Row | None) -> list[str]:
    """One strategy's line of the table."""
    if "confirmed" not in row:
        return [row["strategy"], row.get("found", "nothing"), *[""] * 6, row["reason"], *costs(row)]
    c, (fixed, broken), (before, after) = row["confirmed"], row["flips"], row["log_loss"]
    more = None if laser is None or laser is row else ahead(row, laser)
    return [
        row["strategy"],
        f"`{brief(row['found'])}`",
        f"{c['original']:.1%} to {c['reduced']:.1%} [{c['lower']:+.1%}, {c['upper']:+.1%}], {fixed} / {broken}, "
        f"p {c['p']:.1g}",
        f"{row['race']:+.1%}",
        "" if more is None else f"{more.delta:+.1%} [{more.lower:+.1%}, {more.upper:+.1%}], p {more.p:.1g}",
        f"{before:.2f} to {after:.2f}",
        f"{row['perplexity']:+.1%}",
        f"{row['divergence']:.3f}",
        "use it" if row["recommended"] else f"keep the original: {row['doubt'] or 'not significant'}",
        *costs(row),
    ]


def costs(row: Row) -> list[str]:
    return [f"{row['seconds']:.0f}", f"{row['passes']:,}"] if "seconds" in row else ["", ""]


def show(rows: Iterable[Row]) -> None:
    """A table for each split, and what became of each strategy."""
    splits: dict[tuple[str, int], list[Row]] = {}
    for row in sorted(rows, key=lambda row: NAMES.index(row["strategy"]) if row["strategy"] in NAMES else len(NAMES)):
        splits.setdefault((row["data"], row["seed"]), []).append(row)
    for (data, seed), listed in splits.items():
        subjects = next((row["confirmed"]["n"] for row in listed if "confirmed" in row), 0)
        print(f"\n{data}, seed {seed}, {subjects:,} subjects; not beaten: {', '.join(winners(listed)) or 'none'}\n")
        print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
        laser = next((row for row in listed if row["strategy"] == "laser"), None)
        for row in listed:
            print(f"| {' | '.join(cells(row, laser))} |")
    print(f"\n| {' | '.join(COUNTED)} |\n{'|---' * len(COUNTED)}|")
    for strategy in dict.fromkeys(row["strategy"] for listed in splits.values() for row in listed):
        print(f"| {strategy} | {' | '.join(map(str, counts(strategy, splits)))} |")


def counts(strategy: str, splits: Mapping[tuple[str, int], Sequence[Row]]) -> tuple[int | str, ...]:
    """What became of a strategy on all splits."""
    by_name = [{row["strategy"]: row for row in listed} for listed in splits.values()]
    own = [found[strategy] for found in by_name if strategy in found]
    pairs = [(found[strategy], found["laser"]) for found in by_name if strategy in found and "laser" in found]
    gained = [row for row in own if row["recommended"]]
    fluent = sum(row["perplexity"] <= 0.05 for row in gained)
    better, worse = sum(beats(row, laser) for row, laser in pairs), sum(beats(laser, row) for row, laser in pairs)
    won = [data for (data, _), listed in splits.items() if strategy in winners(listed)]
    return len(own), len(gained), fluent, f"{better}, {worse}", len(won), ", ".join(dict.fromkeys(won))


# ---- in pieces -------------------------------------------------------------------------------------------------------


def read(path: Path, about: Mapping[str, Any]) -> list[Row]:
    """The rows of earlier calls with these settings."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if all(row[name] == value for name, value in about.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path, default=Path("strategies.jsonl"), help="what is finished")
    parser.add_argument("--only", default=",".join(NAMES), help="strategies, with commas")
    parser.add_argument("--data", default="", help="data sets whose name contains this")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the splits")
    parser.add_argument("--limit", type=int, default=1500, help="at most so many facts of each data set")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    module = LaserModule(str(demo_model_folder(print)))
    text = TextWindows(options.folder / "wikitext2.txt", module.tokenizer)
    settings = {"limit": options.limit, "candidates": CANDIDATES}
    done = read(options.results, settings)
    for seed in options.seeds:
        for data in (name for name in PROTOTYPE if options.data in name):
            sets = sets_of(module, options.folder, data, seed, most=options.limit)
            for strategy in options.only.split(","):
                about = {"data": data, "seed": seed, "strategy": strategy, **settings}
                if any(all(row[name] == value for name, value in about.items()) for row in done):
                    continue
                row = about | searched(module, sets, strategy, seed, text)
                with options.results.open("a") as file:
                    print(json.dumps(row), file=file)
                done.append(row)
                print(f"{data} {seed}: {' | '.join(cells(row, None))}", flush=True)
    show(done)


if __name__ == "__main__":
    main()
