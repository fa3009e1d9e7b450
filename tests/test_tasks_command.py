"""The command line of zero-shot tasks, from its words to the table and the JSON of a trained run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from runner import overrides
from task_files import ALPHABET, write_package, write_task
from unipool_jax.cli.main import execute, main
from unipool_jax.config.compose import compose_config, save_config
from unipool_jax.config.schema import ConfigError
from unipool_jax.config.words import from_words
from unipool_jax.data.tokenizer import load_tokenizer
from unipool_jax.evaluation.export_tasks import export_tasks
from unipool_jax.evaluation.requests import PAPER, EvalRequest, TaskRequest
from unipool_jax.evaluation.tasks_command import average_accuracy, print_tasks
from unipool_jax.training.checkpoint import Checkpoints, make_meta
from unipool_jax.training.run_folder import RunError
from unipool_jax.training.state import init_state

pytestmark = pytest.mark.filterwarnings("ignore:NormRouter over")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints; that they hold the same untrained model does not matter here."""
    folder = tmp_path_factory.mktemp("run")
    config = compose_config(overrides(folder, "data.sequence_length=48", "train.eval_batch_size=2"))
    state = jax.jit(init_state, static_argnums=0)(config, jax.random.key(0))
    run = folder / "runs" / "tiny"
    run.mkdir(parents=True)
    save_config(config, run / "config.yaml")
    with Checkpoints(run / "checkpoints") as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, state._asdict(), make_meta(config, step, load_tokenizer("bytes").sha256))
    return run


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    export_tasks(write_package(folder), folder / "olmo")
    return folder / "olmo"


def printed_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_folder_of_tasks_on_a_run(run: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        execute(["eval", f"run={run}", f"tasks_path={tasks}", "train.eval_batch_size=2", "kernels.implementation=xla"])
        == 0
    )
    out = capsys.readouterr().out
    assert f"{run}/checkpoints/4: demo unipool, lm-eval " in out
    found = json.loads(out.splitlines()[-1])
    assert found["harness"].startswith("lm-eval 0.4")
    assert {name: result["documents"] for name, result in found["results"].items()} == {
        **{"olmo_arc_easy": 3, "olmo_arc_easy_test": 1, "olmo_arc_challenge": 2, "olmo_arc_challenge_test": 1},
        **{"olmo_piqa": 1, "olmo_hellaswag": 1, "olmo_winogrande": 1, "olmo_lambada": 2},
    }
    assert set(found["results"]["olmo_arc_easy"]) == {
        *("acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "documents", "text")
    }
    assert set(found["results"]["olmo_winogrande"]) == {"acc", "acc_stderr", "documents", "text"}
    assert all(len(result["text"]) == 64 for result in found["results"].values())
    assert found["results"]["olmo_lambada"]["perplexity"] > 1
    assert found["average_acc"] is None
    for shown in ("acc_norm", "perplexity", "olmo_winogrande", " ± "):
        assert shown in out


def test_named_tasks_have_a_mean(run: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"tasks_path={tasks}", "tasks=[olmo_arc_easy,olmo_winogrande]", "limit=2"]
    assert execute(["eval", f"checkpoint={run}/checkpoints/2", *words]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    assert f"mean of acc over 2 tasks: {found['average_acc']:.4f}" in printed
    assert [found["results"][name]["documents"] for name in ("olmo_arc_easy", "olmo_winogrande")] == [2, 1]
    accuracies = [result["acc"] for result in found["results"].values()]
    assert found["average_acc"] == pytest.approx(sum(accuracies) / 2)
    assert found["limit"] == 2


def test_words_are_understood() -> None:
    assert from_words(EvalRequest, ["run=runs/a", "step=3"]) == EvalRequest("runs/a", step=3)
    assert from_words(EvalRequest, ["tasks=paper"]) == EvalRequest(tasks=TaskRequest(PAPER))
    assert from_words(EvalRequest, ["run=a", "tasks=[x,y,x]", "limit=5", "num_fewshot=0"]) == EvalRequest(
        "a", tasks=TaskRequest(("x", "y"), limit=5, num_fewshot=0)
    )
    assert from_words(EvalRequest, ["tasks=x", "tasks_path=f"]) == EvalRequest(tasks=TaskRequest(("x",), "f"))
    assert len(PAPER) == 7


@pytest.mark.parametrize(
    "word", ["tasks=", "tasks=[]", "tasks=[1]", "tasks=[a", "limit=0", "limit=x", "num_fewshot=-1", "limit=3"]
)
def test_words_that_are_not_understood_are_named(word: str) -> None:
    named = {"limit=3": "tasks=", "tasks=[1]": r"tasks\[0\]=1", "limit=x": "limit='x'"}
    with pytest.raises(ConfigError, match=named.get(word, word.replace("[", r"\["))):
        from_words(EvalRequest, [word])


def test_what_does_not_go_together_is_refused(run: Path, tasks: Path, tmp_path: Path) -> None:
    for word in ("splits=[valid]", "data.files=[a.txt]", "mesh.data=2"):
        with pytest.raises(ConfigError, match=r"leave (it|them) out"):
            execute(["eval", f"run={run}", f"tasks_path={tasks}", word])
    with pytest.raises(RunError, match="no run here"):
        execute(["eval", f"run={tmp_path}", f"tasks_path={tasks}"])
    with pytest.raises(ConfigError, match="nonsense"):
        execute(["eval", f"run={run}", f"tasks_path={tasks}", "nonsense=1"])
    with pytest.raises(ConfigError, match="draws=0"):
        execute(["analyse", str(run), f"tasks_path={tasks}", "draws=0"])
    with pytest.raises(ConfigError, match="num_fewshot=2"):
        execute(["analyse", str(run), f"tasks_path={tasks}", "num_fewshot=2"])


def test_without_the_harness_the_extra_is_named(
    run: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # type: ignore[arg-type]
    for command in ("eval", "analyse"):
        assert main([command, str(run), f"tasks_path={tasks}"]) == 1
        assert 'pip install ".[harness]"' in capsys.readouterr().err
    # All else works without it.
    assert execute(["eval", f"run={run}", "splits=[valid]"]) == 0


def test_the_analysis_of_a_run_includes_tasks(run: Path, tasks: Path, tmp_path: Path) -> None:
    names = "tasks=[olmo_arc_easy,olmo_winogrande]"
    words = [f"tasks_path={tasks}", names, f"out={tmp_path}", "train.eval_batches=2"]
    assert execute(["analyse", str(run), *words]) == 0
    found = json.loads((tmp_path / "analysis.json").read_text())["task_probe"]
    assert {name: (task["questions"], task["measure"]) for name, task in found["tasks"].items()} == {
        "olmo_arc_easy": (3, "acc_norm"),
        "olmo_winogrande": (1, "acc"),
    }
    learned = [task["learned"] for task in found["tasks"].values()]
    assert found["average"]["learned"] == pytest.approx(sum(learned) / 2)
    page = (tmp_path / "report.html").read_text()
    assert "Random choices and zero-shot tasks" in page
    assert "olmo_arc_easy (acc_norm)" in page
    with pytest.raises(ConfigError, match="tasks=olmo_lambada: the probe needs multiple-choice"):
        execute(["analyse", str(run), f"tasks_path={tasks}"])


def test_the_mean_is_of_accuracies_that_all_tasks_have() -> None:
    assert average_accuracy({"a": {"acc": 0.5}, "b": {"acc": 0.25}}) == 0.375
    assert average_accuracy({"a": {"acc": 0.5}}) is None
    assert average_accuracy({"a": {"acc": 0.5}, "b": {"perplexity": 3.0}}) is None


def test_a_table_shows_what_is_missing_as_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    print_tasks({"a": {"acc": 0.5, "acc_stderr": None, "documents": None}, "b": {"perplexity": 61.25}}, "title")
    out = capsys.readouterr().out
    assert out.startswith("title\n")
    assert "0.5000 │" in out
    assert "61.25" in out


def test_tasks_of_ones_own(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_task(tmp_path, "letters", ALPHABET)
    assert execute(["eval", f"run={run}", f"tasks_path={tmp_path}", "num_fewshot=1"]) == 0
    assert printed_json(capsys)["results"]["letters"]["documents"] == 3
