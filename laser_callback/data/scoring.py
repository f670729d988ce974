r"""The answers of a language model, judged: every metric is a function of the scores of rows in ``row_scores.py``.

Every metric of :data:`METRICS` gives one number per fact with ``per_fact`` (what paired tests need) and the total with
``update`` and ``compute``. Sums are kept in float64 and all states add up, so the result depends neither on batches nor
on ranks. The *first token* of an answer is its first one that is not white space: those before it are context.

Example: two facts. The first has one paraphrase, on which the model fails; the second has one wrong choice, which the
model prefers.

    >>> import torch
    >>> from laser_callback.data.row_scores import AnswerScores, Role, score_rows
    >>> logits = torch.tensor([[0.0, 4.0, 1.0], [3.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 2.0, 1.0]])
    >>> rows = score_rows(logits, torch.tensor([[1], [1], [2], [1]]), torch.ones(4, 1, dtype=torch.bool))
    >>> roles = torch.tensor([Role.PROMPT, Role.PARAPHRASE, Role.PROMPT, Role.CHOICE])
    >>> batch = {"row_fact": torch.tensor([0, 0, 1, 1]), "row_role": roles, "id": ["a", "b"]}
    >>> scores = AnswerScores.gather([rows], batch)
    >>> for name, metric in ((name, cls()) for name, cls in METRICS.items()):
    ...     metric.update(scores)
    ...     print(f"{name} {metric.compute():.3f}", [round(x, 3) for x in metric.per_fact(scores).tolist()])
    first_token_accuracy 0.500 [1.0, 0.0]
    answer_accuracy 0.500 [1.0, 0.0]
    top5_accuracy 1.000 [1.0, 1.0]
    top10_accuracy 1.000 [1.0, 1.0]
    log_loss 0.737 [0.066, 1.408]
    soft_error 0.512 [0.457, 0.622]
    choice_accuracy 0.000 [nan, 0.0]
    summed_choice_accuracy 0.000 [nan, 0.0]
    paraphrase_accuracy 0.333 [0.5, 0.0]
    paraphrase_robustness 0.000 [0.0, nan]
    paraphrase_consistency 0.000 [0.0, nan]
    neighbour_accuracy nan [nan, nan]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from typing_extensions import override

from laser_callback.data.row_scores import AnswerScores, Role


class UnitMean(Metric):
    """A mean over units, as two states that add up: ``total`` (float64) and ``count`` (int64)."""

    is_differentiable = False
    higher_is_better: bool = True
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def add(self, total: Tensor, count: Tensor) -> None:
        """Add sums and numbers of units, tensors of any shape."""
        # Out of place: a state made under inference mode must stay usable outside of it.
        self.total = self.total + total.double().sum()
        self.count = self.count + count.sum().long()

    def compute(self) -> Tensor:
        """Float64 scalar: the mean over all units so far; NaN when there are none (see :attr:`has_data`)."""
        return self.total / self.count

    @property
    def has_data(self) -> bool:
        """Whether any unit was seen: by this process, or, inside ``sync_context()``, by any."""
        return bool(self.count > 0)


class AnswerMetric(UnitMean):
    """A mean over units (facts, prompts or pairs of prompts), each of which belongs to one fact.

    Subclasses say with :meth:`tally` what a fact adds to the sum and how many units it has.
    """

    def tally(self, scores: AnswerScores) -> tuple[Tensor, Tensor]:
        """Sum of the units' values and number of units per fact: two (F,) float64 tensors."""
        raise NotImplementedError

    def per_fact(self, scores: AnswerScores) -> Tensor:
        """(F,) float64: each fact's mean over its units, NaN where it has none."""
        total, count = self.tally(scores)
        return total / count

    def update(self, scores: AnswerScores) -> None:
        """Add the facts of a batch."""
        self.add(*self.tally(scores))


class _PromptMetric(AnswerMetric):
    """One unit per fact: its prompt with the right answer."""

    def value(self, scores: AnswerScores) -> Tensor:
        """(R,) value of each row."""
        raise NotImplementedError

    @override
    def tally(self, scores: AnswerScores) -> tuple[Tensor, Tensor]:
        value, rows = self.value(scores), scores.role == Role.PROMPT
        return scores.sum_by_fact(value, rows), scores.sum_by_fact(rows, rows)


class FirstTokenAccuracy(_PromptMetric):
    """Share of facts whose first token is the greedy one there."""

    @override
    def value(self, scores: AnswerScores) -> Tensor:
        return scores.first_rank == 0


class AnswerAccuracy(_PromptMetric):
    """Share of facts of which every answer token is greedy, given the prompt and the answer tokens before it."""

    @override
    def value(self, scores: AnswerScores) -> Tensor:
        return scores.all_greedy


class Top5Accuracy(_PromptMetric):
    """Share of facts whose first token is among the five most probable."""

    @override
    def value(self, scores: AnswerScores) -> Tensor:
        return scores.first_rank < 5


class Top10Accuracy(_PromptMetric):
    """Share of facts whose first token is among the ten most probable."""

    @override
    def value(self, scores: AnswerScores) -> Tensor:
        return scores.first_rank < 10


class LogLoss(_PromptMetric):
    """Mean over facts of the mean negative log probability per answer token, in nats."""

    higher_is_better = False

    @override
    def value(self, scores: AnswerScores) -> Tensor:
        return -scores.mean_log_prob


class ChoiceAccuracy(AnswerMetric):
    """Share of facts with choices whose right answer has strictly the highest log probability per token.

    Dividing by the number of tokens keeps long choices from losing for their length alone. A tie is wrong.
    """

    def value(self, scores: AnswerScores) -> Tensor:
        """(R,) what choices are compared by."""
        return scores.mean_log_prob

    @override
    def tally(self, scores: AnswerScores) -> tuple[Tensor, Tensor]:
        value, prompts, others = self.value(scores), scores.role == Role.PROMPT, scores.role == Role.CHOICE
        right = scores.sum_by_fact(value, prompts) > scores.best_by_fact(value, others)
        has_choices = scores.sum_by_fact(others, others) > 0
        return (right & has_choices).double(), has_choices.double()


class SummedChoiceAccuracy(ChoiceAccuracy):
    """Share of facts with choices whose right answer has strictly the highest log probability as a whole.

    That is ``acc`` of lm-evaluation-harness. A choice of many tokens seldom wins against one of few.
    """

    @override
    def value(self, scores: AnswerScores) -> Tensor:
        return scores.log_prob


class _ParaphraseMetric(AnswerMetric):
    """Prompts and paraphrases; what a model says is its greedy token in the place of the first token."""

    def prompts(self, scores: AnswerScores) -> tuple[Tensor, Tensor]:
        """Rows that are prompts, (R,) bool, and their number per fact, (F,) float64."""
        rows = scores.is_asked
        return rows, scores.sum_by_fact(rows, rows)


class ParaphraseAccuracy(_ParaphraseMetric):
    """Share of prompts, over the prompt and all paraphrases of all facts, that get the right first token.

    Facts without paraphrases count with their one prompt, but they alone are no data: then this would only repeat
    :class:`FirstTokenAccuracy`. The state ``paraphrases`` (int64) counts the paraphrases seen.
    """

    paraphrases: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("paraphrases", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @override
    def tally(self, scores: AnswerScores) -> tuple[Tensor, Tensor]:
        rows, count = self.prompts(scores)
        return scores.sum_by_fact(scores.first_rank == 0, rows), count

    @override
    def update(self, scores: AnswerScores) -> None:
        super().update(scores)
        self.paraphrases = self.paraphrases + (scores.role == Role.PARAPHRASE).sum()

    @property
    @override
    def has_data(self) -> bool:
        return bool(self.paraphrases > 0)


class SoftError(_ParaphraseMetric):
    """Mean over prompts, paraphrases included, of how far from right the first token is, from 0 to 1.

    It is the mean of sigmoid((a - b) / 2), where b is the logit of the first token and a the highest other. It
    changes where answers come nearer to being right, or grow safer, and so tells two models apart on fewer facts than
    shares of right answers do; unlike the log loss it gains nothing from probability that decides no answer.
    """

    is_differentiable = True
    higher_is_better = False

    @override
    def tally(self, scores: AnswerScores) -> tuple[Tensor, Tensor]:
        rows, count = self.prompts(scores)
        return scores.sum_by_fact(scores.soft_error, rows), count


class ParaphraseRobustness(_ParaphraseMetric):
    """Share of facts, among those with paraphrases, that get the right first token under every prompt."""

    @override
    def tally(self, scores: AnswerScores) -> tuple[Tensor, Tensor]:
        rows, count = self.prompts(scores)
        always_right = scores.sum_by_fact(scores.first_rank > 0, rows) == 0
        return (always_right & (count > 1)).double(), (count > 1).double()


class ParaphraseConsistency(_ParaphraseMetric):
    """Share of pairs of prompts of one fact that get the same greedy first token, right or wrong."""

    @override
    def tally(self, scores: AnswerScores) -> tuple[Tensor, Tensor]:
        rows, count = self.prompts(scores)
        answers = torch.stack([scores.fact[rows], scores.first_token[rows]])  # (2, rows)
        (fact, _), same = answers.unique(dim=1, return_counts=True)  # n prompts that agree are n (n - 1) / 2 pairs
        pairs = (same * (same - 1) / 2).double()
        return torch.zeros_like(count).index_add(0, fact, pairs), count * (count - 1) / 2


class NeighbourAccuracy(AnswerMetric):
    """Share of neighbours, over those of all facts, that get the right first token."""

    @override
    def tally(self, scores: AnswerScores) -> tuple[Tensor, Tensor]:
        rows = scores.role == Role.NEIGHBOUR
        return scores.sum_by_fact(scores.first_rank == 0, rows), scores.sum_by_fact(rows, rows)


METRICS: dict[str, type[AnswerMetric]] = {
    "first_token_accuracy": FirstTokenAccuracy,
    "answer_accuracy": AnswerAccuracy,
    "top5_accuracy": Top5Accuracy,
    "top10_accuracy": Top10Accuracy,
    "log_loss": LogLoss,
    "soft_error": SoftError,
    "choice_accuracy": ChoiceAccuracy,
    "summed_choice_accuracy": SummedChoiceAccuracy,
    "paraphrase_accuracy": ParaphraseAccuracy,
    "paraphrase_robustness": ParaphraseRobustness,
    "paraphrase_consistency": ParaphraseConsistency,
    "neighbour_accuracy": NeighbourAccuracy,
}
"""The metrics of answers by the name under which they are logged, in the order in which they are shown."""
CURES = {
    "perplexity": "perplexity needs running text (`text=`)",
    "paraphrase": "paraphrase metrics need facts with `paraphrases`",
    "neighbour": "metrics of neighbours need facts with `neighbours`",
    "choice": "choice metrics need facts with `choices`",
    "refusal": "refusals need probes (`ProbesDataModule`)",
    "answer_rate": "refusals need probes (`ProbesDataModule`)",
    "answer_kl": "divergence at the answers needs a LaserModule with facts",
    "answer_top1": "agreement at the answers needs a LaserModule with facts",
    "kl": "`kl` needs a LaserModule with running text (`text=`)",
    "top1": "`top1_agreement` needs a LaserModule with running text (`text=`)",
    "": "log it in `validation_step`",
}
"""What to do about a metric that is not logged, by a part of its name."""


def rows_said(scores: AnswerScores) -> dict[str, Tensor]:
    """By metric of choices, the row of the choice that the model prefers to each fact, (F,) int64; a tie goes against.

    Facts without choices have their prompt's row.
    """
    rows = ((scores.role == Role.PROMPT) | (scores.role == Role.CHOICE)).nonzero()[:, 0]
    rows = rows[scores.role[rows].argsort(stable=True)]  # the right answer first: of equal values the last is taken
    found = {}
    for name, metric in METRICS.items():
        if issubclass(metric, ChoiceAccuracy):
            order = rows[metric().value(scores)[rows].argsort(stable=True)]
            for_each_fact = order[scores.fact[order].argsort(stable=True)]
            last = scores.fact[for_each_fact].bincount(minlength=scores.facts).cumsum(0) - 1
            found[name] = for_each_fact[last]
    return found


# ------------------------------------------------------------------------------------------ perplexity

FLUENCY = "perplexity"
"""The metric of running text."""
OF_TEXT = (FLUENCY, "kl", "top1_agreement")
"""All metrics of running text: the last two are of both models."""
IGNORED = -100
"""The target where nothing is predicted."""


def windows_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch of rows of running text, each an example, as one part of :meth:`TaskDocuments.collate`.

    Args:
        batch: ``input_ids``, (R, T) int64, padded on the right, the first token of a row being context only; and
            ``attention_mask``, (R, T), nonzero at tokens.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    targets = F.pad(ids[:, 1:].where(mask[:, 1:].bool(), IGNORED), (0, 1), value=IGNORED)
    owner = torch.arange(len(ids), device=ids.device)
    return {"input_ids": ids, "attention_mask": mask, "targets": targets, "owner": owner}


def target_nll(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log likelihood of running text under a causal model.

    Args:
        logits: (R, T, V), any float dtype.
        targets: (R, T) int64, what they predict; :data:`IGNORED` where that is nothing.

    Returns:
        The sum over each row's targets in nats, (R,) float32, and their number, (R,) int64.
    """
    # Row by row: a float32 copy of all logits at once would be the largest tensor of the whole evaluation.
    rows = zip(logits, targets, strict=True)
    nll = torch.stack([F.cross_entropy(row.float(), ids, reduction="none", ignore_index=IGNORED) for row, ids in rows])
    return nll.sum(1), (targets != IGNORED).sum(1)


class Perplexity(UnitMean):
    """exp of the mean negative log likelihood per predicted token, over all tokens of all documents.

    >>> metric = Perplexity()
    >>> metric.update(torch.tensor([1.0, 5.0]), torch.tensor([1, 2]))
    >>> round(metric.compute().item(), 3)  # exp(6 / 3)
    7.389
    """

    higher_is_better = False

    def update(self, nll: Tensor, tokens: Tensor) -> None:
        """Add documents: their summed negative log likelihoods (R,) in nats and numbers of tokens (R,)."""
        self.add(nll, tokens)

    @override
    def compute(self) -> Tensor:
        return super().compute().exp()


class BitsPerByte(Perplexity):
    """Mean negative log likelihood per byte in bits, over all bytes of all documents, counted as tokens are."""

    @override
    def compute(self) -> Tensor:
        return super().compute().log2()
