"""Claims: a goal and its hypotheses about real or whole numbers, read from a line of text.

    given x > 0, 2*x + 1 = 7 show x = 3
    show 17*23 = 391
    given integer n, n > 3 show n >= 4

A step of an answer carries its claim between double square brackets: "So x is three [[given 2*x = 6 show x = 3]]." A
step that says `[[no claim]]` needs no check.
"""

from __future__ import annotations

import ast
import re
from typing import NamedTuple

COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Eq: "=",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}
OPERATIONS: dict[type[ast.operator], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.Mod: "%",
    ast.Pow: "**",
}
MAX_EXPONENT = 16
MAX_CHARACTERS = 2_000

_CLAIM = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
_NO_CLAIM = "no claim"


class ClaimError(ValueError):
    """A text that states no claim in this language."""


class Expression(NamedTuple):
    """A number, a variable, or an operation on expressions; comparisons are operations too."""

    op: str
    """An operation or comparison as it is written, `neg`, `number` or `variable`."""
    args: tuple[Expression, ...] = ()
    name: str = ""
    """Digits of a number, with a point or without; name of a variable."""

    def variables(self) -> set[str]:
        """Names of the variables in it."""
        return {self.name} if self.op == "variable" else set[str]().union(*(arg.variables() for arg in self.args))


class Claim(NamedTuple):
    """What is to be proved."""

    hypotheses: tuple[Expression, ...]
    goal: Expression
    whole: frozenset[str] = frozenset()
    """Variables that are whole numbers; the others are real."""
    text: str = ""

    def variables(self) -> list[str]:
        """Names of all variables, sorted."""
        return sorted(set[str]().union(*(part.variables() for part in (*self.hypotheses, self.goal))))


def parse_claim(text: str) -> Claim:
    """The claim that a line states.

    Raises:
      ClaimError: it states none.
    """
    words = " ".join(text.split())
    if len(words) > MAX_CHARACTERS:
        raise ClaimError(f"longer than {MAX_CHARACTERS} characters")
    before, show, goal = words.rpartition("show ")
    before = before.strip()
    if not show or (before and not before.startswith("given ")):
        raise ClaimError(f"{words!r}: a claim is written `given HYPOTHESES show GOAL` or `show GOAL`")
    hypotheses, whole = [], set[str]()
    for part in (one.strip() for one in before.removeprefix("given ").split(",") if before):
        if (found := re.fullmatch(r"integer ([A-Za-z]\w*)", part)) is not None:
            whole.add(found[1])
        else:
            hypotheses.append(parse_comparison(part))
    claim = Claim(tuple(hypotheses), parse_comparison(goal), frozenset(whole), words)
    for one in (*claim.hypotheses, claim.goal):
        _check_remainders(one, whole)
    return claim


def _check_remainders(part: Expression, whole: set[str]) -> None:
    """Raises ClaimError for a remainder of what need not be a whole number."""
    if part.op == "%" and not all(_is_whole(arg, whole) for arg in part.args):
        raise ClaimError("%: is of whole numbers; say which variables are, as in: given integer n")
    for arg in part.args:
        _check_remainders(arg, whole)


def _is_whole(part: Expression, whole: set[str]) -> bool:
    if part.op == "variable":
        return part.name in whole
    return part.op != "/" and "." not in part.name and all(_is_whole(arg, whole) for arg in part.args)


def parse_comparison(text: str) -> Expression:
    """A single comparison, such as `2*x + 1 = 7`; raises ClaimError."""
    python = re.sub(r"(?<![<>=!])=(?!=)", "==", text)
    try:
        node = ast.parse(python.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ClaimError(f"{text!r}: cannot be read ({type(error).__name__})") from error
    if not isinstance(node, ast.Compare) or len(node.ops) != 1 or type(node.ops[0]) not in COMPARISONS:
        raise ClaimError(f"{text!r}: not one comparison by =, !=, <, <=, > or >=")
    return Expression(COMPARISONS[type(node.ops[0])], (_expression(node.left), _expression(node.comparators[0])))


def _expression(node: ast.expr) -> Expression:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            # The digits as written: 0.1 is a tenth.
            return Expression("number", name=_digits(value))
        case ast.Name(id=name):
            return Expression("variable", name=name)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return Expression("neg", (_expression(inner),))
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int(power))) if 0 <= power <= MAX_EXPONENT:
            return Expression("**", (_expression(left), Expression("number", name=str(power))))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS and not isinstance(op, ast.Pow):
            return Expression(OPERATIONS[type(op)], (_expression(left), _expression(right)))
    raise ClaimError(f"{ast.unparse(node)}: only numbers, variables, + - * / % and powers up to {MAX_EXPONENT}")


def _digits(value: int | float) -> str:
    text = repr(value)
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise ClaimError(f"{text}: not a number of this language")
    return text


def claim_of_step(step: str) -> Claim | None:
    """The claim in a step; None for `[[no claim]]`.

    Raises:
      ClaimError: no claim, or one that cannot be read. That a step makes no claim is said, never guessed from words
        that happen to be in it.
    """
    found = _CLAIM.findall(step)
    if len(found) != 1:
        raise ClaimError(f"{len(found)} claims in [[ ]]; one is needed")
    return None if found[0].strip() == _NO_CLAIM else parse_claim(found[0])
