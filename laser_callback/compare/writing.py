"""What a causal model writes, greedily; and what it writes where another has written before.

Contract: a model writes here what its ``generate`` writes. In a reduced pass of a comparison the original's
continuation of the same prompts is at hand. The reduced model reads it in a few calls, each of many tokens, and where
the token that it would write is another it goes on from there: speculative decoding with the original as the draft
(Leviathan, Kalman and Matias, arXiv 2211.17192, for greedy decoding). Layers in front of its first cut are not computed
for what it reads so (:mod:`laser_callback.surgery.front`). Behind that token, too, it reads several in a call, where
what it writes has stood before (:mod:`laser_callback.compare.lookup`).

Logits that are computed for many tokens at once differ in their rounding from those of one token, as they do between
two sizes of a batch. Where the highest two lie as close as that, either may be written: such tokens are counted.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicCache

from laser_callback.compare.language_model import logits_at
from laser_callback.compare.lookup import Places, Row, Text, go_on
from laser_callback.data.encoding import pad_token_id
from laser_callback.data.generation import ended
from laser_callback.surgery.front import Front, is_plain
from laser_callback.surgery.replay import Answered, answered, aside, recorded

FIRST, LOGITS_BYTES = 16, 2**28
"""So many tokens are checked in the first call, in each further one twice as many, within so many bytes of logits."""
ROUNDING, ROUNDING_OF_HALF = 16.0, 4.0
"""By how much the distance of two logits may differ by rounding, in units of the dtype's precision at the size of the
largest. One token at a time against all at once, SmolLM2-135M: up to 7.7 in float32, and 3.2 in bfloat16."""

# What alters logits by what was written before, and its neutral values beside None.
_ALTERING: Mapping[str, Sequence[Any]] = {
    "guidance_scale": (1, 1.0),
    "sequence_bias": (),
    "encoder_repetition_penalty": (1, 1.0),
    "repetition_penalty": (1, 1.0),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "remove_invalid_values": (False,),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "watermarking_config": (),
}


@dataclass(frozen=True)
class Written:
    """What was written to each of B prompts.

    Attributes:
        tokens: of each row, with the one that ended it.
        texts: the same as text up to the first stop text, without special tokens.
        near_ties: (B,) int64, how many of them were chosen by no more than rounding.
    """

    tokens: list[list[int]]
    texts: list[str]
    near_ties: Tensor


@dataclass
class DraftReport:
    """How an arm came by what it has written.

    Attributes:
        texts: continuations; ``same`` of them are the original's.
        taken: tokens of the original's that were taken over.
        written: tokens that the arm has written itself.
        proposed: of these those that it has read ahead, since they had followed the same before.
        near_ties: of all tokens those that were chosen by no more than rounding.
        alone: why continuations were written without the original's, and how many.
    """

    texts: int = 0
    same: int = 0
    taken: int = 0
    written: int = 0
    proposed: int = 0
    near_ties: int = 0
    alone: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        text = f"{self.same} of {self.texts} continuations are the original's"
        text += f", of which {self.taken} tokens were taken over and {self.written} written"
        text += f", {self.proposed} of them read ahead, as they had followed before" if self.proposed else ""
        text += "".join(f"; {count} were written alone: {reason}" for reason, count in self.alone.most_common())
        return f"{text}; {self.near_ties} near ties" if self.near_ties else text


@dataclass(frozen=True, eq=False)
class _Draft:
    """What the original has written, with what it knew."""

    asked: Tensor
    mask: Tensor
    sequences: Tensor
    written: Written
    front: Front | None
    trouble: str


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Mapping[str, Any]) -> Written:
    """Continue B prompts.

    Whatever else the model's own generation config asks for, such as a penalty on repetition, is kept; where it has
    stop texts, continuations end at these, too.

    Args:
        model: a causal model.
        tokenizer: its tokenizer.
        asked: ``input_ids`` and ``attention_mask``, (B, T) int64, padded on the left; ``max_new_tokens``; and ``stop``,
            texts at which a continuation ends.

    Raises:
        MisconfigurationException: if the model cannot generate.
    """
    if not model.can_generate():
        raise MisconfigurationException(
            f"answers are written by a causal model, got {type(model).__name__}, which does not generate"
        )
    own = getattr(model.generation_config, "stop_strings", None) or ()
    asked = {**asked, "stop": [*asked["stop"], *([own] if isinstance(own, str) else own)]}
    passes, arm = recorded(), answered()
    if arm is not None:
        return _in_arm(model, tokenizer, asked, arm)
    if not passes:
        return _alone(model, tokenizer, asked)[0]
    trouble = _obstacle(model)
    front = None if trouble else Front(passes)
    with aside():
        if front is None:
            written, sequences, cache = _alone(model, tokenizer, asked)
        else:
            with front.watching(asked["input_ids"]):
                written, sequences, cache = _alone(model, tokenizer, asked)
            front.finish(cache)
    if not trouble and not is_plain(cache):
        trouble = f"its cache, {_kind(cache)}, cannot be cut back to a token"
    draft = _Draft(asked["input_ids"].clone(), asked["attention_mask"].clone(), sequences, written, front, trouble)
    for one in passes:
        one.kept.setdefault("drafts", []).append(draft)
    return written


def _in_arm(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Mapping[str, Any], arm: Answered
) -> Written:
    report: DraftReport = arm.report.further.setdefault("written", DraftReport())
    draft = next((one for one in arm.kept.get("drafts", ()) if _same(one, asked)), None)
    trouble = "the original has not" if draft is None else draft.trouble
    with aside():
        if draft is None or trouble:
            written = _alone(model, tokenizer, asked)[0]
            report.alone[trouble] += len(written.tokens)
            taken = proposed = 0
        else:
            written, taken, proposed = _Reduced(model, tokenizer, asked, draft, arm).write()
    report.texts += len(written.tokens)
    report.same += 0 if draft is None else sum(map(list.__eq__, written.tokens, draft.written.tokens))
    report.taken += taken
    report.written += sum(map(len, written.tokens)) - taken
    report.proposed += proposed
    report.near_ties += int(written.near_ties.sum())
    return written


def _same(draft: _Draft, asked: Mapping[str, Any]) -> bool:
    return torch.equal(draft.asked, asked["input_ids"]) and torch.equal(draft.mask, asked["attention_mask"])


def _kind(cache: Any) -> str:
    odd = sorted({type(entry).__name__ for entry in getattr(cache, "layers", ())} - {"DynamicLayer"})
    parts = f" of {', '.join(odd)}" if odd else ""
    return "of another kind" if cache is None else f"a {type(cache).__name__}{parts}"


def _obstacle(model: PreTrainedModel) -> str:
    """Why a continuation cannot be checked with a model in one call; empty if it can."""
    altering = [
        name
        for name, neutral in _ALTERING.items()
        if (value := getattr(model.generation_config, name, None)) is not None and value not in neutral
    ]
    if altering:
        return f"its generation config has {', '.join(altering)}"
    return "" if _cache_name(model) else "its `forward` takes no cache by name"


def _cache_name(model: PreTrainedModel) -> str:
    """As what `forward` takes the key/value cache."""
    taken = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in taken), "")  # the latter before 5.20


# ---- alone -----------------------------------------------------------------------------------------------------------


def _alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Mapping[str, Any]
) -> tuple[Written, Tensor, Any]:
    """What `generate` writes, the tokens with their prompts and paddings as it gives them, and its cache."""
    ends, close = _Ends(tokenizer, _end_tokens(model), asked), _Close(model)
    found = model.generate(
        input_ids=asked["input_ids"],
        attention_mask=asked["attention_mask"],
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        max_new_tokens=asked["max_new_tokens"],
        pad_token_id=pad_token_id(tokenizer),
        return_dict_in_generate=True,
        stop_strings=None,  # the model's own are among `stop`
        stopping_criteria=StoppingCriteriaList([ends]),
        logits_processor=LogitsProcessorList([close]),
    )
    tokens = [row[: ends.lengths[i]].tolist() for i, row in enumerate(found.sequences[:, ends.width :])]
    ties = close.counted([len(row) for row in tokens])
    cache = next((found[name] for name in ("cache", "past_key_values") if found.get(name) is not None), None)
    return Written(tokens, _texts(tokenizer, tokens, asked), ties), found.sequences, cache


def _texts(tokenizer: PreTrainedTokenizerBase, tokens: list[list[int]], asked: Mapping[str, Any]) -> list[str]:
    return [ended(text, asked["stop"]) for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def _end_tokens(model: PreTrainedModel) -> set[int]:
    found = model.generation_config.eos_token_id
    return set() if found is None else {found} if isinstance(found, int) else set(found)


class _Ends(StoppingCriteria):
    """Tells for each row whether it has ended: by a token, by a text, or by its length."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: set[int], asked: Mapping[str, Any]) -> None:
        self.width = asked["input_ids"].shape[1]
        self.most: int = asked["max_new_tokens"]
        self.lengths: dict[int, int] = {}
        self._tokenizer, self._tokens, self._stop = tokenizer, tokens, asked["stop"]
        # A text of so many bytes is in so many tokens at most; what is cut off ahead of these does not reach into it.
        self._tail = max((len(stop.encode()) for stop in self._stop), default=0) + 4

    def ended(self, tokens: Sequence[int]) -> bool:
        """Whether the latest of a row's new tokens ends it."""
        if tokens[-1] in self._tokens or len(tokens) >= self.most:
            return True
        if not self._stop:
            return False
        text = self._tokenizer.decode(tokens[-self._tail :])
        return any(stop in text for stop in self._stop)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        for i, row in enumerate(input_ids[:, self.width :].tolist()):
            if i not in self.lengths and self.ended(row):
                self.lengths[i] = len(row)
        return torch.tensor([i in self.lengths for i in range(len(input_ids))], device=input_ids.device)


class _Close(LogitsProcessor):
    """Notes which tokens are chosen by no more than rounding; it alters nothing."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._steps.append(greedy(self._model, scores)[1])
        return scores

    def counted(self, lengths: Sequence[int]) -> Tensor:
        """(B,) how many among the first so many tokens of each row."""
        steps = torch.stack(self._steps, 1).cpu()  # (B, L)
        return torch.stack([row[:length].sum() for row, length in zip(steps, lengths, strict=True)])


def greedy(model: PreTrainedModel, logits: Tensor) -> tuple[Tensor, Tensor]:
    """(P,) int64, the token that each of logits (P, V) chooses, the first of several; (P,) bool, whether by rounding.

    That is, whether the two highest are as close as those of one sum in another order. The vocabulary is large: the
    highest is put out of the way for a moment, in place, which takes a third of the time that the two highest would.
    """
    device = logits.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    logits = logits.detach()
    first, tokens = logits.max(-1)
    second = logits.scatter_(-1, tokens[:, None], -torch.inf).amax(-1)
    lowest = logits.scatter_(-1, tokens[:, None], first[:, None]).amin(-1)
    if lowest.isinf().any():  # tokens that are ruled out say nothing of the size of the others
        lowest = logits.masked_fill(logits.isinf(), 0.0).amin(-1)
    size = torch.maximum(lowest.abs(), first.abs())
    units = ROUNDING if torch.finfo(dtype).bits >= 32 else ROUNDING_OF_HALF
    return tokens, first - second <= units * torch.finfo(dtype).eps * size


# ---- with a draft ----------------------------------------------------------------------------------------------------


class _Reduced:
    """One reduced model over the original's continuations."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        asked: Mapping[str, Any],
        draft: _Draft,
        arm: Answered,
    ) -> None:
        self._model, self._tokenizer, self._asked = model, tokenizer, asked
        self._ends = _Ends(tokenizer, _end_tokens(model), asked)
        self._names = set(inspect.signature(model.forward).parameters)
        self._cache = _cache_name(model)
        self._sequences = draft.sequences
        self._mask = torch.ones_like(self._sequences)
        self._mask[:, : self._ends.width] = asked["attention_mask"]
        self._front = None if draft.front is None else draft.front.of(arm, _head(model))
        self._tokens = [list(row) for row in draft.written.tokens]
        self._ties = torch.zeros(len(self._tokens), dtype=torch.int64)
        self._seen: Places = {}
        for number, tokens in enumerate(self._tokens):
            Text(self._seen, self._prompt(number) + tokens)  # the original's
        self._told = LOGITS_BYTES // (4 * model.config.get_text_config().vocab_size)  # for logits of one call

    def write(self) -> tuple[Written, int, int]:
        """What the reduced model writes; how many tokens are the original's, and how many else were proposed."""
        others, taken = self._check()
        if others:
            go_on(others, self._tell, self._ends.ended, self._ends.most, self._told)
        for row in others:
            self._ties[row.number] += row.near_ties
        written = Written(self._tokens, _texts(self._tokenizer, self._tokens, self._asked), self._ties)
        return written, taken, sum(row.proposed for row in others)

    def _check(self) -> tuple[list[Row], int]:
        """Read the original's tokens as far as they are the reduced model's.

        Returns the rows that then have a token of their own, and go on; and how many tokens are the original's.
        """
        width, lengths = self._ends.width, torch.tensor([len(row) for row in self._tokens])
        rows, cache = torch.arange(len(lengths)), DynamicCache(config=self._model.config)
        agreed, start, many = 0, 0, FIRST
        others: list[Row] = []
        taken = int(lengths.sum())
        while len(rows):
            many = max(1, min(many, self._told // len(rows)))
            stop = width + min(agreed + many, int(lengths[rows].max())) - 1  # the last token is not read
            wanted = torch.arange(agreed, stop - width + 1)  # which of a row's new tokens this tells
            places = (wanted < lengths[rows, None]).nonzero()  # (P, 2)
            logits = self._read(rows, start, stop, cache, places[:, 0], wanted[places[:, 1]] + width - 1 - start)
            tokens, ties = greedy(self._model, logits)
            told = torch.full((len(rows), len(wanted)), -1).index_put((*places.T,), tokens.cpu())
            close = torch.zeros_like(told).index_put((*places.T,), ties.long().cpu())
            drafted = self._sequences[rows, width + agreed : stop + 1].cpu()
            differs = (told != drafted) & (told >= 0)
            first = torch.where(differs.any(1), differs.long().argmax(1), len(wanted))  # (R,)
            self._ties[rows] += (close * (torch.arange(len(wanted)) <= first[:, None])).sum(1)
            agreed, start, many = agreed + len(wanted), stop, 2 * many
            for i in differs.any(1).nonzero()[:, 0].tolist():
                number, same = int(rows[i]), agreed - len(wanted) + int(first[i])
                taken -= int(lengths[number]) - same
                self._tokens[number] = [*self._tokens[number][:same], int(told[i, first[i]])]
                if not self._ends.ended(self._tokens[number]):
                    read = slice(width - len(self._prompt(number)), width + same)
                    states = [(k[i, :, read].clone(), v[i, :, read].clone()) for k, v in _states(cache)]
                    text = Text(self._seen, self._prompt(number) + self._tokens[number])
                    others.append(Row(number, self._tokens[number], text, states))
            on = (~differs.any(1) & (lengths[rows] > agreed)).nonzero()[:, 0]
            if len(on) < len(rows):
                cache.batch_select_indices(on.to(self._sequences.device))
                rows = rows[on]
        return others, taken

    def _prompt(self, number: int) -> list[int]:
        found: list[int] = self._asked["input_ids"][number][self._asked["attention_mask"][number].bool()].tolist()
        return found

    def _read(self, rows: Tensor, start: int, stop: int, cache: DynamicCache, which: Tensor, columns: Tensor) -> Tensor:
        """Logits (P, V), float32, at some places of these rows' tokens from ``start`` to ``stop``."""
        device = self._sequences.device
        rows, mask = rows.to(device), self._mask[rows.to(device), :stop]
        call = self._sequences[rows, start:stop], mask, cache, which.to(device), columns.to(device)
        if self._front is None:
            return self._call(*call)
        with self._front.answering(rows, start, stop, mask[:, start:]):
            return self._call(*call)

    def _call(self, ids: Tensor, mask: Tensor, cache: DynamicCache, which: Tensor, columns: Tensor) -> Tensor:
        """Logits (P, V), float32, at some places of one call over the tokens behind those that the cache holds."""
        options: dict[str, Any] = {self._cache: cache, "use_cache": True}
        if "position_ids" in self._names:
            positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
            options["position_ids"] = positions[:, -ids.shape[1] :]
        with logits_at(self._model, which, columns):
            return self._model(input_ids=ids, attention_mask=mask, **options).logits[0].float()

    def _tell(self, *call: Any) -> Iterable[tuple[int, bool]]:
        tokens, ties = greedy(self._model, self._call(*call))
        return zip(tokens.tolist(), ties.tolist(), strict=True)


def _states(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    return [(entry.keys, entry.values) for entry in cache.layers]


def _head(model: PreTrainedModel) -> set[int]:
    """The parameters that are read by the output layer and nowhere else, by ``id``."""
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    read = {id(parameter) for parameter in embedding.parameters()} if embedding is not None else set()
    return set() if output is None else {id(parameter) for parameter in output.parameters()} - read
