"""The words of the plan language: how they are read and written, and which do not go together."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path

import pytest
import torch
import yaml

from laser_callback.plans.kinds import GROUPS, KINDS
from laser_callback.plans.plan import LaserPlan, check_base
from laser_callback.plans.rank_rules import RANK_RULES, canonical_rule, global_ranks, places_rule
from laser_callback.plans.reduction import Reduction
from laser_callback.shipping.rollout import in_steps

RHOS = [0, 1, 0.1, "entropy", "energy-0.9", "k0", "k2", "k999999999", "global-0.5", "global-3", "global-1e-07",
        "places-0", "places-0-4+7", "places-3+5-6+999999"]  # fmt: skip
OPTIONS = {
    "keep": ["head", "tail"],
    "band": [1.0, 0.25],
    "scale": [0.0, -0.5],
    "of": ["rank", "entries", "reference"],
    "blocks": [1, 4],
    "cut": ["weight", "delta"],
    "metric": ["none", "inputs"],
    "norm": ["part", "whole"],
    "bias": ["kept", "cut"],
    "noise": [None, 0, 17],
}


def every_pair() -> list[Reduction]:
    """Every rho with every two options that go together."""
    found = {}
    for rho, (one, other) in itertools.product(RHOS, itertools.combinations(OPTIONS, 2)):
        for values in itertools.product(OPTIONS[one], OPTIONS[other]):
            try:
                reduction = Reduction(3, "fc_in", rho, **dict(zip((one, other), values, strict=True)))
            except ValueError:
                continue
            found[reduction] = None
    return list(found)


# ---- forms -----------------------------------------------------------------------------------------------------------


def test_every_form_of_every_pair_of_options_round_trips(tmp_path):
    reductions = every_pair()
    assert len(reductions) > 500
    for name in OPTIONS:  # all values are among them
        assert {getattr(reduction, name) for reduction in reductions} == {*OPTIONS[name]}
    assert {reduction.rho for reduction in reductions} == {*RHOS}
    assert len({str(reduction) for reduction in reductions}) == len(reductions)
    for reduction in reductions:
        assert Reduction.parse(str(reduction)) == reduction
        assert repr(Reduction.parse(str(reduction))) == repr(reduction)
    rng = random.Random(0)
    for number in range(60):
        chosen = rng.sample(reductions, 4)
        plan = LaserPlan(Reduction(**{**r.to_dict(), "layer": layer}) for layer, r in enumerate(chosen))
        forms = [
            LaserPlan.parse(str(plan)),
            LaserPlan.of(json.loads(json.dumps(plan.to_dict()))),
            LaserPlan.of(yaml.safe_load(yaml.safe_dump(plan.to_dict()))),
        ]
        for ending in ("yaml", "json", "txt"):
            plan.to_file(tmp_path / f"{number}.{ending}")
            forms.append(LaserPlan.from_file(tmp_path / f"{number}.{ending}"))
        assert all(repr(form) == repr(plan) for form in forms)
        assert plan.cuts_delta is any(r.cut == "delta" for r in plan)


def test_yaml_as_people_write_it():
    text = "[{layer: '*', matrix: writes, rho: 0, bias: cut}, {layer: 3, matrix: mlp, rho: k2, noise: 7, cut: delta}]"
    assert LaserPlan.of(yaml.safe_load(text)) == LaserPlan.parse("*.writes@0:bias=cut, 3.mlp@k2:cut=delta,noise=7")


def test_the_group_of_what_writes():
    assert GROUPS["writes"] == ("out_proj", "fc_out")
    assert {*GROUPS["writes"]} < {*GROUPS["all"]}


def test_the_page_of_the_language_has_every_word_and_no_other():
    page = (Path(__file__).parents[2] / "docs" / "plans.md").read_text(encoding="utf-8")
    texts = re.findall(r"^\| `([^`|]*@[^`]*)` \|", page, re.MULTILINE)
    assert len(texts) >= 6
    for text in texts:
        assert str(LaserPlan.parse(text)) == text
    (whole,) = re.findall(r"^\*\*Options\*\*.*?(?=^Examples)", page, re.MULTILINE | re.DOTALL)
    options = re.findall(r"^\| `([a-z]+)=([^`]+)` \| `?([^`|]+?)`? \|", whole, re.MULTILINE)
    assert {name for name, *_ in options} == {*OPTIONS}
    for name, value, default in options:
        reduction = Reduction.parse(f"3.fc_in@{0 if name == 'bias' else 0.1}:{name}={value}")
        assert str(getattr(reduction, name)) == value
        assert str(getattr(Reduction(3, "fc_in", 0.1), name)) in (default, f"{default}.0", default.title())
    rhos = re.findall(r"`([^`]+)`", "".join(re.findall(r"^\| rho \|.*?(?=^\*\*)", page, re.MULTILINE | re.DOTALL)))
    rules = [Reduction(3, "fc_in", rho).rho for rho in rhos]
    begins = {re.split(r"[A-Z]", rule)[0] for rule in RANK_RULES}
    assert all(any(str(rule).startswith(begin) for rule in rules) for begin in begins)
    assert all(f"`{name}`" in page for name in (*KINDS, *GROUPS))


# ---- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("k007", "k7"),
        ("global-.50", "global-0.5"),
        ("global-2.0", "global-2"),
        ("global-1e300", f"global-{int(1e300)}"),
        ("places-7+0-2+3", "places-0-3+7"),
        ("places-4-4", "places-4"),
        ("places-1+1-2+2", "places-1-2"),
        *((text, None) for text in ("k", "k-1", "k1.5", "K2", "k1234567890", "k 2")),
        *((text, None) for text in ("global", "global-", "global-0", "global--1", "global-nan", "global-inf")),
        *((text, None) for text in ("places", "places-", "places-a", "places-1-", "places-+1", "places-1++2")),
        *((text, None) for text in ("places-5-2", "places-5-2+7", "places-1-2-3", "places--1", "places-1,2")),
    ],
)
def test_one_rule_has_one_name(text, name):
    assert canonical_rule(text) == name
    if name is None:
        with pytest.raises(ValueError, match=r"`rho` must be a number in \[0, 1\] or one of .*, places-LIST, got"):
            Reduction(0, "fc_in", text)
    else:
        assert canonical_rule(name) == name
        assert str(Reduction(0, "fc_in", text)) == f"0.fc_in@{name}"


@pytest.mark.parametrize("text", ["places-0-999999999", "places-999999999-0+0-999999998", "places-0-600000+7-600000"])
def test_a_list_of_places_has_an_end(text):
    with pytest.raises(ValueError, match=r"a list of places may count at most 1,000,000, got|`rho` must be"):
        Reduction(0, "fc_in", text)


def test_places_are_read_as_a_set():
    rng = random.Random(1)
    for _ in range(200):
        places = rng.sample(range(30), rng.randint(1, 20))
        rule = places_rule(places)
        removed = Reduction(0, "fc_in", rule, keep="tail").removed(0, 30)
        kept = Reduction(0, "fc_in", rule).removed(0, 30)
        assert [place for start, stop in removed for place in range(start, stop)] == sorted(places)
        assert sorted(place for run in (*removed, *kept) for place in range(*run)) == [*range(30)]
        assert Reduction(0, "fc_in", rule).rank(30) == len(places)
    assert places_rule([]) is None


def test_a_threshold_against_all_orders():
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        values = [torch.randint(0, 4, (5,), generator=generator).double().sort(descending=True)[0] for _ in range(3)]
        for count in range(1, 20):
            pairs = [(-float(v), i) for i, each in enumerate(values) for v in each if v > 0]
            chosen = [i for _, i in sorted(pairs)[:count]]
            assert global_ranks(values, count / 3) == [chosen.count(i) for i in range(3)]


# ---- what does not go together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((f"k2:of={of}", f"{of}") for of in ("entries", "reference")),
        ("places-1:of=entries", "`rho` must be a number with of='entries': the rule 'places-1' needs singular values"),
        ("0.1:of=entries,norm=whole", "norm='whole' goes with of='rank': of entries it is not offered"),
        ("global-1:blocks=2", "`blocks` and `band` do not go with global-1: both count from the largest on"),
        ("places-1:blocks=2", "`blocks` and `band` do not go with places-1"),
        ("places-1:band=0.5", "`blocks` and `band` do not go with places-1"),
        ("0.1:bias=cut", r"bias='cut' goes with a cut that keeps nothing, rho 0, got rho 0\.1"),
        ("k0:bias=cut", "keeps nothing, rho 0, got rho k0"),
        ("0:bias=cut,keep=tail", "keeps nothing, rho 0, got keep tail"),
        ("0:bias=cut,band=0.5", r"keeps nothing, rho 0, got band 0\.5"),
        ("0:bias=cut,of=entries", "keeps nothing, rho 0, got of entries"),
        ("0:bias=cut,of=reference", "keeps nothing, rho 0, got of reference"),
        ("0:bias=cut,norm=whole", "keeps nothing, rho 0, got norm whole"),
        ("0.1:metric=inputs,of=entries", "metric='inputs' goes with of='rank', blocks=1"),
        ("0.1:metric=inputs,blocks=2", "metric='inputs' goes with of='rank', blocks=1"),
        (
            "k2:metric=inputs,cut=delta",
            "metric='inputs' goes with cut='weight': nothing finds the directions of a diff",
        ),
        ("entropy:of=reference", "keeps the head at a numeric rho and drops the rest, .*, got rho entropy"),
        *(
            (f"0.1:of=reference,{option}", f"as the paper's code does, got {option.partition('=')[0]}")
            for option in ("keep=tail", "band=0.5", "scale=0.5", "blocks=2", "cut=delta", "norm=whole")
        ),
        *((f"0.1:{word}=x", f"`{word}` must be") for word in ("keep", "of", "cut", "metric", "norm", "bias", "noise")),
        *((f"0.1:noise={seed}", "`noise` must be an integer from 0 on, got") for seed in ("-1", "1.5", "", "None")),
        ("0.1:base=x", "options are keep=, band=, scale=, of=, blocks=, cut=, metric=, norm=, bias=, noise="),
        ("0.1:cut=delta,cut=delta", "cannot read the option 'cut=delta'"),
    ],
)
def test_what_does_not_go_together_is_said(text, message):
    with pytest.raises(ValueError, match=message):
        Reduction.parse(f"0.fc_in@{text}")


@pytest.mark.parametrize("seed", [-1, 1.0, True, "3"])
def test_a_seed_is_an_integer(seed):
    with pytest.raises(ValueError, match="`noise` must be a seed, a non-negative integer, or None, got"):
        Reduction(0, "fc_in", 0.1, noise=seed)


def test_only_the_defaults_are_spectral_or_a_truncation():
    for name, values in OPTIONS.items():
        for value in values[1:]:
            rho = 0 if name == "bias" else 0.1
            reduction = Reduction(0, "fc_in", rho, **{name: value})
            assert not reduction.is_truncation
            assert reduction.is_spectral is (name not in ("of", "blocks", "metric"))
    assert [Reduction(0, "fc_in", rho).is_ruled for rho in RHOS] == [
        isinstance(rho, str) and rho.startswith(("e", "global")) for rho in RHOS
    ]


def test_a_base_where_one_is_needed_and_nowhere_else():
    delta, weight = LaserPlan.parse("1.fc_in@0.1:cut=delta, 2.fc_in@0.1"), LaserPlan.parse("1.fc_in@0.1")
    check_base([delta], given=True)
    check_base([weight], given=False)
    check_base([weight, delta], given=True)
    with pytest.raises(ValueError, match=r"the plan 1\.fc_in@0\.1:cut=delta, .* give that as `base`, .* --base"):
        check_base([weight, delta], given=False)
    with pytest.raises(ValueError, match=r"`base` is given, and 1\.fc_in@0\.1 cuts the weights themselves: .*=delta"):
        check_base([weight], given=True)


def test_stages_before_the_last_keep_the_biases():
    stages = in_steps("1.mlp@0:bias=cut,cut=delta, 2.fc_in@0.3:noise=1", [0.5, 0.1])
    assert [str(stage) for stage in stages] == [
        "1.mlp@0.5:cut=delta, 2.fc_in@0.5:noise=1",
        "1.mlp@0.1:cut=delta, 2.fc_in@0.3:noise=1",
        "1.mlp@0:cut=delta,bias=cut, 2.fc_in@0.3:noise=1",
    ]
