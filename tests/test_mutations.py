"""The mutation tool: which faults it finds in a source, and which tests it gives them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from benchmarks.mutations import __main__ as study
from benchmarks.mutations.sites import Mutation, find

SOURCE = b'''"""A docstring, which stays."""
import os

LIMIT: int = 3


class Box:
    def has_room(self, n: int | None = None) -> bool:
        """Another."""
        if n is None or not self.items:
            return True
        return n + len(self.items) < LIMIT

    def fill(self, x):
        def inner(y):
            return [y * k for k in x]
        self.items = inner(2)
        print("\xc3\xa4", x)
        if x == 0:
            raise ValueError(f"{x + 1} is too much" + "!")
        return None
'''


def test_every_kind_of_fault_is_found_where_it_is() -> None:
    found = {(m.function, m.operator, m.before, m.after) for m in find("box.py", SOURCE)}
    assert found == {
        ("", "constant", "3", "(3 + 1)"),
        ("Box.has_room", "and/or", "n is None or not self.items", "((n is None) and (not self.items))"),
        ("Box.has_room", "comparison", "n is None", "(n is not None)"),
        ("Box.has_room", "not", "not self.items", "(self.items)"),
        ("Box.has_room", "constant", "True", "False"),
        ("Box.has_room", "return", "return True", "return None"),
        ("Box.has_room", "return", "return n + len(self.items) < LIMIT", "return None"),
        ("Box.has_room", "comparison", "n + len(self.items) < LIMIT", "(n + len(self.items) <= LIMIT)"),
        ("Box.has_room", "arithmetic", "n + len(self.items)", "((n) - (len(self.items)))"),
        ("Box.fill.<locals>.inner", "return", "return [y * k for k in x]", "return None"),
        ("Box.fill.<locals>.inner", "arithmetic", "y * k", "((y) / (k))"),
        ("Box.fill", "delete", "self.items = inner(2)", "pass"),
        ("Box.fill", "constant", "2", "(2 + 1)"),
        ("Box.fill", "delete", 'print("ä", x)', "pass"),
        ("Box.fill", "comparison", "x == 0", "(x != 0)"),
        ("Box.fill", "constant", "0", "(0 + 1)"),
        ("Box.fill", "delete", 'raise ValueError(f"{x + 1} is too much" + "!")', "pass"),
    }


def test_a_fault_changes_its_own_bytes() -> None:
    for mutation in find("box.py", SOURCE):
        changed = mutation.apply(SOURCE)
        assert changed != SOURCE
        ast.parse(changed)
        tail = len(SOURCE) - mutation.stop
        assert changed[: mutation.start] == SOURCE[: mutation.start]
        assert changed[len(changed) - tail :] == SOURCE[mutation.stop :]


@pytest.mark.parametrize("room", study.ROOMS)
def test_every_fault_in_the_package_parses(room: str) -> None:
    drawn = study.draw(room, 30, seed=1)
    assert drawn == study.draw(room, 30, seed=1) != study.draw(room, 30, seed=2)
    assert len({(mutation.file, mutation.line) for mutation in drawn}) == 30
    for mutation in drawn:
        ast.parse(mutation.apply((study.ROOT / mutation.file).read_bytes()))


def test_a_fault_meets_the_cheapest_tests_that_call_its_function() -> None:
    calls = {
        "t.py::slow": {"seconds": 50.0, "functions": ["a.py::f"]},
        "t.py::fast": {"seconds": 1.0, "functions": ["a.py::f", "a.py::g"]},
        "t.py::middle": {"seconds": 5.0, "functions": ["a.py::f.<locals>.h", "a.py::f"]},
        "t.py::other": {"seconds": 0.1, "functions": ["b.py::f"]},
    }

    def tests(function: str, budget: float) -> tuple[list[str], int]:
        return study.chosen_tests(Mutation("a.py", function, 1, "", "", "", 0, 0), calls, budget)

    assert tests("f", 60) == (["t.py::fast", "t.py::middle", "t.py::slow"], 0)
    assert tests("f", 10) == (["t.py::fast", "t.py::middle"], 1)
    assert tests("g", 0.5) == (["t.py::fast"], 0)
    assert tests("f.<locals>.h", 60) == (["t.py::middle"], 0)
    assert tests("k", 60) == ([], 0)
    # What is outside of functions is met by whoever calls anything in the file.
    assert tests("", 10) == (["t.py::fast", "t.py::middle"], 1)


def test_the_table_counts_rooms_and_names_survivors() -> None:
    def record(file: str, outcome: str, left_out: int = 0) -> dict[str, object]:
        return {
            "file": file,
            "line": 7,
            "before": "a\n  + b",
            "after": "(a - b)",
            "outcome": outcome,
            "left_out": left_out,
        }

    lines = study.table(
        [
            record("unipool_jax/moe/x.py", "killed"),
            record("unipool_jax/moe/x.py", "timeout"),
            record("unipool_jax/moe/y.py", "survived", 3),
            record("unipool_jax/data/z.py", "uncovered"),
        ]
    ).splitlines()
    assert lines[2:4] == ["| moe | 3 | 2 | 1 | 0 |", "| data | 1 | 0 | 0 | 1 |"]
    assert lines[5:] == [
        "- `unipool_jax/moe/y.py:7` `a + b` -> `(a - b)` (survived, 3 tests left out)",
        "- `unipool_jax/data/z.py:7` `a + b` -> `(a - b)` (uncovered)",
    ]


def test_a_fault_is_put_in_and_taken_out(tmp_path: Path) -> None:
    """On a package of one function, with a test that notices and one that does not."""
    (tmp_path / "doubling.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "test_doubling.py").write_text(
        "from doubling import double\n\ndef test_bites():\n    assert double(3) == 6\n\n"
        "def test_does_not():\n    assert double(0) == 0\n"
    )
    (mutation,) = (m for m in find("doubling.py", (tmp_path / "doubling.py").read_bytes()) if m.operator == "constant")
    seconds = {"seconds": 0.1, "functions": ["doubling.py::double"]}
    before = (tmp_path / "doubling.py").read_bytes()
    for tests, outcome in ((["bites", "does_not"], "killed"), (["does_not"], "survived"), ([], "uncovered")):
        calls = {f"test_doubling.py::test_{name}": seconds for name in tests}
        assert study.attempt(mutation, tmp_path, calls, budget=10)["outcome"] == outcome
        assert (tmp_path / "doubling.py").read_bytes() == before
