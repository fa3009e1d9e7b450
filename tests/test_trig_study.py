"""The study of provable sequences: models of one active size, and tables from what is kept of each run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import trig_study as study
from unipool_jax.model.report import count_parameters
from unipool_jax.rewriting.text import TESTS, TOKENIZER, TRAIN


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for name in (TRAIN, TOKENIZER):
        (tmp_path / "data" / name).touch()
    return tmp_path


def test_models_have_the_same_active_parameters_and_text(work: Path) -> None:
    configs = [study.configuration(method, 2, work, ["train.steps=7"]) for method in study.METHODS]
    assert len({count_parameters(config)["active"] for config in configs}) == 1
    assert {config.train.steps for config in configs} == {7}
    assert len({dataclasses.replace(config.data) for config in configs}) == 1
    # A run reads the text one and a half times: a document has 34 words and its end on average.
    default = study.configuration("dense", 1, work, [])
    tokens = default.train.steps * default.train.batch_size * default.data.sequence_length
    assert 1.4 < tokens / (study.TRAIN_PROBLEMS * (1 + 2 + 3) * 35 * 0.98) < 1.6


def kept(folder: Path, method: str, seed: int, rate: float) -> None:
    results: list[dict[str, Any]] = [
        {"test": test, "policy": policy, "passed": rate if policy == "model" else 0.1}
        for test in TESTS
        for policy in ("model", "random")
    ]
    about = {"method": method, "seed": seed, "parameters": 10, "active": 5, "tokens": 1000, "valid_loss": 1.0}
    (folder / f"{method}-seed{seed}.json").write_text(json.dumps(about | {"results": results}), encoding="utf-8")


def test_tables(tmp_path: Path) -> None:
    for method, first in (("dense", 0.2), ("vanilla", 0.4), ("unipool", 0.4)):
        for seed in (1, 2, 3):
            kept(tmp_path, method, seed, first + 0.01 * seed)
    models, proved, differences = study.tables(study.stored(tmp_path))
    assert "| vanilla | 3 | 10 | 5 | 1,000 | 1.0000 |" in models
    # Mean 0.22 and standard deviation 0.01 of three: t is 4.303, so 0.0248 on either side.
    assert "| depth_4 | 0.220 (0.195 to 0.245) | 0.420 (0.395 to 0.445) | 0.420 (0.395 to 0.445) | 0.100 |" in proved
    assert "| depth_1 | vanilla - dense | +0.2000 |" in differences
    line = next(line for line in differences.splitlines() if line.startswith("| depth_1 | unipool - vanilla"))
    assert "not shown" in line
