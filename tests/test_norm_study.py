"""The table of the study of norms, from cells whose numbers are known."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.norm_study import Cell, report


def stored(out: Path, cell: Cell, valid: list[float], leap: int | None = None, diverged: bool = False) -> None:
    """A cell of runs that alternate between two losses, one of which leaps at a step."""
    losses = [3.0, 3.1] * 50
    if leap is not None:
        losses[leap] = 9.0
    runs: list[dict[str, Any]] = [
        {"seed": seed, "valid": loss, "diverged": diverged, "loss/lm": losses, "grad_norm": [1.0, 1.1] * 50}
        for seed, loss in enumerate(valid)
    ]
    (out / f"{cell.name}.json").write_text(json.dumps(cell._asdict() | {"runs": runs}))


def test_differences_are_paired_and_spikes_counted(tmp_path: Path) -> None:
    stored(tmp_path, Cell("pre", "base", 1e-3), [3.0, 3.2, 3.4])
    stored(tmp_path, Cell("sandwich", "tiny", 1e-3), [2.9, 3.1, 3.3], leap=70)
    stored(tmp_path, Cell("sandwich", "base", 1e-3), [9.0, 9.0, 9.0], diverged=True)
    stored(tmp_path, Cell("sandwich", "tiny", 1e-2), [2.9, 3.1, 3.3])
    rows = [line.split(" | ") for line in report(tmp_path).splitlines()[2:]]
    found = {(row[0][2:], row[1], row[2]): row[3:] for row in rows}
    assert found["pre", "base", "0.001"][1:] == ["-", "0 of 3", "0.0%", "0.0% |"]
    # One of the 50 steps that have 50 before them.
    assert found["sandwich", "tiny", "0.001"][1:] == ["-0.100 [-0.100, -0.100]", "0 of 3", "2.0%", "0.0% |"]
    assert found["sandwich", "base", "0.001"][1:3] == ["-", "3 of 3"]
    assert found["sandwich", "tiny", "0.01"][1] == "-"


def test_cells_are_deep_models_of_their_norm() -> None:
    arguments = argparse.Namespace(method="dense", layers=32, steps=600, cache="tokens")
    config = Cell("depth_scaled_sandwich", "tiny", 3e-3).config(arguments)
    assert (config.model.num_layers, config.model.norm, config.model.init) == (32, "depth_scaled_sandwich", "tiny")
    assert config.model.table_std == 0.5
    assert config.optimizer.learning_rate == 3e-3
