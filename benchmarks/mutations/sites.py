"""Places in a source file where one small fault can be put, found in its syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

_COMPARISONS: dict[type[ast.cmpop], str] = {
    # The boundary moves; a reversed comparison is noticed by almost any test.
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
_ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "//",
    ast.Pow: "*",
}


@dataclass(frozen=True)
class Mutation:
    """One fault: the bytes `start .. stop-1` of a file become `after`."""

    file: str
    function: str
    """Qualified name of the enclosing function; empty at the level of a module or class."""
    line: int
    operator: str
    before: str
    after: str
    start: int
    stop: int

    @property
    def identity(self) -> tuple[str, str, str, str, str]:
        """What it is, wherever its line has moved to."""
        return self.file, self.function, self.operator, self.before, self.after

    def apply(self, source: bytes) -> bytes:
        """`source` with the fault in it."""
        return source[: self.start] + self.after.encode() + source[self.stop :]


def find(file: str, source: bytes) -> list[Mutation]:
    """All mutations of a source file, in the order of its text.

    Left alone are annotations, docstrings and strings, imports, and what a `raise` says.
    """
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def mutation(node: ast.expr | ast.stmt, function: str, operator: str, after: str) -> Mutation:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start, stop = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        return Mutation(file, function, node.lineno, operator, source[start:stop].decode(), after, start, stop)

    found = [mutation(node, function, *change) for node, function in _walk(ast.parse(source)) for change in _of(node)]
    return sorted(found, key=lambda item: (item.start, item.stop, item.operator))


def _walk(tree: ast.AST, function: str = "", prefix: str = "") -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """The nodes that may change, with the function around them, named as in `code.co_qualname`."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list", "exc", "cause", "bases"):
            continue
        for node in value if isinstance(value, list) else [value]:
            if not isinstance(node, ast.AST) or isinstance(node, (ast.Import, ast.ImportFrom, ast.JoinedStr)):
                continue
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from _walk(node, prefix + node.name, f"{prefix}{node.name}.<locals>.")
            elif isinstance(node, ast.ClassDef):
                yield from _walk(node, function, f"{prefix}{node.name}.")
            else:
                if isinstance(node, (ast.expr, ast.stmt)):
                    yield node, function
                yield from _walk(node, function, prefix)


def _of(node: ast.expr | ast.stmt) -> list[tuple[str, str]]:
    """The mutations of one node: name of the operator, and the new text."""
    match node:
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARISONS:
            return [("comparison", f"({ast.unparse(left)} {_COMPARISONS[type(op)]} {ast.unparse(right)})")]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC and not _text(left) | _text(right):
            return [("arithmetic", f"({_inner(left)} {_ARITHMETIC[type(op)]} {_inner(right)})")]
        case ast.BoolOp(op=op, values=values):
            word = " or " if isinstance(op, ast.And) else " and "
            return [("and/or", f"({word.join(f'({ast.unparse(value)})' for value in values)})")]
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return [("not", f"({ast.unparse(operand)})")]
        case ast.Constant(value=bool() as value):
            return [("constant", str(not value))]
        case ast.Constant(value=int() | float() as value):
            return [("constant", f"({value!r} + 1)")]
        case ast.Return(value=value) if value is not None and not _none(value):
            return [("return", "return None")]
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise():
            return [("delete", "pass")]
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            return [("delete", "pass")]
    return []


def _inner(node: ast.expr) -> str:
    return f"({ast.unparse(node)})"


def _text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
