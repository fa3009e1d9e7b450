"""The study of retrieval: models of one active size, text without the answers, and tables from what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import retrieval_study as study
from unipool_jax.model.report import count_parameters

TASKS = ("docstring", "ccr")


def test_models_have_the_same_active_parameters_and_text(tmp_path: Path) -> None:
    for name in (study.TEXT, study.TOKENIZER):
        (tmp_path / name).touch()
    configs = [study.configuration(method, 2, tmp_path, ["train.steps=7"]) for method in study.METHODS]
    assert len({count_parameters(config)["active"] for config in configs}) == 1
    assert {config.train.steps for config in configs} == {7}
    assert len({config.data for config in configs}) == 1


def test_text_and_tasks_of_a_library(tmp_path: Path) -> None:
    """No file is both read and tested on."""
    for number in range(30):
        source = f'def f{number}():\n    """Give {number}, or more."""\n    return {number} * 2 + {number}\n'
        (tmp_path / f"m{number}.py").write_text(source, encoding="utf-8")
    study.write_texts(tmp_path, tmp_path / "work")
    lines = (tmp_path / "work" / study.TEXT).read_text(encoding="utf-8").splitlines()
    read = {json.loads(line)["text"].partition("(")[0].removeprefix("def f") for line in lines}
    tasks = study.Tasks(tmp_path)
    asked = {name.partition(".py")[0][1:] for name in tasks.tested["docstring"][0].queries}
    assert read | asked == {str(number) for number in range(30)}
    assert read
    assert asked
    assert not read & asked
    assert len(tasks.examples) == 2 * len(read)
    found = tasks.baselines()
    assert found["digests"] == tasks.digests
    assert [(one["collection"], one["retriever"]) for one in found["results"]] == [
        (task, name) for task in TASKS for name in ("bm25", "random")
    ]


def _results(values: dict[str, float]) -> list[dict[str, Any]]:
    return [{"collection": task, "retriever": name, "ndcg_10": ndcg} for task in TASKS for name, ndcg in values.items()]


def test_tables(tmp_path: Path) -> None:
    for method, first in (("dense", 0.2), ("vanilla", 0.4), ("unipool", 0.4)):
        for seed in (1, 2, 3):
            about = {"method": method, "seed": seed, "parameters": 10, "active": 5, "tokens": 1000}
            losses = {"valid_loss": 1.0, "tune_loss": 2.0}
            results = _results({"frozen": 0.05, "tuned": first + 0.01 * seed})
            kept = tmp_path / f"{method}-seed{seed}.json"
            kept.write_text(json.dumps(about | losses | {"results": results}), encoding="utf-8")
    models, found, differences = study.tables(
        study.stored(tmp_path), {"results": _results({"bm25": 0.31, "random": 0.001})}
    )
    assert "| vanilla | 3 | 10 | 5 | 1,000 | 1.0000 | 2.0000 |" in models
    # Mean 0.22 and standard deviation 0.01 of three: t is 4.303, so 0.0248 on either side.
    assert "| ccr | tuned | 0.2200 (0.1952 to 0.2448) | 0.4200 (0.3952 to 0.4448) |" in found
    assert found.count("| 0.3100 | 0.0010 |") == 4
    assert "| docstring | tuned | vanilla - dense | +0.2000 |" in differences
    assert "| docstring | frozen | unipool - dense | +0.0000 |" in differences
    assert "| ccr |  | unipool: tuned - frozen | +0.3700 |" in differences
    line = next(line for line in differences.splitlines() if line.startswith("| ccr | tuned | unipool - vanilla"))
    assert "not shown" in line


@pytest.mark.slow
def test_the_study_of_a_small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--seeds", "1", "--tune", "2"]
    library = str(Path(json.__file__).parents[1] / "email")
    overrides = ("train.steps=2", "train.eval_batches=1", "model.num_layers=2", "model.hidden_size=16")
    monkeypatch.setattr("sys.argv", ["study", *words, "--library", library, "--overrides", *overrides])
    monkeypatch.setattr(study, "METHODS", ("dense",))
    assert study.main() == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(before) == 2
    assert study.main() == 0
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
