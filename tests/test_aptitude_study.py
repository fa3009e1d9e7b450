"""The study of aptitude selection: problems that are what they say, and tables from what is kept of each arm."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import aptitude_problems as problems
from benchmarks import aptitude_study as study
from unipool_jax.aptitude.tools import boxed, same_answer
from unipool_jax.data.tokenizer import Tokenizer, load_tokenizer
from unipool_jax.data.train_tokenizer import train_tokenizer


def test_both_solutions_of_a_problem_are_right() -> None:
    drawn = problems.draw(seed=3, count=200)
    assert [one.source for one in drawn] == ["sums"] * 200 + ["orders"] * 200
    assert len({one.question for one in drawn}) == len({one.id for one in drawn}) == 400
    for one in drawn:
        (text,), (code,) = one.cot, one.tir
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code.split("```")[1].removeprefix("python"))
        assert one.answer == boxed(text) == boxed(code) == printed.getvalue().strip()
        if one.source == "sums":
            assert same_answer(str(sum(map(int, one.question.split("+")))), one.answer)
            steps = re.findall(r"(\d)\+(\d)\+(\d)=(\d\d)", text)
            assert len(steps) == problems.DIGITS
            assert all(int(a) + int(b) + int(c) == int(total) for a, b, c, total in steps)
        else:
            chain = text.partition(",")[0].split(">")
            assert sorted(chain) == sorted(set(re.findall(r"\b[a-l]\b", one.question)))
            for more, less in re.findall(r"([a-l])>([a-l])", one.question):
                assert chain.index(more) < chain.index(less)
            assert one.answer == chain[0 if one.question.endswith("most") else -1]


def test_what_is_tested_is_drawn_nowhere_else() -> None:
    tests = problems.draw(1, 100)
    assert not {one.question for one in tests} & {one.question for one in problems.draw(2, 100, without=tests)}
    assert {one.question for one in tests} & {one.question for one in problems.draw(2, 2000)}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    (tmp_path / "t.json").write_bytes(train_tokenizer(problems.markup(), study.VOCABULARY))
    return load_tokenizer(str(tmp_path / "t.json"))


def test_tokens_of_a_response_are_those_of_the_text(tokenizer: Tokenizer) -> None:
    """Few-shot text and conversations agree, everything fits, and each digit and letter of a problem is a token."""
    for one in problems.draw(3, 100):
        for solution in (one.cot[0], one.tir[0], one.answer):
            prompt = study.PROMPT.format(one.question)
            before, after, both = tokenizer.encode_batch([prompt, solution, prompt + solution])
            assert [*before, *after] == both.tolist()
            assert 2 * (len(both) + 2) <= 96
            if "```output" not in solution:
                assert len(after) <= study.MAX_TOKENS
        pieces = [tokenizer.decode([int(token)]) for token in tokenizer.encode_batch([one.question])[0]]
        assert all(len(piece) == 1 for piece in pieces if re.search(r"[0-9]", piece))
    document = next(problems.shots(problems.draw(3, 10), 1, 1))
    assert document.count("Question: ") == 2


def test_answers_are_counted() -> None:
    one = problems.draw(1, 1)[0]
    found = study._counts([(one, one.tir[0]), (one, one.cot[0]), (one, "no"), (one, "")])
    assert found["right"] == 0.5
    assert found["programs"] == 0.25


def kept(folder: Path, arm: str, seed: int, share: float) -> None:
    answers = {source: {"right": share, "programs": 1.0, "characters": 20.0} for source in study.SOURCES}
    about: dict[str, Any] = {"arm": arm, "seed": seed, "solutions": None if arm == "base" else 300, "answers": answers}
    if arm == "base":
        rho = {"rho": 0.5, "low": 0.1, "high": 0.8, "questions": 20}
        names = ("expert_distance_and_d", "expert_distance_and_size_of_d", "length_difference_and_d")
        scores = {"mean_difference": 0.1, "spread": 0.2, "error": 0.3}
        scores |= {"rank_correlations": {**dict.fromkeys(names, rho), names[2]: None}}  # type: ignore[dict-item]
        about["scores"] = dict.fromkeys(study.SOURCES, scores)
    (folder / f"{arm}-seed{seed}.json").write_text(json.dumps(about), encoding="utf-8")


def test_tables(tmp_path: Path) -> None:
    for arm, share in {"base": 0.1, "random": 0.4, "tata": 0.5, "both": 0.2}.items():
        for seed in (1, 2, 3):
            kept(tmp_path, arm, seed, share + 0.01 * seed)
    arms, differences, scores = study.tables(study.stored(tmp_path))
    # Mean 0.52 and standard deviation 0.01 of three: t is 4.303, so 0.0248 on either side.
    cell = "0.520 (0.495 to 0.545)"
    assert f"| tata | 3 | 300 | {cell} | {cell} | {cell} | 1.000 | 20.000 |" in arms
    assert arms.splitlines()[2].startswith("| base | 3 | - |")
    assert "| all | tata - random | +0.1000 |" in differences
    assert "tata - cot" not in differences
    assert "| sums | 2 | 0.100 | 0.200 | 0.300 | +0.50 (+0.10 to +0.80) | +0.50 (+0.10 to +0.80) | - |" in scores


@pytest.mark.slow
def test_a_seed_of_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every arm of a model that knows nothing."""
    monkeypatch.setattr(study, "ARMS", ("random", "tata"))
    monkeypatch.setattr(study, "DOCUMENTS", 300)
    small = ["train.steps=2", "model.num_layers=2", "model.hidden_size=16", "train.eval_batches=1"]
    places = {"out": tmp_path / "out", "work": tmp_path / "work"}
    arguments = argparse.Namespace(**places, candidates=40, tests=2, text=30, overrides=small)
    (tmp_path / "out").mkdir()
    assert study.run_seed(1, arguments) == 0
    found = study.stored(tmp_path / "out")
    assert [(arm, list(by_seed)) for arm, by_seed in found.items()] == [("base", [1]), ("random", [1]), ("tata", [1])]
    assert found["tata"][1]["solutions"] == found["random"][1]["solutions"] > 80
