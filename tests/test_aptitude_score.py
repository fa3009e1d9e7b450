"""Scores of demonstrations by a model: against the model in NumPy, and as a command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import oracles
from alphabet import alphabet_model, config_of, log_likelihood, random_model
from unipool_jax.aptitude import run_embedding, score_command
from unipool_jax.aptitude.expert_use import UseObserver, correlations
from unipool_jax.aptitude.generation import GenerationScorer
from unipool_jax.aptitude.likelihood import LikelihoodScorer, model_fingerprint, one_shot
from unipool_jax.aptitude.scores import Score, Shown, Use, read_scores
from unipool_jax.cli.main import execute
from unipool_jax.config.errors import UserError
from unipool_jax.config.schema import ConfigError
from unipool_jax.evaluation.scoring import LanguageModel
from unipool_jax.model.transformer import apply
from unipool_jax.training.state import layer_inputs


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return random_model()._replace(config=config_of("data.sequence_length=64"))


def test_a_score_is_the_mean_of_the_tokens_in_numpy(model: LanguageModel) -> None:
    asked = [Shown("1+1", "two", "2+2", "4"), Shown("1+1", "print(1+1)", "2+2", "14")]
    found = LikelihoodScorer(model)(asked)
    for one, value in zip(asked, found, strict=True):
        text = f"Question: 1+1\nAnswer: {one.solution}\n\nQuestion: 2+2\nAnswer:"
        total, _ = log_likelihood(model, list(text.encode()), list(f" {one.answer}".encode()))
        assert value == pytest.approx(total / (1 + len(one.answer)), rel=1e-4)
    assert one_shot(asked[0])[1] == " 4"


def test_generated_answers_are_right_or_wrong() -> None:
    """A model that goes on with the alphabet: after `:` comes `;`."""
    model = alphabet_model()._replace(config=config_of("data.sequence_length=64"))
    scorer = GenerationScorer(model, 3)
    boxed = r"\boxed{4}"  # of the demonstration, so it is no answer
    asked = [
        Shown("1+1", boxed + 5 * " ", "2+2", "4"),
        *(Shown("1+1", "2 and so on.", "2+2", a) for a in (";<=", ";<")),
    ]
    assert scorer(asked) == [0.0, 1.0, 0.0]
    assert scorer.complete(["x" * 48 + end for end in "abm"] + ["x" * 62]) == ["bcd", "cde", "nop", None]
    assert scorer([Shown("1+1", "x" * 64, "2+2", "4")]) == [None]
    with pytest.raises(UserError, match="max_tokens=64: the model reads 64 tokens"):
        GenerationScorer(model, 64)


def test_what_does_not_fit_has_no_score(model: LanguageModel) -> None:
    long = Shown("1+1", "x" * 40, "2+2", "4")
    assert LikelihoodScorer(model)([Shown("1+1", "two", "2+2", "4"), long]) == [None, None]


def test_the_fingerprint_is_that_of_the_weights(model: LanguageModel) -> None:
    first = model_fingerprint(model)
    assert first == model_fingerprint(random_model())  # how long its windows are does not count
    changed = np.array(model.params["embedding"])
    changed[0, 0] += 1e-6
    assert model_fingerprint(model._replace(params=model.params | {"embedding": changed})) != first


def test_expert_use_is_that_of_the_model_in_numpy(model: LanguageModel) -> None:
    """Each solution alone, without padding, at the positions that predict it."""
    context, solutions = b"Question: 1+1\nAnswer:", (b" two", b" print(1+1)")
    distances = np.zeros(model.config.mixture_layers)
    for layer in range(len(distances)):
        shares = []
        for solution in solutions:
            tokens = np.array([*context, *solution])
            visited = oracles.Forward(model.config, model.params, tokens[None, :-1]).experts[layer]
            own = visited[len(context) - 1 :].reshape(-1).tolist()
            shares.append({expert: own.count(expert) / len(own) for expert in range(model.config.experts_per_pool)})
        distances[layer] = sum(abs(shares[0][expert] - shares[1][expert]) for expert in shares[0]) / 2
    found = UseObserver(model)("1+1", "two", "print(1+1)")
    assert found is not None
    assert found.distance == pytest.approx(distances.mean())
    assert found.distance > 0.05
    assert (found.tokens_cot, found.tokens_tir) == (4, 11)
    assert UseObserver(model)("1+1", "two", "x" * 64) is None


def test_correlations_see_what_goes_together() -> None:
    scores = [Score(str(n), "u", 0, n / 10, 0.0, None, Use((n % 7) / 10 + n / 33, 5 + n, 5)) for n in range(20)]
    others = [Score("none", "u", 0, None, None, None, scores[0].use), Score("dense", "u", 0, 1, 0, None)]
    found = correlations([*scores, *others])
    length = found["length_difference_and_d"]
    assert length is not None
    assert (round(length.rho, 9), length.questions) == (1.0, 20)
    use = found["expert_distance_and_d"]
    assert use is not None
    distances = [one.use.distance for one in scores if one.use is not None]
    ranks = np.argsort(np.argsort(distances))
    squares = float(((ranks - np.arange(20)) ** 2).sum())
    assert use.rho == pytest.approx(1 - 6 * squares / (20 * (400 - 1)))  # Spearman's formula without equals
    assert use.low < use.rho < use.high
    assert correlations(scores[:9])["expert_distance_and_d"] is None


@pytest.fixture
def words(model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line without its output; seven short candidates and one that is too long."""
    monkeypatch.setattr(score_command, "open_model", lambda request: (model, request.run))
    rows: list[dict[str, Any]] = [
        {"id": str(n), "source": "s", "question": f"{n}+1", "cot": ["so"], "tir": ["1+1"], "answer": str(n + 1)}
        for n in range(8)
    ]
    rows[7]["tir"] = ["x" * 64]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    assert execute(["aptitude", "anchors", str(path), f"out={tmp_path / 'a.json'}", "count=2"]) == 0
    return ["aptitude", "score", "here", f"candidates={path}", f"anchors={tmp_path / 'a.json'}"]


def test_anchors_by_the_hidden_states_of_a_run(
    words: Sequence[str], model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by an array of the same vectors, made without padding."""
    monkeypatch.setattr(run_embedding, "open_model", lambda request: (model, f"{request.run} {request.step}"))
    rows = [f"{n * n * 37 + 500:05}+{n:02}" for n in range(30)]  # of one length, so that one pass makes all vectors
    lines = [
        json.dumps({"id": f"{n:02}", "source": "s", "question": text, "cot": ["a"], "tir": ["b"], "answer": "c"})
        for n, text in enumerate(rows)
    ]
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokens_NS = np.array([list(text.encode()) for text in rows], np.int32)
    hidden_NSD = apply(model.config, model.params, tokens_NS, layer_inputs(model.config, model.balance)).head.hidden_BSD
    np.save(tmp_path / "v.npy", np.asarray(hidden_NSD).mean(axis=1))
    found = []
    for source in ("run=here", f"embeddings={tmp_path / 'v.npy'}", "seed=0"):
        assert execute(["aptitude", "anchors", str(path), f"out={tmp_path / 'b.json'}", "count=7", source]) == 0
        found.append(json.loads((tmp_path / "b.json").read_text(encoding="utf-8")))
    by_run, by_array, by_words = found
    assert by_run["anchors"] == by_array["anchors"] != by_words["anchors"]
    assert by_run["embedding"] == f"mean hidden state of {model_fingerprint(model)}"
    for extra, message in (("embeddings=v.npy", "leave one of both out"), ("step=3", None)):
        asked = ["aptitude", "anchors", str(path), f"out={tmp_path / 'b.json'}", "count=7", "run=here", extra]
        if message is None:
            assert execute(asked) == 0
            asked.remove("run=here")
        with pytest.raises(ConfigError, match=message or "without run= there are no checkpoints"):
            execute(asked)


def last(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_parts_and_interruptions_give_the_same_table(
    words: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole.jsonl"
    assert execute([*words, f"out={whole}"]) == 0
    said = last(capsys)
    assert (said["sources"]["s"]["questions"], said["sources"]["s"]["unscored"]) == (8, 1)
    scores = read_scores(whole)
    assert (scores["7"].cot, scores["7"].use) == (None, None)
    assert all(one.use is not None and one.use.tokens_cot == 3 for name, one in scores.items() if name != "7")
    known = [one.difference for name, one in scores.items() if name != "7"]
    assert said["sources"]["s"]["mean_difference"] == pytest.approx(np.mean(known))
    assert len({round(one, 9) for one in known}) == 7
    for part in range(2):
        assert execute([*words, f"out={tmp_path / f'{part}.jsonl'}", f"part={part}", "parts=2"]) == 0
    halves = [read_scores(tmp_path / f"{part}.jsonl") for part in range(2)]
    assert [sorted(half) for half in halves] == [["0", "2", "4", "6"], ["1", "3", "5", "7"]]
    assert halves[0] | halves[1] == scores
    lines = whole.read_bytes().splitlines(keepends=True)
    whole.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    assert execute([*words, f"out={whole}"]) == 0
    assert whole.read_bytes() == b"".join(lines)


def test_scores_of_another_seed_are_not_mixed(words: Sequence[str], tmp_path: Path) -> None:
    out = f"out={tmp_path / 'x.jsonl'}"
    assert execute([*words, out, "parts=8"]) == 0
    with pytest.raises(UserError, match="0 was scored by another model"):
        execute([*words, out, "parts=8", "seed=1"])
    with pytest.raises(UserError, match="part=2: parts=2"):
        execute([*words, out, "part=2", "parts=2"])
