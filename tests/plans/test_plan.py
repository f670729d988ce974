from __future__ import annotations

import json
import math
import random
from fractions import Fraction

import pytest
import yaml

from laser_callback.plans.plan import LaserPlan
from laser_callback.plans.reduction import Reduction

RULES = ["entropy", "gavish-donoho", "marchenko-pastur", "laser-rmt", "energy-0.9", "energy-1e-5", "energy-.99"]


def generate(rng: random.Random) -> Reduction:
    """Any reduction that can be constructed."""
    rho = rng.choice([0, 1, 0.01, 0.005, 1 / 3, 1e-5, 5e-324, 1 - 2**-53, round(rng.random(), 4), rng.random(), *RULES])
    keep = rng.choice(["head", "tail"])
    layer = rng.choice([0, 27, -1, -3, "*", "0-3", "20-27", "5-5", None])
    matrix = rng.choice(
        ["fc_in", "q_proj", "attn", "all", "mlp.down_proj", "layer.0.SelfAttention.q", "experts.gate_up_proj", "_x.1.y"]
    )
    stack = rng.choice([None, None, "decoder", "model.decoder.layers", "net.1", "encoder.block", "a.b.3.1"])
    if layer is None:
        matrix = rng.choice([r"/lm_head/", r"/model\.(a|b),c@d:e\[q_proj\]/", "/.*=x,y=1/", r"/layers\.[34]\..*_proj/"])
        stack = None
    return Reduction(
        layer,
        matrix,
        rho,
        stack=stack,
        expert=rng.choice([None, None, 0, 17]),
        keep=keep,
        band=rng.choice([1, 0.25, 1e-5, rng.random() or 1]) if keep == "head" else 1,
        scale=rng.choice([0, 0.5, -0.25, 2, 1e-7, -0.0, 1e22]),
        of="rank" if isinstance(rho, str) else rng.choice(["rank", "entries"]),
        blocks=rng.choice([1, 1, 4, 33]),
    )


def generate_plan(rng: random.Random) -> LaserPlan:
    reductions = {(r.stack, r.layer, r.matrix, r.expert): r for r in (generate(rng) for _ in range(rng.randint(1, 6)))}
    return LaserPlan(reductions.values())


def test_every_form_round_trips(tmp_path):
    rng = random.Random(0)
    for _ in range(300):
        plan = generate_plan(rng)
        forms = [
            LaserPlan.parse(str(plan)),
            LaserPlan.parse(str(plan).replace(", ", "\n")),
            LaserPlan.of(plan.to_dict()),
            LaserPlan.of(json.loads(json.dumps(plan.to_dict()))),
            LaserPlan.of(yaml.safe_load(yaml.safe_dump(plan.to_dict()))),
            LaserPlan.of([str(reduction) for reduction in plan]),
            LaserPlan.of(reduction.to_dict() for reduction in plan),
            LaserPlan.of(plan),
        ]
        for form in forms:
            assert form == plan
            assert hash(form) == hash(plan)
            assert [repr(r) for r in form] == [repr(r) for r in plan]
        assert all(Reduction.parse(str(r)) == r for r in plan)


@pytest.mark.parametrize("ending", ["yaml", "yml", "json", "txt", "laser"])
def test_files_round_trip(tmp_path, ending):
    rng = random.Random(1)
    path = tmp_path / f"plan.{ending}"
    for _ in range(25):
        plan = generate_plan(rng)
        plan.to_file(path)
        assert LaserPlan.from_file(path) == plan
        assert LaserPlan.from_file(str(path)) == plan


def test_text_files_have_comments(tmp_path):
    path = tmp_path / "plan.txt"
    path.write_text(
        "# found by the screen\n27.fc_in@0.01  # last\n\n26.fc_out@0.1:keep=tail,scale=0.5, 3.q_proj@entropy\n"
    )
    expected = [Reduction(27, "fc_in", 0.01), Reduction(26, "fc_out", 0.1, keep="tail", scale=0.5)]
    assert LaserPlan.from_file(path) == LaserPlan([*expected, Reduction(3, "q_proj", "entropy")])


def test_yaml_as_people_write_it(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(
        "reductions:\n"
        "- {layer: 20-27, matrix: mlp, rho: 1e-3}\n"  # YAML 1.1 reads 1e-3 as text
        "- {layer: '*', matrix: q_proj, rho: 0.5, scale: 5e-1, keep: tail}\n"
        "- {matrix: /lm_head/, rho: gavish-donoho}\n"
        "- {layer: 3, matrix: fc_in, rho: energy-.90, blocks: 4}\n"
        "- {layer: 3, matrix: fc_out, rho: 0.1, band: 5e-1, of: entries}\n"
        "- decoder.-1.fc_out@0.1\n"
    )
    assert LaserPlan.from_file(path) == LaserPlan(
        [
            Reduction("20-27", "mlp", 0.001),
            Reduction("*", "q_proj", 0.5, scale=0.5, keep="tail"),
            Reduction(None, "/lm_head/", "gavish-donoho"),
            Reduction(3, "fc_in", "energy-0.9", blocks=4),
            Reduction(3, "fc_out", 0.1, band=0.5, of="entries"),
            Reduction(-1, "fc_out", 0.1, stack="decoder"),
        ]
    )


def test_the_designs_example():
    text = "27.fc_in@0.01, -1.fc_out@0.1, 20-27.mlp@gavish-donoho, decoder.3.q_proj@0.05, 5.fc_out[3]@0.1:keep=tail"
    assert LaserPlan.parse(text).reductions == (
        Reduction(27, "fc_in", 0.01),
        Reduction(-1, "fc_out", 0.1),
        Reduction("20-27", "mlp", "gavish-donoho"),
        Reduction(3, "q_proj", 0.05, stack="decoder"),
        Reduction(5, "fc_out", 0.1, expert=3, keep="tail"),
    )
    assert str(LaserPlan.parse(text)) == text


def test_stack_layer_and_matrix_are_told_apart():
    assert Reduction.parse("decoder.3.layer.0.q@0.1") == Reduction(3, "layer.0.q", 0.1, stack="decoder")
    assert Reduction.parse("net.1.0.fc_in@0.1") == Reduction(0, "fc_in", 0.1, stack="net.1")
    assert Reduction.parse("a.b.c.*.x.y@0.1") == Reduction("*", "x.y", 0.1, stack="a.b.c")


def test_equality_and_hash_ignore_order_and_nothing_else():
    rng = random.Random(2)
    for _ in range(50):
        plan = generate_plan(rng)
        shuffled = list(plan)
        rng.shuffle(shuffled)
        assert LaserPlan(shuffled) == plan
        assert len({LaserPlan(shuffled), plan}) == 1
        assert plan != LaserPlan([*shuffled, Reduction(99, "fc_in", 0.1)])
    assert LaserPlan.parse("1.fc_in@0.1") != LaserPlan.parse("1.fc_in@0.2")
    assert LaserPlan.parse("1.fc_in@0.1") != LaserPlan.parse("1.fc_in@0.1:keep=tail")
    assert LaserPlan.parse("1.fc_in@1") == LaserPlan([Reduction(1, "fc_in", 1)]) == LaserPlan.parse("1.fc_in@1.0")
    assert LaserPlan.parse("1.fc_in@1") != "1.fc_in@1"


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rho",
    [
        *[math.nan, math.inf, -math.inf, -0.1, 1.1, True, False, "x", "nan", "1.5", None, [0.1]],
        *["energy", "energy-", "energy-0", "energy-1", "energy-1.5", "energy-nan", "energy-x", "energy-SHARE"],
    ],
)
def test_rho_is_named(rho):
    with pytest.raises((ValueError, TypeError), match="`rho`"):
        Reduction(0, "fc_in", rho)
    with pytest.raises((ValueError, TypeError), match="`rho`"):
        LaserPlan.of([{"layer": 0, "matrix": "fc_in", "rho": rho}])
    if isinstance(rho, (str, float)):
        with pytest.raises(ValueError, match="`rho`"):
            LaserPlan.parse(f"0.fc_in@{rho}")


@pytest.mark.parametrize("layer", [1.5, "3-1", True, None, "x", "1", "", "-3--1", [1], "1-", "**"])
def test_layer_is_named(layer):
    with pytest.raises(ValueError, match="`layer`"):
        Reduction(layer, "fc_in", 0.1)
    with pytest.raises(ValueError, match="`layer`"):
        LaserPlan.of({"reductions": [{"layer": layer, "matrix": "fc_in", "rho": 0.1}]})


@pytest.mark.parametrize(
    "matrix", ["", "*", "a b", "mlp.", ".mlp", "fc_in@0.1", "1.fc", "fc_in\n", "/", 3, None, ["a"]]
)
def test_matrix_is_named(matrix):
    with pytest.raises((ValueError, TypeError), match="`matrix`"):
        Reduction(0, matrix, 0.1)


@pytest.mark.parametrize("pattern", ["/(/", "/a/b/", "/a#b/", "/a\nb/", "/a b/", "//"])
def test_patterns_that_are_none_or_could_not_be_written(pattern):
    with pytest.raises(ValueError, match="`matrix`"):
        Reduction(None, pattern, 0.1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("stack", value) for value in ("", "3", "a b", "a.", 3, "a.1.b")],
        *[("expert", value) for value in (-1, 1.5, "3", True)],
        *[("keep", value) for value in ("sideways", None, 1)],
        *[("band", value) for value in (0, -0.1, 1.1, math.nan, math.inf, "x", None, True)],
        *[("scale", value) for value in (math.nan, math.inf, "x", None, True)],
        *[("of", value) for value in ("values", None, 1)],
        *[("blocks", value) for value in (0, -1, 1.0, "2", None, True)],
    ],
)
def test_other_fields_are_named(field, value):
    with pytest.raises((ValueError, TypeError), match=f"`{field}`"):
        Reduction(0, "fc_in", 0.1, **{field: value})


def test_options_that_contradict_each_other():
    with pytest.raises(ValueError, match=r"`band` goes with keep='head'.*got band 0\.5"):
        Reduction(0, "fc_in", 0.1, keep="tail", band=0.5)
    with pytest.raises(ValueError, match="`rho` must be a number with of='entries': the rule 'entropy'"):
        Reduction(0, "fc_in", "entropy", of="entries")


def test_a_regex_takes_neither_layer_nor_stack():
    with pytest.raises(ValueError, match="`layer`"):
        Reduction(3, "/fc_in/", 0.1)
    with pytest.raises(ValueError, match="`stack`"):
        Reduction(None, "/fc_in/", 0.1, stack="decoder")


def test_a_plan_is_given_as_its_file_too(tmp_path):
    plan = LaserPlan.parse("27.fc_in@0.01, 11.q_proj@0.05")
    for name in ("plan.yaml", "plan.json", "plan.txt"):
        plan.to_file(tmp_path / name)
        assert LaserPlan.of(str(tmp_path / name)) == plan
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        LaserPlan.of("none.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one"),
        (" ,\n, ", "at least one"),
        ("27.fc_in", "cannot read the reduction '27.fc_in'"),
        ("fc_in@0.1", r"cannot read the reduction 'fc_in@0.1'.*; in every layer: \*.fc_in@0.1$"),
        ("mlp.gate_proj@0.1:keep=tail", r"; in every layer: \*.mlp.gate_proj@0.1:keep=tail$"),
        ("all-linear@0.5", r"; in every layer: \*.all@0.5$"),
        ("27@0.1", "cannot read"),
        ("27.fc_in@", "cannot read"),
        ("27.fc_in@0.1@0.2", "cannot read"),
        ("27.fc_in[x]@0.1", "cannot read"),
        ("1.5.fc_in@0.1", "cannot read"),
        ("27.fc_in@0.1:", "cannot read"),
        ("3-1.fc_in@0.1", "`layer`.*'3-1'"),
        ("27.fc_in@0.1:keep", "option 'keep'"),
        ("27.fc_in@0.1:colour=red", "option 'colour=red'"),
        ("27.fc_in@0.1:keep=tail,keep=head", "option 'keep=head'"),
        ("27.fc_in@0.1:keep=sideways", "`keep`.*'sideways'"),
        ("27.fc_in@0.1:scale=big", "`scale`.*'big'"),
        ("27.fc_in@0.1:band=0", "`band`.*got 0.0"),
        ("27.fc_in@0.1:blocks=2.5", "`blocks`.*'2.5'"),
        ("27.fc_in@0.1:of=values", "`of`.*'values'"),
        ("27.fc_in@0.1, 27.fc_in@0.5", "names one matrix twice: 27.fc_in"),
        ("/(/@0.1", "not a regular expression"),
    ],
)
def test_text_errors(text, message):
    with pytest.raises(ValueError, match=message):
        LaserPlan.parse(text)


def test_other_errors(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        LaserPlan([])
    with pytest.raises(TypeError, match="Reduction objects, got str"):
        LaserPlan(["27.fc_in@0.1"])
    with pytest.raises(TypeError, match="`text`"):
        LaserPlan.parse(3)
    with pytest.raises(TypeError, match="`plan`"):
        LaserPlan.of(3)
    with pytest.raises(TypeError, match="got int"):
        LaserPlan.of([3])
    with pytest.raises(ValueError, match="one key 'reductions', got \\['plans'\\]"):
        LaserPlan.of({"plans": []})
    with pytest.raises(ValueError, match="unknown \\['rate'\\]"):
        LaserPlan.of([{"layer": 1, "matrix": "fc_in", "rho": 0.1, "rate": 9}])
    with pytest.raises(ValueError, match="missing \\['rho'\\]"):
        LaserPlan.of([{"layer": 1, "matrix": "fc_in"}])
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    with pytest.raises(ValueError, match=r"empty\.yaml: expected a plan.*got None"):
        LaserPlan.from_file(empty)


# ---- the paper -------------------------------------------------------------------------------------------------------

TABLE_1 = """
U_in,8,0.8     U_in,27,0.01   U_in,28,0.05
U_out,2,0.4    U_in,27,0.1    U_in,27,0.2
U_in,3,0.4     U_in,24,0.01   U_in,30,0.2
U_in,9,0.9     U_in,14,0.01   U_in,24,0.01
U_in,3,0.9     U_in,18,0.01   U_out,30,0.4
U_in,0,0.01    U_in,7,0.8     U_in,30,0.05
U_out,1,0.4    U_in,26,0.01   U_out,28,0.01
U_in,7,0.4     U_in,27,0.01   U_in,27,0.01
"""


def test_the_papers_table_1():
    triples = [entry.split(",") for entry in TABLE_1.split()]
    assert len(triples) == 24
    for tau, ell, rho in triples:
        plan = LaserPlan.from_paper(tau, int(ell), float(rho))
        (reduction,) = plan
        assert reduction == Reduction(int(ell), {"U_in": "fc_in", "U_out": "fc_out"}[tau], float(rho))
        assert str(plan) == f"{ell}.{reduction.matrix}@{rho}"
        # GPT-J is 4096 wide, RoBERTa 768, LLaMA2 4096: the ranks of section 4, floor(rho * d).
        for width in (768, 4096):
            assert reduction.rank(width) == math.floor(Fraction(rho) * width)


def test_from_paper_other_arguments():
    assert LaserPlan.from_paper("U_in", -1, 0.1) == LaserPlan.parse("*.fc_in@0.1")  # -1 is every layer, not the last
    names = {"W_q": "q_proj", "W_k": "k_proj", "W_v": "v_proj", "W_o": "out_proj", "fc_up": "fc_up", "mlp": "mlp"}
    for tau, matrix in names.items():
        assert LaserPlan.from_paper(tau, 3, 0.1) == LaserPlan([Reduction(3, matrix, 0.1)])
    with pytest.raises(ValueError, match=r"`tau` must be one of U_in.*got 'U_up'"):
        LaserPlan.from_paper("U_up", 3, 0.1)
    with pytest.raises(ValueError, match="`rho`"):
        LaserPlan.from_paper("U_in", 3, 9.9)


# ---- ranks -----------------------------------------------------------------------------------------------------------


def test_ranks_are_exact():
    cases = {(0.01, 1000): 10, (0.29, 100): 29, (0.005, 64): 1, (0, 4096): 0, (1, 4096): 4096, (0.57, 100): 57}
    for (rho, size), rank in cases.items():
        assert Reduction(0, "fc_in", rho).rank(size) == rank


def test_ranks_against_fractions():
    rng = random.Random(3)
    for tenthousandths in range(10001):
        rho = tenthousandths / 10000
        reduction = Reduction(0, "fc_in", rho)
        for size in (*rng.choices(range(1, 4097), k=12), 1, 1000, 4096):
            exact = math.floor(Fraction(tenthousandths, 10000) * size)
            assert reduction.rank(size) == max(exact, 1 if tenthousandths else 0), (rho, size)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ((2, 10),)),
        ({"keep": "tail"}, ((0, 2),)),
        ({"band": 0.5}, ((2, 7),)),
        ({"band": 0.8}, ((2, 10),)),
        ({"band": 0.9}, ((2, 10),)),  # ends with the matrix
        ({"band": 1e-9}, ((2, 3),)),  # as with rho, at least one
    ],
)
def test_what_is_removed_is_one_run_of_components(options, expected):
    reduction = Reduction(0, "fc_in", 0.2, **options)
    assert reduction.removed(reduction.rank(10), 10) == expected


def test_only_the_defaults_are_a_truncation():
    assert Reduction(3, "fc_in", 0.2, stack="decoder", expert=1).is_truncation
    assert Reduction(3, "fc_in", "entropy").is_truncation
    for options in ({"keep": "tail"}, {"band": 0.5}, {"scale": 0.5}, {"of": "entries"}, {"blocks": 2}):
        assert not Reduction(3, "fc_in", 0.2, **options).is_truncation


def test_one_rule_has_one_name():
    assert Reduction.parse("3.fc_in@energy-.990") == Reduction(3, "fc_in", "energy-0.99")
    assert str(Reduction(3, "fc_in", "energy-9.9e-1")) == "3.fc_in@energy-0.99"


def test_the_rank_of_a_rule_needs_a_spectrum():
    with pytest.raises(TypeError, match="spectrum"):
        Reduction(0, "fc_in", "entropy").rank(64)
