"""Targets: the tokens that follow the prompt in running text, with tokenizers of every kind."""

from __future__ import annotations

import pytest
import torch
from language_models import SMALL, build
from tokenizer_kinds import KINDS, tokenizer_of
from tokenizers import pre_tokenizers
from trainers import quiet_trainer
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from laser_callback import FactsDataModule, LaserModule
from laser_callback.data.encoding import encode_facts
from laser_callback.data.facts import Fact
from laser_callback.data.probes import Probe, ProbesDataModule
from laser_callback.data.row_scores import Role

FACTS = [
    Fact("fr", "The capital of France is", "Paris", ("France? Its capital city:", "Say\n"), ("Rome", "Paris")),
    Fact("br", "People in Brazil speak", "Portuguese today", ("In Brazil they speak",)),
    Fact("jp", "The currency of Japan is the", "yen", choices=("yen", "false claim", "(")),
]


def tokenizers():
    options = [(kind, {}) for kind in KINDS] + [(kind, {"bos": True, "eos": True}) for kind in KINDS]
    made = [pytest.param(tokenizer_of(kind, **more), id=" ".join([kind, *more])) for kind, more in options]
    return [*made, pytest.param(ByT5Tokenizer(), id="in Python")]  # what transformers calls slow


def pairs(fact):
    texts = [(prompt, fact.answer) for prompt in (fact.prompt, *fact.paraphrases)]
    return texts + [(fact.prompt, choice) for choice in fact.choices if choice != fact.answer]


@pytest.mark.parametrize("tokenizer", tokenizers())
def test_a_row_is_running_text_and_its_targets_are_the_answer(tokenizer):
    leading = [0] if tokenizer("a")["input_ids"][0] == 0 and tokenizer.bos_token is not None else []
    for item in encode_facts(FACTS, tokenizer, masked=False):
        for row, (prompt, answer) in zip(item.rows, pairs(item.fact), strict=True):
            text = tokenizer(f"{prompt} {answer}", add_special_tokens=False)["input_ids"]
            assert [*row.input_ids, row.targets[-1]] == leading + text
            assert list(row.targets) == text[len(text) - len(row.targets) :]
            assert [(leading + text)[position + 1] for position in row.positions] == list(row.targets)
            assert "".join(tokenizer.decode(row.targets).split()) == "".join(answer.split())


@pytest.mark.parametrize("kind", KINDS)
def test_masked_rows_have_a_mask_for_each_token_of_the_answer_in_running_text(kind):
    tokenizer = tokenizer_of(kind, bos=True, eos=True, masked=True)
    for item in encode_facts(FACTS, tokenizer, masked=True):
        for row, (prompt, answer) in zip(item.rows, pairs(item.fact), strict=True):
            before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            text = tokenizer(f"{prompt} {answer}", add_special_tokens=False)["input_ids"]
            masks = [tokenizer.mask_token_id] * (len(text) - len(before))
            stop = tokenizer.convert_tokens_to_ids(".")
            assert list(row.input_ids) == [0, *before, *masks, stop, 1]
            assert list(row.targets) == text[len(before) :]


def test_byte_level_targets_are_those_of_the_answer_alone():
    """A space begins a new piece there, so that prompt and answer have the tokens that they have alone."""
    tokenizer = tokenizer_of("byte level", bos=True)
    for item in encode_facts(FACTS, tokenizer, masked=False):
        for row, (prompt, answer) in zip(item.rows, pairs(item.fact), strict=True):
            apart = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, f" {answer}")]
            assert [*row.input_ids, row.targets[-1]] == [0, *apart[0], *apart[1]]
            assert list(row.targets) == apart[1]


def test_a_tokenizer_that_joins_prompt_and_answer_is_an_error_that_names_the_fact():
    tokenizer = tokenizer_of("byte level")
    tokenizer.backend_tokenizer.add_tokens(["is Paris"])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    with pytest.raises(ValueError, match=r"joins the prompt 'The capital of France is' of fact 'fr' to .*'Paris'; end"):
        encode_facts(FACTS, tokenizer, masked=False)


# ---- what begins a text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_prompt_may_bring_the_first_special_token(kind, masked):
    tokenizer = tokenizer_of(kind, bos=True, eos=masked, masked=masked)
    for prompt in ("<s>The capital of France is", "<s> Ask: the capital?", "<s>The claim <s> is"):
        (item,) = encode_facts([Fact("a", prompt, "Paris", (prompt + " a",))], tokenizer, masked=masked)
        for row, text in zip(item.rows, (prompt, prompt + " a"), strict=True):
            expected = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert list(row.input_ids[: len(expected)]) == expected
            assert row.input_ids[0] == 0 != row.input_ids[1]


def test_text_and_probes_may_bring_it_too(tmp_path):
    tokenizer = tokenizer_of("llama2", bos=True)
    (tmp_path / "t.txt").write_text("<s>The capital of France is Paris.")
    data = FactsDataModule(FACTS, tokenizer, text=tmp_path / "t.txt")
    data.setup()
    assert data.text[0]["input_ids"][:2] == tuple(tokenizer("<s>The", add_special_tokens=False)["input_ids"])
    probes = ProbesDataModule([Probe("a", "<s>The capital", "answer"), Probe("b", "The capital", "answer")], tokenizer)
    probes.setup()
    first, second = (tokens for _, tokens in probes.probes)
    assert first == second == (0, *tokenizer("The capital", add_special_tokens=False)["input_ids"])


# ---- chat ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama2", "metaspace first", "byte level"])
@pytest.mark.parametrize("space", ["", " ", "\n", "\n "])
@pytest.mark.parametrize("generation", [False, True])
def test_answers_follow_where_the_chat_template_lets_the_model_reply(kind, space, generation):
    tokenizer = tokenizer_of(kind, bos=True)
    asked, said = "{{ m.content }} Say:", f"{space}{{{{ m.content }}}}</s>"
    if generation:
        asked, said = "{{ m.content }}\n", f"Say:{space}{{{{ m.content }}}}</s>"
    tokenizer.chat_template = (
        f"{{{{ bos_token }}}}{{% for m in messages %}}{{% if m.role == 'user' %}}{asked}{{% else %}}{said}{{% endif %}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{'Say:' if generation else ''}{{% endif %}}"
    )
    for item in encode_facts(FACTS, tokenizer, masked=False, chat=True):
        for row, (prompt, answer) in zip(item.rows, pairs(item.fact), strict=True):
            talk = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            whole = tokenizer.apply_chat_template(talk)["input_ids"]
            asked_only = tokenizer.apply_chat_template(talk[:1], add_generation_prompt=True)["input_ids"]
            assert [*row.input_ids, row.targets[-1]] == whole[:-1]  # but for the end of the reply
            assert list(row.input_ids[: len(asked_only)]) == asked_only
            assert row.input_ids.count(0) == 1
            assert "".join(tokenizer.decode(row.targets).split()) == "".join(answer.split())
        assert item.rows[0].role == Role.PROMPT


def test_a_model_that_thinks_is_asked_to_reply_at_once():
    tokenizer = tokenizer_of("byte level")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]"
        "{% if enable_thinking is defined and enable_thinking is false %}(no thoughts){% endif %}{% endif %}"
    )
    (item, *_) = encode_facts(FACTS, tokenizer, masked=False, chat=True)
    assert tokenizer.decode(item.rows[0].input_ids).startswith("[user]The capital of France is[assistant](no thoughts)")


def test_chat_is_refused_where_there_is_no_template(tmp_path):
    with pytest.raises(ValueError, match=r"`chat` must be False for a tokenizer without a chat template.*chat model"):
        FactsDataModule(FACTS, tokenizer_of("llama2"), chat=True).setup()
    with pytest.raises(ValueError, match="`chat` must be False for a masked model"):
        FactsDataModule(FACTS, tokenizer_of("word piece", masked=True), chat=True).setup()


# ---- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama2", "metaspace always", "byte level"])
def test_scores_and_prior_checks_are_about_the_same_tokens(kind):
    tokenizer = tokenizer_of(kind, bos=True)
    model = build(LlamaForCausalLM, LlamaConfig(**{**SMALL, "vocab_size": len(tokenizer)}))
    facts = [Fact(f"{i}", f"{fact.prompt}{',' * i}", fact.answer) for i in range(4) for fact in [FACTS[i % 3]]]
    module = LaserModule(model, tokenizer, plan="1.fc_up@0.05", report=False)
    wanted, said = [], []
    for fact in facts:
        ids = tokenizer(f"{fact.prompt} {fact.answer}")["input_ids"]
        before = tokenizer(fact.prompt)["input_ids"]
        wanted.append(ids[len(before)])
        with torch.no_grad():
            said.append(int(model(torch.tensor([before])).logits[0, -1].argmax()))
    quiet_trainer().validate(module, datamodule=FactsDataModule(facts, tokenizer), verbose=False)
    rows = module.result.examples.to_rows()
    right = [row["original"]["first_token_accuracy"] for row in rows]
    assert right == [float(a == b) for a, b in zip(said, wanted, strict=True)]
    assert [row["answer"] == row["original"]["prediction"] for row in rows] == [bool(x) for x in right]
    answers = [" Paris", " Portuguese", " yen", " Paris"]
    assert [row["answer"] for row in rows] == answers


def test_tokens_that_differ_by_the_mark_only_are_two_answers():
    tokenizer = tokenizer_of("llama2")
    names = [name for name in ("\u2581a", "a", "\u2581", "\u2581is", "is") if name in tokenizer.get_vocab()]
    module = LaserModule(
        build(LlamaForCausalLM, LlamaConfig(**{**SMALL, "vocab_size": len(tokenizer) + 3})), tokenizer, report=False
    )
    ids = tokenizer.convert_tokens_to_ids(names)
    assert module._texts(torch.tensor(ids)[:, None]) == [name.replace("\u2581", " ") for name in names]
    assert module._texts(torch.tensor([[ids[0], ids[1], -1]])) == [f"{names[0]}{names[1]}".replace("\u2581", " ")]
    assert len(module._texts(torch.tensor([[len(tokenizer) + 1]]))) == 1  # a row of the vocabulary that has no token
