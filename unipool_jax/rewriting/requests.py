"""Settings of the commands `trig data` and `trig eval`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from unipool_jax.config.ranges import Range
from unipool_jax.config.words import Positional

SearchName = Literal["greedy", "samples", "best_first"]

_COUNT = Range(1, 10_000_000)
_SEED = Range(0, 2**32 - 1)


@dataclass(frozen=True, kw_only=True)
class TrigDataRequest:
    """Make trigonometric equations with proofs: text to train on, problems to solve, and their tokenizer.

    A proof has as many moves as its depth. The text has depths 1, 2 and 3; the problems also 4 and 5, and larger
    numbers. No problem is in the text.

        unipool trig data out=trig
        unipool trig data out=trig train=2000 test=100 seed=1
        unipool train data=trig_rewrite model.vocab_size=256
    """

    out: str
    """Folder to write: train.jsonl, one file of problems for each test, tokenizer.json."""
    train: Annotated[int, _COUNT] = 4000
    """Training problems of each depth; every move is a document."""
    test: Annotated[int, _COUNT] = 200
    """Problems of each test."""
    whole_proofs: bool = False
    """Add each training problem with all its moves as one more document."""
    seed: Annotated[int, _SEED] = 0
    """Of the random draws."""


@dataclass(frozen=True)
class TrigEvalRequest:
    """Let a model prove trigonometric equations, check every move, and count what it proves.

    Prints a table, with a policy that draws legal moves at random beside the model, and, last, one line of JSON.

        unipool trig eval runs/trig data=trig
        unipool trig eval runs/trig data=trig tests=[depth_1,depth_2] search=[samples,best_first] limit=50
    """

    run: Annotated[str, Positional()] = "latest"
    """Folder of a run, or `latest`, the run below runs/ that was saved to last."""
    step: Annotated[int | None, Range(0, 1_000_000_000)] = None
    """Which checkpoint of the run; null is the newest."""
    data: str = "trig"
    """Folder made by `unipool trig data`."""
    tests: tuple[str, ...] = ()
    """Which of its files, without their ending; none are all tests."""
    search: tuple[SearchName, ...] = ("greedy",)
    """How proofs are looked for: the most probable move each time (`greedy`); independent attempts at random
    (`samples`); the most probable of all states found so far next (`best_first`)."""
    limit: Annotated[int | None, _COUNT] = None
    """Problems of each test at most, the first ones; null is all."""
    samples: Annotated[int, Range(1, 1000)] = 8
    """Attempts for each problem (`samples`), or moves drawn at each state (`best_first`)."""
    expansions: Annotated[int, Range(1, 100_000)] = 32
    """States expanded for each problem at most (`best_first`)."""
    max_moves: Annotated[int, Range(1, 1000)] = 10
    """Moves of a proof at most (`greedy` and `samples`)."""
    max_tokens: Annotated[int, Range(4, 1000)] = 48
    """Words of a move at most."""
    temperature: Annotated[float, Range(0, 1e6, open_low=True)] = 1.0
    """Logits are divided by it (`samples` and `best_first`)."""
    seed: Annotated[int, _SEED] = 0
    """Of the random draws."""
