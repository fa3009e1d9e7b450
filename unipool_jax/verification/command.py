"""`unipool steps check`, `steps train` and `steps select`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unipool_jax.config.errors import UserError
from unipool_jax.config.files import check_fields, read_lines, write_text
from unipool_jax.verification.aggregator import (
    Traces,
    Training,
    load_aggregator,
    pad,
    probabilities,
    save_aggregator,
    train_aggregator,
)
from unipool_jax.verification.checking import check_steps
from unipool_jax.verification.provers import PROVERS
from unipool_jax.verification.requests import AggregatorRequest, CheckRequest, SelectRequest
from unipool_jax.verification.selection import Candidate, select, tune
from unipool_jax.verification.states import StepState

_ANSWER = {"problem": str, "steps": list, "answer": str | None, "correct": bool}
_CHECKED = {**_ANSWER, "states": list}
_ADVICE = "what a line must have: unipool steps check --help"


def read_answers(path: Path, checked: bool, reward: bool = False) -> list[dict[str, Any]]:
    """Lines of a file of answers.

    Args:
      path: the file.
      checked: whether it must have the states of steps.
      reward: whether it must have rewards.

    Raises:
      FileError: it cannot be read, or a line lacks something.
      UserError: there are none.
    """
    found = []
    for number, line in enumerate(read_lines(path, _CHECKED if checked else _ANSWER, _ADVICE), 1):
        if line.problem is not None:
            raise line.problem
        if reward:
            check_fields(line.record, f"{path} line {number}", {"reward": float}, _ADVICE)
        if checked and not all(state in set(StepState) for state in line.record["states"]):
            raise UserError(
                f"{path} line {number}: {line.record['states']} are no states; write the file with unipool steps check"
            )
        found.append(line.record)
    if not found:
        raise UserError(f"{path}: no answers; {_ADVICE}")
    return found


def check_command(request: CheckRequest) -> int:
    """Prove steps, write what became of them and print how often; raises UserError, as for a prover not here."""
    prover = PROVERS[request.prover]
    if (why := prover.unavailable()) is not None:
        raise UserError(why)
    lines, counts, vacuous = [], Counter[StepState](), 0
    for answer in read_answers(Path(request.answers), checked=False):
        steps = check_steps([str(step) for step in answer["steps"]], prover, request.seconds)
        counts.update(step.state for step in steps)
        vacuous += sum(step.vacuous for step in steps)
        judged = {"states": [int(step.state) for step in steps], "evidence": [step.reason for step in steps]}
        lines.append(json.dumps(answer | judged, ensure_ascii=False))
    write_text(Path(request.out), "".join(f"{line}\n" for line in lines))
    for state in StepState:
        print(f"{state.name.lower()}: {counts[state]:,}")
    print(f"vacuous, counted as proof_failed: {vacuous:,}")
    return 0


def train_command(request: AggregatorRequest) -> int:
    """Train an aggregator; raises UserError."""
    answers = read_answers(Path(request.answers), checked=True)
    problems = {name: number for number, name in enumerate(dict.fromkeys(one["problem"] for one in answers))}
    traces = Traces(
        *pad([one["states"] for one in answers]),
        np.array([one["correct"] for one in answers]),
        np.array([problems[one["problem"]] for one in answers]),
    )
    how = Training(learning_rate=request.learning_rate, epochs=request.epochs, seed=request.seed)
    trained = train_aggregator(traces, how)
    save_aggregator(Path(request.out), trained)
    print(f"{request.out}: balanced accuracy {trained.accuracy:.3f} on problems held out, after epoch {trained.epoch}")
    return 0


def select_command(request: SelectRequest) -> int:
    """Choose answers, print what that is worth and, last, one line of JSON; raises UserError."""
    problems = candidates(read_answers(Path(request.answers), True, reward=True), Path(request.aggregator))
    rewards = [one.pro for answers in problems for one in answers]
    if request.rule == "geometric" and not all(0 <= reward <= 1 for reward in rewards):
        raise UserError(
            f"rule=geometric: a reward of {min(rewards)} to {max(rewards)} is no probability; use rule=weighted"
        )
    alpha, curve = request.alpha, dict[float, float]()
    if alpha is None and request.rule in ("geometric", "weighted"):
        if len(problems) < 2:
            raise UserError(
                "alpha=null: the weight is chosen on other problems than those reported; give alpha, or more"
            )
        alpha, curve = tune(problems[::2], request.rule)
        problems = problems[1::2]
        print(f"alpha={alpha:g}, chosen on other problems")
    found = select(problems, alpha or 0.0, request.rule)
    for name, share in found._asdict().items():
        print(f"{name.replace('_', ' ')}: {share if name == 'problems' else format(share, '.3f')}")
    print(json.dumps({"alpha": alpha, "rule": request.rule, "tuning": curve, **found._asdict()}))
    return 0


def candidates(answers: Sequence[dict[str, Any]], aggregator: Path) -> list[list[Candidate]]:
    """The answers to each problem, judged by the aggregator in a file."""
    retro = probabilities(load_aggregator(aggregator), [one["states"] for one in answers])
    found: dict[str, list[Candidate]] = {}
    for one, probability in zip(answers, retro, strict=True):
        judged = Candidate(one["answer"], one["correct"], probability, float(one["reward"]))
        found.setdefault(one["problem"], []).append(judged)
    return list(found.values())
