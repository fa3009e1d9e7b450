"""How fast a run trains: tokens per second of an interval and of the run, and the time that is left."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple


class Interval(NamedTuple):
    """What was measured between two lines of the metrics."""

    tokens_per_second: float
    seconds: float
    """Of training: what `Speed` does not count is left out."""


class Speed:
    """Times the steps of training, without compilation, evaluation and saving.

    Args:
      tokens_per_step: tokens of a batch.
      earlier: intervals of the run before this process, from its metrics: the means are those of the whole run.
      clock: seconds from any origin.
    """

    def __init__(
        self, tokens_per_step: int, earlier: Iterable[Interval] = (), clock: Callable[[], float] = time.perf_counter
    ):
        self._tokens_per_step, self._clock = tokens_per_step, clock
        self._intervals = list(earlier)
        self._step: int | None = None  # at which the open interval began
        self._seconds = 0.0
        self._running_since: float | None = None
        self._first: tuple[int, float] | None = None

    def start(self, step: int) -> None:
        """Open an interval: `step` steps are done, and the next one needs no compilation."""
        now = self._clock()
        self._step, self._seconds, self._running_since = step, 0.0, now
        self._first = self._first or (step, now)

    def drop(self) -> None:
        """Drop the open interval, because the next step will be compiled."""
        self._step = self._running_since = None

    def pause(self) -> None:
        """Stop counting seconds, for an evaluation or a save."""
        if self._running_since is not None:
            self._seconds += self._clock() - self._running_since
            self._running_since = None

    def resume(self) -> None:
        """Count seconds again; no effect while no interval is open."""
        if self._step is not None and self._running_since is None:
            self._running_since = self._clock()

    def interval(self, step: int) -> Interval | None:
        """Close the interval at the end of `step` and open the next one; None if there is nothing to measure."""
        if self._step is None or step <= self._step:
            return None
        running = self._running_since is not None
        self.pause()
        seconds = max(self._seconds, 1e-9)
        found = Interval((step - self._step) * self._tokens_per_step / seconds, seconds)
        self._intervals.append(found)
        self._step, self._seconds = step, 0.0
        if running:
            self.resume()
        return found

    @property
    def mean(self) -> float | None:
        """Tokens per second over all intervals of the run; None if nothing was measured."""
        seconds = sum(interval.seconds for interval in self._intervals)
        tokens = sum(interval.tokens_per_second * interval.seconds for interval in self._intervals)
        return tokens / seconds if seconds else None

    @property
    def median(self) -> float | None:
        """Median of the intervals' tokens per second; None if nothing was measured."""
        return statistics.median(i.tokens_per_second for i in self._intervals) if self._intervals else None

    def left(self, step: int, steps: int) -> float | None:
        """Seconds from the end of `step` to that of `steps`, at the pace of this process so far.

        The pace is that of the clock on the wall: evaluations and saves will come again. None while unknown.
        """
        if self._first is None or step <= self._first[0]:
            return None
        return (steps - step) * (self._clock() - self._first[1]) / (step - self._first[0])
