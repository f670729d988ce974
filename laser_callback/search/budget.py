"""The time that a search is given: how many candidates can race in it, and the winner still be confirmed."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from laser_callback.compare.controls import NOISES
from laser_callback.results.candidates import Candidate
from laser_callback.search.race import schedule
from laser_callback.search.steps import Steps
from laser_callback.support.journal import Step


class OutOfTimeError(ValueError):
    """``minutes`` do not suffice to race one candidate and confirm it."""


@dataclass(frozen=True)
class Budget:
    """Time for a whole search.

    Attributes:
        minutes: so much; ``None`` for as long as it takes.
        start: when the search began, by ``time.perf_counter``.
        pass_seconds: what one example takes through the whole model.
        controls: whether the winner is confirmed beside its controls.
        last_seconds: what one example takes where finalists race, and for what is confirmed; by default the same.
    """

    minutes: float | None
    start: float
    pass_seconds: float
    controls: bool = True
    last_seconds: float | None = None

    def affordable(
        self, steps: Steps, step: str, ranked: Sequence[Candidate], examples: int, finalists: int, near: int
    ) -> int:
        """How many of the ranked candidates can race in the time that is left; see :func:`passes_of`.

        It is kept in the journal, unless there is time for none: a resumed search may have more.

        Raises:
            OutOfTimeError: if there is time for none, with the minutes that one takes.
        """
        minutes = math.inf if self.minutes is None else self.minutes
        left = 60 * minutes - (time.perf_counter() - self.start)

        def compute() -> Step:
            for many in range(len(ranked), 0, -1):
                confirmed = 4 + NOISES if self.controls else 2
                passes = passes_of(steps, ranked[:many], examples, finalists, near, confirmed)
                seconds = self.pass_seconds * passes
                if self.last_seconds is not None:
                    last = confirmed * steps.sets.sizes["confirm"]
                    last += schedule(examples, many, finalists)[-1].examples * (1 + min(many, finalists))
                    seconds += max(0.0, self.last_seconds - self.pass_seconds) * last
                if seconds <= left:
                    return {"count": many}, {}
            raise OutOfTimeError(
                f"`minutes` = {minutes} is too short: to race one candidate and confirm it takes about "
                f"{minutes + (seconds - left) / 60:.2g}; give more time, or fewer examples"
            )

        data, _ = steps.journal.step(f"{step}-budget", compute)
        return int(data["count"])


def passes_of(
    steps: Steps, racers: Sequence[Candidate], examples: int, finalists: int, near: int, confirmed: int = 4 + NOISES
) -> float:
    """Passes of one example through the whole model until the winner is confirmed; about ``near`` others enter late.

    ``confirmed`` models run on the confirm set: the original, the plan, and those of its controls if there are any.
    """
    share, alive = sum(steps.lab.share(c.whole) for c in racers) / len(racers), len(racers)
    passes = float(confirmed * steps.sets.sizes["confirm"])
    passes += near * share * examples / 2
    for rung in schedule(examples, len(racers), finalists):
        passes += rung.examples * (1 + share * alive)
        alive = rung.keep
    return passes
