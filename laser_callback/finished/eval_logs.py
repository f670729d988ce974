"""Logs of two evaluation harnesses: lm-evaluation-harness' samples, and Inspect's logs.

Sources: ``lm_eval/evaluator.py`` and ``lm_eval/loggers/evaluation_tracker.py`` of lm-eval 0.4.13; ``EvalLog`` of
``inspect_ai/log/_log.py`` and ``value_to_float`` of ``inspect_ai/scorer/_metric.py`` of inspect_ai 0.3.285. Neither is
imported.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from laser_callback.finished.logged import LoggedExample, LoggedTask, by_id
from laser_callback.support.plain_json import text_of
from laser_callback.support.reading import shown
from laser_callback.support.suggest import clipped

# ---- lm-evaluation-harness -------------------------------------------------------------------------------------------

HASHES = ("doc_hash", "prompt_hash", "target_hash")
_WEIGHTED = {"word_perplexity": 1.0, "byte_perplexity": 1.0, "bits_per_byte": math.log(2)}
"""Metrics logged as (log likelihood, weight), and the nats in one unit."""
_LOWER = ("bits_per_byte", "brier_score", "ter")
"""Better low, where the results are not beside the samples to say so; of perplexities their kind does."""


def is_sample(row: Any) -> bool:
    """Whether a line is a sample of lm-eval."""
    return isinstance(row, Mapping) and "doc_hash" in row and "metrics" in row


def read_samples(rows: Iterable[Any], higher_is_better: Mapping[str, bool | None]) -> LoggedTask:
    """A task from the lines of its samples: a document has one for each filter.

    The rows are named as in lm-eval's results, ``acc``, ``exact_match,strict-match``, without the filter ``none``.

    Args:
        rows: the lines.
        higher_is_better: what the results say of each metric.

    Raises:
        ValueError: if a line is no sample, or a document comes twice.
    """
    found: dict[str, list[LoggedExample]] = {}  # by filter
    task = LoggedTask({})
    for number, row in enumerate(rows, 1):
        with _told_of(f"line {number} is no sample as lm-eval writes it"):
            suffix, example = _example(task, row)
        found.setdefault(suffix, []).append(example)
    first, *others = map(by_id, found.values())
    for other in others:
        for one in other.values():
            whole = first.setdefault(one.id, one)
            for name in ("outcomes", "weights", "answers", "predictions", "meant"):
                getattr(whole, name).update(getattr(one, name))
    task.examples = first
    metrics = {metric for example in first.values() for metric in example.outcomes}
    known = dict.fromkeys(_LOWER, False) | {name: way for name, way in higher_is_better.items() if way is not None}
    task.higher_is_better = {m: known[base] for m in metrics if (base := m.partition(",")[0]) in known}
    return task


@contextmanager
def _told_of(what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{what}: {type(error).__name__}, {clipped(error)}") from error


def _example(task: LoggedTask, row: Mapping[str, Any]) -> tuple[str, LoggedExample]:
    """What a filter's name adds to those of metrics, and the example."""
    example = LoggedExample(str(row["doc_id"]), same={name: str(row[name]) for name in HASHES})
    suffix = "" if row.get("filter", "none") == "none" else f",{row['filter']}"
    for metric in row["metrics"]:
        _add_metric(task, example, metric, f"{metric}{suffix}", row.get(metric))
    arguments = [list(one.values()) for one in row.get("arguments", {}).values()]
    example.prompt = text_of(arguments[0][0]) if arguments and arguments[0] else ""
    example.continuation = _written(row, arguments)
    for metric, (answer, said) in _said(row, arguments).items():
        if f"{metric}{suffix}" in example.outcomes:
            example.said(f"{metric}{suffix}", answer, said)
    return suffix, example


def _add_metric(task: LoggedTask, example: LoggedExample, metric: str, name: str, value: Any) -> None:
    if metric in _WEIGHTED and isinstance(value, Sequence) and len(value) == 2:
        log_likelihood, weight = map(float, value)
        example.outcomes[name], example.weights[name] = -log_likelihood / weight / _WEIGHTED[metric], weight
        if metric != "bits_per_byte":
            task.kinds[name] = "log_ratio"
    elif metric == "perplexity" and isinstance(value, (int, float)):
        example.outcomes[name] = -float(value)
        task.kinds[name] = "log_ratio"
    elif isinstance(value, (bool, int, float)):
        example.outcomes[name] = float(value)
    else:
        task.unused.setdefault(name, f"not one number per example, such as {shown(value)}")


def _said(row: Mapping[str, Any], arguments: Sequence[Sequence[Any]]) -> dict[str, tuple[str, str]]:
    """The right answer and the run's, by metric, where the sample tells both."""
    responses, target = row.get("filtered_resps") or [], text_of(row.get("target", ""))
    if len(arguments) > 1 and all(isinstance(one, Sequence) and len(one) == 2 for one in responses):
        return _chosen(row, [text_of(one[-1]).removeprefix(" ") for one in arguments], responses, target)
    if _is_generated(arguments) and len(responses) == 1 and isinstance(responses[0], str):
        return dict.fromkeys(row["metrics"], (target, responses[0]))
    return {}


def _is_generated(arguments: Sequence[Sequence[Any]]) -> bool:
    """Whether a prompt was given with options for what is written to it."""
    return bool(arguments) and len(arguments[0]) == 2 and isinstance(arguments[0][1], Mapping)


def _written(row: Mapping[str, Any], arguments: Sequence[Sequence[Any]]) -> str:
    """All that was written to the prompt, the first time; empty where nothing was."""
    responses = row.get("resps") or [[]]
    first = responses[0][0] if isinstance(responses[0], Sequence) and responses[0] else ""
    return first if _is_generated(arguments) and isinstance(first, str) else ""


def _chosen(
    row: Mapping[str, Any], choices: list[str], responses: Sequence[Sequence[Any]], target: str
) -> dict[str, tuple[str, str]]:
    """Of multiple choice, by the accuracies that lm-eval defines: the likeliest choice, by its letters or as it is."""
    if "acc_mutual_info" in row["metrics"]:  # the second half is without the prompt
        choices = choices[: len(choices) // 2]
    likelihoods = np.array([float(one[0]) for one in responses[: len(choices)]])
    if len(set(choices)) < len(choices):  # a prompt for each choice: they are told apart by their number
        choices = [str(number) for number in range(len(choices))]
    is_number = target.isdecimal() and int(target) < len(choices)
    places = {*([int(target)] if is_number else []), *([choices.index(target)] if target in choices else [])}
    if len(places) != 1:  # a number among numbers may be the right choice or its place
        return {}
    right = places.pop()
    lengths = np.array([max(len(choice), 1) for choice in choices])
    best = {"acc": int(np.argmax(likelihoods)), "acc_norm": int(np.argmax(likelihoods / lengths))}
    return {
        metric: (choices[right], choices[place])
        for metric, place in best.items()
        if row.get(metric) is not None and (place == right) == (row[metric] == 1)
    }


# ---- Inspect ---------------------------------------------------------------------------------------------------------

_WORDS = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0, "yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}


def is_inspect(data: Any) -> bool:
    """Whether a file is a log of Inspect."""
    return isinstance(data, Mapping) and isinstance(data.get("eval"), Mapping) and "version" in data


def read_inspect(data: Mapping[str, Any]) -> tuple[str, str, LoggedTask]:
    """The model, the task's name and the task of a log.

    A scorer is a metric; of one that gives several values each is, ``scorer/value``. Epochs of a sample are examples of
    one cluster.

    Raises:
        ValueError: for a log without samples, if one is none, or if a sample's epoch comes twice.
    """
    samples = data.get("samples")
    if not isinstance(samples, list) or not samples:
        raise ValueError("expected `samples`: Inspect writes none with `--no-log-samples`, and none in a header")
    task = LoggedTask({})
    examples = []
    for number, sample in enumerate(samples, 1):
        with _told_of(f"sample {number} is none as Inspect writes it"):
            examples.append((str(sample["id"]), sample.get("epoch", 1), _scored(task, sample)))
    if len({epoch for _, epoch, _ in examples}) > 1:
        for name, epoch, example in examples:
            example.id, example.cluster = f"{name}, epoch {epoch}", name
    task.examples = by_id(example for _, _, example in examples)
    return text_of(data["eval"].get("model", "")), text_of(data["eval"].get("task", "")), task


def _scored(task: LoggedTask, sample: Mapping[str, Any]) -> LoggedExample:
    target = sample.get("target", "")
    answers = [text_of(one) for one in (target if isinstance(target, list) else [target])]
    example = LoggedExample(str(sample["id"]), prompt=_conversation(sample.get("input")))
    example.same = {"input": example.prompt, "target": "; ".join(answers)}
    example.continuation = text_of((sample.get("output") or {}).get("completion") or "")
    for scorer, score in (sample.get("scores") or {}).items():
        value, answer = score["value"], score.get("answer")
        values = {f"{scorer}/{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {scorer: value}
        for metric, one in values.items():
            if (number := _number(one)) is None:
                task.unused.setdefault(metric, f"no number, such as {shown(one)}")
                continue
            example.outcomes[metric] = number
            if isinstance(one, str) and not _is_float(one):
                task.higher_is_better[metric] = True
            if answer is not None and answers:
                example.said(metric, answers[0], text_of(answer))
    return example


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        value = _WORDS.get(value, _WORDS.get(value.lower(), value))
        return float(value) if isinstance(value, float) or _is_float(value) else None
    return float(value) if isinstance(value, (bool, int, float)) else None


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _conversation(messages: Any) -> str:
    """The input of a sample: text, or messages with a role and text."""
    if not isinstance(messages, list):
        return text_of(messages)
    return "\n".join(f"{one.get('role', '')}: {text_of(one.get('content', ''))}" for one in messages)
