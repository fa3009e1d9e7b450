"""Which of N answers is chosen, and what choosing is compared with."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from unipool_jax.verification.selection import ALPHAS, RULES, Candidate, fuse, pick, plurality, select, tune


def candidate(answer: str | None, correct: bool, retro: float = 0.5, pro: float = 0.5) -> Candidate:
    return Candidate(answer, correct, retro, pro)


def test_the_limits_of_fusion_are_one_judgement_alone() -> None:
    rng = np.random.default_rng(0)
    pairs = rng.random((20, 2)).tolist()
    for rule in ("geometric", "weighted"):
        assert [fuse(r, p, 0.0, rule) for r, p in pairs] == [p for _, p in pairs]
        assert [fuse(r, p, 1.0, rule) for r, p in pairs] == [r for r, _ in pairs]
    assert fuse(0.0, 0.3, 0.0) == 0.3
    assert fuse(0.25, 0.81, 0.5) == pytest.approx(0.45)


def test_every_rule() -> None:
    found = {rule: fuse(0.4, 0.9, 0.25, rule) for rule in RULES}
    expected = {"weighted": 0.775, "sum": 1.3, "product": 0.36, "min": 0.4, "max": 0.9}
    assert found == pytest.approx(expected | {"geometric": math.exp(0.25 * math.log(0.4) + 0.75 * math.log(0.9))})


def test_rewards_below_zero_still_choose() -> None:
    rewards = [-7.0, -2.0, -3.0]
    assert pick([fuse(0.5, reward, 0.0) for reward in rewards]) == 1
    assert pick([fuse(0.5, reward, 0.5, "weighted") for reward in rewards]) == 1
    with pytest.raises(ValueError, match="must be a probability"):
        fuse(0.5, -2.0, 0.5)


def test_among_equals_the_first_is_chosen() -> None:
    assert pick([0.1, 0.7, 0.7]) == 1
    assert pick([-math.inf, -math.inf]) == 0
    assert pick([math.nan, 0.2]) == 1


def test_plurality_is_not_a_majority() -> None:
    """Two of five are enough where the others differ; what was published as a majority needs three."""
    answers = [candidate("7", True), candidate("7", True), *(candidate(str(n), False) for n in range(3))]
    assert plurality([one.answer for one in answers]) == 0
    found = select([answers], 0.5)
    assert (found.plurality, found.half_correct, found.any_correct, found.mean) == (1.0, 0.0, 1.0, 0.4)
    assert plurality([None, "1", "2", "2", "1"]) == 1
    assert plurality([None, None]) is None


def test_shares_are_means_over_problems() -> None:
    sure, unsure = {"retro": 0.9, "pro": 0.9}, {"retro": 0.1, "pro": 0.1}
    problems = [
        [candidate("1", False, **unsure), candidate("2", True, **sure)],
        [candidate("1", True, **unsure), candidate("2", False, **sure)],
        [candidate(None, False), candidate(None, False)],
        [candidate("3", True, **sure)],
    ]
    found = select(problems, 0.5)
    assert found == (4, pytest.approx((0.5 + 0.5 + 0 + 1) / 4), 0.5, 0.75, 0.75, 0.5)


def test_the_weight_is_the_first_that_chooses_best() -> None:
    """The steps know the first problem, the reward model the second; both together both."""
    problems = [
        [candidate("1", True, 0.9, 0.5), candidate("2", False, 0.1, 0.6)],
        [candidate("1", False, 0.6, 0.1), candidate("2", True, 0.5, 0.9)],
    ]
    alpha, curve = tune(problems)
    assert tuple(curve) == ALPHAS
    assert (curve[0.0], curve[1.0], curve[alpha]) == (0.5, 0.5, 1.0)
    assert all(curve[one] < 1.0 for one in itertools.takewhile(lambda one: one < alpha, ALPHAS))
