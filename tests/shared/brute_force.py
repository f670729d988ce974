"""The metrics of facts and text by full forward passes, one prompt at a time, in plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from laser_callback.data.datamodule import TextWindows

BASE = ["first_token_accuracy", "answer_accuracy", "top5_accuracy", "top10_accuracy", "log_loss", "soft_error"]
CHOICES = ["choice_accuracy", "summed_choice_accuracy"]
OF_BOTH, OF_TEXT = ["answer_kl", "answer_top1_agreement"], ["kl", "top1_agreement"]
"""Numbers of both models, which stand beside the metrics of facts and of text where these are compared."""
PARAPHRASES = ["paraphrase_accuracy", "paraphrase_robustness", "paraphrase_consistency"]


def answer_log_probs(
    model: Any, tokenizer: Any, prompt: str, answer: str, masked: bool
) -> tuple[torch.Tensor, list[int]]:
    """(A, V) float64 log probabilities at the answer's positions, and its tokens: one row, no padding, all logits."""
    targets = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
    if masked:
        inner = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        dot = tokenizer(".", add_special_tokens=False)["input_ids"]
        ids = inner + [tokenizer.mask_token_id] * len(targets) + dot
        bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
        wrapped = tokenizer("a")["input_ids"]
        ids = (bos if wrapped[0] == bos[0] else []) + ids + (eos if wrapped[-1] == eos[0] else [])
        where = [i for i, token in enumerate(ids) if token == tokenizer.mask_token_id]
    else:
        prompt_ids = tokenizer(prompt)["input_ids"]
        ids = [token for token in prompt_ids if token != tokenizer.eos_token_id] + targets
        where = list(range(len(ids) - len(targets) - 1, len(ids) - 1))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    return logits[where].log_softmax(-1), targets


def first_token(tokenizer: Any, targets: list[int]) -> int:
    """The place of the first token with which the text of an answer is more than white space."""
    return next(i for i in range(len(targets)) if tokenizer.decode(targets[: i + 1]).strip())


def brute_force(model: Any, tokenizer: Any, rows: list[dict[str, Any]], masked: bool = False) -> dict[str, Any]:
    """Each metric, and each metric's value per fact."""
    each: dict[str, list[float | None]] = {name: [] for name in BASE + CHOICES + PARAPHRASES}
    prompts_right = prompts = pairs_same = pairs = 0
    softly = 0.0
    for row in rows:
        table, targets = answer_log_probs(model, tokenizer, row["prompt"], row["answer"], masked)
        ranks = [int((line >= line[t]).sum()) - 1 for line, t in zip(table, targets, strict=True)]
        score = float(sum(line[t] for line, t in zip(table, targets, strict=True))) / len(targets)
        first = first_token(tokenizer, targets)
        each["first_token_accuracy"].append(float(ranks[first] == 0))
        each["answer_accuracy"].append(float(max(ranks) == 0))
        each["top5_accuracy"].append(float(ranks[first] < 5))
        each["top10_accuracy"].append(float(ranks[first] < 10))
        each["log_loss"].append(-score)
        others, other_sums = [], []
        for choice in row.get("choices", []):
            if choice != row["answer"]:
                t, tokens = answer_log_probs(model, tokenizer, row["prompt"], choice, masked)
                other_sums.append(float(sum(line[x] for line, x in zip(t, tokens, strict=True))))
                others.append(other_sums[-1] / len(tokens))
        each["choice_accuracy"].append(float(score > max(others)) if others else None)
        summed = score * len(targets)
        each["summed_choice_accuracy"].append(float(summed > max(other_sums)) if others else None)
        said, soft = [], []
        for prompt in [row["prompt"], *row.get("paraphrases", [])]:
            t, tokens = answer_log_probs(model, tokenizer, prompt, row["answer"], masked)
            line, gold = t[first], tokens[first]
            said.append((int(line.argmax()), gold))
            highest = max(float(x) for token, x in enumerate(line) if token != gold)
            soft.append(1 / (1 + math.exp((float(line[gold]) - highest) / 2)))
        right = [s == gold for s, gold in said]
        prompts_right, prompts, softly = prompts_right + sum(right), prompts + len(right), softly + sum(soft)
        same = [a[0] == b[0] for i, a in enumerate(said) for b in said[i + 1 :]]
        pairs_same, pairs = pairs_same + sum(same), pairs + len(same)
        each["soft_error"].append(sum(soft) / len(soft))
        each["paraphrase_accuracy"].append(sum(right) / len(right))
        each["paraphrase_robustness"].append(float(all(right)) if len(right) > 1 else None)
        each["paraphrase_consistency"].append(sum(same) / len(same) if same else None)
    metrics = {}
    for name, values in each.items():
        present = [v for v in values if v is not None]
        if present:
            metrics[name] = sum(present) / len(present)
    metrics["paraphrase_accuracy"], metrics["soft_error"] = prompts_right / prompts, softly / prompts
    if pairs:
        metrics["paraphrase_consistency"] = pairs_same / pairs
    return {"metrics": metrics, "each": each}


def assert_close(logged: dict[str, float], expected: dict[str, float], prefix: str = "") -> None:
    for name, value in expected.items():
        assert logged[f"{prefix}{name}"] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def text_perplexity(model: Any, windows: TextWindows) -> float:
    total = count = 0.0
    for ids in windows.windows:
        with torch.no_grad():
            table = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total -= float(sum(table[i, token] for i, token in enumerate(ids[1:])))
        count += len(ids) - 1
    return float(torch.tensor(total / count).double().exp())
