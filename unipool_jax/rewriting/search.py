"""Searches for a proof: one move after the other, many times at random, or the most probable state first.

A search is a generator. It yields the state for which it wants moves and is sent texts with their log-probabilities, so
that `run_searches` can ask a model about the states of many problems at once.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import NamedTuple, Protocol

from unipool_jax.rewriting.moves import IllegalMoveError, Move, State, apply, bound_moves, read_move
from unipool_jax.rewriting.numeric import holds, random_points

MAX_SIZE = 256
"""Operations and leaves of a state at most; a move that makes a larger one is not allowed."""


class Proposal(NamedTuple):
    """The text of a move and its log-probability."""

    text: str
    log_probability: float = 0.0


@dataclass
class Attempt:
    """What came of a search."""

    goal: State
    proof: list[Move] | None = None
    """None if none was found."""
    proposed: int = 0
    """Texts that were looked at."""
    legal: int = 0
    """Of them, moves that could be made."""
    _points: list[dict[str, Decimal]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._points = random_points(self.goal.text())

    def make(self, state: State, text: str) -> tuple[Move, State] | None:
        """The move of a text and the state after it; None, and counted, if it is illegal.

        Besides matching exactly, the equation after it must have values on both sides and be true at random points.
        """
        self.proposed += 1
        try:
            move = read_move(text)
            after = apply(state, move)
        except IllegalMoveError:
            return None
        if after.left.size + after.right.size > MAX_SIZE or not holds([after], self._points):
            return None
        self.legal += 1
        return move, after


Search = Generator[State, Sequence[Proposal], Attempt]


class Policy(Protocol):
    """What proposes moves."""

    def propose(self, states: Sequence[State], count: int) -> list[list[str]]:
        """At most `count` texts for each state."""

    def score(self, pairs: Sequence[tuple[State, str]]) -> list[float]:
        """Log-probability of each text after its state."""


class RandomPolicy:
    """Draws from the moves that match and leave nothing open, each as likely: what knowing the rules alone is worth."""

    def __init__(self, seed: int):
        self._rng = random.Random(seed)

    def propose(self, states: Sequence[State], count: int) -> list[list[str]]:
        """`count` moves for each state, with repetition."""
        return [[move.text() for move in self._rng.choices(self._moves(state), k=count)] for state in states]

    def score(self, pairs: Sequence[tuple[State, str]]) -> list[float]:
        """Minus the logarithm of the number of moves."""
        return [-math.log(len(self._moves(state))) for state, _ in pairs]

    def _moves(self, state: State) -> list[Move]:
        return [move for move, _ in bound_moves(state)]


def rollout(goal: State, most_moves: int) -> Search:
    """The first move proposed, again and again, until it is illegal or the equation is proved."""
    attempt, state, proof = Attempt(goal), goal, list[Move]()
    while len(proof) < most_moves:
        proposals = yield state
        made = attempt.make(state, proposals[0].text) if proposals else None
        if made is None:
            break
        proof.append(made[0])
        state = made[1]
        if state.solved:
            attempt.proof = proof
            break
    return attempt


def best_first(goal: State, expansions: int) -> Search:
    """Expand the state with the highest sum of log-probabilities next, until one is solved.

    Args:
      goal: the equation.
      expansions: states expanded at most.
    """
    attempt, seen = Attempt(goal), {goal}
    queue: list[tuple[float, int, State, list[Move]]] = [(0.0, 0, goal, [])]
    for _ in range(expansions):
        if not queue:
            break
        cost, _, state, proof = heapq.heappop(queue)
        for text, log_probability in (yield state):
            made = attempt.make(state, text)
            if made is None or made[1] in seen:
                continue
            move, after = made
            if after.solved:
                attempt.proof = [*proof, move]
                return attempt
            seen.add(after)
            heapq.heappush(queue, (cost - log_probability, len(seen), after, [*proof, move]))
    return attempt


def breadth_first(goal: State, most_moves: int) -> list[Move] | None:
    """A shortest proof with moves that leave nothing open, or None if none has at most `most_moves`."""
    level: list[tuple[State, list[Move]]] = [(goal, [])]
    seen = {goal}
    for _ in range(most_moves):
        following = []
        for state, proof in level:
            for move, after in bound_moves(state):
                if after.solved:
                    return [*proof, move]
                if after not in seen:
                    seen.add(after)
                    following.append((after, [*proof, move]))
        level = following
    return None


def run_searches(
    searches: Sequence[Search],
    policy: Policy,
    count: int,
    scored: bool,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Attempt]:
    """Run searches side by side.

    Args:
      searches: not begun.
      policy: that proposes moves.
      count: texts asked for at each state.
      scored: whether log-probabilities are needed; equal texts are then given once.
      progress: is told how many searches have ended after each round.

    Returns:
      What came of each, in order.
    """
    ended: dict[int, Attempt] = {}
    waiting: dict[int, State] = {}

    def resume(number: int, proposals: Sequence[Proposal] | None) -> None:
        try:
            search = searches[number]
            waiting[number] = next(search) if proposals is None else search.send(proposals)
        except StopIteration as end:
            ended[number] = end.value
            waiting.pop(number, None)

    for number in range(len(searches)):
        resume(number, None)
    while waiting:
        numbers, states = list(waiting), list(waiting.values())
        texts = policy.propose(states, count)
        if scored:
            texts = [list(dict.fromkeys(found)) for found in texts]
            scores = iter(
                policy.score([(state, text) for state, found in zip(states, texts, strict=True) for text in found])
            )
            answers = [[Proposal(text, next(scores)) for text in found] for found in texts]
        else:
            answers = [[Proposal(text) for text in found] for found in texts]
        for number, proposals in zip(numbers, answers, strict=True):
            resume(number, proposals)
        progress(len(ended))
    return [ended[number] for number in range(len(searches))]


def pass_at_k(samples: int, solved: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k samples solves a problem (arXiv 2107.03374, section 2.1).

    Args:
      samples: n that were drawn.
      solved: c of them that solved it.
      k: at most n.
    """
    if samples - solved < k:
        return 1.0
    return 1.0 - math.comb(samples - solved, k) / math.comb(samples, k)
