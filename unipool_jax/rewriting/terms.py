"""Expressions as trees, their text, and what stands at a place in them.

The text is prefix notation with spaces: `+ * # 2 pi x` is 2 pi + x. A number is `#` and its digits, each a word. The
two operands of a sum or product are ordered by their text, so terms that differ in this order alone are one term.
Nothing else is simplified: a tree is rewritten by rules only.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

ARITY = {"sin": 1, "cos": 1, "tan": 1, "sqrt": 1, "neg": 1, "+": 2, "-": 2, "*": 2, "/": 2, "^": 2}
"""Operands of each operation."""
COMMUTATIVE = ("+", "*")
LEAVES = ("pi", "x", "y")
"""The constant and the variables of a problem; other leaves are numbers and, in rules, placeholders."""
PLACEHOLDERS = ("X", "Y", "K")
"""What a rule is about: any two terms, and a whole number."""
NUMBER = "#"

Path = tuple[int, ...]
"""Where a part is: which operand to go to, from the top."""

_OPERATORS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Pow: "^"}


class Term:
    """An expression; equal and hashed by its text.

    Attributes:
      op: an operation of `ARITY`, a leaf, or the digits of a number.
      args: the operands, ordered where their order does not matter.
      text: prefix notation.
      size: operations and leaves.
    """

    __slots__ = ("_hash", "args", "op", "size", "text")

    op: str
    args: tuple[Term, ...]
    text: str
    size: int

    def __init__(self, op: str, *args: Term):
        if op in COMMUTATIVE:
            args = tuple(sorted(args, key=lambda term: term.text))
        self.op = op
        self.args = args
        self.text = " ".join([" ".join([NUMBER, *op]) if op.isdigit() else op, *(term.text for term in args)])
        self.size = 1 + sum(term.size for term in args)
        self._hash = hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Term) and self.text == other.text

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return self.text

    @property
    def is_number(self) -> bool:
        """Whether it is a whole number."""
        return self.op.isdigit()

    def leaves(self) -> set[str]:
        """Its variables, placeholders, numbers and pi."""
        return set[str]().union(*(term.leaves() for term in self.args)) if self.args else {self.op}

    def paths(self) -> Iterator[tuple[Path, Term]]:
        """Every part with its place, operands before what they are operands of."""
        for index, child in enumerate(self.args):
            for path, term in child.paths():
                yield (index, *path), term
        yield (), self

    def at(self, path: Path) -> Term:
        """The part at a place; raises IndexError without one."""
        term = self
        for index in path:
            term = term.args[index]
        return term

    def replaced(self, path: Path, new: Term) -> tuple[Term, Path]:
        """This term with `new` at a place, and where `new` then is."""
        if not path:
            return new, ()
        child, below = self.args[path[0]].replaced(path[1:], new)
        args = [child if index == path[0] else term for index, term in enumerate(self.args)]
        term = Term(self.op, *args)
        return term, (next(index for index, one in enumerate(term.args) if one is child), *below)

    def substituted(self, values: dict[str, Term]) -> Term:
        """This term with leaves replaced."""
        if not self.args:
            return values.get(self.op, self)
        return Term(self.op, *(term.substituted(values) for term in self.args))


def number(value: int) -> Term:
    """A whole number, 0 or more."""
    return Term(str(value))


def parse(text: str) -> Term:
    """A term from the usual notation, which is read as Python: `2*sin(X)^2` is written `2*sin(X)**2`.

    Raises:
      ValueError: anything but operations of `ARITY`, names and whole numbers.
    """
    return _of_python(ast.parse(text.strip(), mode="eval").body)


def _of_python(node: ast.expr) -> Term:
    match node:
        case ast.Constant(value=int(value)):
            return number(value)
        case ast.Name(id=name):
            return Term(name)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return Term("neg", _of_python(inner))
        case ast.BinOp(left=left, op=op, right=right):
            return Term(_OPERATORS[type(op)], _of_python(left), _of_python(right))
        case ast.Call(func=ast.Name(id=name), args=[inner]) if ARITY.get(name) == 1:
            return Term(name, _of_python(inner))
    raise ValueError(f"{ast.unparse(node)}: not a term")


def read_prefix(words: Sequence[str]) -> Term:
    """A term from the words of its text.

    Raises:
      ValueError: unknown words, too few or too many of them.
    """
    term, end = _read(words, 0)
    if end != len(words):
        raise ValueError(f"{' '.join(words[end:])}: left over after {term}")
    return term


def _read(words: Sequence[str], start: int) -> tuple[Term, int]:
    if start >= len(words):
        raise ValueError("the text of a term ends early")
    word, end = words[start], start + 1
    if word == NUMBER:
        while end < len(words) and len(words[end]) == 1 and words[end] in "0123456789":
            end += 1
        digits = "".join(words[start + 1 : end])
        if not digits or digits != str(int(digits)):
            raise ValueError(f"{NUMBER} {digits}: not a number")
        return Term(digits), end
    if word in LEAVES:
        return Term(word), end
    if word not in ARITY:
        raise ValueError(f"{word}: not a word of a term")
    args = []
    for _ in range(ARITY[word]):
        arg, end = _read(words, end)
        args.append(arg)
    return Term(word, *args), end


def infix(term: Term) -> str:
    """The usual notation, with parentheses around every operation inside another."""
    if not term.args:
        return term.op
    inner = [
        infix(arg) if not arg.args or arg.op in ("sin", "cos", "tan", "sqrt") else f"({infix(arg)})"
        for arg in term.args
    ]
    if term.op == "neg":
        return f"-{inner[0]}"
    if len(inner) == 1:
        return f"{term.op}({infix(term.args[0])})"
    return f"{inner[0]} {term.op} {inner[1]}"
