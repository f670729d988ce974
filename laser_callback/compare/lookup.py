"""Rows that a model writes on, greedily, where it reads several tokens in a call.

What is written repeats what stands before: in the question, in another model's answer, in those to other questions. So
where a row's latest tokens have stood in any of these, what followed them there is proposed (prompt lookup decoding:
A. Saxena, 2023, https://github.com/apoorvumang/prompt-lookup-decoding). The model reads what is proposed together with
the row's latest token. As far as it would have written the same, that is written, and one token of its own. What it has
read beyond is taken out of its cache again, so that rows stay without gaps there: not every model has positions that
could leave one out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

MOST = 15
"""So many tokens are proposed for a row at most."""
CALL = 40
"""A call is taken to cost as much as so many tokens in it do, beside those that it has. SmolLM2-135M on one core: about
50; on a GPU more. With fewer, less is read in vain where hardly any proposal is right. By bench_generation.py 40 takes
1.51 times as long as the original alone where half agree, and 1.88 times in the worst case; 25 1.60 and 1.81, 50 1.55
and 1.99."""

_SAME = (3, 2, 1)  # so many of the latest tokens are looked up: the most that are found
_MEMORY = 0.8  # what the share of right proposals keeps of itself with each

Ended = Callable[[Sequence[int]], bool]
Call = Callable[[Tensor, Tensor, DynamicCache, Tensor, Tensor], Iterable[tuple[int, bool]]]
"""Reads ids (R, T) behind a cache, with the mask of both; tells at places (P,), (P,) of them the token that comes next
and whether it is a near tie."""
Places = dict[tuple[int, ...], tuple[list[int], int]]
"""Of a few tokens that have stood in some texts the last place, what followed: in which text, and where."""


class Text:
    """Tokens, and what they may go on with.

    Args:
        places: of these and other texts' tokens, filled as they grow; all propose from it.
        tokens: that are there.
    """

    def __init__(self, places: Places, tokens: Sequence[int]) -> None:
        self.right = 0.5  # the share of proposed tokens that were, the later the more
        self._places = places
        self._tokens: list[int] = []
        self._said: list[int] = []
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """This token comes next; what was said of it last is judged, whether a call has read it or not."""
        if self._said:
            right = self._said.pop(0) == token
            self.right = _MEMORY * self.right + (1 - _MEMORY) * right
            self._said = self._said if right else []
        for many in _SAME:
            self._places[tuple(self._tokens[-many:])] = self._tokens, len(self._tokens)
        self._tokens.append(token)

    def ahead(self, most: int) -> list[int]:
        """Up to so many tokens that may come next."""
        found = (self._places.get(tuple(self._tokens[-many:])) for many in _SAME)
        tokens, place = next((one for one in found if one is not None), ([], 0))
        period = len(tokens) - place  # at the end of a text, what it repeats is repeated on
        self._said = [tokens[place + i % period] for i in range(most)] if tokens else []
        return list(self._said)


@dataclass(eq=False)
class Row:
    """A row that writes on by itself.

    Attributes:
        number: of the row in the batch.
        tokens: the new ones; they grow.
        text: its tokens behind the prompt's; they grow, too.
        states: keys and values (H, S, D) of each layer at all its tokens but the latest.
        near_ties: tokens that it has written by no more than rounding.
        proposed: tokens that it has written as they were proposed.
        ended: whether it has.
    """

    number: int
    tokens: list[int]
    text: Text
    states: list[tuple[Tensor, Tensor]]
    near_ties: int = 0
    proposed: int = 0
    ended: bool = False

    def take(self, found: Sequence[tuple[int, bool]], ahead: Sequence[int], ended: Ended) -> int:
        """Write what a model tells, as far as that was proposed, and the token behind; how many these are."""
        taken = 0
        for (token, close), said in zip(found, (*ahead, None), strict=True):
            self.tokens.append(token)
            self.text.append(token)
            self.near_ties += close
            self.proposed += token == said
            self.ended = ended(self.tokens)
            taken += 1
            if token != said or self.ended:
                break
        return taken


def go_on(rows: Sequence[Row], call: Call, ended: Ended, most: int, told: int) -> None:
    """Let rows write on, each behind its own tokens, until all have ended.

    Args:
        rows: that have not ended; their states are moved into a cache.
        call: the model.
        ended: whether the latest of a row's new tokens ends it.
        most: new tokens of a row.
        told: at how many places a call may tell what comes next.
    """
    device = rows[0].states[0][0].device
    lengths = [row.states[0][0].shape[1] for row in rows]  # in the cache, where each row ends with the last column
    width, cache = max(lengths), DynamicCache()
    for states in zip(*(row.states for row in rows), strict=True):
        keys, values = (torch.stack([_padded(state, width) for state in part]) for part in zip(*states, strict=True))
        cache.layers.append(_Roomy(keys, values))
    for row in rows:
        row.states.clear()
    while rows:
        limit = max(0, min(MOST, told // len(rows) - 1))
        ahead = [row.text.ahead(min(limit, most - len(row.tokens) - 1)) for row in rows]
        many = _worth([(row.text.right, len(its)) for row, its in zip(rows, ahead, strict=True)])
        ahead = [its[:many] for its in ahead]
        # Behind the last that is proposed for a row is nothing: no position, so that none is beyond the context.
        ids = [[row.tokens[-1], *its, *[0] * (many - len(its))] for row, its in zip(rows, ahead, strict=True)]
        reads = [1 + len(its) for its in ahead]
        mask = [[0] * (width - n) + [1] * (n + k) + [0] * (1 + many - k) for n, k in zip(lengths, reads, strict=True)]
        places = torch.tensor([(i, j) for i, k in enumerate(reads) for j in range(k)], device=device).unbind(1)
        found = iter(call(torch.tensor(ids, device=device), torch.tensor(mask, device=device), cache, *places))
        taken = [row.take([*islice(found, k)], its, ended) for row, k, its in zip(rows, reads, ahead, strict=True)]
        lengths = [length + count for length, count in zip(lengths, taken, strict=True)]
        kept = [i for i, row in enumerate(rows) if not row.ended]
        ends, width = [width + taken[i] for i in kept], width + 1 + many
        rows, lengths = [rows[i] for i in kept], [lengths[i] for i in kept]
        if rows and (len(kept) < len(taken) or min(ends) < width):
            width = max(lengths)
            for layer in cache.layers:
                layer.select(torch.tensor(kept, device=device), torch.tensor(ends, device=device), width)


def _worth(proposed: Sequence[tuple[float, int]]) -> int:
    """How many proposed tokens of each row a call should read, to write the most tokens in its time.

    Args:
        proposed: of each row the share of right tokens, and how many there are.
    """

    def speed(many: int) -> float:
        written = sum(sum(right**i for i in range(1 + min(many, there))) for right, there in proposed)
        # To take what was wrong out of the cache costs about as much as another token of each row.
        return written / (CALL + len(proposed) * (1 + many + (many > 0)))

    return max(range(1 + max(there for _, there in proposed)), key=speed)


class _Roomy(DynamicLayer):
    """Keys and values (R, H, S, D) with room behind them: to add some is not to copy all."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.is_initialized, self.dtype, self.device = True, keys.dtype, keys.device
        self._hold(keys, values, keys.shape[2])

    def _hold(self, keys: Tensor, values: Tensor, width: int) -> None:
        self._room = keys, values
        self.keys, self.values = keys[:, :, :width], values[:, :, :width]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        width, new = self.keys.shape[2], key_states.shape[2]
        if width + new > self._room[0].shape[2]:
            self._room = _with_room(self.keys, new + MOST), _with_room(self.values, new + MOST)
        self._hold(*self._room, width + new)
        self.keys[:, :, width:], self.values[:, :, width:] = key_states, value_states
        return self.keys, self.values

    def select(self, rows: Tensor, ends: Tensor, width: int) -> None:
        """Keep of some rows so many columns, those in front of each row's own end, and some room."""
        _, heads, length, _ = self._room[0].shape
        columns = ends[:, None] - width + torch.arange(width + 1 + MOST, device=ends.device)  # (R, S)
        at = (rows[:, None] * heads + torch.arange(heads, device=rows.device))[:, :, None] * length
        at = at + columns.clamp(0, length - 1)[:, None]  # (R, H, S)
        keys, values = (state.flatten(0, 2).index_select(0, at.flatten()).view(*at.shape, -1) for state in self._room)
        self._hold(keys, values, width)


def _padded(state: Tensor, length: int) -> Tensor:
    """Keys or values (H, S, D), with zeros in front of them up to a length; the mask hides these."""
    return torch.nn.functional.pad(state, (0, 0, length - state.shape[1], 0))


def _with_room(state: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(state, (0, 0, 0, columns))
