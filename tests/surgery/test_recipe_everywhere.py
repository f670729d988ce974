"""A recipe wherever a plan goes: held to its hashes, with its directions, or told what to give instead."""

from __future__ import annotations

import html
import re
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from toy import CALLS, PLAN, Toy, evaluate, make_data
from trainers import quiet_trainer
from weights import same, weights

from laser_callback import LaserCallback, LaserPlan, StagedRollout, find_matrices, reduced, save_reduced
from laser_callback.compare.measure import Lab
from laser_callback.reports.page import page
from laser_callback.reports.search_terminal import plain
from laser_callback.results.search import SearchResult
from laser_callback.shipping import Gates, in_parts, in_steps
from laser_callback.spectra import InputDirections, Spectra, input_directions
from laser_callback.surgery import Recipe, apply, recorded

INPUTS = "1.fc_in@0.3:metric=inputs, 2.fc_in@0.3:metric=inputs"
GATES = ["loss <= +0.5"]
QUIET: dict[str, Any] = {"progress": False, "accelerator": "cpu"}


@pytest.fixture
def recipe() -> Recipe:
    """Of two cuts in the metric of some inputs of the toy's."""
    module = Toy()
    matrices = [m for m in find_matrices(module) if m.name.endswith("linear1")]
    moments = torch.diag(torch.logspace(0, 2, 8, dtype=torch.float64))
    found = {(m.name, "weight"): input_directions(m.value, moments) for m in matrices}
    with recorded(module, INPUTS, Spectra(directions=InputDirections(found))) as (_, done):
        return done


def other() -> Toy:
    """The toy with one other number in what the recipes cut."""
    module = Toy()
    with torch.no_grad():
        module.net.encoder.layers[1].linear1.weight[0, 0] += 1
    return module


# ---- the weights that it was made for --------------------------------------------------------------------------------


def enter(module: Toy, recipe: Any) -> Any:
    with reduced(module, recipe):
        pass


def compare(module: Toy, recipe: Any) -> Any:
    evaluate(quiet_trainer, module, LaserCallback(recipe, report=False))


def roll_out(module: Toy, recipe: Any) -> Any:
    StagedRollout(module, in_parts(recipe), GATES, make_data(), **QUIET).run()


def roll_out_in_steps(module: Toy, recipe: Any) -> Any:
    StagedRollout(module, in_steps(recipe, [0.5]), GATES, make_data(), **QUIET).prepare()


def gate(module: Toy, recipe: Any) -> Any:
    Gates(GATES, make_data()).prepare(Lab(module, Spectra(), "cpu"), Recipe.of(recipe))


USES = [enter, compare, roll_out, gate]


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("use", [*USES, roll_out_in_steps])
def test_other_weights_are_refused_by_all_that_take_a_plan(use: Any, tmp_path: Any) -> None:
    apply(Toy(), PLAN).to_file(tmp_path / "laser.json")
    file = str(tmp_path / "laser.json")
    use(Toy(), file)
    module = other()
    before = weights(module)
    with pytest.raises(ValueError, match=r"weights of `net\.encoder\.layers\.1\.linear1` are others than those"):
        use(module, file)
    assert same(module, before)
    with pytest.raises(ValueError, match="is bfloat16, but the recipe is for float32"):
        use(Toy().bfloat16(), file)


def test_a_recipe_is_not_compared_with_what_training_makes_of_its_weights() -> None:
    recipe, module = apply(Toy(), PLAN), Toy()
    callback = LaserCallback(recipe, loops="fit", report=False)
    with pytest.raises(
        MisconfigurationException, match=r"the recipe is for `net\.encoder\.layers\.1\.linear1` as it is"
    ):
        quiet_trainer(callback).fit(module, make_data(), make_data())
    module.net.encoder.requires_grad_(False)
    quiet_trainer(callback, num_sanity_val_steps=0).fit(module, make_data(), make_data())
    assert callback.result["laser"].rows


# ---- what a plan alone does not say ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("use", USES[:3])
def test_its_directions_come_along(use: Any, recipe: Recipe, tmp_path: Any) -> None:
    recipe.to_file(tmp_path / "laser.yaml")
    for given in (recipe, str(tmp_path / "laser.yaml"), recipe.to_dict()):
        if use is not roll_out or not isinstance(given, dict):
            use(Toy(), given)


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("lose", [lambda r: LaserPlan([*r]), str, lambda r: LaserPlan.of([*r])])
def test_a_plan_without_them_is_refused_ahead_of_the_work(lose: Any, recipe: Recipe, tmp_path: Any) -> None:
    plan, module = lose(recipe), Toy()
    cure = r"give the recipe in its place, the search's `result\.recipe` or its file"
    CALLS.clear()
    with pytest.raises(ValueError, match=cure):
        compare(module, plan)
    assert not CALLS
    with pytest.raises(ValueError, match=cure):
        StagedRollout(module, plan, GATES, make_data(), **QUIET).prepare()
    with pytest.raises(ValueError, match="give the recipe in place of the plan"):
        save_reduced(module, plan, tmp_path / "cut.ckpt", "checkpoint")
    with pytest.raises(ValueError, match="give the recipe in place of the plan"):
        enter(module, plan)


def test_a_plan_is_not_made_of_a_recipe_in_silence(recipe: Recipe, tmp_path: Any) -> None:
    recipe.to_file(tmp_path / "laser.json")
    with pytest.raises(ValueError, match=r"this is a recipe, whose hashes .* in place of the plan, or .*Recipe\.of"):
        LaserPlan.of(recipe.to_dict())
    with pytest.raises(ValueError, match=r"laser\.json: this is a recipe"):
        LaserPlan.from_file(tmp_path / "laser.json")


def test_the_parts_of_a_recipe_are_recipes(recipe: Recipe) -> None:
    first, whole = in_parts(recipe)
    assert whole is recipe
    assert isinstance(first, Recipe)
    with reduced(module := Toy(), first):
        inside = weights(module)
    with reduced(module, recipe):
        for name, value in weights(module).items():
            assert torch.equal(value, inside[name]) == (name != "net.encoder.layers.2.linear1.weight")
    with pytest.raises(ValueError, match=r"of 1\.fc_in@0\.3:metric=inputs no other rho is known"):
        in_steps(recipe, [0.5])


# ---- what reports say ------------------------------------------------------------------------------------------------


def code_of(result: Any) -> list[str]:
    """What the page says to run."""
    return [html.unescape(found) for found in re.findall("<code>(from .*?)</code></pre>", page(result), re.DOTALL)]


def test_a_result_that_is_read_back_still_has_it_and_reports_say_so(recipe: Recipe, tmp_path: Any, monkeypatch) -> None:
    result = SearchResult(recipe, recipe, "it helps", ("acc",), [], recipe=recipe)
    result.to_json(tmp_path / "laser-search.json")
    read = SearchResult.from_json(tmp_path / "laser-search.json")
    assert read.plan is read.found is read.recipe
    with reduced(model := Toy(), recipe):
        inside = weights(model)
    assert "wherever a plan is asked for give `recipe`, in the JSON file" in plain(read)
    (code,) = code_of(read)
    monkeypatch.chdir(tmp_path)
    seen: list[Any] = []
    exec(code.replace("...", "seen.append(weights(model))"), {"model": model, "seen": seen, "weights": weights})
    assert all(torch.equal(value, inside[name]) for name, value in seen[0].items())
    plan = LaserPlan.parse(PLAN)
    other = SearchResult(plan, plan, "it helps", ("acc",), [])
    assert f"with reduced(model, {PLAN!r})" in code_of(other)[0]
    assert "recipe" not in plain(other)


def test_the_page_of_a_comparison_asks_for_the_recipe(recipe: Recipe) -> None:
    callback = LaserCallback({"cut": recipe, "plain": PLAN}, report=False)
    evaluate(quiet_trainer, Toy(), callback)
    first, second = code_of(callback.result)
    assert "with reduced(model, 'recipe-1.json')" in first
    assert f"with reduced(model, {PLAN!r})" in second
    assert "SearchResult" not in first
