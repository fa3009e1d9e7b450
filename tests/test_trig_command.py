"""`unipool trig data` and `unipool trig eval`, from making problems to what a model proves of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unipool_jax.cli.main import execute
from unipool_jax.config.compose import compose_config
from unipool_jax.config.files import FileError
from unipool_jax.data.tokenizer import load_tokenizer
from unipool_jax.evaluation.requests import EvalRequest
from unipool_jax.evaluation.scoring import LanguageModel
from unipool_jax.evaluation.tasks_command import open_model
from unipool_jax.rewriting.command import measure, summarize, wilson
from unipool_jax.rewriting.generator import Dials, problems, statement
from unipool_jax.rewriting.moves import State, read_state
from unipool_jax.rewriting.policy import ModelPolicy
from unipool_jax.rewriting.requests import TrigEvalRequest
from unipool_jax.rewriting.search import Attempt
from unipool_jax.rewriting.terms import parse
from unipool_jax.rewriting.text import TESTS, prompt, read_problems, vocabulary, whole_proof
from unipool_jax.training import loop

pytestmark = pytest.mark.usefixtures("steps_are_shared")

SMALL = (
    *("method=dense", "model.num_layers=2", "model.hidden_size=16", "model.num_heads=2", "model.num_kv_heads=1"),
    *("model.ffn_size=16", "model.vocab_size=256", "data=trig_rewrite", "data.sequence_length=64", "mesh=single"),
    *("train.batch_size=4", "train.microbatch_size=4", "train.eval_batch_size=8", "train.eval_batches=1"),
    *("loss.switch_group_sequences=4", "train.steps=2", "train.eval_every=0", "run.tensorboard=false"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trig") / "data"
    assert execute(["trig", "data", f"out={out}", "train=30", "test=3", "whole_proofs=true"]) == 0
    return out


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    """A run of two steps, which knows nothing."""
    places = [f"data.files=[{data / 'train.jsonl'}]", f"data.tokenizer={data / 'tokenizer.json'}"]
    places += [f"data.cache_dir={data.parent / 'cache'}", f"run.dir={data.parent / 'runs'}", "run.name=tiny"]
    assert loop.train(compose_config([*SMALL, *places])) == 0
    return data.parent / "runs" / "tiny"


@pytest.fixture(scope="module")
def model(run: Path) -> LanguageModel:
    return open_model(EvalRequest(str(run)))[0]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_folder_holds_what_the_tests_and_training_read(data: Path) -> None:
    assert {path.name for path in data.iterdir()} == {f"{name}.jsonl" for name in TESTS} | {
        "train.jsonl",
        "tokenizer.json",
    }
    texts = [row["text"] for row in lines(data / "train.jsonl")]
    assert len(texts) == 30 * (1 + 2 + 3) + 3 * 30
    assert sum(text.count("STEP") == 1 for text in texts) == 30 * (1 + 2 + 3) + 30
    solved = [row["goal"] for name in TESTS for row in lines(data / f"{name}.jsonl")]
    read = [text.partition(" STEP")[0] for text in texts]
    assert not {statement(read_state(goal)) for goal in solved} & {statement(read_state(goal)) for goal in read}
    assert len(set(solved)) == 3 * len(TESTS)


def test_the_same_seed_writes_the_same_files(data: Path, tmp_path: Path) -> None:
    assert execute(["trig", "data", f"out={tmp_path}", "train=30", "test=3", "whole_proofs=true"]) == 0
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (data / path.name).read_bytes()


def test_every_word_is_a_token_and_comes_back(data: Path) -> None:
    tokenizer = load_tokenizer(str(data / "tokenizer.json"))
    assert tokenizer.vocab_size == len(vocabulary()) == len(set(vocabulary())) <= 256
    texts = [row["text"] for row in lines(data / "train.jsonl")]
    for text, tokens in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert len(tokens) == len(text.split())
        assert 0 not in tokens  # <unk>
        assert tokenizer.decode(tokens) == text


def test_problems_are_read_back(data: Path) -> None:
    found = read_problems(data / "depth_3.jsonl")
    assert [len(problem.proof) for problem in found] == [3, 3, 3]
    assert read_problems(data / "depth_3.jsonl", 1) == found[:1]
    assert whole_proof(found[0]).count("STEP") == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 1"),
        ('{"goal": "GOAL x = x"}', "proof"),
        ('{"goal": "GOAL x", "proof": []}', "not a problem"),
        ('{"goal": "GOAL sin x = cos x", "proof": []}', "before the sides are equal"),
        ('{"goal": "GOAL x = x", "proof": ["sin_0 forward left"]}', "not a problem"),
    ],
)
def test_a_file_that_holds_no_problem(row: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{row}\n", encoding="utf-8")
    with pytest.raises(FileError, match=rf"bad.jsonl line 1.*{message}|line 1"):
        read_problems(path)


def test_no_problems(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no problems here"):
        execute(["trig", "eval", f"data={tmp_path}"])


def test_a_model_is_measured_beside_chance(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["samples=2", "expansions=2", "max_moves=2", "max_tokens=8", "tests=[depth_1,numbers_2]", "limit=2"]
    search = "search=[greedy,samples,best_first]"
    assert execute(["trig", "eval", str(run), f"data={data}", search, *words]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [(r["test"], r["search"], r["policy"]) for r in results] == [
        (test, search, policy)
        for test in ("depth_1", "numbers_2")
        for search in ("greedy", "samples", "best_first")
        for policy in ("model", "random")
    ]
    assert all(r["problems"] == 2 and r["low"] <= r["passed"] <= r["high"] for r in results)
    assert all(r["legal"] > 0.5 for r in results if r["policy"] == "random")


def test_moves_of_a_model(model: LanguageModel) -> None:
    """As many texts as asked for; a state without room gets none; scores are log-probabilities of the text."""
    policy = ModelPolicy(model, max_tokens=8, temperature=1.0, seed=0)
    short, long = State(parse("sin(x)"), parse("cos(x)")), State(parse("+".join(["x"] * 40)), parse("x"))
    texts = policy.propose([short, long, short], 3)
    assert [len(found) for found in texts] == [3, 0, 3]
    assert policy.too_long == 1
    greedy = ModelPolicy(model, max_tokens=8, temperature=0.0, seed=0)
    assert len(set(greedy.propose([short], 3)[0])) == 1
    # An untrained model spreads its probability evenly over 256 rows.
    (two, four) = policy.score([(short, "sin_0 forward"), (short, "sin_0 forward left first")])
    assert two == pytest.approx(-2 * np.log(256), rel=0.1)
    assert four == pytest.approx(-4 * np.log(256), rel=0.1)
    assert prompt(short) == "GOAL sin x = cos x STEP"


def test_rates() -> None:
    (problem,) = problems(Dials(1), 1, 0, set())

    def attempt(solved: bool) -> Attempt:
        return Attempt(problem.goal, list(problem.proof) if solved else None, proposed=4, legal=3)

    attempts = [[attempt(True), attempt(False)], [attempt(False), attempt(False)], [attempt(True), attempt(True)]]
    result = summarize("depth_1", "samples", "model", attempts)
    assert (result.problems, result.passed, result.first, result.legal, result.moves) == (3, 2 / 3, 0.5, 0.75, 1.0)


def test_the_interval_of_a_rate() -> None:
    """The worked example of Wilson's interval: 10 of 100 gives 5.5% to 17.4%; at the ends it does not collapse."""
    np.testing.assert_allclose(wilson(0.1, 100), (0.05523, 0.17437), atol=1e-4)
    assert wilson(0.0, 20)[0] == pytest.approx(0.0)
    assert wilson(0.0, 20)[1] == pytest.approx(0.1611, abs=1e-3)
    assert wilson(1.0, 20)[0] == pytest.approx(1 - 0.1611, abs=1e-3)


@pytest.mark.slow
def test_a_model_of_minutes_beats_chance(tmp_path: Path) -> None:
    """0.38 million parameters and 300 steps: more than 0.4 above drawing from all moves that match."""
    out = tmp_path / "data"
    assert execute(["trig", "data", f"out={out}", "train=3000", "test=60"]) == 0
    places = [f"data.files=[{out / 'train.jsonl'}]", f"data.tokenizer={out / 'tokenizer.json'}", "run.name=slow"]
    places += [f"data.cache_dir={tmp_path / 'cache'}", f"run.dir={tmp_path / 'runs'}", "mesh=single"]
    size = ["scale=demo", "method=dense", "model.num_layers=4", "model.hidden_size=96", "model.ffn_size=192"]
    length = ["model.vocab_size=256", "data.sequence_length=192", "train.steps=300", "train.eval_every=0"]
    rows = ["train.batch_size=16", "train.microbatch_size=16", "loss.switch_group_sequences=16"]
    assert loop.train(compose_config(["data=trig_rewrite", *size, *length, *rows, *places])) == 0
    model, _ = open_model(EvalRequest(str(tmp_path / "runs" / "slow")))
    request = TrigEvalRequest(data=str(out))
    rates = {}
    for name in TESTS:
        found, chance = measure(request, model, name, read_problems(out / f"{name}.jsonl"), "greedy")
        rates[name] = (found.passed, chance.passed)
        print(name, found.passed, "random:", chance.passed)  # depth 2 and more, and other numbers, are for reading
    assert rates["depth_1"][0] > rates["depth_1"][1] + 0.4
