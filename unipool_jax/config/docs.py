"""What the sources say about settings: the docstring under each field, and the values it takes."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import sys
import typing
from typing import Any, Literal

from unipool_jax.config.parsing import KIND_NAMES, alternatives
from unipool_jax.config.ranges import Range

_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


@functools.cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


@functools.cache
def field_docs(kind: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, on one line."""
    body = _classes(kind.__module__)[kind.__name__].body
    found = {}
    for entry, after in itertools.pairwise(body):
        if (
            isinstance(entry, ast.AnnAssign)
            and isinstance(entry.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            found[entry.target.id] = " ".join(str(after.value.value).split())
    return found


def choices(kind: Any) -> tuple[str, ...]:
    """The values of a setting that takes one of a few."""
    kinds = alternatives(kind)
    if len(kinds) > 1:
        return tuple(choice for one in kinds for choice in choices(one))
    kind = kinds[0]
    if kind is bool:
        return "true", "false"
    if typing.get_origin(kind) is tuple:
        return choices(typing.get_args(kind)[0])
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def allowed_values(kind: Any, allowed: Range | None = None) -> str:
    """What a setting of this type takes, in words."""
    kinds = alternatives(kind)
    if len(kinds) > 1:
        texts = [allowed_values(one, allowed) for one in kinds]
    else:
        several = typing.get_origin(kinds[0]) is tuple
        item = typing.get_args(kinds[0])[0] if several else kinds[0]
        if found := choices(item):
            text = f"{'any' if several else 'one'} of {', '.join(found)}"
        else:
            text = f"a list of {_PLURALS[item]}" if several else KIND_NAMES[item]
        texts = [text + (f", {allowed}" if allowed is not None else "")]
    return ", or ".join([*texts, *(["null"] if type(None) in typing.get_args(kind) else [])])
