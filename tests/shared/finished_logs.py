"""Logs of finished runs, as the programs write them that log them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

CHOICES = ["euro", "yen", "peso", "crown"]


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sample(number: int, gold: int, said: int, **changes: Any) -> dict[str, Any]:
    """A document of a multiple-choice task as lm-eval 0.4 logs it, ``said`` the likeliest choice."""
    prompt = f"Question {number}:"
    hashes = {f"{what}_hash": sha256(f"{what}{number}".encode()).hexdigest() for what in ("doc", "prompt", "target")}
    lls = [["-1.0" if place == said else "-9.0", "False"] for place in range(len(CHOICES))]
    return {
        "doc_id": number,
        "doc": {"question": prompt},
        "target": str(gold),
        "arguments": {f"gen_args_{i}": {"arg_0": prompt, "arg_1": f" {text}"} for i, text in enumerate(CHOICES)},
        "resps": [[one] for one in lls],
        "filtered_resps": lls,
        "filter": "none",
        "metrics": ["acc"],
        **hashes,
        "acc": float(gold == said),
        **changes,
    }


def lm_eval_folder(folder: Path, model: str, tasks: Mapping[str, Sequence[Mapping[str, Any]]], day: int = 1) -> Path:
    """The folder of a model, as ``--output_path`` has it; returns it."""
    date, owner = f"2025-01-0{day}T10-00-00.000000", folder / model.replace("/", "__")
    for task, rows in tasks.items():
        write_lines(owner / f"samples_{task}_{date}.jsonl", rows)
    better = {task: dict.fromkeys(rows[0]["metrics"], True) for task, rows in tasks.items()}
    results = {"model_name": model, "higher_is_better": better, "n-samples": {}}
    (owner / f"results_{date}.json").write_text(json.dumps(results))
    return owner


def inspect_log(path: Path, model: str, samples: Sequence[Mapping[str, Any]], task: str = "arithmetic") -> Path:
    """A log of Inspect, version 2, with what is read of it and some of the rest."""
    log = {
        "version": 2,
        "status": "success",
        "eval": {"task": task, "task_id": "x", "run_id": "y", "created": "2025-01-01T00:00:00+00:00", "model": model},
        "plan": {"name": "plan", "steps": []},
        "results": {"total_samples": len(samples), "scores": []},
        "samples": list(samples),
    }
    path.write_text(json.dumps(log))
    return path


def scored(number: int, value: Any, answer: str | None = None, epoch: int = 1, **changes: Any) -> dict[str, Any]:
    score = {"value": value, "answer": answer, "history": []}
    question = [{"role": "user", "content": f"{number} + 1?"}]
    whole = {"id": number, "epoch": epoch, "input": question, "target": str(number + 1), "scores": {"match": score}}
    return whole | changes
