"""The prompts of the LASER paper's tasks: rows of the public data sets as facts.

They are those of the paper's code (https://github.com/pratyushasharma/laser, ``src/dataset_utils`` and the scripts for
GPT-J and LLaMA), to the letter, as are the filters. Its scripts for RoBERTa ask otherwise. Contract: each function
yields :class:`~laser_callback.data.Fact` in the order of the rows; its wording, and the columns that it reads, are in
``tasks.yaml`` under its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from laser_callback.data.facts import Fact
from laser_callback.support.reading import read_table

SourceRow = Mapping[str, Any]

TABLE: Mapping[str, Mapping[str, Any]] = read_table("laser_callback.data", "tasks.yaml")
"""The rows of ``tasks.yaml`` by task."""


def _wording(task: str) -> tuple[str, Mapping[Any, str]]:
    return TABLE[task]["prompt"], TABLE[task]["answers"]


def _statement(text: str) -> str:
    return text.strip() if text.strip().endswith((".", "?")) else f"{text.strip()}."


def counterfact(rows: Iterable[SourceRow]) -> Iterator[Fact]:
    """Facts with two paraphrases each; the paper counts every prompt as an example."""
    for row in rows:
        rewrite = row["requested_rewrite"]
        yield Fact(
            id=f"counterfact-{row['case_id']}",
            prompt=rewrite["prompt"].format(rewrite["subject"]).strip(),
            answer=rewrite["target_true"]["str"].strip(),
            paraphrases=tuple(text.strip() for text in row["paraphrase_prompts"]),
            subject=rewrite["subject"],
            group=rewrite["relation_id"],
        )


def hotpotqa(rows: Iterable[SourceRow]) -> Iterator[Fact]:
    """Questions without their documents."""
    for row in rows:
        question = row["question"].strip()
        end = "" if question.endswith(("?", ".")) else "?"
        prompt = TABLE["hotpotqa"]["prompt"].format(question=question + end)
        yield Fact(id=f"hotpotqa-{row['id']}", prompt=prompt, answer=row["answer"].strip(), subject=question)


def fever(rows: Iterable[SourceRow]) -> Iterator[Fact]:
    """Claims that are supported or refuted; each once, and none that is said to be both."""
    prompt, answers = _wording("fever")
    labels: dict[str, set[str]] = {}
    ids: dict[str, Any] = {}
    for row in rows:
        if row["label"] in answers:
            labels.setdefault(row["claim"], set()).add(row["label"])
            ids.setdefault(row["claim"], row["id"])
    for claim, said in labels.items():
        if len(said) == 1:
            yield Fact(
                id=f"fever-{ids[claim]}",
                prompt=prompt.format(claim=_statement(claim)),
                answer=answers[said.pop()],
                choices=tuple(answers.values()),
                subject=claim,
            )


def bios_gender(rows: Iterable[SourceRow]) -> Iterator[Fact]:
    """The gender of the person in a biography."""
    prompt, genders = _wording("bios_gender")
    for number, row in enumerate(rows):
        text = prompt.format(text=_statement(row["hard_text"]))
        yield Fact(f"bios-{number}", text, genders[int(row["gender"])], choices=tuple(genders.values()))


def bios_profession(rows: Iterable[SourceRow]) -> Iterator[Fact]:
    """The profession of the person in a biography, where it is one of eight."""
    prompt, professions = _wording("bios_profession")
    for number, row in enumerate(rows):
        if (answer := professions.get(int(row["profession"]))) is not None:
            text = prompt.format(text=_statement(row["hard_text"]))
            yield Fact(f"bios-{number}", text, answer, choices=tuple(professions.values()))


def truthfulqa(rows: Iterable[SourceRow]) -> Iterator[Fact]:
    """Whether an answer to a question is true; one fact per candidate answer."""
    prompt, answers = _wording("truthfulqa")
    for number, row in enumerate(rows):
        targets = row["mc2_targets"]
        for position, (answer, label) in enumerate(zip(targets["choices"], targets["labels"], strict=True)):
            said = f"{row['question']} {answer}" + ("" if answer.endswith(".") else ".")
            yield Fact(
                id=f"truthfulqa-{number}-{position}",
                prompt=prompt.format(statement=said),
                answer=answers[int(label)],
                choices=tuple(answers.values()),
                subject=row["question"],
            )


def epistemic_reasoning(rows: Iterable[SourceRow]) -> Iterator[Fact]:
    """Whether a premise entails a hypothesis."""
    choices = ("entailment", "non-entailment")
    for number, row in enumerate(rows):
        yield Fact(f"epistemic-{number}", row["inputs"].strip(), row["targets"][0], choices=choices)


def wikidata_qa(rows: Iterable[SourceRow]) -> Iterator[Fact]:
    """Facts that have one answer."""
    for number, row in enumerate(rows):
        if len(row["targets"]) == 1:
            yield Fact(f"wikidata-{number}", row["inputs"].strip(), row["targets"][0].strip())
