"""Reads the metrics file of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unipool_jax.analysis.figures import Series
from unipool_jax.config.files import FileError
from unipool_jax.training.metrics import read_metrics


def read_history(run: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """Complete lines of a run's metrics file, up to `last_step`; empty for imported runs, which have no such file.

    Raises:
      FileError: a line is damaged.
    """
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    records = []
    for line in read_metrics(path):
        if line.problem is not None:
            raise line.problem
        if last_step is None or line.record["step"] <= last_step:
            records.append(line.record)
    return records


def series_of(history: Sequence[Mapping[str, Any]], kind: str, name: str) -> Series | None:
    """A metric over steps; None if it was never written."""
    points = [(line["step"], line[name]) for line in history if line.get("kind") == kind and line.get(name) is not None]
    if not points:
        return None
    for step, value in points:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _unexpected(kind, step, name, value, "a number")
    steps, values = zip(*points, strict=True)
    return Series(np.array(steps), np.array([values], dtype=float))


def layers_of(history: Sequence[Mapping[str, Any]], kind: str, name: str, layers: int) -> Series:
    """A metric of each layer over steps, one row per layer; without steps where it was never written.

    NaN for layers that a run that grows did not have yet.
    """
    steps, values = [], []
    for line in history:
        if line.get("kind") != kind or (value := line.get(name)) is None:
            continue
        there = min(line.get("growth/layers", layers), layers)
        if not isinstance(value, list) or len(value) != there or not all(isinstance(x, int | float) for x in value):
            raise _unexpected(kind, line["step"], name, value, f"{there} numbers")
        steps.append(line["step"])
        values.append([*value, *[math.nan] * (layers - there)])
    return Series(np.array(steps, np.int64), np.array(values, dtype=float).reshape(len(steps), layers).T)


def last_map(history: Sequence[Mapping[str, Any]], kind: str, name: str, layers: int) -> np.ma.MaskedArray | None:
    """The newest value of a metric with a row for each layer, `[L, ...]`, masked where it is null; None without one."""
    lines = [line for line in history if line.get("kind") == kind and line.get(name) is not None]
    if not lines:
        return None
    value = lines[-1][name]
    try:
        found = np.array(value, dtype=float)
    except (TypeError, ValueError):
        found = np.zeros(0)
    if found.ndim != 2 or len(found) != layers:
        raise _unexpected(kind, lines[-1]["step"], name, value, f"{layers} lists of numbers")
    return np.ma.masked_invalid(found)


def _unexpected(kind: str, step: int, name: str, value: object, expected: str) -> FileError:
    return FileError(
        f"metrics.jsonl, {kind} line of step {step}: {name} is {value!r:.80}, expected {expected}; correct or "
        "delete that line"
    )
