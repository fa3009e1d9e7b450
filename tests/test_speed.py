"""Tokens per second of intervals and of the run, on a clock that the tests turn."""

from __future__ import annotations

import pytest

from unipool_jax.training.speed import Interval, Speed

TOKENS = 100


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_nothing_is_known_before_the_first_interval(clock: Clock) -> None:
    speed = Speed(TOKENS, clock=clock)
    assert (speed.mean, speed.median, speed.left(0, 10), speed.interval(1)) == (None, None, None, None)
    clock.pass_(60)
    speed.resume()  # after an evaluation before the first step: there is no interval to go on with
    clock.pass_(60)
    speed.start(1)
    assert speed.interval(1) is None
    assert (speed.mean, speed.median, speed.left(1, 10)) == (None, None, None)


def test_the_speed_of_a_run_is_not_that_of_its_last_interval(clock: Clock) -> None:
    speed = Speed(TOKENS, clock=clock)
    speed.start(1)
    rates = []
    for step, seconds in ((11, 20.0), (21, 10.0), (23, 0.5)):
        clock.pass_(seconds)
        interval = speed.interval(step)
        assert interval is not None
        rates.append(interval.tokens_per_second)
    assert rates == [50.0, 100.0, 400.0]
    assert speed.mean == pytest.approx(22 * TOKENS / 30.5)
    assert speed.median == 100.0


def test_evaluations_saves_and_compilations_are_not_counted(clock: Clock) -> None:
    speed = Speed(TOKENS, clock=clock)
    clock.pass_(500)  # compilation
    speed.start(1)
    clock.pass_(4)
    speed.pause()
    clock.pass_(300)  # an evaluation
    speed.pause()
    speed.resume()
    speed.resume()
    clock.pass_(6)
    assert speed.interval(11) == (pytest.approx(100.0), 10.0)
    clock.pass_(1)
    speed.drop()  # the program changes
    clock.pass_(700)
    speed.resume()
    assert speed.interval(12) is None
    speed.start(13)
    clock.pass_(10)
    assert speed.interval(18) == (pytest.approx(50.0), 10.0)
    assert speed.mean == pytest.approx(15 * TOKENS / 20)


def test_an_interval_may_end_during_a_pause(clock: Clock) -> None:
    speed = Speed(TOKENS, clock=clock)
    speed.start(0)
    clock.pass_(2)
    speed.pause()
    clock.pass_(50)
    assert speed.interval(1) == (50.0, 2.0)
    clock.pass_(50)
    speed.resume()
    clock.pass_(1)
    assert speed.interval(2) == (100.0, 1.0)


def test_the_speed_of_a_resumed_run_is_that_of_all_its_processes(clock: Clock) -> None:
    speed = Speed(TOKENS, [Interval(10.0, 100.0), Interval(30.0, 50.0)], clock)
    assert speed.mean == pytest.approx((1000 + 1500) / 150)
    speed.start(5)
    clock.pass_(5)
    speed.interval(10)
    assert speed.mean == pytest.approx((1000 + 1500 + 500) / 155)
    assert speed.median == 30.0


def test_the_time_left_holds_evaluations_and_saves_too(clock: Clock) -> None:
    speed = Speed(TOKENS, clock=clock)
    clock.pass_(1000)  # compilation, which does not come again
    speed.start(1)
    clock.pass_(10)
    speed.interval(11)
    assert speed.left(11, 31) == pytest.approx(20.0)
    speed.pause()
    clock.pass_(30)
    speed.resume()
    clock.pass_(10)
    assert speed.left(21, 31) == pytest.approx(10 * 50 / 20)
    assert speed.left(31, 31) == 0.0
