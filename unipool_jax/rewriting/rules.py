"""The rules: trigonometric identities from any school book, in the usual notation.

The design, an equation rewritten by a bank of rules, is that of TRIGO (arXiv 2310.10180); the bank is our own. X and Y
stand for any term, K for a whole number. A rule that needs something to be non-zero says so by its terms alone: see
`numeric.conditions`.
"""

from __future__ import annotations

from dataclasses import dataclass

from unipool_jax.rewriting.terms import PLACEHOLDERS, Term, parse

_SPECIAL_ANGLES = {
    "0": ("0", "0", "1", "0"),
    "pi": ("pi", "0", "-1", "0"),
    "pi_2": ("pi/2", "1", "0", None),
    "pi_3": ("pi/3", "sqrt(3)/2", "1/2", "sqrt(3)"),
    "pi_4": ("pi/4", "sqrt(2)/2", "sqrt(2)/2", "1"),
    "pi_6": ("pi/6", "1/2", "sqrt(3)/2", "sqrt(3)/3"),
    "pi_12": ("pi/12", "(sqrt(6)-sqrt(2))/4", "(sqrt(6)+sqrt(2))/4", "2-sqrt(3)"),
    "2pi_3": ("2*pi/3", "sqrt(3)/2", "-(1/2)", "-sqrt(3)"),
    "3pi_4": ("3*pi/4", "sqrt(2)/2", "-(sqrt(2)/2)", "-1"),
    "5pi_6": ("5*pi/6", "1/2", "-(sqrt(3)/2)", "-(sqrt(3)/3)"),
}
"""Angle, sine, cosine, tangent."""

_OTHERS = """
sin_period: sin(X) = sin(X + 2*pi*K)
cos_period: cos(X) = cos(X + 2*pi*K)
tan_period: tan(X) = tan(X + pi*K)
sin_odd_turns: sin(X) = -sin(X + pi*(2*K + 1))
cos_odd_turns: cos(X) = -cos(X + pi*(2*K + 1))
sin_quarter_turns: sin(X) = cos(2*pi*K + (pi/2 - X))
cos_quarter_turns: cos(X) = sin(2*pi*K + (pi/2 + X))
sin_minus: sin(-X) = -sin(X)
cos_minus: cos(-X) = cos(X)
tan_minus: tan(-X) = -tan(X)
sin_supplement: sin(pi - X) = sin(X)
cos_supplement: cos(pi - X) = -cos(X)
tan_supplement: tan(pi - X) = -tan(X)
sin_half_turn: sin(pi + X) = -sin(X)
cos_half_turn: cos(pi + X) = -cos(X)
tan_half_turn: tan(pi + X) = tan(X)
sin_complement: sin(pi/2 - X) = cos(X)
cos_complement: cos(pi/2 - X) = sin(X)
sin_quarter_turn: sin(pi/2 + X) = cos(X)
cos_quarter_turn: cos(pi/2 + X) = -sin(X)
sin_double: sin(2*X) = 2*sin(X)*cos(X)
cos_double: cos(2*X) = cos(X)**2 - sin(X)**2
cos_double_cos: cos(2*X) = 2*cos(X)**2 - 1
cos_double_sin: cos(2*X) = 1 - 2*sin(X)**2
tan_double: tan(2*X) = 2*tan(X)/(1 - tan(X)**2)
sin_triple: sin(3*X) = 3*sin(X) - 4*sin(X)**3
cos_triple: cos(3*X) = 4*cos(X)**3 - 3*cos(X)
tan_triple: tan(3*X) = (3*tan(X) - tan(X)**3)/(1 - 3*tan(X)**2)
tan_half_cos: tan(X/2) = sin(X)/(1 + cos(X))
tan_half_sin: tan(X/2) = (1 - cos(X))/sin(X)
sin_square_double: sin(X)**2 = (1 - cos(2*X))/2
cos_square_double: cos(X)**2 = (1 + cos(2*X))/2
tan_square_double: tan(X)**2 = (1 - cos(2*X))/(1 + cos(2*X))
sin_half: sin(X) = 2*sin(X/2)*cos(X/2)
cos_half: cos(X) = cos(X/2)**2 - sin(X/2)**2
cos_half_cos: cos(X) = 2*cos(X/2)**2 - 1
cos_half_sin: cos(X) = 1 - 2*sin(X/2)**2
tan_quotient: tan(X) = sin(X)/cos(X)
pythagoras: sin(X)**2 + cos(X)**2 = 1
sin_square: sin(X)**2 = 1 - cos(X)**2
cos_square: cos(X)**2 = 1 - sin(X)**2
tan_square: 1 + tan(X)**2 = 1/cos(X)**2
sin_sum: sin(X + Y) = sin(X)*cos(Y) + cos(X)*sin(Y)
sin_difference: sin(X - Y) = sin(X)*cos(Y) - cos(X)*sin(Y)
cos_sum: cos(X + Y) = cos(X)*cos(Y) - sin(X)*sin(Y)
cos_difference: cos(X - Y) = cos(X)*cos(Y) + sin(X)*sin(Y)
tan_sum: tan(X + Y) = (tan(X) + tan(Y))/(1 - tan(X)*tan(Y))
tan_difference: tan(X - Y) = (tan(X) - tan(Y))/(1 + tan(X)*tan(Y))
sin_plus_sin: sin(X) + sin(Y) = 2*(sin((X + Y)/2)*cos((X - Y)/2))
sin_minus_sin: sin(X) - sin(Y) = 2*(cos((X + Y)/2)*sin((X - Y)/2))
cos_plus_cos: cos(X) + cos(Y) = 2*(cos((X + Y)/2)*cos((X - Y)/2))
cos_minus_cos: cos(X) - cos(Y) = -(2*(sin((X + Y)/2)*sin((X - Y)/2)))
sin_cos: sin(X)*cos(Y) = (sin(X + Y) + sin(X - Y))/2
cos_cos: cos(X)*cos(Y) = (cos(X + Y) + cos(X - Y))/2
sin_sin: sin(X)*sin(Y) = (cos(X - Y) - cos(X + Y))/2
tan_plus_tan: tan(X) + tan(Y) = sin(X + Y)/(cos(X)*cos(Y))
tan_minus_tan: tan(X) - tan(Y) = sin(X - Y)/(cos(X)*cos(Y))
tan_tan: tan(X)*tan(Y) = (cos(X - Y) - cos(X + Y))/(cos(X - Y) + cos(X + Y))
"""


@dataclass(frozen=True)
class Rule:
    """An identity between two terms."""

    name: str
    left: Term
    right: Term

    def sides(self, forward: bool) -> tuple[Term, Term]:
        """What is replaced, and by what: the right side for the left one if forward."""
        return (self.left, self.right) if forward else (self.right, self.left)

    def placeholders(self) -> list[str]:
        """Those of both sides, in order."""
        return [name for name in PLACEHOLDERS if name in self.left.leaves() | self.right.leaves()]

    def unbound(self, forward: bool) -> list[str]:
        """Placeholders that what is replaced does not determine."""
        old, new = self.sides(forward)
        return [name for name in PLACEHOLDERS if name in new.leaves() - old.leaves()]


def _special_values() -> list[Rule]:
    rules = []
    for name, (angle, *values) in _SPECIAL_ANGLES.items():
        for function, result in zip(("sin", "cos", "tan"), values, strict=True):
            if result is not None:
                rules.append(Rule(f"{function}_{name}", Term(function, parse(str(angle))), parse(result)))
    return rules


def _from_lines(text: str) -> list[Rule]:
    rules = []
    for line in text.strip().splitlines():
        name, _, equation = line.partition(":")
        left, right = equation.split(" = ")
        rules.append(Rule(name, parse(left.strip()), parse(right.strip())))
    return rules


SPECIAL_VALUES = tuple(_special_values())
RULES = {rule.name: rule for rule in (*SPECIAL_VALUES, *_from_lines(_OTHERS))}
