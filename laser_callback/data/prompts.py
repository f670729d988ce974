"""The prompts of the LASER paper's tasks: rows of the public data sets as facts.

They are those of the paper's code (https://github.com/pratyushasharma/laser, ``src/dataset_utils`` and the GPT-J
scripts), to the letter, as are the filters. Contract: each function yields :class:`~laser_callback.data.Fact` in the
order of the rows; the columns that it reads are listed in ``tasks.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from laser_callback.data.facts import Fact

Row = Mapping[str, Any]


def _statement(text: str) -> str:
    return text.strip() if text.strip().endswith((".", "?")) else f"{text.strip()}."


def counterfact(rows: Iterable[Row]) -> Iterator[Fact]:
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


def hotpotqa(rows: Iterable[Row]) -> Iterator[Fact]:
    """Questions without their documents."""
    for row in rows:
        question = row["question"].strip()
        end = "" if question.endswith(("?", ".")) else "?"
        prompt = f"{question}{end} The answer is"
        yield Fact(id=f"hotpotqa-{row['id']}", prompt=prompt, answer=row["answer"].strip(), subject=question)


def fever(rows: Iterable[Row]) -> Iterator[Fact]:
    """Claims that are supported or refuted; each once, and none that is said to be both."""
    answers = {"SUPPORTS": "true", "REFUTES": "false"}
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
                prompt=f"Consider the following claim: {_statement(claim)} Is this claim true or false. The claim is",
                answer=answers[said.pop()],
                choices=("true", "false"),
                subject=claim,
            )


def bios_gender(rows: Iterable[Row]) -> Iterator[Fact]:
    """The gender of the person in a biography."""
    question = "Is the person in this text a male or female? The gender of this person is"
    genders = ("male", "female")
    for number, row in enumerate(rows):
        prompt = f"Consider the following text: {_statement(row['hard_text'])} {question}"
        yield Fact(f"bios-{number}", prompt, genders[int(row["gender"])], choices=genders)


# The professions that are one token for the paper's models, in its order, by their numbers in the data set.
_PROFESSIONS = {
    11: "journalist",
    20: "poet",
    5: "composer",
    12: "model",
    26: "teacher",
    1: "architect",
    14: "painter",
    21: "professor",
}


def bios_profession(rows: Iterable[Row]) -> Iterator[Fact]:
    """The profession of the person in a biography, where it is one of eight."""
    question = "What is the profession of the person in this text? The profession of this person is"
    professions = tuple(_PROFESSIONS.values())
    for number, row in enumerate(rows):
        if (answer := _PROFESSIONS.get(int(row["profession"]))) is not None:
            prompt = f"Consider the following text: {_statement(row['hard_text'])} {question}"
            yield Fact(f"bios-{number}", prompt, answer, choices=professions)


def truthfulqa(rows: Iterable[Row]) -> Iterator[Fact]:
    """Whether an answer to a question is true; one fact per candidate answer."""
    for number, row in enumerate(rows):
        targets = row["mc2_targets"]
        for position, (answer, label) in enumerate(zip(targets["choices"], targets["labels"], strict=True)):
            said = f"{row['question']} {answer}" + ("" if answer.endswith(".") else ".")
            yield Fact(
                id=f"truthfulqa-{number}-{position}",
                prompt=f"{said}Is this statement true or false? This statement is",  # as in the paper's code, no space
                answer="true" if label else "false",
                choices=("true", "false"),
                subject=row["question"],
            )


def epistemic_reasoning(rows: Iterable[Row]) -> Iterator[Fact]:
    """Whether a premise entails a hypothesis."""
    choices = ("entailment", "non-entailment")
    for number, row in enumerate(rows):
        yield Fact(f"epistemic-{number}", row["inputs"].strip(), row["targets"][0], choices=choices)


def wikidata_qa(rows: Iterable[Row]) -> Iterator[Fact]:
    """Facts that have one answer."""
    for number, row in enumerate(rows):
        if len(row["targets"]) == 1:
            yield Fact(f"wikidata-{number}", row["inputs"].strip(), row["targets"][0].strip())
