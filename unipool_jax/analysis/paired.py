"""What differences paired by seed show: their mean, the 95% interval of Student's t, and when that is too little."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
"""Of the interval."""
FEWEST = 3
"""Pairs below which nothing is shown: the interval of two is 12.7 standard errors wide on each side."""
CELLS = ("difference", "95% interval", "p", "reading")
"""Head of the columns of a difference in every table."""


class Paired(NamedTuple):
    """The mean of paired differences, as far as it is known."""

    mean: float
    pairs: int
    standard_error: float | None = None
    """`s / sqrt(n)` with the sample standard deviation s; None for a single pair, as what follows."""
    interval: tuple[float, float] | None = None
    """95% interval of the mean, by Student's t with n - 1 degrees of freedom."""
    p: float | None = None
    """Two-sided: how often chance alone gives a mean this far from 0."""

    @property
    def shown(self) -> bool:
        """Whether there is a difference: at least three pairs, and an interval without 0."""
        return self.pairs >= FEWEST and self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)

    @property
    def reading(self) -> str:
        """`shown`, or `not shown` and why."""
        if self.shown:
            return "shown"
        if not math.isfinite(self.mean):
            return "not shown: a loss is not finite"
        if self.pairs < FEWEST:
            return f"not shown: {self.pairs} of at least {FEWEST} pairs"
        return "not shown: the interval holds 0"

    def cells(self) -> list[str]:
        """The columns `CELLS` of a table."""
        interval = "-" if self.interval is None else "{:+.4f} to {:+.4f}".format(*self.interval)
        return [f"{self.mean:+.4f}", interval, "-" if self.p is None else f"{self.p:.2g}", self.reading]


def paired(differences: Sequence[float]) -> Paired:
    """The mean of differences, one for each seed, with its interval."""
    count = len(differences)
    error = float(np.std(differences, ddof=1)) / math.sqrt(count) if count > 1 else None
    return paired_of(float(np.mean(differences)), error, count)


def paired_of(mean: float, error: float | None, count: int) -> Paired:
    """A mean of `count` differences whose standard error is known; None for a single one."""
    # A second of import that only comparisons need.
    from scipy.stats import t

    if error is None:
        return Paired(mean, count)
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    # Equal differences leave no doubt about their mean; only none at all is what chance gives.
    p = float(2 * t.sf(abs(mean) / error, count - 1)) if error else float(mean == 0)
    return Paired(mean, count, error, (mean - half, mean + half), p)
