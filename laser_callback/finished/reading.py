"""Finished runs, as other programs have logged them: what was asked, and what came of it. No model is run.

Contract: what is read is what the log says, example by example; what is no outcome is told, and any other file is
refused, with its place. Read are lm-evaluation-harness' samples (``--log_samples``), logs of Inspect as JSON, JSONL and
CSV files with an ``id`` and outcomes, and this package's own ``.examples.jsonl``, of which the original's outcomes are
taken.
"""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from laser_callback.data.facts import read_csv
from laser_callback.finished.eval_logs import is_inspect, is_sample, read_inspect, read_samples
from laser_callback.finished.logged import FinishedRun, LoggedExample, LoggedTask, by_id
from laser_callback.support.plain_json import text_of
from laser_callback.support.reading import MisfitError, read_json_lines, read_plain, shown, typed

_SAMPLES = re.compile(r"samples_(?P<task>.+)_(?P<date>\d{4}-\d\d-\d\dT[\d.-]+)")
_FORMS = (".jsonl", ".csv", ".json")
_DESCRIBE = ("id", "task", "cluster", "subject", "group", "prompt", "answer", "prediction", "continuation")
_WORDS = {"true": True, "false": False, **dict.fromkeys(("", "na", "n/a", "null", "none"))}
_OWN = ".examples.jsonl"
_ORIGINAL = "original"  # the arm of one's own examples
_LARGEST = sys.float_info.max


class _Log(NamedTuple):
    """What a file holds; ``model`` is empty where it does not say whose it is."""

    model: str
    tasks: dict[str, LoggedTask]


def read_run(path: Path, option: str) -> FinishedRun:
    """Read a finished run.

    Args:
        path: a file, or a folder of files that are a task each.
        option: that names it, for messages.

    Raises:
        OSError: if there is no such file.
        ValueError: if it holds no outcomes, something else, or an example twice, with the place.
    """
    in_folder = path.is_dir()
    files = _files(path, option) if in_folder else [path]
    models: dict[str, Path] = {}
    tasks: dict[str, LoggedTask] = {}
    for file in files:
        log = _read(file, option, _stem(file) if in_folder else "")
        models.setdefault(log.model or _stem(path), file)
        if twice := [task for task in log.tasks if task in tasks]:
            raise ValueError(f"`{option}`: {path} has several logs of the task {twice[0]!r}: name one of them")
        tasks |= log.tasks
    if len(models) > 1:
        raise ValueError(f"`{option}`: {path} holds runs of {', '.join(models)}: name the folder or file of one")
    return FinishedRun(next(iter(models)), str(path), tasks)


def run_of_rows(rows: Sequence[Mapping[str, Any]], name: str, source: str) -> FinishedRun:
    """A finished run from rows of a table, or of this package's own examples.

    Raises:
        ValueError: as :func:`read_run`.
    """
    return FinishedRun(name, source, _table(list(enumerate(rows, 1)), ""))


def _files(folder: Path, option: str) -> list[Path]:
    """The logs in a folder: of lm-eval the latest of each task, wherever they are in it; else each file."""
    dated = [(match["date"], match["task"], file) for file in folder.rglob("*.jsonl") if (match := _sample(file))]
    latest = {(file.parent, task): file for _, task, file in sorted(dated)}
    if older := len(dated) - len(latest):
        warnings.warn(
            f"`{option}`: {folder} has {older} older logs of the same tasks; the latest are read", stacklevel=3
        )
    found = [*latest.values()] or sorted(file for file in folder.iterdir() if file.suffix in _FORMS)
    if not found:
        raise ValueError(f"`{option}`: {folder} has no samples_*.jsonl of lm-eval, and no {', '.join(_FORMS)} file")
    return found


def _sample(file: Path) -> re.Match[str] | None:
    return _SAMPLES.fullmatch(file.stem)


def _stem(path: Path) -> str:
    return path.name.removesuffix(_OWN).removesuffix(path.suffix)


def _read(file: Path, option: str, task: str) -> _Log:
    """A file; ``task`` is its task where it names none itself."""
    if file.suffix == ".json":
        return read_plain(file, option, _inspect)
    if file.suffix == ".csv":
        with _named(option, file):
            return _Log("", _table([(n, _numbers(row)) for n, row in read_csv(file)], task))
    if file.suffix != ".jsonl":
        also = "; `inspect log convert --to json` makes one of it" if file.suffix == ".eval" else ""
        raise ValueError(f"`{option}`: a finished run is a folder, or a {', '.join(_FORMS)} file, got {file}{also}")
    rows = read_json_lines(file, option)
    with _named(option, file):
        if not rows or not is_sample(rows[0]):
            return _Log("", _table(list(enumerate(rows, 1)), task))
        match = _sample(file)
        results = {} if match is None else _results(file.with_name(f"results_{match['date']}.json"), option)
        name = _stem(file) if match is None else match["task"]
        better = typed(dict[str, dict[str, bool | None]], results.get("higher_is_better", {})).get(name, {})
        return _Log(text_of(results.get("model_name") or file.parent.name), {name: read_samples(rows, better)})


def _results(file: Path, option: str) -> dict[str, Any]:
    """The results that lm-eval has written beside its samples, if they are there."""
    return read_plain(file, option, partial(typed, dict[str, Any])) if file.is_file() else {}


def _inspect(data: Any) -> _Log:
    if not is_inspect(data):
        of_lm_eval = isinstance(data, dict) and "n-samples" in data
        also = ": of lm-eval, name the folder or the samples" if of_lm_eval else ""
        raise MisfitError(f"expected a log of Inspect, with `version`, `eval` and `samples`{also}")
    model, task, logged = read_inspect(data)
    return _Log(model, {task: logged})


@contextmanager
def _named(option: str, file: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"`{option}`: {file}: {error}") from error


# ---- tables ----------------------------------------------------------------------------------------------------------


def _numbers(row: Mapping[Any, Any]) -> dict[Any, Any]:
    """A row of CSV, in which a number is text."""

    def value(text: Any) -> Any:
        if not isinstance(text, str) or text.lower() in _WORDS:
            return _WORDS.get(text.lower()) if isinstance(text, str) else text
        try:
            return float(text)
        except ValueError:
            return text

    return {key: cell if key in _DESCRIBE else value(cell) for key, cell in row.items()}


def _table(rows: Sequence[tuple[int, Any]], task: str) -> dict[str, LoggedTask]:
    """Tasks from numbered rows of ``id``, what describes an example, and outcomes: whatever is a number in each row."""
    tasks: dict[str, dict[str, list[Any]]] = {}
    listed: dict[str, list[LoggedExample]] = {}
    are_own = bool(rows) and isinstance(rows[0][1], Mapping) and isinstance(rows[0][1].get(_ORIGINAL), Mapping)
    for number, row in rows:
        if not isinstance(row, Mapping) or row.get("id") in (None, ""):
            raise ValueError(f"line {number}: expected a row with an `id`, got {shown(row)}")
        if None in row:
            raise ValueError(f"line {number}: more cells than the header has, from {shown(row[None])} on")
        example, values = _example(row)
        name = text_of(row.get("task") or task)
        for column, value in values.items():
            tasks.setdefault(name, {}).setdefault(column, []).append(value)
        example.outcomes = values
        listed.setdefault(name, []).append(example)
    found = {}
    for name, examples in listed.items():
        columns = tasks.get(name, {})
        bad = {c: next((v for v in values if not _is_outcome(v)), None) for c, values in columns.items()}
        logged = LoggedTask(by_id(examples))
        logged.unused = {
            column: f"no number, such as {shown(value)}" for column, value in bad.items() if value is not None
        }
        if are_own and "perplexity" in columns:
            logged.unused["perplexity"] = "how many tokens each example has is not written beside it"
        for example in examples:
            kept = {c: v for c, v in example.outcomes.items() if c not in logged.unused}
            example.outcomes = {c: math.nan if v is None else float(v) for c, v in kept.items()}
        found[name] = logged
    if not any(example.outcomes for logged in found.values() for example in logged.examples.values()):
        why = dict(item for logged in found.values() for item in logged.unused.items())
        also = "".join(f"; `{column}` has {reason}" for column, reason in list(why.items())[:3])
        raise ValueError(f"it has no outcomes: expected rows with an `id` and numbers, true or false{also}")
    return found


def _example(row: Mapping[str, Any]) -> tuple[LoggedExample, dict[str, Any]]:
    """A row, and what may be its outcomes; of one's own examples those of the original."""
    own = row.get(_ORIGINAL)
    arm: Mapping[str, Any] = own if isinstance(own, Mapping) else row
    values = {
        k: v for k, v in arm.items() if k not in _DESCRIBE and k.partition("/")[0] not in ("answer", "prediction")
    }
    texts = {name: text_of(row[name]) for name in ("prompt", "answer") if row.get(name) not in (None, "")}
    cluster = row.get("cluster", row.get("subject"))
    example = LoggedExample(
        text_of(row["id"]),
        same=texts,
        prompt=texts.get("prompt", ""),
        group=text_of(row.get("group") or ""),
        cluster=None if cluster in (None, "") else text_of(cluster),
        continuation=text_of(arm.get("continuation") or ""),
    )
    for metric in values:
        answer = row.get(f"answer/{metric}", row.get("answer"))
        prediction = arm.get(f"prediction/{metric}", arm.get("prediction"))
        if answer is not None and prediction is not None:
            example.answers[metric], example.predictions[metric] = text_of(answer), text_of(prediction)
    return example, values


def _is_outcome(value: Any) -> bool:
    return value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) <= _LARGEST)
