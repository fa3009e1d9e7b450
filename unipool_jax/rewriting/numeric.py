"""Values of terms: 40 digits to decide whether an equation is true, and NumPy to try many points.

Python's `decimal` gives the digits; sine and cosine are Taylor series after the argument is brought near 0.
"""

from __future__ import annotations

import decimal
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

import numpy as np

from unipool_jax.rewriting.terms import Term

DIGITS = 40
"""Digits to which two sides must agree."""
WORKING_DIGITS = 60
POINTS = 3
"""Random points at which an equation is tried."""

_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534211706798")
_ZERO = Decimal(10) ** -DIGITS

Functions = Mapping[str, Callable[..., Any]]
"""Operations, `pi`, and `#`, which makes a number of an integer."""


class UndefinedError(ArithmeticError):
    """A term has no value at a point: a division by zero, a tangent where the cosine is zero, a root of less than 0."""


def _series(x: Decimal, term: Decimal, start: int) -> Decimal:
    """Sum of the Taylor series of sine (`term` x, `start` 1) or cosine (1, 0), for |x| below 1."""
    total, square, n = term, x * x, start
    while abs(term) > Decimal(10) ** -(WORKING_DIGITS + 2):
        term = -term * square / ((n + 1) * (n + 2))
        total, n = total + term, n + 2
    return total


def _sine(x: Decimal, quarters: int) -> Decimal:
    """Sine of x plus so many quarter turns."""
    turns = (x / (_PI / 2)).to_integral_value()
    rest = x - turns * _PI / 2
    quarter = (int(turns) + quarters) % 4
    value = _series(rest, rest, 1) if quarter % 2 == 0 else _series(rest, Decimal(1), 0)
    return -value if quarter >= 2 else value


def _divided(a: Decimal, b: Decimal) -> Decimal:
    if abs(b) < _ZERO:
        raise UndefinedError("a division by zero")
    return a / b


def _root(a: Decimal) -> Decimal:
    if a < -_ZERO:
        raise UndefinedError("a square root of less than zero")
    return max(a, Decimal(0)).sqrt()


def _power(a: Decimal, b: Decimal) -> Decimal:
    if b != b.to_integral_value():
        raise UndefinedError("a power that is no whole number")
    return a ** int(b) if b >= 0 else _divided(Decimal(1), a ** int(-b))


EXACT: Functions = {
    "sin": lambda x: _sine(x, 0),
    "cos": lambda x: _sine(x, 1),
    "tan": lambda x: _divided(_sine(x, 0), _sine(x, 1)),
    "sqrt": _root,
    "neg": lambda x: -x,
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": _divided,
    "^": _power,
    "pi": lambda: _PI,
    "#": Decimal,
}
FLOATS: Functions = {
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "sqrt": np.sqrt,
    "neg": np.negative,
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "/": np.divide,
    "^": np.power,
    "pi": lambda: np.pi,
    "#": float,
}


def value(
    term: Term, point: Mapping[str, Any], functions: Functions = EXACT, known: dict[Term, Any] | None = None
) -> Any:
    """The value of a term where its variables have the values of `point`.

    Args:
      term: the term.
      point: values by name of leaf.
      functions: `EXACT` for Decimals, `FLOATS` for arrays.
      known: values of terms at this point, which is added to.

    Raises:
      UndefinedError: there is none (EXACT).
    """
    known = {} if known is None else known
    if term in known:
        return known[term]
    if term.op in point:
        found = point[term.op]
    elif term.is_number:
        found = functions["#"](int(term.op))
    else:
        found = functions[term.op](*(value(arg, point, functions, known) for arg in term.args))
    known[term] = found
    return found


def conditions(term: Term) -> Iterator[Term]:
    """What must not be zero for a term to have a value: denominators that are no numbers, cosines under tangents."""
    for arg in term.args:
        yield from conditions(arg)
    if term.op == "tan":
        yield Term("cos", term.args[0])
    elif term.op == "/" and not term.args[1].is_number:
        yield term.args[1]


def random_points(seed: int | str, count: int = POINTS) -> list[dict[str, Decimal]]:
    """Values of x and y between -3 and 3, the same for the same seed."""
    rng = random.Random(seed)
    return [
        {name: Decimal(rng.randrange(-(3 * 10**9), 3 * 10**9)) / 10**9 for name in ("x", "y")} for _ in range(count)
    ]


def holds(equations: Iterable[tuple[Term, Term]], points: Iterable[Mapping[str, Decimal]]) -> bool:
    """Whether all of some equations have values on both sides, equal to `DIGITS` digits, at each of the points.

    A point at which all have values shows too that their side conditions do not contradict each other.
    """
    equations = list(equations)
    with decimal.localcontext(prec=WORKING_DIGITS):
        for point in points:
            known: dict[Term, Decimal] = {}
            for left, right in equations:
                try:
                    a, b = value(left, point, EXACT, known), value(right, point, EXACT, known)
                except (UndefinedError, decimal.DecimalException):
                    return False
                if abs(a - b) > _ZERO * (1 + abs(a)):
                    return False
    return True
