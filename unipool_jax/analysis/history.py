"""Reads the metrics file of a run."""

from __future__ import annotations

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
            raise FileError(
                f"metrics.jsonl, {kind} line of step {step}: {name} is {value!r:.80}, expected a number; correct or "
                "delete that line"
            )
    steps, values = zip(*points, strict=True)
    return Series(np.array(steps), np.array([values], dtype=float))
