"""What pictures and pages are drawn from: spectra of cuts, flips, labels, panels; and results from files."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from candidates import proposed
from classifier import PLAN, Classifier, compared, searched
from torch.utils.data import DataLoader
from trainers import quiet_trainer

from laser_callback import LaserCallback, LaserPlan, find_matrices
from laser_callback.plans.reduction import Reduction
from laser_callback.reports.page import spectrum_pictures
from laser_callback.reports.panels import STEPS, panels, shading
from laser_callback.reports.search_text import numbered, pictured
from laser_callback.results.candidates import Estimate
from laser_callback.results.comparison import LaserResult
from laser_callback.results.flips import claim_row, flip_metric, flip_metrics, flips, label_counts
from laser_callback.results.search import SearchResult, Trade, mark_efficient
from laser_callback.spectra.cut import POINTS, CutSpectrum, cut_spectra
from laser_callback.spectra.spectrum import Spectrum
from laser_callback.spectra.store import Spectra
from laser_callback.support.reading import typed


@pytest.fixture(scope="module")
def result():
    return compared()


# ---- spectra ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (400, 900)])
@pytest.mark.parametrize(
    "cut", ["0.fc_in@0.3", "0.fc_in@0", "0.fc_in@0.3:keep=tail", "0.fc_in@0.2:band=0.4", "0.fc_in@places-0+3"]
)
def test_spectrum_of_a_cut(shape, cut):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    reduction = Reduction.parse(cut)
    spectrum = Spectrum.of(weight)
    found = CutSpectrum.of(spectrum, "w", reduction)
    values = torch.linalg.svdvals(weight.double())
    places = torch.tensor(found.places)
    assert torch.allclose(torch.tensor(found.values).double(), values[places], rtol=1e-5)
    assert (places[0], places[-1]) == (0, min(shape) - 1)
    assert len(places) == min(shape) if min(shape) <= POINTS else len(places) <= POINTS
    kept = spectrum.reduce(weight.double(), reduction)
    assert found.energy == pytest.approx(float((kept.norm() / weight.double().norm()) ** 2), abs=1e-9)
    assert sum(stop - start for start, stop in found.removed) == int(
        torch.linalg.matrix_rank(weight.double() - kept, rtol=1e-6)
    )
    assert typed(CutSpectrum, json.loads(json.dumps(vars(found)))) == found


def test_spectra_of_a_plan_are_in_the_result_and_its_file(result, tmp_path):
    module = Classifier()
    named = {matrix.name: matrix for matrix in find_matrices(module)}
    spectra = result["laser"].spectra
    assert {spectrum.matrix for spectrum in spectra} == {m.name for m, _ in LaserPlan.parse(PLAN).resolve(module)}
    for spectrum in spectra:
        weight = named[spectrum.matrix].value
        assert spectrum.values == pytest.approx(torch.linalg.svdvals(weight).tolist(), rel=1e-4)
    assert all(arm.spectra == [] for arm in result.controls["laser"].values())


def test_what_has_no_spectrum_has_none(result):
    module = Classifier()
    found = LaserPlan.parse(
        "0.fc_in@0.5:of=entries, 1.fc_in@0.5:blocks=2, 1.fc_out@0.5:of=reference, 0.fc_out@0.5"
    ).resolve(module)
    (spectrum,) = cut_spectra(found, Spectra())
    assert spectrum.reduction == "0.fc_out@0.5"
    zero = CutSpectrum.of(Spectrum.of(torch.zeros(3, 4)), "w", Reduction.parse("0.fc_in@0.4"))
    assert zero.energy == 1
    arm = replace(result["laser"], spectra=[zero])
    assert spectrum_pictures(arm) == []  # a logarithmic axis has no place for it


# ---- examples --------------------------------------------------------------------------------------------------------


def test_flips_are_those_that_the_table_counts(result):
    row = flip_metric(result, "laser")
    assert row == claim_row(result, "laser") == result["laser"]["<i>acc</i>"]
    found = flips(result.examples.to_rows(), "laser", row)
    assert (sum(f.fixed for f in found), sum(not f.fixed for f in found)) == (row.fixed, row.broken)
    assert row.fixed > 0
    assert row.broken > 0
    for flip in found:
        assert flip.answer == (flip.after if flip.fixed else flip.before)
        assert flip.before != flip.after
        assert int(flip.id) % 2 == int(flip.fixed)


def test_flips_of_a_metric_that_is_better_low_and_has_a_dataloader():
    from laser_callback.stats.outcomes import Outcomes
    from laser_callback.stats.paired import compare

    before, after = torch.tensor([1, 0, 1]).bool(), torch.tensor([0, 0, 1]).bool()
    row = compare("wrong/dataloader_idx_0", Outcomes.of(before), Outcomes.of(after), higher_is_better=False)
    rows = [
        {"original": {"wrong": float(b)}, "x": {"wrong": float(a)}}
        for b, a in zip(before.tolist(), after.tolist(), strict=True)
    ]
    rows += [{"original": {"wrong": 1.0}}, {"original": {"wrong": None}, "x": {"wrong": 1.0}}]
    (flip,) = flips(rows, "x", row)
    assert flip.fixed
    assert row.fixed == 1


def test_of_two_dataloaders_each_has_its_own_flips(tmp_path):
    module, laser = Classifier(), LaserCallback(PLAN, report=False)
    whole = module.rows().dataset
    data = [DataLoader(part, batch_size=16) for part in (whole[:24], whole[24:])]
    quiet_trainer(laser).validate(module, data, verbose=False)
    rows = laser.result.examples.to_rows()
    assert [row["dataloader_idx"] for row in rows] == [0] * 24 + [1] * 40
    shown = flip_metrics(laser.result, "laser", rows)
    assert len(shown) == 2
    for row in shown:
        found = flips(rows, "laser", row)
        assert (sum(flip.fixed for flip in found), sum(not flip.fixed for flip in found)) == (row.fixed, row.broken)
        assert found
    counts = label_counts(rows, "laser", shown[1].metric)
    assert sum(count.gold for count in counts) == shown[1].n


def test_labels_are_counted(result):
    rows = result.examples.to_rows()
    checks = result["laser"].prior(None)
    counts = label_counts(rows, "laser", checks.metric)
    assert sum(c.gold for c in counts) == sum(c.original for c in counts) == sum(c.reduced for c in counts) == 64
    top = dict(checks.top_predictions["reduced"])
    assert {c.label: c.reduced for c in counts if c.label in top} == top
    assert label_counts([{"original": {}, "laser": {}}], "laser") == []


def test_labels_are_those_of_the_metric():
    arms = {name: {"prediction": "x", "prediction/choice": said} for name, said in (("original", "a"), ("laser", "b"))}
    rows = [{"answer": "x", "answer/choice": "a", **arms}] * 2
    assert [c.label for c in label_counts(rows, "laser")] == ["x"]
    counts = label_counts(rows, "laser", "choice/dataloader_idx_0")
    assert [(c.label, c.gold, c.original, c.reduced) for c in counts] == [("a", 2, 2, 0), ("b", 0, 0, 2)]


# ---- panels ----------------------------------------------------------------------------------------------------------


def test_panels_hold_each_candidate_of_the_first_step_once():
    search = searched()
    drawn = panels(search)
    assert [panel.kind for panel in drawn] == ["q_proj", "fc_out", "other"]
    assert sum(len(panel.cells) for panel in drawn) == len(search.candidates) - 1
    assert (drawn[0].rows, drawn[0].rhos) == (("0", "1", "2"), (0.0, 0.1, 0.5))
    assert drawn[2].rows == ("/lstm.*<b>/",)


def test_a_candidate_off_the_grid_stands_between_its_columns():
    search = searched()
    near = proposed("2.fc_out@0.3", examples=5)
    search.candidates.append(near)
    panel = panels(search)[1]
    assert panel.rhos == (0.0, 0.1, 0.5)
    assert panel.between == (("2", 2, near),)
    assert len(panel.cells) == 9


def test_namesakes_have_rows_of_their_own():
    texts = ["decoder.3.fc_in@0.1", "encoder.3.fc_in@0.1", "3.fc_in[1]@0.1", "3.fc_in@0.1", "/a/@0.1", "/b/@0.1"]
    candidates = [replace(proposed(text), layer=3, kind="fc_in") for text in texts]
    (panel,) = panels(SearchResult(None, None, "", (), candidates))
    assert panel.rows == ("decoder.3", "encoder.3", "3[1]", "3", "/a/", "/b/")
    assert list(panel.cells.values()) == candidates


def test_of_strategies_that_meet_in_one_place_the_one_that_came_furthest_has_it():
    raced = proposed("1.fc_in@0.1", "drop", examples=5, status="dropped out")
    several = proposed("1.fc_in@0.1, 2.fc_in@0.1", "drop", score=-9.0, examples=9, status="chosen")
    scored = proposed("1.fc_in@0.1", score=-1.0)
    for found in ([scored, raced, several], [raced, several, scored]):
        (panel,) = panels(SearchResult(None, None, "", (), found))
        assert list(panel.cells.values()) == [raced]


def with_scores(*scores: float) -> SearchResult:
    found = [proposed(f"{i}.fc_in@0.1", score=score) for i, score in enumerate(scores)]
    return SearchResult(None, None, "", ("acc",), found)


def test_shades_double_and_are_symmetric():
    search = with_scores(-1.0, 0.0, 1.0, -0.2, 0.2, 0.024, math.nan, math.inf, -math.inf)
    shades = shading(search)
    assert shades.thresholds == (0.025, 0.05, 0.1, 0.2, 0.4)
    assert [shades.level(c) for c in search.candidates] == [-5, 0, 5, -4, 4, 0, None, 5, -5]
    assert len(shades.thresholds) == STEPS


@pytest.mark.parametrize("scores", [(1.0, 2.0, 3.0), (0.0,), (1e-300, -1e-300), (-7e300,)])
def test_shades_where_nothing_is_better_or_all_is_extreme(scores):
    search = with_scores(*scores)
    assert all(shading(search).level(c) is not None for c in search.candidates)


def test_without_a_screen_the_measured_changes_are_shaded():
    search = with_scores()
    search.objective = ("accuracy",)
    search.candidates = [proposed("0.fc_in@0.1")]
    assert shading(search) is None
    search.candidates[0].gain = Estimate(0.25)
    assert shading(search).change(search.candidates[0]) == -25.0  # points
    search.candidates[0].loss = Estimate(-0.5)
    assert shading(search).change(search.candidates[0]) == -0.5


def test_a_picture_leaves_out_what_would_flatten_it():
    trades = [
        Trade("chosen", 0.04, 0.10, True, True),
        Trade("near", 0.05, 0.25),
        Trade("ruinous", 0.09, 2.0),
        Trade("harmful", -0.5, 0.0),
        Trade("unknown", 0.04, None),
        Trade("no number", math.nan, 0.1),
    ]
    assert {i: trade.plan for i, trade in pictured(numbered(trades)).items()} == {2: "near", 3: "chosen"}
    assert [trade.plan for trade in pictured(numbered(trades[2:3])).values()] == ["ruinous"]
    assert pictured(numbered([])) == {}


def test_the_best_by_gain_perplexity_and_divergence_are_marked():
    trades = [
        Trade("most gain", 0.05, 0.1, kl=0.2),
        Trade("near", 0.04, 0.0, kl=0.1),
        Trade("nearer", 0.04, 0.01, kl=0.05),
        Trade("beaten", 0.03, 0.01, kl=0.05),
        Trade("beaten in all", 0.03, 0.2, kl=0.3),
        Trade("unknown", 0.09, None),
    ]
    mark_efficient(trades)
    assert [trade.plan for trade in trades if trade.efficient] == ["most gain", "near", "nearer"]


# ---- files -----------------------------------------------------------------------------------------------------------


def test_results_come_back_from_their_files(result, tmp_path):
    for found in (result, searched(result), searched()):
        path = tmp_path / "result.json"
        found.to_json(path)
        again = type(found).from_json(path)
        assert again.to_dict() == found.to_dict()
        json.loads(path.read_text(), parse_constant=pytest.fail)  # strict JSON: no NaN
    search = SearchResult.from_json(path)
    assert search.candidates[0] == searched().candidates[0]
    assert search.plan == searched().plan
    assert isinstance(search, SearchResult)
    result.to_json(path)
    assert LaserResult.from_json(path)["laser"].rows == result["laser"].rows
