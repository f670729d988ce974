r"""Answers that a model writes: how it is asked to, and when what it has written is right.

Contract: :class:`Generation` knows texts, and neither tokens nor models. From a continuation it takes what the
``extract`` pattern finds, and compares that with each accepted answer, both in their normal form. Whoever judges
otherwise makes a subclass with another :meth:`Generation.judged`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from laser_callback.data.scoring import UnitMean

if TYPE_CHECKING:
    from laser_callback.data.facts import Fact

EXACT_MATCH = "exact_match"
"""The metric of answers that are written."""
NORMAL_FORMS = ("case", "punctuation", "articles", "separators", "numbers")
"""What a normal form may leave out: see :attr:`Generation.normalise`."""

_MINUS = "\\-\u2212\u2013"  # as typed, as typeset, and an en dash in its place
_ARTICLES = re.compile(r"\b(a|an|the)\b", re.IGNORECASE)


class Judged(NamedTuple):
    """What one continuation says, and whether it is right.

    Attributes:
        said: the answer in it, in its normal form; of a right one that of the fact, however it was put. Empty if it
            holds none.
        right: whether it is one that is accepted; of a score that is no share of right answers, its value.
        answer: the fact's own answer, in its normal form.
    """

    said: str
    right: float
    answer: str


class Scored(NamedTuple):
    """The continuations of a batch by one metric.

    Attributes:
        metric: its name.
        judged: each of them.
        binary: whether each is right or wrong.
        higher_is_better: whether more is better.
    """

    metric: str
    judged: list[Judged]
    binary: bool = True
    higher_is_better: bool = True


def ended(text: str, stop: Sequence[str]) -> str:
    """A continuation up to the first stop text."""
    return text[: min((place for each in stop if (place := text.find(each)) >= 0), default=len(text))]


@dataclass(frozen=True)
class Generation:
    r"""How answers are written, and judged.

    Attributes:
        max_new_tokens: the most tokens of a continuation.
        stop: texts at whose first occurrence in a continuation it ends; neither they nor what follows are judged.
        extract: a regular expression; the answer is what the first of its groups holds that holds anything. By default
            all that is written.
        match: which of several matches that hold something counts, the ``"first"`` or the ``"last"``.
        normalise: what makes no difference: ``"case"``; ``"punctuation"``, with signs of currencies and percents, and
            what is not seen at all, such as marks of direction; English ``"articles"``; the comma ``"separators"`` of
            thousands; how ``"numbers"`` of the same value are written, with minus signs for hyphens. Never does white
            space, but for there being any, nor whether an accent is one character with its letter or two.

    Raises:
        ValueError: if an argument is not as stated, or ``extract`` is no pattern with a group.

    Example:
        >>> gsm8k = Generation(max_new_tokens=256, stop=("\n\n",), extract=r"#### (-?[\d,.]+)", match="last")
        >>> gsm8k.judge("So she earns 2 * 600 = 1200. #### 1,200.00\n\nQuestion: ...", ["1200"])
        Judged(said='1200', right=True, answer='1200')
    """

    max_new_tokens: int = 256
    stop: Sequence[str] = ()
    extract: str = ""
    match: Literal["first", "last"] = "first"
    normalise: Sequence[str] = NORMAL_FORMS

    def __post_init__(self) -> None:
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be an integer, at least 1, got {self.max_new_tokens!r}.")
        for name in ("stop", "normalise"):
            value = getattr(self, name)
            value = (value,) if isinstance(value, str) else tuple(value)
            if not all(isinstance(text, str) and text for text in value):
                raise ValueError(f"`{name}` must be texts, none of them empty, got {value!r}.")
            object.__setattr__(self, name, value)
        if unknown := [form for form in self.normalise if form not in NORMAL_FORMS]:
            raise ValueError(f"`normalise` must be some of {', '.join(NORMAL_FORMS)}, got {unknown}.")
        if self.match not in ("first", "last"):
            raise ValueError(f"`match` must be 'first' or 'last', got {self.match!r}.")
        if self.extract != "":
            try:
                groups = re.compile(self.extract).groups
            except (re.error, TypeError) as error:
                raise ValueError(f"`extract` must be a regular expression, got {self.extract!r}: {error}.") from error
            if not groups:
                raise ValueError(
                    f"`extract` must have a group that holds the answer, as in '#### (.+)', got {self.extract!r}."
                )

    def found(self, text: str) -> str:
        """The answer in a continuation; empty if there is none."""
        if not self.extract:
            return text
        matches = (next(filter(None, match.groups()), "") for match in re.finditer(self.extract, text))
        held = [text for text in matches if text]
        return held[0 if self.match == "first" else -1] if held else ""

    def normal(self, text: str) -> str:
        """The normal form of an answer: the same for all that :attr:`normalise` does not tell apart.

        >>> Generation().normal("The  U.S.A., at $1,200.50!"), Generation().normal("usa at 1200.5")
        ('usa at 1200.5', 'usa at 1200.5')
        """
        comma = "(?:,[0-9]{3}(?![0-9]))*" if "separators" in self.normalise else ""
        minus = f"[{_MINUS}]" if "numbers" in self.normalise else "-"
        # Of 1.10.2024 each part is a number of its own, in which 10 and 1 differ.
        whole = rf"(?<![0-9]\.)[0-9]+{comma}\.[0-9]+(?!\.?[0-9])|[0-9]+{comma}"
        number = rf"((?:(?<![\w.)]){minus})?(?:{whole}|(?<!\w)\.[0-9]+))"
        parts = re.split(number, unicodedata.normalize("NFC", text))
        # Numbers stand at the odd places: of them nothing is taken that alters their value.
        texts = [self._value(part) if i % 2 else self._words(part) for i, part in enumerate(parts)]
        for i in range(2, len(parts) - 1, 2):  # what parts two numbers does so still
            texts[i] = texts[i] or " "
        return " ".join("".join(texts).split())

    def _words(self, text: str) -> str:
        if "case" in self.normalise:
            text = text.casefold()
        if "punctuation" in self.normalise:
            text = "".join(char for char in text if not _is_mark(char))
        return _ARTICLES.sub(" ", text) if "articles" in self.normalise else text

    def _value(self, number: str) -> str:
        number = re.sub(f"[{_MINUS}]", "-", number.replace(",", ""))
        if "numbers" not in self.normalise:
            return number
        whole, _, part = number.lstrip("-").partition(".")
        value = f"{whole.lstrip('0') or '0'}.{part.rstrip('0')}".rstrip(".")
        return f"-{value}" if number.startswith("-") and value != "0" else value

    def judge(self, continuation: str, accepted: Sequence[str]) -> Judged:
        """What a continuation says, and whether that is one of the ``accepted`` answers, of which the first is told."""
        said, answers = self.normal(self.found(ended(continuation, self.stop))), list(map(self.normal, accepted))
        right = bool(said) and said in answers
        return Judged(answers[0] if right else said, right, answers[0])

    def judged(self, continuations: Sequence[str], batch: Mapping[str, Any]) -> list[Scored]:
        """By each metric, :meth:`judge` for a batch of facts, whose ``accepted`` are a list for each."""
        pairs = zip(continuations, batch["accepted"], strict=True)
        return [Scored(EXACT_MATCH, [self.judge(text, answers) for text, answers in pairs])]

    def before(self, fact: Fact) -> tuple[str, str]:
        """What the model is to continue, and what stands between that and what should be written."""
        return fact.prompt, " "

    def check(self, fact: Fact, between: str = " ") -> None:
        """Refuse a fact whose own answer would never be judged right; ``between`` is written ahead of it.

        Raises:
            ValueError: with its id: if an answer has no normal form, a stop text is in what is to be written, or its
                rationale and answer are not judged right.
        """
        for answer in fact.accepted:
            if not self.normal(answer):
                raise ValueError(
                    f"an answer must be something in its normal form, but {answer!r} of fact {fact.id!r} is nothing "
                    f"without {', '.join(self.normalise)}; give others to `normalise`."
                )
        for stop in self.stop:
            if stop in (written := between + fact.written):
                raise ValueError(
                    f"`stop` must hold nothing that is in what is to be written, but {stop!r} is in {written!r} "
                    f"of fact {fact.id!r}: no model could write it to the end."
                )
        if fact.rationale and not self.judge(fact.written, fact.accepted).right:
            found = self.found(fact.written)
            raise ValueError(
                f"the rationale and answer of fact {fact.id!r} must be judged right, but in {fact.written[-60:]!r} "
                f"`extract` finds {found!r}; the rationale is what stands between prompt and answer, such as "
                "'... ####'."
            )


def _is_mark(char: str) -> bool:
    return unicodedata.category(char)[0] == "P" or unicodedata.category(char) in ("Sc", "Cf")


class ExactMatch(UnitMean):
    """Share of facts to which an accepted answer is written, or the mean of another score of what is written."""

    said: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("said", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, right: Tensor, said: Sequence[str]) -> None:
        """Add facts: (F,) 1 for a right answer and 0 for a wrong one, NaN for what has no score; and what is said."""
        self.add(right.nan_to_num(), ~right.isnan())
        self.said = self.said + sum(map(bool, said))

    @property
    def says_nothing(self) -> bool:
        """Whether continuations were seen, and none of them holds an answer."""
        return self.has_data and not bool(self.said)


class WrittenError(ExactMatch):
    """The mean of a score of what is written, the lower the better."""

    higher_is_better = False
