"""The search as a user runs it: a planted effect is found and confirmed, luck is not, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import threading
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from benchmarks.planted import plant
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from recall import QUIET, SEARCH, Recall
from tiny import tiny_causal_lm, tiny_tokenizer
from torch.utils.data import DataLoader, TensorDataset
from weights import same, weights

from laser_callback import FactsDataModule, LaserModule, LaserSearch
from laser_callback.cli.command import Exit
from laser_callback.cli.commands import main
from laser_callback.compare.measure import Lab
from laser_callback.data.sets import ExampleSets
from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.target import RHOS, targets
from laser_callback.search.candidates import shortlist
from laser_callback.search.screen import GradientScreen
from laser_callback.spectra.store import Spectra

# ---- what it finds ---------------------------------------------------------------------------------------------------


def test_a_planted_effect_in_an_early_attention_matrix_is_found_and_confirmed(planted, recall):
    module, loader = recall
    before, flags = weights(module), [p.requires_grad for p in module.parameters()]
    result = LaserSearch(module, loader, **SEARCH).run()
    (found,) = result.found
    assert (found.layer, found.matrix) == (planted.target.address["layer"], planted.target.address["matrix"])
    row = result.confirmed["laser"]["val_acc"]
    assert result.plan == result.found
    assert row.p < 0.05
    assert row.delta > 0
    assert row.n == result.sets["confirm"] == 160
    assert set(result.confirmed.controls["laser"]) == {"zeroed", "random", "noise"}
    assert "; controls: the same matrix zeroed" in result.reason
    assert not any("confirm set" in warning for warning in result.warnings), "it was large enough, after all"
    assert same(module, before)
    assert flags == [p.requires_grad for p in module.parameters()]
    assert all(p.grad is None for p in module.parameters())
    winner = next(c for c in result.candidates if c.status == "chosen")
    assert winner.examples == result.sets["race"]
    assert {phase.name for phase in result.phases} == {"screen", "race", "refine", "confirm"}
    assert any(c.examples and c.rho not in RHOS for c in result.candidates), "between the grid's rhos"


@pytest.mark.slow
def test_a_model_whose_spectra_have_no_room_is_screened_in_parts(recall, monkeypatch):
    module, loader = recall
    made, end = [], GradientScreen.on_validation_end
    monkeypatch.setattr(
        GradientScreen,
        "on_validation_end",
        lambda self, *args: (made.append(self._spectra.factorised), end(self, *args)),
    )
    scores, counts = [], []
    for memory in (2**30, 80_000):
        made.clear()
        result = LaserSearch(module, loader, **SEARCH, spectra=Spectra(memory_bytes=memory)).run()
        scores.append({str(candidate.plan): candidate.score for candidate in result.candidates})
        counts.append(made.copy())
    assert scores[0] == scores[1]
    matrices = sum(len(target.matrices) for target in targets(module))
    assert counts[0] == [matrices]
    assert len(counts[1]) > 3  # passes
    assert counts[1][-1] == matrices  # each once, not once per batch


@pytest.mark.slow
def test_the_same_seed_gives_the_same_search(recall):
    module, loader = recall
    first, second = (LaserSearch(module, loader, **SEARCH, seed=3).run().to_dict() for _ in range(2))
    for result in (first, second):
        for phase in result["phases"]:
            phase["seconds"] = 0
        for arms in ({"": result["confirmed"]}, result["confirmed"]["controls"]):
            strip_times(arms)
    assert first == second


def strip_times(data: Any) -> None:
    if isinstance(data, dict):
        for key, value in data.items():
            if "seconds" in key:
                data[key] = 0
            strip_times(value)
    elif isinstance(data, list):
        for value in data:
            strip_times(value)


def test_exhaustive_finds_it_too_and_tries_everything(planted, recall):
    module, loader = recall
    result = LaserSearch(module, loader, **SEARCH, method="exhaustive", rhos=(0.1, 0.5)).run()
    assert next(iter(result.found)).matrix == planted.target.address["matrix"]
    assert all(c.examples == result.sets["race"] for c in result.candidates)
    assert all(c.score is None for c in result.candidates)


def test_the_reference_selects_as_the_papers_code_does(recall):
    module, loader = recall
    result = LaserSearch(module, loader, **SEARCH, method="paper", within="0.attn").run()
    assert result.sets == {"race": 80, "confirm": 320}  # the first fifth, and the rest
    assert len({c.rho for c in result.candidates}) == 8  # its nine rates, of which two make rank 1 of 64
    tried = [c for c in result.candidates if c.examples]
    best = max(tried, key=lambda c: (c.gain.delta, -c.loss.delta))
    assert result.found == best.plan
    # Confirmed is the cut that was tried: by torch.svd_lowrank, not the exact one.
    row = result.confirmed["laser"]["val_loss"]
    exact = Lab(module, Spectra(), "cpu").compare(
        LaserPlan(replace(cut, of="rank") for cut in result.found),
        ExampleSets.reference(loader).loader("confirm"),
        primary="val_acc",
        controls=False,
    )
    assert row.reduced != exact["laser"]["val_loss"].reduced


@pytest.mark.parametrize("strategies", ["late-mlp", ["gavish-donoho", "laser"]])
def test_other_strategies(recall, strategies):
    module, loader = recall
    result = LaserSearch(module, loader, **SEARCH, strategies=strategies, controls=False).run()
    names = ["late-mlp"] if strategies == "late-mlp" else strategies
    assert {c.strategy for c in result.candidates if c.examples} == set(names)
    assert result.settings["strategies"] == names
    assert {c.strategy for c in result.candidates if c.score is not None} == {"laser"} & set(names)
    assert ("screen" in {phase.name for phase in result.phases}) == ("laser" in names)


def test_luck_is_not_recommended():
    """A random model on random labels: something looks best in the race, and is not confirmed."""
    torch.manual_seed(0)
    module = Recall(plant(layers=1, subjects=4, steps=2).module.model).eval()
    vocabulary = module.model.config.vocab_size
    data = TensorDataset(torch.randint(vocabulary, (300, 6)), torch.randint(vocabulary, (300,)))
    result = LaserSearch(module, DataLoader(data, batch_size=100), **SEARCH).run()
    assert result.plan is None
    assert result.verdict.startswith("keep the original: ")


@pytest.mark.slow
def test_composing_accepts_only_what_fresh_examples_confirm(recall):
    module, loader = recall
    before = weights(module)
    result = LaserSearch(module, loader, **SEARCH, max_reductions=2).run()
    second = [c for c in result.candidates if c.base]
    assert second
    first = next(iter(result.found))
    assert {c.base for c in second} == {str(first)}
    assert all((c.kind, c.layer) != (first.matrix, first.layer) for c in second)
    if len(result.found) == 1:
        assert any(c.status == "rejected" for c in second)
    assert same(module, before)
    accept = next(phase for phase in result.phases if phase.name == "accept")
    assert accept.passes > 0


class ByKey(Recall):
    """Returns its loss per example, under the name that it logs, and no other."""

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        found = super().validation_step(batch, batch_idx)
        del found["loss"]
        return found


@pytest.mark.slow
def test_the_screen_differentiates_what_the_loss_is_returned_under(recall):
    module, loader = recall
    expected, found = (LaserSearch(m, loader, **SEARCH).run() for m in (module, ByKey(module.model).eval()))
    scores = [{str(c.plan): c.score for c in result.candidates if c.score} for result in (expected, found)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4, abs=1e-7)


@pytest.mark.slow
def test_minimising_a_plain_loss_without_outcomes_per_example(recall):
    class Plain(Recall):
        def validation_step(self, batch, batch_idx):
            output = super().validation_step(batch, batch_idx)
            return output["loss"]

    module, loader = recall
    sets = ExampleSets.of(DataLoader(loader.dataset, batch_size=10))
    options = {**SEARCH, "objective": "val_loss", "direction": "min", "loss": None}
    result = LaserSearch(Plain(module.model).eval(), sets, **options).run()
    assert next(c for c in result.candidates if c.status == "chosen").gain.delta > 0
    assert result.confirmed["laser"]["val_loss"].note == "unit: the batch"


# ---- facts -----------------------------------------------------------------------------------------------------------

WORDS = "Paris Rome yen Canberra Portuguese French Italy Japan Brazil France capital currency city people true"
WORDS = WORDS.split(" ")


def facts(count: int = 120) -> list[dict]:
    return [
        {
            "id": str(i),
            "prompt": f"The {WORDS[i % 15]} of {WORDS[(7 * i + i // 15) % 15]} number {i} is",
            "answer": WORDS[5 * i % 15],
            "paraphrases": [f"{WORDS[(7 * i + i // 15) % 15]} {i} has the {WORDS[i % 15]}"],
            "group": str(i % 3),
        }
        for i in range(count)
    ]


BOUNDS = ["perplexity <= +5 %", "paraphrase_robustness >= -0.02"]  # the default


def facts_data(module: LaserModule, **options: Any) -> FactsDataModule:
    return FactsDataModule(facts(), module.tokenizer, batch_size=16, **options)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(
        " ".join(f"The capital of {WORDS[i % 13]} is {WORDS[i % 15]}, number {i} of 400." for i in range(400))
    )
    return path


@pytest.mark.slow
def test_facts_have_an_objective_constraints_and_a_trade_off(text):
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer())
    options = {"candidates": 8, "controls": False, "constraints": [*BOUNDS, "kl <= 30", "top1_agreement >= -1"]}
    result = LaserSearch(module, facts_data(module, text=text), **options, **QUIET).run()
    assert result.objective == ("first_token_accuracy", "paraphrase_robustness")
    assert any(c.loss is not None for c in result.candidates if c.examples)
    assert all(trade.fluency is not None for trade in result.trades)
    assert all(0 <= trade.kl < 30 for trade in result.trades)
    assert any(trade.efficient for trade in result.trades)
    if result.found is not None:
        assert [j.gate for j in result.judgements] == options["constraints"]
        assert [j.verdict for j in result.judgements[2:]] == ["pass", "pass"], result.judgements
        assert result.plan is None or all(j.verdict == "pass" for j in result.judgements)


@pytest.mark.slow
def test_finalists_that_diverge_too_far_are_rejected_in_the_race(text):
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer())
    options = {"candidates": 4, "strategies": "laser", "rhos": (0.01,), "within": "0.mlp", "controls": False}
    for bounds in (["kl <= 0.00001"], ["answer_kl <= 0.00001"]):
        result = LaserSearch(module, facts_data(module, text=text), **options, constraints=bounds, **QUIET).run()
        assert result.found is None
        assert result.reason == "every finalist breaks a constraint in the race"
        assert {c.reason for c in result.candidates if c.status == "rejected"} == {
            f"breaks {bounds[0]} on the race examples"
        }


@pytest.mark.parametrize("name", ["objective", "loss"])
def test_a_number_of_both_models_is_no_objective(name):
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer())
    with pytest.raises(MisconfigurationException, match=f"`{name}` must be a metric of one model.*`constraints`"):
        LaserSearch(module, facts_data(module), **{name: "answer_kl"}, candidates=4, **QUIET).run()


@pytest.mark.slow
def test_a_constraint_that_nothing_keeps_leaves_the_original(text):
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer())
    search = LaserSearch(
        module, facts_data(module, text=text), candidates=8, constraints=["perplexity <= -90 %"], **QUIET
    )
    result = search.run()
    assert result.plan is None
    assert result.found is None
    assert result.reason == "every finalist breaks a constraint in the race"
    # The next of the screen's ranking have had their turn too.
    assert sum(c.status == "rejected" for c in result.candidates) >= 3 * 6
    assert sum(c.examples > 0 and c.score is not None for c in result.candidates) >= 3 * 8
    assert all(c.reason.startswith("breaks perplexity") for c in result.candidates if c.status == "rejected")


@pytest.mark.slow
def test_the_next_candidates_race_where_all_finalists_break_a_constraint(text, tmp_path, monkeypatch):
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer())
    options = {"candidates": 4, "controls": False, "minutes": 60, "folder": tmp_path / "run", **QUIET}
    options["strategies"] = "laser"
    search = LaserSearch(module, facts_data(module, text=text), **options)
    # The second round's budget is in the journal before its finalists are judged.
    monkeypatch.setattr("laser_callback.search.course.keeps", lambda *_: (tmp_path / "run/1.2-budget.json").exists())
    result = search.run()
    ranked = shortlist(c for c in result.candidates if c.score is not None)
    assert all(c.examples and c.status in ("dropped out", "rejected") for c in ranked[:4])
    assert {c.status for c in ranked[4:8]} & {"finalist", "chosen"}
    assert not (tmp_path / "run/1.3-budget.json").exists()


def test_screening_asks_one_prompt_per_fact_and_racing_all():
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer())
    sets = ExampleSets.of(facts_data(module))
    assert all(len(item.rows) == 1 for item in sets.loader("screen").dataset)
    assert all(len(item.rows) == 2 for item in sets.loader("race").dataset)


# ---- interrupted and resumed -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_interrupted_search_goes_on_where_it_stopped(recall, tmp_path, monkeypatch):
    module, loader = recall
    whole = LaserSearch(module, loader, **SEARCH).run()
    measured: list[str] = []
    measure = Lab.measure

    def interrupted(self, plans, *arguments, **options):
        measured.append("one")
        if len(measured) == 5:  # two probes, two rungs
            raise KeyboardInterrupt
        return measure(self, plans, *arguments, **options)

    before = weights(module)
    monkeypatch.setattr(Lab, "measure", interrupted)
    first = LaserSearch(module, loader, **SEARCH, folder=tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert same(module, before)
    assert first.result.reason.startswith("interrupted")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["reason"].startswith("interrupted")

    measured.clear()
    with pytest.raises(FileExistsError, match="resume=True"):
        LaserSearch(module, loader, **SEARCH, folder=tmp_path / "run").run()
    monkeypatch.setattr(Lab, "measure", lambda self, *a, **o: measured.append("two") or measure(self, *a, **o))
    second = LaserSearch(module, loader, **SEARCH, folder=tmp_path / "run", resume=True).run()
    assert [(str(c.plan), c.status, c.gain, c.loss) for c in second.candidates] == [
        (str(c.plan), c.status, c.gain, c.loss) for c in whole.candidates
    ]
    assert second.confirmed["laser"]["val_acc"] == whole.confirmed["laser"]["val_acc"]

    measured.clear()
    third = LaserSearch(module, loader, **SEARCH, folder=tmp_path / "run", resume=True).run()
    assert len(measured) == 2  # the probes
    assert third.to_dict() == second.to_dict()


@pytest.mark.slow
def test_other_settings_or_weights_do_not_resume(recall, tmp_path):
    module, loader = recall
    LaserSearch(module, loader, **SEARCH, folder=tmp_path / "run").run()
    with pytest.raises(ValueError, match="seed"):
        LaserSearch(module, loader, **SEARCH, folder=tmp_path / "run", resume=True, seed=1).run()
    parameter = next(module.parameters())
    with torch.no_grad():
        parameter[0, 0] += 1
    try:
        with pytest.raises(ValueError, match="weights"):
            LaserSearch(module, loader, **SEARCH, folder=tmp_path / "run", resume=True).run()
    finally:
        with torch.no_grad():
            parameter[0, 0] -= 1


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals go to the main thread")
def test_ctrl_c_in_a_pass_leaves_the_model_intact(recall):
    class Interrupting(Recall):
        calls = 0

        def validation_step(self, batch, batch_idx):
            type(self).calls += 1
            if self.calls == 12:
                os.kill(os.getpid(), signal.SIGINT)
            return super().validation_step(batch, batch_idx)

    module, loader = Interrupting(recall[0].model).eval(), recall[1]
    before = weights(module)
    search = LaserSearch(module, loader, **SEARCH)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a logger's of another test may be left
    try:
        with pytest.raises(KeyboardInterrupt):
            search.run()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert same(module, before)
    assert search.result.reason.startswith("interrupted")


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "val_f1"}, "`objective` 'val_f1' is not logged by `validation_step`; it logs val_loss, val_acc"),
        ({"objective": None}, "`objective` must name what to improve"),
        ({"loss": "nll"}, "`loss` 'nll' is not logged"),
        ({"direction": None}, "`direction` must say whether 'val_acc' is better high"),
        ({"direction": "up"}, "`direction` must be 'max' or 'min', got 'up'"),
        ({"constraints": ["perplexity <= +2 %"]}, "needs running text"),
        ({"constraints": ["val_f1 >= -0.01"]}, "needs 'val_f1'"),
    ],
)
def test_what_cannot_work_is_said_before_the_work(recall, options, message):
    module, loader = recall
    with pytest.raises(MisconfigurationException, match=message.replace("(", r"\(")):
        LaserSearch(module, loader, **{**SEARCH, **options}).run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": 0}, "`candidates` must be an integer, at least 1, got 0"),
        ({"rhos": (0.5, 2)}, r"`rhos` must be numbers in \[0, 1\]"),
        ({"rhos": ["0.5"]}, r"`rhos` must be numbers in \[0, 1\]"),
        ({"candidates": 2.5}, "`candidates` must be an integer, at least 1, got 2.5"),
        ({"strategies": "lasers"}, "`strategies` must be of laser, .* or objects, got 'lasers', did you mean `laser`?"),
        ({"strategies": []}, "`strategies` must be one or more, .* got none"),
        ({"strategies": "laser, laser"}, "each of a name of its own, got laser, laser"),
        ({"strategies": "random", "method": "paper"}, "tries what `strategies` 'reference' proposes, got random"),
        ({"method": "fast"}, "`method` must be one of screened, exhaustive, paper"),
        ({"method": "paper", "max_reductions": 2}, "the paper's procedure finds one cut"),
        ({"spectra": Spectra(), "base": {}}, "`spectra` have their own `base`"),
        ({"resume": True}, "`resume` needs the `folder`"),
        ({"constraints": ["val_acc better"]}, "a constraint is"),
        ({"within": "*.fc_in@0.1"}, "without rho"),
        ({"minutes": 1e-4}, "`minutes` = 0.0001 is too short"),
    ],
)
def test_bad_arguments_are_named(recall, options, message):
    module, loader = recall
    with pytest.raises(ValueError, match=message):
        LaserSearch(module, loader, **{**SEARCH, **options}).run()


def test_a_metric_that_is_no_mean_is_refused(recall):
    class Maximum(Recall):
        def validation_step(self, batch, batch_idx):
            output = super().validation_step(batch, batch_idx)
            self.log("worst", output["val_loss"].max(), reduce_fx="max")
            return output

    module, loader = Maximum(recall[0].model).eval(), recall[1]
    with pytest.raises(MisconfigurationException, match="'worst' is not a mean over examples"):
        LaserSearch(module, loader, **{**SEARCH, "objective": "worst", "direction": "min"}).run()


def test_a_value_that_is_not_finite_is_refused(recall):
    class NotFinite(Recall):
        def validation_step(self, batch, batch_idx):
            output = super().validation_step(batch, batch_idx)
            self.log("broken", output["loss"] * float("nan"))
            return {**output, "broken": output["val_loss"] * float("nan")}

    module, loader = NotFinite(recall[0].model).eval(), recall[1]
    with pytest.raises((ValueError, MisconfigurationException), match="'broken' is not"):
        LaserSearch(module, loader, **{**SEARCH, "objective": "broken"}).run()


@pytest.mark.slow
def test_too_few_examples_for_the_asked_gain_are_said_before_the_work(recall):
    module, loader = recall
    with pytest.warns(
        UserWarning,
        match=r"the confirm set has 160 examples: to confirm a gain of 2.0 points .* takes 843 .*; 160 show",
    ):
        result = LaserSearch(module, loader, **SEARCH, min_gain=0.02).run()
    # Where a gain was confirmed all the same, they were enough.
    assert any("843" in warning for warning in result.warnings) == (result.plan is None)


def test_a_module_with_a_plan_of_its_own_is_refused():
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer(), plan="0.fc_in@0.1")
    with pytest.raises(MisconfigurationException, match="`module` must have no plan"):
        LaserSearch(module, facts_data(module))


def test_nothing_right_anywhere_is_said(recall):
    class Wrong(Recall):
        def validation_step(self, batch, batch_idx):
            output = super().validation_step(batch, batch_idx)
            return {**output, "val_acc": torch.zeros_like(output["val_acc"])}

    module, loader = Wrong(recall[0].model).eval(), recall[1]
    result = LaserSearch(module, loader, **SEARCH, controls=False).run()
    assert any("val_acc is 0 on all race examples" in warning for warning in result.warnings)
    assert result.plan is None


# ---- command line ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_line(tmp_path, capsys):
    model, tokenizer = tiny_causal_lm(), tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, facts())))
    output = tmp_path / "result.json"
    arguments = ["search", "--model", str(tmp_path / "model"), "--facts", str(tmp_path / "facts.jsonl")]
    arguments += [
        "--strategies",
        "laser,late-mlp",
        "--candidates",
        "6",
        "--within",
        "0-1.mlp",
        "--output",
        str(output),
        "--accelerator",
        "cpu",
    ]
    code = main(arguments)
    shown = capsys.readouterr()
    result = json.loads(output.read_text())
    assert code == (Exit.KEPT_ORIGINAL if result["plan"] is None else Exit.DONE)
    assert {c["layer"] for c in result["candidates"]} == {0, 1}
    assert {c["strategy"] for c in result["candidates"] if c["examples"]} == {"laser", "late-mlp"}
    assert "screen" in shown.err
    assert "race" in shown.err
    assert result["reason"].split(":")[0][:20] in shown.out.replace("\n", " ")


def test_the_command_line_says_what_is_missing(capsys):
    assert main(["search"]) == Exit.MISUSED
    assert "give `--model` and `--facts` or `--judge`, or `--module` and `--data`" in capsys.readouterr().err


def test_share_of_layers_to_compute():
    module = LaserModule(tiny_causal_lm(), tiny_tokenizer())
    lab = Lab(module, Spectra())
    assert lab.share(LaserPlan.parse("3.fc_in@0.1")) == 0.25
    assert lab.share(LaserPlan.parse("1.fc_in@0.1, 3.fc_in@0.1")) == 0.75
    assert isinstance(module, pl.LightningModule)
