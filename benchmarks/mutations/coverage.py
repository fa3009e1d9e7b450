"""A pytest plugin that writes down which functions of the package each test calls, and how long the test takes.

UNIPOOL_CALLS=calls.json python -m pytest -p benchmarks.mutations.coverage tests/test_routing.py
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

_calls: dict[str, dict[str, Any]] = {}
_failed: set[str] = set()
_root = os.getcwd() + os.sep
_seen: dict[int, CodeType] = {}


def _trace(frame: FrameType, event: str, argument: object) -> None:
    # By identity: a code object is hashed by its contents, which is slow. The dictionary keeps it alive.
    _seen[id(frame.f_code)] = frame.f_code


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Trace a test with its fixtures."""
    _seen.clear()
    before = time.perf_counter()
    threading.settrace(_trace)
    sys.settrace(_trace)
    try:
        return (yield)
    finally:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
        seconds = time.perf_counter() - before
        inside = {code for code in _seen.values() if code.co_filename.startswith(_root + "unipool_jax")}
        functions = {f"{code.co_filename.removeprefix(_root)}::{_function(code)}" for code in inside}
        _calls[item.nodeid] = {"seconds": round(seconds, 3), "functions": sorted(functions)}


def _function(code: CodeType) -> str:
    """The nearest named function: a comprehension or lambda belongs to the one around it."""
    name = code.co_qualname
    while name.rpartition(".")[2].startswith("<"):
        name = name.rpartition(".")[0]
    return name


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember what did not pass."""
    if not report.passed:
        _failed.add(report.nodeid)


def pytest_sessionfinish() -> None:
    """Write the calls of the tests that passed."""
    passed = {test: calls for test, calls in _calls.items() if test not in _failed}
    Path(os.environ["UNIPOOL_CALLS"]).write_text(json.dumps(passed), encoding="utf-8")
