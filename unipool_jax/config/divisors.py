"""Divisors and multiples that messages recommend."""

from __future__ import annotations

import math


def divisors_of(number: int) -> list[int]:
    """The divisors of `number`, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def shown_divisors(number: int) -> str:
    """The divisors of `number` as text; the smallest and the largest of a number with many."""
    shown = [str(n) for n in divisors_of(number)]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:6], "...", *shown[-5:]])


def next_multiple(number: int, step: int) -> int:
    """The smallest multiple of `step` that is at least `number`."""
    return -(-number // step) * step
