"""Problems as text: what a model is trained on, its vocabulary, and the files of a data set."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from unipool_jax.config.files import FileError, read_lines, write_json, write_text
from unipool_jax.rewriting.generator import Dials, Problem, problems, statement
from unipool_jax.rewriting.moves import (
    DIRECTIONS,
    EQUALS,
    GOAL,
    PATH_WORDS,
    SIDES,
    STEP,
    IllegalMoveError,
    State,
    read_move,
    read_state,
)
from unipool_jax.rewriting.rules import RULES
from unipool_jax.rewriting.terms import ARITY, LEAVES, NUMBER, PLACEHOLDERS, infix

TRAIN_DEPTHS = (1, 2, 3)
SHIFTED_NUMBER = 999
TESTS = {
    **{f"depth_{depth}": Dials(depth) for depth in (1, 2, 3, 4, 5)},
    **{f"numbers_{depth}": Dials(depth, SHIFTED_NUMBER, shifted=True) for depth in TRAIN_DEPTHS},
}
"""Problems to solve; of depth 4 and 5, and with other numbers, none are in the training text."""
TRAIN, TOKENIZER = "train.jsonl", "tokenizer.json"
UNKNOWN, END = "<unk>", "<|endoftext|>"


def vocabulary() -> list[str]:
    """Every word of a text, in the order of their ids; the last ends a document."""
    digits = list("0123456789")
    grammar = [GOAL, STEP, EQUALS, *DIRECTIONS, *SIDES, *PATH_WORDS]
    return [UNKNOWN, *grammar, *ARITY, *LEAVES, NUMBER, *digits, *PLACEHOLDERS, *RULES, END]


def tokenizer_definition() -> dict[str, Any]:
    """A tokenizer.json whose tokens are the words."""
    words = {word: index for index, word in enumerate(vocabulary())}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": words[END], "content": END, **flags}],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": UNKNOWN},
    }


def prompt(state: State) -> str:
    """What a model goes on with the text of a move."""
    return f"{state.text()} {STEP}"


def documents(problem: Problem) -> Iterator[str]:
    """One text for each move: the state before it and the move."""
    for state, move in zip(problem.states(), problem.proof, strict=False):
        yield f"{prompt(state)} {move.text()}"


def whole_proof(problem: Problem) -> str:
    """One text: the goal and all moves."""
    return " ".join([problem.goal.text(), *(f"{STEP} {move.text()}" for move in problem.proof)])


def write_data(out: Path, train: int, test: int, seed: int, whole_proofs: bool) -> dict[str, int]:
    """Write the training text, the problems to solve and the tokenizer into a folder.

    The problems to solve are made first. No equation in the training text, the later ones of proofs included, is one of
    them; an instance of a rule without X, Y or K, of which there is one only, is therefore no problem to solve.

    Args:
      out: the folder.
      train: training problems of each depth in `TRAIN_DEPTHS`.
      test: problems of each of `TESTS`.
      seed: of the random draws.
      whole_proofs: whether each training problem is also there as one text with all its moves.

    Returns:
      Number of problems of each test, and of training documents.
    """
    seen = {statement(State(rule.left, rule.right)) for rule in RULES.values() if not rule.placeholders()}
    single, counts = set(seen), {}
    for name, dials in TESTS.items():
        found = list(problems(dials, test, f"{seed} {name}", seen))
        write_text(out / f"{name}.jsonl", _lines(as_json(problem) for problem in found))
        counts[name] = len(found)
    lines: list[str] = []
    tests, seen = seen - single, set()
    for depth in TRAIN_DEPTHS:
        for problem in problems(Dials(depth), train, f"{seed} train", seen, tests):
            lines += documents(problem)
            lines += [whole_proof(problem)] if whole_proofs else []
    random.Random(f"{seed} order").shuffle(lines)
    write_text(out / TRAIN, _lines({"text": line} for line in lines))
    write_json(out / TOKENIZER, tokenizer_definition(), indent=1)
    return counts | {"training documents": len(lines)}


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def as_json(problem: Problem) -> dict[str, Any]:
    """A problem for a file; `equation` and `nonzero` are for people."""
    return {
        "goal": problem.goal.text(),
        "proof": [move.text() for move in problem.proof],
        "equation": " = ".join(map(infix, problem.goal)),
        "nonzero": [infix(term) for term in problem.hypotheses()],
    }


def read_problems(path: Path, limit: int | None = None) -> list[Problem]:
    """Problems of a file, the first `limit`, whose proofs are replayed.

    Raises:
      FileError: no such file, or a line that is no problem with a proof.
    """
    advice = "make problems with unipool trig data"
    found = []
    for number, line in enumerate(itertools.islice(read_lines(path, {"goal": str, "proof": list}, advice), limit), 1):
        if line.problem is not None:
            raise line.problem
        try:
            moves = tuple(read_move(str(text)) for text in line.record["proof"])
            problem = Problem(read_state(line.record["goal"]), moves)
            if not problem.states()[-1].solved:
                raise IllegalMoveError("the proof ends before the sides are equal")
        except ValueError as error:
            raise FileError(f"{path} line {number}: not a problem with a proof ({error}); {advice}") from error
        found.append(problem)
    return found
