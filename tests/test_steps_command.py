"""`unipool steps check`, `train` and `select`, from answers with claims to the best of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unipool_jax.cli.main import execute
from unipool_jax.config.errors import UserError

GOOD = ["Two and two. [[show 2 + 2 = 4]]", "So it is. [[no claim]]"]
BAD = ["Two and two. [[show 2 + 2 = 5]]", "So anything. [[given 1 = 2 show x = 0]]"]


def answers(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def rows(problems: int = 6) -> list[dict[str, Any]]:
    """A right answer and two wrong ones to each problem; the reward model prefers a wrong one."""
    kinds = ((BAD, "5", False, 0.6), (GOOD, "4", True, 0.5), (BAD, "5", False, 0.4))
    return [
        {"problem": str(number), "steps": steps, "answer": answer, "correct": correct, "reward": reward}
        for number in range(problems)
        for steps, answer, correct, reward in kinds
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checked answers and an aggregator."""
    folder = tmp_path_factory.mktemp("steps")
    path = answers(folder / "answers.jsonl", rows())
    assert execute(["steps", "check", str(path), f"out={folder / 'checked.jsonl'}"]) == 0
    words = [str(folder / "checked.jsonl"), f"out={folder / 'a.safetensors'}", "epochs=8", "learning_rate=0.02"]
    assert execute(["steps", "train", *words]) == 0
    return folder


def test_steps_are_checked(folder: Path) -> None:
    found = [json.loads(line) for line in (folder / "checked.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [one["states"] for one in found[:3]] == [[0, 0], [1, 2], [0, 0]]
    assert found[0]["evidence"][1].startswith("vacuous")
    assert found[1]["answer"] == "4"


def test_counts_are_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    execute(["steps", "check", str(folder / "answers.jsonl"), f"out={folder / 'again.jsonl'}"])
    said = capsys.readouterr().out
    for line in ("proof_failed: 24", "proof_ok: 6", "not_needed: 6", "vacuous, counted as proof_failed: 12"):
        assert line in said


def test_the_chosen_answer_is_better_than_plurality(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(folder / "checked.jsonl"), f"aggregator={folder / 'a.safetensors'}"]
    assert execute(["steps", "select", *words]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["problems"], found["plurality"], found["half_correct"], found["picked"]) == (3, 0.0, 0.0, 1.0)
    assert found["mean"] == pytest.approx(1 / 3)
    assert found["tuning"]["0.0"] == 0.0
    assert execute(["steps", "select", *words, "alpha=0"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["problems"], found["picked"], found["tuning"]) == (6, 0.0, {})


def test_a_prover_that_is_not_here(folder: Path) -> None:
    with pytest.raises(UserError, match="prover=lean: Lean 4"):
        execute(["steps", "check", str(folder / "answers.jsonl"), f"out={folder / 'x'}", "prover=lean"])


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({"steps": "one"}, [], "steps"),
        ({"correct": 1}, [], "correct"),
        ({"states": [4]}, [], "unipool steps check"),
        ({"reward": None}, [], "reward"),
        ({"reward": -2.0}, [], "rule=weighted"),
        ({}, [], "give alpha, or more"),
        ({}, ["alpha=0.5", "rule=max"], "has no weight"),
    ],
)
def test_answers_that_cannot_be_used(
    changes: dict[str, Any], words: list[str], message: str, folder: Path, tmp_path: Path
) -> None:
    row = rows(1)[0] | {"states": [1]} | changes
    path = answers(tmp_path / "bad.jsonl", [row])
    with pytest.raises(UserError, match=message):
        execute(["steps", "select", str(path), f"aggregator={folder / 'a.safetensors'}", *words])


def test_no_answers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no answers"):
        execute(["steps", "check", str(answers(tmp_path / "none.jsonl", [])), f"out={tmp_path / 'out'}"])
