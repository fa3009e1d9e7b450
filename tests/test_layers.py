"""The plan of the house, enforced: a module imports only from rooms below its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "unipool_jax"

# The rooms from the ground up; what each may import of unipool_jax, besides itself.
_GROUND = {"config", "kernels"}
_MODEL = _GROUND | {"parallel", "moe", "model"}
_TRAINING = _MODEL | {"data", "training"}
ALLOWED = {
    "config": set[str](),
    "kernels": set[str](),
    "parallel": {"config"},
    "data": {"config"},
    "moe": _GROUND | {"parallel"},
    "model": _GROUND | {"parallel", "moe"},
    "training": _MODEL | {"data"},
    "evaluation": _TRAINING,
    "convert": _TRAINING,
    "planner": _TRAINING,
    "analysis": _TRAINING | {"evaluation"},
    "pruning": _TRAINING | {"evaluation", "convert", "analysis"},
    # After pre-training; nothing but the command line imports them.
    "rewriting": _TRAINING | {"evaluation"},
    "verification": {"config"},
    "retrieval": _TRAINING | {"evaluation", "convert"},
    "aptitude": _TRAINING | {"evaluation", "analysis", "retrieval"},
    "chat": _TRAINING | {"evaluation"},
    "cli": _TRAINING
    | {"evaluation", "convert", "planner", "analysis"}
    | {"pruning", "rewriting", "verification", "retrieval", "aptitude", "chat"},
    "__init__": _TRAINING | {"evaluation", "convert", "planner", "analysis"},
    "__main__": {"cli"},
}


def room_of(path: Path) -> str:
    """`kernels` for unipool_jax/kernels/xla.py, `config` for unipool_jax/config/schema.py."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_rooms(source: str, package: str) -> set[str]:
    """Rooms of unipool_jax that `source`, a module of the dotted `package`, imports anywhere, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "unipool_jax":
                found.add(parts[1] if len(parts) > 1 else "__init__")
    return found


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_every_room_is_in_the_plan() -> None:
    assert {room_of(path) for path in modules()} <= set(ALLOWED)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_from_layers_below(path: Path) -> None:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    room = room_of(path)
    upwards = imported_rooms(path.read_text(encoding="utf-8"), package) - ALLOWED[room] - {room}
    assert not upwards, (
        f"{path.relative_to(ROOT)} is in the layer {room} and may not import {', '.join(sorted(upwards))}"
    )


def test_the_plan_has_no_cycle() -> None:
    """Rooms can be built one after the other, each on those before it."""
    left = dict(ALLOWED)
    while left:
        ready = [room for room, needs in left.items() if not needs & set(left)]
        assert ready, f"these rooms import each other: {', '.join(sorted(left))}"
        for room in ready:
            del left[room]


@pytest.mark.parametrize(
    ("source", "package", "rooms"),
    [
        ("import unipool_jax.model.attention", "unipool_jax.moe", {"model"}),
        ("from unipool_jax import training", "unipool_jax.moe", {"training"}),
        ("from unipool_jax.moe.bank import x", "unipool_jax.kernels", {"moe"}),
        ("def f():\n    from unipool_jax.data import store", "unipool_jax.moe", {"data"}),
        ("from ..model import attention", "unipool_jax.moe", {"model"}),
        ("from .routing import route", "unipool_jax.moe", {"moe"}),
        ("from .. import training", "unipool_jax.moe", {"training"}),
        ("import jax\nfrom unipool import x", "unipool_jax.moe", set()),
    ],
)
def test_reading_imports(source: str, package: str, rooms: set[str]) -> None:
    assert imported_rooms(source, package) == rooms


def test_nothing_lies_loose_at_the_top() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} <= {"__init__.py", "__main__.py"}
