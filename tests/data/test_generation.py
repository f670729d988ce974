"""Answers that are written: their normal form, what is taken from a continuation, facts that nobody could answer."""

from __future__ import annotations

import pickle

import pytest
from tiny import tiny_tokenizer

from laser_callback import FactsDataModule
from laser_callback.data import Fact, Generation, encode_facts
from laser_callback.data.encoding import FactCollator
from laser_callback.data.generation import EXACT_MATCH


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The  Eiffel Tower.", "eiffel tower"),
        ("$1,234.50", "1234.5"),
        ("007", "7"),
        ("-0.0", "0"),
        (".5", "0.5"),
        ("x = -3.0", "x = -3"),
        ("12%", "12"),
        ("An apple, a day!", "apple day"),
        ("U.S.A.", "usa"),
        ("1,234,567", "1234567"),
        ("STRASSE", "straße"),
        ("na\u00efve", "nai\u0308ve"),
        ("\u200f\u05e9\u05dc\u05d5\u05dd\u200e", "\u05e9\u05dc\u05d5\u05dd"),
        ("x = \u22123.0", "x = -3"),
        ("(\u20133)", "-3"),
        ("007.50", "7.5."),
        ("12345678901234567890123456789012", "12,345,678,901,234,567,890,123,456,789,012"),
    ],
)
def test_these_are_one_answer(one, other):
    assert Generation().normal(one) == Generation().normal(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("5-3", "53"),
        ("5 - 3", "53"),
        ("1,23", "123"),
        ("3.5", "35"),
        ("-3", "3"),
        ("1.05", "1.5"),
        ("1.10.2024", "1.1.2024"),
        ("3.0.1", "3.1"),
        ("\u22123", "3"),
        ("3\u20135", "-5"),
        ("10", "100"),
        ("therapist", "rapist"),
        ("x<3", "x>3"),
        ("1234567890123456789012345678901", "1234567890123456789012345678902"),
    ],
)
def test_these_are_two(one, other):
    assert Generation().normal(one) != Generation().normal(other)


def test_only_what_is_named_makes_no_difference():
    texts = ["The X 1,000.0!", "The x 1,000.0!", "The X 1,000.0", "X 1,000.0!", "The X 1000.0!", "The X 1,000!"]
    for name, other in zip(("case", "punctuation", "articles", "separators", "numbers"), texts[1:], strict=True):
        exact, lax = Generation(normalise=()), Generation(normalise=(name,))
        assert exact.normal(texts[0]) != exact.normal(other)
        assert lax.normal(texts[0]) == lax.normal(other), name
        for another in texts[1:]:
            assert (lax.normal(texts[0]) == lax.normal(another)) == (another == other), (name, another)
    assert Generation(normalise=()).normal(" a \n b ") == "a b"


def test_what_is_taken_from_a_continuation():
    text = "First 3, then 4.\n#### 7 or #### 8\n\nQuestion: #### 9"
    pattern = r"#### (-?[\d.]+)"
    assert Generation(extract=pattern).judge(text, ["7"]) == ("7", True, "7")
    assert Generation(extract=pattern, match="last").judge(text, ["9"]).right
    assert Generation(extract=pattern, match="last", stop=("\n\n",)).judge(text, ["8.0"]) == ("8", True, "8")
    assert Generation(extract="(?:A: (.+)|B: (.+))").judge("B: yes", ["Yes"]).right
    assert Generation(extract=pattern).judge("7", ["7"]) == ("", False, "7")
    assert Generation().judge(" Rome \n", ["Paris", "ROME"]) == ("paris", True, "paris")
    assert not Generation().judge("", ["x"]).right
    # Matches that hold nothing are none, wherever they are.
    assert Generation(extract="(.*)", match="last").judge("Rome\n", ["Rome"]).right
    assert Generation(extract=r"(?P<a>is \d)?|so(?P<b> \d)?").judge("so it is so 4", ["4"]).right


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"extract": "####"}, "must have a group"),
        ({"extract": "("}, "must be a regular expression"),
        ({"stop": ("",)}, "none of them empty"),
        ({"normalise": ("spelling",)}, r"some of case, punctuation.*\['spelling'\]"),
        ({"match": "any"}, "'first' or 'last'"),
        ({"max_new_tokens": 0}, "at least 1, got 0"),
        ({"max_new_tokens": True}, "at least 1, got True"),
    ],
)
def test_settings_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        Generation(**arguments)


TALE = {"prompt": "2 and 3 are", "answer": "5", "rationale": "2 + 3 = 5. ####", "id": "x"}


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"answer": "The"}, {}, "fact 'x' is nothing without case"),
        ({"answers": ["..."]}, {}, "'...' of fact 'x' is nothing"),
        ({}, {"stop": ("####",)}, "'####' is in .* of fact 'x'"),
        ({"rationale": ""}, {"stop": (" ",)}, "' ' is in ' 5' of fact 'x'"),
        ({}, {"extract": "#### ([a-z]+)"}, "of fact 'x' must be judged right"),
        ({}, {"max_new_tokens": 510}, "at most 512 tokens, but '2 and 3 are' of fact 'x' makes"),
    ],
)
def test_facts_that_nobody_could_answer(row, settings, message):
    tokenizer = tiny_tokenizer()
    options = {"extract": r"#### (\d+)"} if "rationale" in TALE | row else {}
    data = FactsDataModule([TALE | row], tokenizer, generation=Generation(**options | settings))
    with pytest.raises(ValueError, match=message):
        data.setup()


def test_a_masked_model_writes_nothing():
    with pytest.raises(ValueError, match="must be None for a masked model"):
        FactsDataModule([TALE], tiny_tokenizer(masked=True), generation=Generation()).setup()


@pytest.mark.parametrize("row", [{"rationale": " x"}, {"answers": "5.0"}, {"answers": ["a "]}, {"rationale": 3}])
def test_facts_that_are_malformed(row):
    with pytest.raises(ValueError, match=r"`(rationale|answers)` must be"):
        Fact.from_row(TALE | row, "1")


def test_rows_and_batches():
    tokenizer, generation = tiny_tokenizer(bos=True), Generation(max_new_tokens=9, stop="\n", extract=r"#### (\d+)")
    facts = [
        Fact.from_row(TALE | {"paraphrases": ["So 2 and 3 are"], "choices": ["5", "6"], "answers": ["five"]}, "1"),
        Fact("y", "The capital of France is", "7"),
    ]
    encoded = encode_facts(facts, tokenizer, masked=False, generation=generation)
    assert [len(item.rows) for item in encoded] == [1, 1]
    assert tokenizer.decode(encoded[0].rows[0].targets) == " 2 + 3 = 5. #### 5"
    assert list(encoded[1].asked) == tokenizer("The capital of France is")["input_ids"]
    batch = pickle.loads(pickle.dumps(FactCollator(2, generation=generation)(encoded)))  # as a worker sends it
    asked = batch["asked"]
    assert batch["accepted"] == [["5", "five"], ["7"]]
    assert (asked["max_new_tokens"], asked["stop"]) == (9, ["\n"])
    assert asked["attention_mask"].sum(1).tolist() == [len(item.asked) for item in encoded]
    assert asked["attention_mask"][:, -1].all()  # padded on the left
    (scored,) = asked["judged"](["#### five", "#### 7"], batch)
    assert scored[::2] == (EXACT_MATCH, True)
    assert [one.right for one in scored.judged] == [False, True]
    assert FactCollator(2, generation=generation, writes=False)(encoded)["asked"] == {}
    assert "asked" not in FactCollator(2)(encoded)


def test_a_chat_is_continued_behind_its_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    (item,) = encode_facts([Fact("x", "Hi", "5")], tokenizer, masked=False, chat=True, generation=Generation())
    assert tokenizer.decode(item.asked) == "<s>user: Hi</s><s>assistant: "


def test_training_is_by_loss():
    data = FactsDataModule([TALE], tiny_tokenizer(), generation=Generation(max_new_tokens=4, extract=r"#### (\d+)"))
    data.setup()
    assert next(iter(data.train_dataloader()))["asked"] == {}
    assert next(iter(data.val_dataloader()))["asked"]["max_new_tokens"] == 4
    assert data.metric == "exact_match"
