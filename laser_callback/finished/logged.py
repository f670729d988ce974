"""What a finished run did on one example, in whatever form it was logged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from laser_callback.stats.outcomes import Kind


@dataclass
class LoggedExample:
    """What a finished run did on one example.

    Attributes:
        id: of the example.
        outcomes: by metric, one number; a perplexity's is the negative log likelihood in nats per word, byte or token.
        weights: of the metrics that weigh their examples, such as by a perplexity's words.
        answers: the right answer by metric, where the log tells it.
        predictions: what the run said, by metric, as it was judged.
        meant: where that is another, what it means for the prior checks: what counts as right is the right answer, word
            for word.
        continuation: all that the run has written, where the log tells it.
        same: what both runs of a comparison must have of an example, by its name in the log.
        prompt, group: for readers.
        cluster: what examples share that are not independent of each other; ``None`` where they are.
    """

    id: str
    outcomes: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)
    predictions: dict[str, str] = field(default_factory=dict)
    meant: dict[str, str] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    prompt: str = ""
    group: str = ""
    cluster: str | None = None
    continuation: str = ""

    def said(self, metric: str, answer: str, prediction: str) -> None:
        """Note what was said, and what was right, where ``metric`` tells the two apart."""
        self.answers[metric], self.predictions[metric] = answer, prediction
        self.meant[metric] = answer if self.outcomes.get(metric) == 1 else prediction


@dataclass
class LoggedTask:
    """The examples of one task of a finished run.

    Attributes:
        examples: by id.
        kinds: of the metrics that are no plain means: ``"log_ratio"`` of a perplexity.
        higher_is_better: of metrics, where the log says so.
        unused: what stands in the log and is no outcome, and why.
    """

    examples: dict[str, LoggedExample]
    kinds: dict[str, Kind] = field(default_factory=dict)
    higher_is_better: dict[str, bool] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)


@dataclass
class FinishedRun:
    """A run that is over.

    Attributes:
        name: the model's, where the log says it; else the file's.
        source: what it was read from.
        tasks: by name; ``""`` where the log names none.
    """

    name: str
    source: str
    tasks: dict[str, LoggedTask]


def by_id(examples: Iterable[LoggedExample]) -> dict[str, LoggedExample]:
    """The examples by their ids.

    Raises:
        ValueError: naming ids that come twice.
    """
    found: dict[str, LoggedExample] = {}
    twice: dict[str, int] = {}
    for example in examples:
        if example.id in found:
            twice[example.id] = twice.get(example.id, 1) + 1
        found[example.id] = example
    if twice:
        named = ", ".join(f"{one!r} ({count} times)" for one, count in list(twice.items())[:3])
        more = f", and {len(twice) - 3:,} more" if len(twice) > 3 else ""
        raise ValueError(f"`id` must be another for each example, but these come again: {named}{more}")
    return found
