"""Terms, their values to 40 digits, and the rules: true at many points, and every wrong sign is noticed.

The oracle is Python: the usual notation of a term is evaluated as an expression over NumPy arrays.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from unipool_jax.rewriting.numeric import (
    EXACT,
    FLOATS,
    WORKING_DIGITS,
    UndefinedError,
    conditions,
    holds,
    random_points,
    value,
)
from unipool_jax.rewriting.rules import RULES, SPECIAL_VALUES, Rule
from unipool_jax.rewriting.terms import Term, infix, number, parse, read_prefix

POINTS = 1_000
_RNG = np.random.default_rng(0)
AT: dict[str, Any] = {
    "X": _RNG.uniform(-3, 3, POINTS),
    "Y": _RNG.uniform(-3, 3, POINTS),
    "K": _RNG.integers(0, 100, POINTS).astype(float),
}
NAMES = {name: getattr(np, name) for name in ("sin", "cos", "tan", "sqrt", "pi")}


def evaluated(term: Term, point: dict[str, Any] = AT) -> np.ndarray:
    """The value by Python, `[POINTS]`."""
    found = eval(infix(term).replace("^", "**"), NAMES | point)
    return np.broadcast_to(found, (POINTS,))


def admissible(rule: Rule) -> np.ndarray:
    """Points at which no denominator and no cosine under a tangent is near zero."""
    terms = [term for side in (rule.left, rule.right) for term in conditions(side)]
    return np.all([np.abs(evaluated(term)) > 1e-2 for term in terms] or [np.ones(POINTS, bool)], axis=0)


def differs(left: Term, right: Term, where: np.ndarray) -> bool:
    """Whether two terms differ at one of some points."""
    a, b = evaluated(left)[where], evaluated(right)[where]
    return bool(np.any(np.abs(a - b) > 1e-7 * (1 + np.abs(a))))


def mutants(term: Term, inside: bool) -> Iterator[Term]:
    """`term` with one sign wrong: a plus for a minus, or the other way round; `inside` of functions too."""
    if term.op in ("+", "-"):
        yield Term("-" if term.op == "+" else "+", *term.args)
    if term.op == "neg":
        yield term.args[0]
    if inside or term.op not in ("sin", "cos", "tan"):
        for index, arg in enumerate(term.args):
            for changed in mutants(arg, inside):
                yield Term(term.op, *(changed if place == index else one for place, one in enumerate(term.args)))


def test_there_are_rules_of_every_kind() -> None:
    assert len(SPECIAL_VALUES) == 29  # ten angles, three functions, and no tangent of pi/2
    assert len(RULES) == 87
    assert not [rule.name for rule in RULES.values() if rule.unbound(True) and rule.unbound(False)]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_rule_is_true_and_every_wrong_sign_is_noticed(rule: Rule) -> None:
    where = admissible(rule)
    assert where.sum() > 0.9 * POINTS
    assert not differs(rule.left, rule.right, where)
    zero = not np.any(np.abs(evaluated(rule.right)) > 1e-12)
    # Whole turns may be added or taken away; zero has no sign.
    wrong = [number(1)] if zero else [Term("neg", rule.right), *mutants(rule.right, "K" not in rule.placeholders())]
    assert all(differs(rule.left, mutant, where) for mutant in wrong)


@pytest.mark.slow
def test_rules_are_true_to_40_digits_at_a_thousand_points() -> None:
    with decimal.localcontext(prec=WORKING_DIGITS):
        for rule in RULES.values():
            points = [{name: Decimal(repr(float(x))) for name, x in zip(AT, xs, strict=True)} for xs in _rows()]
            tried = [point for point in points if _has_values(rule, point)]
            assert len(tried) > 0.9 * POINTS
            assert holds([(rule.left, rule.right)], tried), rule.name


def _rows() -> Iterator[tuple[float, ...]]:
    yield from zip(*AT.values(), strict=True)


def _has_values(rule: Rule, point: dict[str, Decimal]) -> bool:
    return all(
        abs(value(term, point)) > Decimal("1e-2") for side in (rule.left, rule.right) for term in conditions(side)
    )


def test_exact_functions() -> None:
    with decimal.localcontext(prec=WORKING_DIGITS):
        for x in (0.3, -7.7, 1.0, 1000.25, -0.0001):
            for name in ("sin", "cos", "tan"):
                assert math.isclose(EXACT[name](Decimal(x)), getattr(math, name)(x), rel_tol=1e-12)
        half, turns = EXACT["sin"](EXACT["pi"]() / 6), EXACT["cos"](EXACT["pi"]() * 1998)
        assert abs(half - Decimal("0.5")) < Decimal("1e-58")
        assert abs(turns - 1) < Decimal("1e-55")
        # The first 40 decimals, of the On-Line Encyclopedia of Integer Sequences, A049469.
        assert str(EXACT["sin"](Decimal(1))).startswith("0.8414709848078965066525023216302989996225")
        for text in ("tan(pi/2)", "1/sin(pi)", "sqrt(0-1)", "2**(1/2)", "0**(0-1)"):
            with pytest.raises(UndefinedError):
                value(parse(text), {})


def test_an_equation_holds_with_values_on_both_sides_only() -> None:
    points = random_points(0)

    def true(text: str) -> bool:
        left, right = text.split("=")
        return holds([(parse(left), parse(right))], points)

    assert true("sin(2*x) = 2*sin(x)*cos(x)")
    assert not true("sin(2*x) = 2*sin(x)*cos(y)")
    assert not true("1/cos(pi/2) = 1/cos(pi/2)")
    assert not true("tan(pi/2 + pi*7) = tan(pi/2 + pi*7)")
    assert not true("sin(x) = sin(x) + 1/10**30")


def test_values_of_arrays_are_those_of_python() -> None:
    for rule in RULES.values():
        where = admissible(rule)
        ours = np.broadcast_to(value(rule.right, AT, FLOATS), (POINTS,))
        np.testing.assert_allclose(ours[where], evaluated(rule.right)[where], rtol=1e-9, atol=1e-9)


def test_a_term_is_its_text() -> None:
    for rule in RULES.values():
        names = {"X": parse("x + 2*pi*37"), "Y": parse("-(pi/6)"), "K": number(905)}
        for side in (rule.left, rule.right):
            term = side.substituted(names)
            assert read_prefix(term.text.split()) == term
    assert parse("x + pi") == parse("pi + x")
    assert parse("x - pi") != parse("pi - x")
    assert parse("12*x").text == "* # 1 2 x"


@pytest.mark.parametrize("text", ["", "+ x", "x y", "z", "# x", "# 0 1", "sin", "# ²", "= x x"])
def test_a_text_that_is_no_term(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w|#"):
        read_prefix(text.split())


def test_a_place_is_found_again_after_operands_change_order() -> None:
    term = parse("sin(y) + cos(x)")
    path = next(path for path, part in term.paths() if part == parse("cos(x)"))
    new, there = term.replaced(path, parse("x**2"))
    assert new == parse("sin(y) + x**2")
    assert new.at(there) == parse("x**2")
    assert there != path or new.args[path[0]] == parse("x**2")
