"""What is kept of a language model's logits at the answers: a few numbers per row, joined to the facts they belong to.

The *first token* of an answer is its first one that is not white space: those before it are context.

:func:`score_rows` reads the logits at the answer positions once. Logits of any dtype are compared and normalised in
float32. Nothing here knows models, tokenizers or text; ``scoring.py`` makes metrics of it.

A *fact* owns one row with its prompt, one per paraphrase (all with the right answer as target), one per wrong
choice (its prompt with that choice as target), and one per neighbour; see :class:`Role`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Role(IntEnum):
    """What a row is to its fact. Targets are the right answer, in ``CHOICE`` rows a wrong one; a ``NEIGHBOUR`` has a
    prompt and a right answer of its own.
    """

    PROMPT = 0
    PARAPHRASE = 1
    CHOICE = 2
    NEIGHBOUR = 3


SOFTNESS = 2.0
"""Nats of difference between two logits over which an error is smooth."""


@dataclass(frozen=True, eq=False)
class RowScores:
    """What is kept of the logits of R rows whose answers have up to A tokens.

    Attributes:
        first_rank: (R,) int64, how many other tokens score at least as high as the answer's first token: 0 means that
            it is the greedy one there. Ties count against it (half-precision logits tie often), and so does NaN.
        all_greedy: (R,) bool, whether every target token has rank 0, each given the target tokens before it.
        log_prob: (R,) float32, sum over the target tokens of the log probability, in nats.
        mean_log_prob: (R,) float32, the same per target token.
        tokens: (R, A) int64, the greedy token at each answer position (the lowest id of a tie), -1 where there is none.
        first_token: (R,) int64, the greedy token at the answer's first token.
        soft_error: (R,) float32, sigmoid((a - b) / 2), where b is the first token's logit and a the highest other: a
            smooth version of ``first_rank > 0``.
    """

    first_rank: Tensor
    all_greedy: Tensor
    log_prob: Tensor
    mean_log_prob: Tensor
    tokens: Tensor
    first_token: Tensor
    soft_error: Tensor


def score_rows(logits: Tensor, targets: Tensor, target_mask: Tensor, first: Tensor | None = None) -> RowScores:
    """Score the answers of R rows from the logits at their P answer positions.

    Args:
        logits: (P, V), any float dtype; row by row, the positions where ``target_mask`` is true.
        targets: (R, A) int64, answer tokens, padded on the right.
        target_mask: (R, A) bool, true at answer tokens; every row has at least one, in the first column.
        first: (R,) int64, the column of each answer's first token; by default 0.

    Raises:
        ValueError: if P is not the number of answer tokens.
    """
    if len(logits) != (expected := int(target_mask.sum())):
        raise ValueError(f"`logits` must have one row per answer token ({expected}), got shape {tuple(logits.shape)}.")
    logits = logits.float()
    target_logit = logits.gather(1, targets[target_mask][:, None])  # (P, 1)
    # Counting what is strictly lower puts ties and NaN on the side of the wrong answers.
    rank = logits.shape[1] - 1 - (logits < target_logit).sum(1, dtype=torch.int32).long()
    greedy = logits.max(1)
    log_prob = -F.cross_entropy(logits, targets[target_mask], reduction="none")

    def per_row(values: Tensor, fill: int) -> Tensor:  # (P,) -> (R, A)
        return torch.full_like(target_mask, fill, dtype=values.dtype).masked_scatter(target_mask, values)

    column = target_mask.new_zeros(len(targets), 1, dtype=torch.int64) if first is None else first[:, None]  # (R, 1)
    at_first = target_mask.flatten().cumsum(0).reshape(target_mask.shape).gather(1, column)[:, 0] - 1  # (R,) among P
    target, highest = target_logit[at_first, 0], greedy.values[at_first]
    # The highest logit is the highest other, but where the target itself is: only there is the row read again.
    right = (highest == target).nonzero()[:, 0]
    second = logits[at_first[right]].scatter(1, targets.gather(1, column)[right], -torch.inf).amax(1)
    others = highest.index_put((right,), second)

    row_log_prob = per_row(log_prob, 0).sum(1)
    return RowScores(
        first_rank=rank[at_first],
        all_greedy=(per_row(rank, 0) == 0).all(1),
        log_prob=row_log_prob,
        mean_log_prob=row_log_prob / target_mask.sum(1),
        tokens=per_row(greedy.indices, -1),
        first_token=greedy.indices[at_first],
        soft_error=torch.sigmoid((others - target) / SOFTNESS),
    )


@dataclass(frozen=True, eq=False)
class AnswerScores(RowScores):
    """The rows of a batch and the facts they belong to.

    Attributes:
        fact: (R,) int64, index of each row's fact in the batch.
        role: (R,) int64, :class:`Role` of each row.
        facts: F, the number of facts in the batch.
    """

    fact: Tensor
    role: Tensor
    facts: int

    @classmethod
    def gather(cls, chunks: Sequence[RowScores], batch: Mapping[str, Any]) -> AnswerScores:
        """Join the scores of a batch's chunks, given in the batch's order.

        Args:
            chunks: one :class:`RowScores` per entry of ``batch["chunks"]``.
            batch: what :class:`~laser_callback.data.FactCollator` returns (``row_fact``, ``row_role``, ``id``).

        Raises:
            ValueError: if the chunks do not hold as many rows as the batch.
        """
        rows, width = sum(len(chunk.first_rank) for chunk in chunks), max(chunk.tokens.shape[1] for chunk in chunks)
        if rows != len(batch["row_fact"]):
            raise ValueError(f"`chunks` must hold the batch's {len(batch['row_fact'])} rows, got {rows}.")
        return cls(
            first_rank=torch.cat([chunk.first_rank for chunk in chunks]),
            all_greedy=torch.cat([chunk.all_greedy for chunk in chunks]),
            log_prob=torch.cat([chunk.log_prob for chunk in chunks]),
            mean_log_prob=torch.cat([chunk.mean_log_prob for chunk in chunks]),
            tokens=torch.cat([F.pad(c.tokens, (0, width - c.tokens.shape[1]), value=-1) for c in chunks]),
            first_token=torch.cat([chunk.first_token for chunk in chunks]),
            soft_error=torch.cat([chunk.soft_error for chunk in chunks]),
            fact=batch["row_fact"],
            role=batch["row_role"],
            facts=len(batch["id"]),
        )

    @property
    def is_asked(self) -> Tensor:
        """(R,) bool, true at the prompts and paraphrases, which ask for the fact's own right answer."""
        return (self.role == Role.PROMPT) | (self.role == Role.PARAPHRASE)

    def sum_by_fact(self, values: Tensor, rows: Tensor) -> Tensor:
        """(F,) float64: the (R,) values, summed per fact over the rows where the (R,) mask is true."""
        return self._zeros().index_add(0, self.fact[rows], values[rows].double())

    def best_by_fact(self, values: Tensor, rows: Tensor) -> Tensor:
        """(F,) float64: the largest of the (R,) values per fact over the masked rows; 0 where a fact has none."""
        kept = values[rows].double()
        return self._zeros().scatter_reduce(0, self.fact[rows], kept, reduce="amax", include_self=False)

    def _zeros(self) -> Tensor:
        return torch.zeros(self.facts, dtype=torch.float64, device=self.fact.device)
