"""The search against the practice it replaces: python tests/benchmarks/bench_search.py WHAT DATA_FOLDER

speed    on ParaRel, main prompts: (a) the paper's procedure, one example at a time with full logits, (b) the same
         candidates in batches with logits at the answers only; both timed on a sample of the 1,890 candidates,
         stratified by layer, and scaled; (c) this search whole, with a cold and with a warm cache of spectra.
quality  on each data set: what the search finds, confirmed; and whether it is inferior to the cut that an earlier
         prototype had found, on the same examples (margin one point), of which there are as many as the data has.
null     on ParaRel and CounterFact with the answers of each relation dealt anew among its facts, so that there is
         nothing to know: how many of --searches searches claim a gain. Exits with 1 where more than one in 20 does.
scaling  time against examples (75, 150, 300) and layers (the model's first 8, 16, 30), and peak memory against the
         number of candidates that race.

DATA_FOLDER holds pararel.jsonl and so on in this package's facts format. SmolLM2-135M, dequantised from 4 bits.
"""

from __future__ import annotations

import argparse
import logging
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from exhaustive import SIZES
from torch import nn

from laser_callback import FactsDataModule, LaserModule, LaserPlan, LaserSearch, find_matrices
from laser_callback.compare.measure import Lab
from laser_callback.data.demo_model import demo_model_folder
from laser_callback.data.encoding import FactCollator, encode_facts
from laser_callback.data.facts import Fact, read_facts, sample_facts, split_facts
from laser_callback.data.sets import ExampleSets
from laser_callback.data.worldfacts import world_facts
from laser_callback.plans import brief
from laser_callback.spectra.store import Spectra
from laser_callback.stats.outcomes import Outcomes
from laser_callback.stats.paired import compare

RATES = (1, 2, 4, 6, 8, 9, 9.5, 9.9, 9.95)
PROTOTYPE = {
    "pararel": "28.fc_up@0.01",
    "counterfact": "28.fc_out@0.05",
    "bigbench_qa_wikidata": "11.fc_in@0.01",
    "world facts": "11.q_proj@0.05",
}
OTHERS = ("bigbench_epistemic_reasoning", "fever", "truthfulqa_true_false")


def facts_of(folder: Path, name: str, paraphrases: bool = False) -> list[Fact]:
    if name == "world facts":
        facts = [Fact(**{**row, "paraphrases": tuple(row["paraphrases"])}) for row in world_facts()]
    else:
        facts = read_facts(folder / f"{name}.jsonl")
    return facts if paraphrases else [replace(fact, paraphrases=(), choices=()) for fact in facts]


def sets_of(
    module: LaserModule, folder: Path, name: str, seed: int, *, paraphrases: bool = False, most: int = 1500
) -> ExampleSets:
    """The sets of a split of at most so many facts; where there are few, in the search's own shares."""
    facts = facts_of(folder, name, paraphrases)
    if len(facts) > most:
        facts = sample_facts(facts, most, seed)
    data = FactsDataModule(facts, module.tokenizer, batch_size=64)
    if len(facts) < sum(SIZES.values()):
        return ExampleSets.of(data, seed=seed)
    sizes = {**SIZES, "confirm": len(facts) - 400} if name in PROTOTYPE else SIZES
    return ExampleSets.of(data, sizes=sizes, seed=seed)


# ---- speed -----------------------------------------------------------------------------------------------------------


def speed(folder: Path, sample: int, seed: int) -> None:
    module = LaserModule(str(demo_model_folder(print))).eval()
    facts = facts_of(folder, "pararel")
    race = split_facts(facts, SIZES, seed)["race"]
    matrices = [m for m in find_matrices(module) if m.kind is not None]
    layers = 1 + max(m.layer for m in matrices)
    rng = random.Random(seed)
    chosen = []
    for i in range(sample):  # one from each stretch of layers
        stretch = range(i * layers // sample, max((i + 1) * layers // sample, i * layers // sample + 1))
        chosen.append((rng.choice([m for m in matrices if m.layer in stretch]), rng.choice(RATES)))
    total = len(matrices) * len(RATES)

    encoded = encode_facts(race, module.tokenizer, masked=False)
    batch = FactCollator(0, rows_per_forward=64)(encoded)
    one_by_one, batched = [], []
    with torch.inference_mode():
        module._scores(batch)  # warm up
        for matrix, rate in chosen:
            begin = time.perf_counter()
            with cut_like_the_paper(matrix, rate):
                for item in encoded:
                    score_one(module.model, item.rows[0])
            one_by_one.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            with cut_like_the_paper(matrix, rate):
                module._scores(batch)
            batched.append(time.perf_counter() - begin)
            print(f"  {matrix.name} rate {rate}: (a) {one_by_one[-1]:.1f} s, (b) {batched[-1]:.1f} s", flush=True)
    a, b = scaled(one_by_one, total), scaled(batched, total)
    print(f"(a) one example at a time, full logits, {total} candidates: {a[0]:,.0f} s [{a[1]:,.0f}, {a[2]:,.0f}]")
    print(f"(b) in batches, logits at the answers only:                {b[0]:,.0f} s [{b[1]:,.0f}, {b[2]:,.0f}]")

    with tempfile.TemporaryDirectory() as cache:
        for state in ("cold", "warm"):
            data = FactsDataModule(facts, module.tokenizer, batch_size=64)
            begin = time.perf_counter()
            sets = ExampleSets.of(data, sizes=SIZES, seed=seed)
            result = LaserSearch(module, sets, spectra=Spectra(cache), progress=False, seed=seed).run()
            seconds = time.perf_counter() - begin
            parts = ", ".join(f"{phase.name} {phase.seconds:.1f}" for phase in result.phases)
            print(f"(c) this search, {state} cache: {seconds:.1f} s ({parts})")
            print(
                f"    (a) / (c) = {a[0] / seconds:,.0f}, (b) / (c) = {b[0] / seconds:,.0f}; {result.reason}", flush=True
            )
            single = sum(p.seconds for p in result.phases if p.name in ("screen", "race", "confirm"))
            print(
                f"    screen + race + confirm: {single:.1f} s, (a) {a[0] / single:,.0f} x, (b) {b[0] / single:,.0f} x"
            )
        measured = against(module, sets, result.found, PROTOTYPE["pararel"])
        print(f"    {measured}")


class cut_like_the_paper:
    """One (layer, kind, rate) by torch.svd_lowrank, written over the weight, as in the paper's code."""

    def __init__(self, matrix, rate: float) -> None:
        self.matrix, self.rate = matrix, rate

    def __enter__(self) -> None:
        self.data = self.matrix.parameter.data
        weight = self.matrix.read(self.data)
        rank = max(1, int(self.matrix.max_rank * (10 - self.rate) * 0.1))
        u, s, v = torch.svd_lowrank(weight.float(), q=rank, niter=2)
        cut = self.data.clone()
        self.matrix.write(cut, u @ torch.diag(s) @ v.T)
        self.matrix.parameter.data = cut

    def __exit__(self, *_) -> None:
        self.matrix.parameter.data = self.data


def score_one(model: nn.Module, row) -> tuple[bool, float]:
    """Log probability and correctness of one answer from all logits of one unbatched forward pass."""
    logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
    log_probs = logits.log_softmax(-1)[list(row.positions)]
    targets = torch.tensor(row.targets)
    loss = -log_probs.gather(1, targets[:, None]).mean()
    return bool(log_probs[0].argmax() == targets[0]), float(loss)


def scaled(seconds: list[float], total: int) -> tuple[float, float, float]:
    """Total of all candidates from a sample's mean, with a 95 % interval (t)."""
    from scipy import stats

    mean, error = statistics.mean(seconds), statistics.stdev(seconds) / len(seconds) ** 0.5
    margin = float(stats.t.ppf(0.975, len(seconds) - 1)) * error
    return total * mean, total * (mean - margin), total * (mean + margin)


# ---- quality ---------------------------------------------------------------------------------------------------------


def quality(folder: Path, only: str, seed: int, paraphrases: bool, reductions: int) -> None:
    module = LaserModule(str(demo_model_folder(print)))
    print(
        "| data | n | found | first token | fixed / broken, p | log loss | said most left out | zeroed "
        "| found - prototype |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in (*PROTOTYPE, *OTHERS):
        if only and only not in name:
            continue
        begin = time.perf_counter()
        sets = sets_of(module, folder, name, seed, paraphrases=paraphrases)
        search = LaserSearch(module, sets, progress=False, seed=seed, constraints=[], max_reductions=reductions)
        result = search.run()
        seconds = time.perf_counter() - begin
        cells = [name]
        if result.confirmed is not None:
            arm = result.confirmed["laser"]
            first, loss = arm["first_token_accuracy"], arm["log_loss"]
            checks = arm.prior_checks["first_token_accuracy"]
            rest = checks.majority_excluded
            zeroed = result.confirmed.controls["laser"].get("zeroed")
            cells += [
                str(first.n),
                brief(result.found),
                f"{first.original:.1%} -> {first.reduced:.1%} [{first.lower:+.1%}, {first.upper:+.1%}]",
                f"{first.fixed} / {first.broken}, {first.p:.1g}",
                f"{loss.original:.2f} -> {loss.reduced:.2f}",
                (f"{rest.original:.1%} -> {rest.reduced:.1%}" if rest else "none left")
                + (" (flagged)" if checks.doubt else ""),
                "itself" if zeroed is None else f"{zeroed['first_token_accuracy'].reduced:.1%}",
                against(module, sets, result.found, PROTOTYPE[name]) if name in PROTOTYPE else "",
            ]
        print(f"| {' | '.join(cells)} |", flush=True)
        print(f"<!-- {seconds:.0f} s; {result.reason} -->", flush=True)


def against(module: LaserModule, sets: ExampleSets, found: LaserPlan, prototype: str) -> str:
    """Found minus prototype on the confirm set: the difference of accuracies and whether it is inferior by a point."""
    plans = {"found": found, "prototype": LaserPlan.parse(prototype)}
    table = Lab(module, Spectra.default()).measure(plans, sets.loader("confirm"), ("first_token_accuracy",))
    before, after = (
        Outcomes(table[arm]["first_token_accuracy"].values, kind="binary") for arm in ("prototype", "found")
    )
    row = compare("first_token_accuracy", before, after)
    verdict = "not inferior" if row.lower90 > -0.01 else "inferior" if row.upper90 < -0.01 else "undecided"
    return f"{row.delta:+.1%} [{row.lower90:+.1%}, {row.upper90:+.1%}] {verdict}"


# ---- nothing to find -------------------------------------------------------------------------------------------------


def null(folder: Path, searches: int, seed: int) -> int:
    module = LaserModule(str(demo_model_folder(print)))
    claimed = 0
    for number in range(searches):
        name, rng = ("pararel", "counterfact")[number % 2], random.Random(seed + number)
        facts = dealt_anew(facts_of(folder, name), rng)
        data = FactsDataModule(facts, module.tokenizer, batch_size=64)
        sets = ExampleSets.of(data, sizes={**SIZES, "confirm": len(facts) - 400}, seed=seed + number)
        search = LaserSearch(module, sets, progress=False, seed=seed + number, constraints=[], controls=False)
        result = search.run()
        claimed += result.plan is not None
        print(f"{name} {seed + number}: {'CLAIMED' if result.plan else 'kept'}; {result.reason}", flush=True)
    print(f"{claimed} of {searches} searches claim a gain")
    return int(claimed > searches / 20)


def dealt_anew(facts: list[Fact], rng: random.Random) -> list[Fact]:
    """The same facts and answers, but whose answer is whose is drawn within each group."""
    answers: dict[str, list[str]] = {}
    for fact in facts:
        answers.setdefault(fact.group, []).append(fact.answer)
    for group in answers.values():
        rng.shuffle(group)
    return [replace(fact, answer=answers[fact.group].pop()) for fact in facts]


# ---- scaling ---------------------------------------------------------------------------------------------------------


def scaling(folder: Path, seed: int) -> None:
    print("| layers | race examples | candidates | seconds | screen | race | peak above the model, MB |")
    print("|---|---|---|---|---|---|---|")
    for layers, examples, candidates in (
        (30, 75, 48), (30, 150, 48), (30, 300, 48), (8, 300, 48), (16, 300, 48), (30, 150, 12), (30, 150, 192),
    ):  # fmt: skip
        command = [sys.executable, __file__, "one", str(folder), "--seed", str(seed)]
        command += ["--layers", str(layers), "--examples", str(examples), "--candidates", str(candidates)]
        subprocess.run(command, check=True)  # a process each: peak memory is the process' own


def one(folder: Path, layers: int, examples: int, candidates: int, seed: int) -> None:
    module = LaserModule(str(demo_model_folder(print)))
    module.model.model.layers = module.model.model.layers[:layers]
    module.model.config.num_hidden_layers = layers
    facts = facts_of(folder, "pararel")
    data = FactsDataModule(facts, module.tokenizer, batch_size=64)
    sizes = {"screen": 100, "race": examples, "confirm": 100}
    with torch.no_grad():
        module.model(input_ids=torch.ones(1, 8, dtype=torch.long))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as cache:
        begin = time.perf_counter()
        sets = ExampleSets.of(data, sizes=sizes, seed=seed)
        options = {"spectra": Spectra(cache), "candidates": candidates, "controls": False}
        result = LaserSearch(module, sets, progress=False, seed=seed, **options).run()
        seconds = time.perf_counter() - begin
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    phase = {p.name: f"{p.seconds:.1f}" for p in result.phases}
    cells = (layers, examples, candidates, f"{seconds:.1f}", phase["screen"], phase["race"], f"{peak:.0f}")
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "quality", "null", "scaling", "one"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sample", type=int, default=12, help="candidates timed for (a) and (b)")
    parser.add_argument("--only", default="", help="data sets whose name contains this")
    parser.add_argument("--paraphrases", action="store_true", help="judge by paraphrases too")
    parser.add_argument("--reductions", type=int, default=1)
    parser.add_argument("--searches", type=int, default=20)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--candidates", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if options.what == "speed":
        speed(options.folder, options.sample, options.seed)
    elif options.what == "quality":
        quality(options.folder, options.only, options.seed, options.paraphrases, options.reductions)
    elif options.what == "null":
        return null(options.folder, options.searches, options.seed)
    elif options.what == "scaling":
        scaling(options.folder, options.seed)
    else:
        one(options.folder, options.layers, options.examples, options.candidates, options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
