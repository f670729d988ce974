"""Numbers of both models: what a reduced arm says of a batch, held against what the original has said of it.

A step runs once for each arm, and knows of no other. What it says of a batch it tells here: in the original's pass that
is kept, and in a reduced arm's it is compared. Contract: what is kept is of one batch and goes with it; what the step
returns and logs stays as it is; outside of a comparison nothing is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from laser_callback.data.row_scores import AnswerScores, Role
from laser_callback.stats.outcomes import Outcomes

MOST_NUMBERS = 2**23
"""So many logits of each model are compared at a time: 32 MiB in float32; but those of one token at least."""


class Both:
    """What the original has said of one batch, and what comes of comparing each arm with it."""

    def __init__(self) -> None:
        self.original: dict[str, Outcomes] = {}
        self._kept: list[Tensor] = []
        self._next: int | None = None  # of what is kept, while an arm runs
        self._of_arm: dict[str, Outcomes] = {}

    def begin(self) -> None:
        """From now on, until :meth:`end`, the original's pass is heard."""
        self.forget()
        _heard.set((*_heard.get(), self))

    def end(self) -> None:
        """The original's pass is over."""
        _heard.set(tuple(one for one in _heard.get() if one is not self))

    @contextmanager
    def of_arm(self) -> Iterator[dict[str, Outcomes]]:
        """Within: a reduced arm's pass over the same batch; what comes of it is in the mapping."""
        before = _heard.get()
        self._next, self._of_arm = 0, {}
        _heard.set((self,))
        try:
            yield self._of_arm
        finally:
            _heard.set(before)
            self._next = None

    def forget(self) -> None:
        """The batch is over, or the whole run."""
        self.end()
        self.original = {}
        self._kept.clear()

    @property
    def is_original(self) -> bool:
        """Whether the pass that runs is the original's."""
        return self._next is None

    def keep(self, value: Tensor) -> None:
        """Keep what the original says."""
        self._kept.append(value)

    def kept(self) -> Tensor:
        """What the original has said at this point of its pass."""
        assert self._next is not None
        self._next += 1
        return self._kept[self._next - 1]

    def tell(self, name: str, outcomes: Outcomes) -> None:
        """What the pass that runs has of a number of both models."""
        (self.original if self.is_original else self._of_arm)[name] = outcomes


def beside(returned: Any, numbers: Mapping[str, Outcomes]) -> Any:
    """What a step has returned, with numbers of both models beside it, if there are any."""
    return [returned, dict(numbers)] if numbers else returned


_heard: ContextVar[tuple[Both, ...]] = ContextVar("_heard", default=())


def is_compared() -> bool:
    """Whether the step that runs is one of a comparison; only then is there anything to tell."""
    return bool(_heard.get())


def divergence(logits: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """How far logits are from the original's, token by token.

    Args:
        logits: (..., V), any float dtype.
        where: (...) bool, true at the P tokens that count.

    Returns:
        KL(original || this) in nats, (P,) float32, and whether both have the same most probable token, (P,) bool; of
        the original itself 0 and true. A token whose logit is -inf in the original adds nothing; logits that are not
        numbers are infinitely far.
    """
    places = where.nonzero(as_tuple=True)
    kl = torch.zeros(len(places[0]), device=logits.device)
    same = torch.ones_like(kl, dtype=torch.bool)
    if _is_original():
        _keep(logits[places])
        return kl, same
    original, step = _kept(), max(MOST_NUMBERS // logits.shape[-1], 1)
    for begin in range(0, len(kl), step):
        part = slice(begin, begin + step)
        kl[part], same[part] = _compared(original[part], logits[tuple(axis[part] for axis in places)])
    return kl, same


@torch.no_grad()
def _compared(original: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Of a few tokens' logits, (p, V) each; in place where it can be, since these are the largest tensors.

    The sum of p log(p / q) + q - p, which is the divergence since p and q sum to one. No term is below zero, and what
    float32 errs in their norms, which p log(p / q) alone takes over, cancels.
    """
    same = original.argmax(-1) == other.argmax(-1)
    log_p, log_q = original.float().log_softmax(-1), other.float().log_softmax(-1)
    gap = (log_p - log_q).masked_fill_(log_p == -torch.inf, 0.0)  # 0 log 0 is 0
    p, q = log_p.exp_(), log_q.exp_()
    kl = q.sub_(p).addcmul_(p, gap).sum(-1).clamp_min(0.0)
    return kl.nan_to_num_(nan=torch.inf, posinf=torch.inf), same


def _is_original() -> bool:
    return _heard.get()[-1].is_original


def _keep(value: Tensor) -> None:
    for both in _heard.get():  # of several callbacks
        both.keep(value)


def _kept() -> Tensor:
    return _heard.get()[-1].kept()


def _tell(name: str, values: Tensor, owner: Tensor, examples: int, unit: str = "example") -> None:
    """Each example's mean, weighted by its number of values: (N,) values of the examples (N,)."""
    weights = torch.bincount(owner, minlength=examples)
    totals = torch.zeros(examples, dtype=torch.float64, device=values.device).index_add(0, owner, values.double())
    for both in _heard.get():
        both.tell(name, Outcomes(totals / weights, weights, "pair", unit))


# ---- of a LaserModule ------------------------------------------------------------------------------------------------


class TextOfBoth:
    """Numbers of both models on one batch of running text, whose parts come one after the other."""

    def __init__(self) -> None:
        self._owners: list[Tensor] = []
        self._found: list[tuple[Tensor, Tensor]] = []

    def add(self, logits: Tensor, predicted: Tensor, owner: Tensor) -> None:
        """Add rows.

        Args:
            logits: (R, T, V).
            predicted: (R, T) bool, true where they predict a token that the perplexity is of.
            owner: (R,) int64, the example of each row.
        """
        if is_compared():
            self._owners.append(owner[predicted.nonzero()[:, 0]])
            self._found.append(divergence(logits, predicted))

    def tell(self, examples: int, unit: str) -> None:
        """Tell ``kl`` and ``top1_agreement`` of so many units."""
        if self._found:
            owner = torch.cat(self._owners)
            for name, parts in zip(("kl", "top1_agreement"), zip(*self._found, strict=True), strict=True):
                _tell(name, torch.cat(parts), owner, examples, unit)


class AnswersOfBoth:
    """Numbers of both models at the answers of one batch of facts, whose chunks come one after the other.

    Args:
        batch: what :class:`~laser_callback.data.FactCollator` returns.
    """

    def __init__(self, batch: Mapping[str, Any]) -> None:
        sizes = [len(chunk["input_ids"]) for chunk in batch["chunks"]]
        self._rows = zip(batch["row_fact"].split(sizes), batch["row_role"].split(sizes), strict=True)
        self._owners: list[Tensor] = []
        self._found: list[tuple[Tensor, Tensor]] = []

    def add(self, logits: Tensor, target_mask: Tensor) -> None:
        """Add the next chunk.

        Args:
            logits: (P, V) at the answers' tokens, row by row.
            target_mask: (r, A) bool, true at these.
        """
        if not is_compared():
            return
        fact, role = next(self._rows)
        row = target_mask.nonzero()[:, 0]
        asked = (role == Role.PROMPT)[row]
        self._owners.append(fact[row][asked])
        self._found.append(divergence(logits, asked))

    def tell(self, scores: AnswerScores) -> None:
        """Tell ``answer_kl`` and ``answer_top1_agreement``, and of facts with neighbours ``neighbour_agreement``."""
        if not is_compared():
            return
        owner = torch.cat(self._owners)
        for name, parts in zip(("answer_kl", "answer_top1_agreement"), zip(*self._found, strict=True), strict=True):
            _tell(name, torch.cat(parts), owner, scores.facts)
        neighbours = scores.role == Role.NEIGHBOUR
        said = scores.first_token[neighbours]
        if _is_original():
            _keep(said)
        agree = said == (said if _is_original() else _kept())
        if len(said):
            _tell("neighbour_agreement", agree, scores.fact[neighbours], scores.facts)
