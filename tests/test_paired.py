"""Intervals of paired differences against tables and closed forms of Student's t, and what they are said to show."""

from __future__ import annotations

import math
import statistics

import pytest

from unipool_jax.analysis.paired import Paired, paired

QUANTILES = {2: 12.7062, 3: 4.3027, 4: 3.1824, 5: 2.7764, 6: 2.5706, 10: 2.2622, 31: 2.0423}
"""Two-sided 95% points of Student's t for n pairs, from the printed table of n - 1 degrees of freedom."""


@pytest.mark.parametrize("count", QUANTILES)
def test_intervals_are_those_of_the_printed_table(count: int) -> None:
    values = [0.1 + 0.01 * (7 * i % count) for i in range(count)]
    found = paired(values)
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(count)
    assert (found.mean, found.standard_error, found.pairs) == (pytest.approx(mean), pytest.approx(error), count)
    assert found.interval is not None
    half = QUANTILES[count] * error
    assert found.interval == (pytest.approx(mean - half, rel=1e-4), pytest.approx(mean + half, rel=1e-4))


def test_p_values_are_those_of_the_closed_forms() -> None:
    # One degree of freedom is Cauchy's distribution, and two have an algebraic one.
    two, three = paired([0.1, 0.3]), paired([0.1, 0.3, 0.2])
    assert two.p == pytest.approx(1 - 2 / math.pi * math.atan(0.2 / 0.1))
    t = 0.2 / (0.1 / math.sqrt(3))
    assert three.p == pytest.approx(1 - t / math.sqrt(2 + t * t))


def test_an_interval_ends_at_zero_where_p_is_five_percent() -> None:
    t = math.sqrt(2 * 0.95**2 / (1 - 0.95**2))
    # 1, 0, -1 have a standard error of 1 / sqrt(3).
    edge = paired([t / math.sqrt(3) + x for x in (1, 0, -1)])
    assert edge.p == pytest.approx(0.05)
    assert edge.interval is not None
    assert edge.interval[0] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("differences", "reading"),
    [
        ([-0.5], "not shown: 1 of at least 3 pairs"),
        # However far from 0: two pairs cannot tell.
        ([-0.500, -0.501], "not shown: 2 of at least 3 pairs"),
        ([-0.3, -0.2, -0.25], "shown"),
        ([0.3, 0.2, 0.25], "shown"),
        ([-0.3, -0.2, 0.1], "not shown: the interval holds 0"),
        ([0.0, 0.0, 0.0], "not shown: the interval holds 0"),
        ([-0.1, -0.1, -0.1], "shown"),
        ([-0.1, -0.1, math.nan], "not shown: a loss is not finite"),
    ],
)
def test_what_is_shown(differences: list[float], reading: str) -> None:
    assert paired(differences).reading == reading
    assert paired(differences).shown == (reading == "shown")


def test_one_pair_has_no_interval() -> None:
    assert paired([0.25]) == Paired(0.25, 1, None, None, None)


def test_equal_differences_have_no_spread() -> None:
    assert paired([0.5, 0.5, 0.5]) == Paired(0.5, 3, 0.0, (0.5, 0.5), 0.0)
    assert paired([0.0, 0.0]) == Paired(0.0, 2, 0.0, (0.0, 0.0), 1.0)
