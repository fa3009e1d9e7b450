"""How often the loss or the gradient norm leaps out of what it was just before."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

WINDOW = 50
"""Steps before one that it is compared with."""
LIMIT = 6.0
"""Median absolute deviations above their median from which on it is a spike."""
WATCHED = {"loss": "loss/lm", "grad_norm": "grad_norm"}
"""What is watched, and its name among the metrics of a step."""


def is_spike(value: float, before: Sequence[float]) -> bool:
    """Whether a value exceeds the median of those before by more than `LIMIT` times their median absolute deviation.

    One that is not finite always does.
    """
    if not math.isfinite(value):
        return True
    middle = statistics.median(before)
    return value - middle > LIMIT * statistics.median(abs(other - middle) for other in before)


class Spikes:
    """Counts of a run. Of the first `WINDOW` steps, and of values that are not finite, nothing is compared with.

    Args:
      meta: of the checkpoint that a run resumes from, which has the counts so far; None in a new run.
    """

    def __init__(self, meta: Mapping[str, Any] | None = None):
        known = (meta or {}).get("spikes", {})
        self._before = {name: deque[float](known.get(name, {}).get("before", ()), WINDOW) for name in WATCHED}
        self._counts = {name: int(known.get(name, {}).get("count", 0)) for name in WATCHED}
        self._steps = {name: int(known.get(name, {}).get("steps", 0)) for name in WATCHED}

    def add(self, values: Mapping[str, Any]) -> None:
        """Record the metrics of a step; call for every step, not only those that are logged."""
        for name, metric in WATCHED.items():
            value, before = float(values[metric]), self._before[name]
            if len(before) == WINDOW:
                self._steps[name] += 1
                self._counts[name] += is_spike(value, before)
            if math.isfinite(value):
                before.append(value)

    def shares(self) -> dict[str, float | None]:
        """`spikes/loss` and `spikes/grad_norm`: the share of steps compared so far that are spikes, or None."""
        return {f"spikes/{name}": self._counts[name] / steps if steps else None for name, steps in self._steps.items()}

    def document(self) -> dict[str, Any]:
        """What a checkpoint's meta document must hold to go on counting."""
        return {
            "spikes": {
                name: {"count": self._counts[name], "steps": self._steps[name], "before": list(self._before[name])}
                for name in WATCHED
            }
        }
