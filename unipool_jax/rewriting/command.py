"""`unipool trig data` and `unipool trig eval`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from unipool_jax.config.files import FileError
from unipool_jax.evaluation.requests import EvalRequest
from unipool_jax.evaluation.scoring import LanguageModel
from unipool_jax.evaluation.tasks_command import open_model
from unipool_jax.rewriting.generator import Problem
from unipool_jax.rewriting.policy import ModelPolicy
from unipool_jax.rewriting.requests import SearchName, TrigDataRequest, TrigEvalRequest
from unipool_jax.rewriting.search import (
    Attempt,
    Policy,
    RandomPolicy,
    best_first,
    pass_at_k,
    rollout,
    run_searches,
)
from unipool_jax.rewriting.text import TESTS, TOKENIZER, TRAIN, read_problems, write_data


class Result(NamedTuple):
    """What one search came to on one test."""

    test: str
    search: str
    policy: str
    problems: int
    passed: float
    """Share of problems proved; of `samples`, the unbiased estimate with as many attempts as were made."""
    low: float
    """95% Wilson interval of `passed`."""
    high: float
    first: float
    """Share that one attempt proves; pass@1."""
    legal: float
    """Share of proposed moves that could be made."""
    moves: float | None
    """Mean moves of the proofs found."""
    too_long: int
    """States that the model could not read."""


def data_command(request: TrigDataRequest) -> int:
    """Write the files; raises UserError where there are not that many problems."""
    counts = write_data(Path(request.out), request.train, request.test, request.seed, request.whole_proofs)
    for name, count in counts.items():
        print(f"{name}: {count:,}")
    out = Path(request.out)
    words = f"data.files=[{out / TRAIN}] data.tokenizer={out / TOKENIZER}"
    print(f"train on it: unipool train data=trig_rewrite {words} model.vocab_size=256")
    return 0


def eval_command(request: TrigEvalRequest) -> int:
    """Prove problems, print a table and, last, one line of JSON.

    Raises:
      FileError: no such problems.
      ConfigError, RunError, CheckpointError, DataError: with what to do about it.
    """
    folder = Path(request.data)
    names = request.tests or tuple(name for name in TESTS if (folder / f"{name}.jsonl").exists())
    if not names:
        raise FileError(f"data={folder}: no problems here; make them with unipool trig data out={folder}")
    tests = {name: read_problems(folder / f"{name}.jsonl", request.limit) for name in names}
    model, title = open_model(EvalRequest(request.run, step=request.step))
    results = [
        result
        for name, found in tests.items()
        for search in request.search
        for result in measure(request, model, name, found, search)
    ]
    print_results(results, title)
    print(json.dumps({"results": [result._asdict() for result in results]}))
    return 0


def measure(
    request: TrigEvalRequest, model: LanguageModel, name: str, problems: Sequence[Problem], search: SearchName
) -> list[Result]:
    """What the model, and a random policy, prove of some problems.

    Args:
      request: how.
      model: the checkpoint.
      name: of the test.
      problems: to prove.
      search: one of the request's.
    """
    temperature = 0.0 if search == "greedy" else request.temperature
    policies: dict[str, Policy] = {
        "model": ModelPolicy(model, request.max_tokens, temperature, request.seed),
        "random": RandomPolicy(request.seed),
    }
    found = []
    for title, policy in policies.items():
        attempts = search_all(policy, problems, search, request)
        too_long = policy.too_long if isinstance(policy, ModelPolicy) else 0
        found.append(summarize(name, search, title, attempts, too_long))
    return found


def search_all(
    policy: Policy, problems: Sequence[Problem], search: SearchName, request: TrigEvalRequest
) -> list[list[Attempt]]:
    """Every attempt at each problem."""
    goals = [problem.goal for problem in problems]
    if search == "best_first":
        searches = [best_first(goal, request.expansions) for goal in goals]
        return [[attempt] for attempt in run_searches(searches, policy, request.samples, scored=True)]
    each = request.samples if search == "samples" else 1
    attempts = run_searches(
        [rollout(goal, request.max_moves) for goal in goals for _ in range(each)], policy, 1, scored=False
    )
    return [attempts[first : first + each] for first in range(0, len(attempts), each)]


def summarize(test: str, search: str, policy: str, attempts: Sequence[Sequence[Attempt]], too_long: int = 0) -> Result:
    """Rates over problems.

    Args:
      test: its name.
      search: its name.
      policy: its name.
      attempts: of each problem, as many of each.
      too_long: states that the model could not read.
    """
    each = len(attempts[0])
    solved = [sum(attempt.proof is not None for attempt in one) for one in attempts]

    def rate(k: int) -> float:
        return sum(pass_at_k(each, count, k) for count in solved) / len(solved)

    proofs = [len(attempt.proof) for one in attempts for attempt in one if attempt.proof is not None]
    proposed = sum(attempt.proposed for one in attempts for attempt in one)
    legal = sum(attempt.legal for one in attempts for attempt in one)
    low, high = wilson(rate(each), len(solved))
    return Result(
        test,
        search,
        policy,
        len(solved),
        rate(each),
        low,
        high,
        rate(1),
        legal / proposed if proposed else math.nan,
        sum(proofs) / len(proofs) if proofs else None,
        too_long,
    )


def wilson(rate: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% interval of a rate over `count` independent trials (Wilson, 1927)."""
    center = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return center - half, center + half


def print_results(results: Sequence[Result], title: str) -> None:
    """A table with a row for each test, search and policy."""
    columns: dict[str, Callable[[Result], str]] = {
        "test": lambda r: r.test,
        "search": lambda r: r.search,
        "policy": lambda r: r.policy,
        "problems": lambda r: str(r.problems),
        "proved": lambda r: f"{r.passed:.3f}",
        "95%": lambda r: f"{r.low:.3f}-{r.high:.3f}",
        "one attempt": lambda r: f"{r.first:.3f}",
        "legal": lambda r: f"{r.legal:.3f}",
        "moves": lambda r: "-" if r.moves is None else f"{r.moves:.1f}",
    }
    print(title)
    table = Table()
    for column in columns:
        table.add_column(column)
    for result in results:
        table.add_row(*(cell(result) for cell in columns.values()))
    Console(width=None if Console().is_terminal else 120).print(table)
