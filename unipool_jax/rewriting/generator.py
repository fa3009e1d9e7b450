"""Problems with known proofs: an instance of a rule, rewritten so many times, to be undone.

Difficulty is a dial: the number of moves of the proof. So is the range of numbers. A draw is thrown away unless

- both sides of every equation of its proof have values, equal to 40 digits, at random points, which also shows that
  its side conditions do not contradict each other (no vacuous and no false problem);
- its recorded proof replays move by move;
- no shorter proof is found (`moves.has_shorter_proof`);
- its statement is new, sides and names of variables exchanged or not.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

from unipool_jax.config.errors import UserError
from unipool_jax.rewriting.moves import Binding, IllegalMoveError, Move, State, apply, has_shorter_proof, match
from unipool_jax.rewriting.numeric import conditions, holds, random_points
from unipool_jax.rewriting.rules import RULES, Rule
from unipool_jax.rewriting.terms import Term, number, parse

DRAWS = 200
"""Rules drawn for one problem at most."""
_PATIENCE = 2_000
"""Problems thrown away in a row before giving up."""


def _both_signs(*angles: str) -> tuple[Term, ...]:
    return tuple(parse(text) for angle in angles for text in (angle, f"-({angle})"))


ANGLES = _both_signs("2*pi", "pi", "pi/2", "pi/3", "pi/6")
MORE_ANGLES = _both_signs("pi/4", "pi/5", "pi/7", "pi/8", "pi/9")
"""Angles of problems with other numbers."""
ORDINARY_NUMBER = 99
"""Largest K of ordinary problems."""
_NEW_ANGLES = tuple(parse(f"pi/{n}") for n in (5, 7, 8, 9))
_X, _Y = Term("x"), Term("y")


@dataclass(frozen=True)
class Dials:
    """How hard problems are."""

    depth: int
    """Moves of the recorded proof, 1 or more."""
    max_number: int = ORDINARY_NUMBER
    """Largest K."""
    shifted: bool = False
    """Whether angles are drawn from `MORE_ANGLES` too, and only problems kept with a number that ordinary ones lack."""
    max_size: int = 64
    """Operations and leaves of both sides together, at every step of the proof."""

    def angles(self) -> tuple[Term, ...]:
        """Angles that X and Y are made of."""
        return ANGLES + MORE_ANGLES if self.shifted else ANGLES


class Problem(NamedTuple):
    """An equation and a proof of it."""

    goal: State
    proof: tuple[Move, ...]

    def states(self) -> list[State]:
        """The goal and what each move makes of it; raises IllegalMoveError if the proof does not replay."""
        states = [self.goal]
        for move in self.proof:
            states.append(apply(states[-1], move))
        return states

    def hypotheses(self) -> list[Term]:
        """What must not be zero for all equations of the proof to have values, each once, numbers left out."""
        found = (term for state in self.states() for side in state for term in conditions(side))
        return list(dict.fromkeys(term for term in found if term.leaves() & {"x", "y"}))


def statement(state: State) -> tuple[str, str]:
    """What makes two equations the same: the sides in either order, under either naming of the variables."""
    named = [state, State(*(side.substituted({"x": _Y, "y": _X}) for side in state))]
    first, second = min(sorted(side.text for side in one) for one in named)
    return first, second


def problems(
    dials: Dials,
    count: int,
    seed: int | str,
    seen: set[tuple[str, str]],
    avoided: Set[tuple[str, str]] = frozenset(),
) -> Iterator[Problem]:
    """Problems, the same for the same arguments.

    Args:
      dials: how hard they are.
      count: how many.
      seed: of the random draws.
      seen: statements that are taken already, to which those of these problems are added.
      avoided: statements that no equation of a proof may be.

    Raises:
      UserError: too many draws in a row gave nothing new.
    """
    rng = random.Random(f"{seed} {dials}")
    for made in range(count):
        for _ in range(_PATIENCE):
            problem = draw(dials, rng)
            if problem is None or (new := statement(problem.goal)) in seen:
                continue
            if avoided and any(statement(state) in avoided for state in problem.states()):
                continue
            seen.add(new)
            yield problem
            break
        else:
            raise UserError(f"{count} problems of depth {dials.depth}: no new one found after {made:,}; ask for fewer")


def draw(dials: Dials, rng: random.Random) -> Problem | None:
    """One problem, or None if it would be trivial, too large, vacuous, false, or its proof does not replay."""
    rule = rng.choice(list(RULES.values()))
    terms = _terms(rule.placeholders(), dials, rng)
    state = State(rule.left.substituted(terms), rule.right.substituted(terms))
    forward = not rule.unbound(True)
    undo = [Move(rule.name, forward, 0 if forward else 1)]
    states = [state]
    for _ in range(DRAWS):
        if len(undo) == dials.depth:
            break
        made = _rewrite(state, rng.choice(list(RULES.values())), dials, rng)
        if made is not None:
            state, move = made
            undo.append(move)
            states.append(state)
    problem = Problem(state, tuple(reversed(undo)))
    return problem if len(undo) == dials.depth and is_good(problem, states[::-1], dials) else None


def _terms(names: Sequence[str], dials: Dials, rng: random.Random) -> Binding:
    """Terms for placeholders; X and Y differ."""
    found: Binding = {}
    for name in names:
        if name == "K":
            found[name] = number(rng.randint(0, dials.max_number))
            continue
        while (term := _angle(dials, rng)) in found.values():
            pass
        found[name] = term
    return found


def _angle(dials: Dials, rng: random.Random) -> Term:
    """A constant, a variable up to nine times, or the sum of both, each as often."""
    constant, variable, times = rng.choice(dials.angles()), rng.choice((_X, _Y)), rng.randint(1, 9)
    if times > 1:
        variable = Term("*", number(times), variable)
    return rng.choice((constant, variable, Term("+", variable, constant)))


def _rewrite(state: State, rule: Rule, dials: Dials, rng: random.Random) -> tuple[State, Move] | None:
    """A rule applied left to right at a random place, and the move that undoes it; None if it fits nowhere."""
    side = rng.randrange(2)
    places = [path for path, term in state[side].paths() if next(match(rule.left, term, {}), None) is not None]
    if not places:
        return None
    path = rng.choice(places)
    binding = next(match(rule.left, state[side].at(path), {}))
    fresh = _terms(rule.unbound(True), dials, rng)
    new, there = state[side].replaced(path, rule.right.substituted(binding | fresh))
    after = State(new, state.right) if side == 0 else State(state.left, new)
    open_terms = tuple((name, binding[name]) for name in rule.unbound(False))
    return after, Move(rule.name, False, side, there, open_terms)


def _is_new(term: Term) -> bool:
    """Whether no ordinary problem has this number or angle; pi/4 is in the rules."""
    return term in _NEW_ANGLES or (term.is_number and int(term.op) > ORDINARY_NUMBER)


def is_good(problem: Problem, states: list[State], dials: Dials) -> bool:
    """Whether a drawn problem is kept.

    Args:
      problem: the problem.
      states: of its proof without the last, as they were made.
      dials: how hard it should be.
    """
    if dials.shifted and not any(_is_new(term) for side in problem.goal for _, term in side.paths()):
        return False
    if any(state.solved or state.left.size + state.right.size > dials.max_size for state in states):
        return False
    try:
        replayed = problem.states()
    except IllegalMoveError:
        return False
    if replayed[:-1] != states or not replayed[-1].solved:
        return False
    return holds(replayed, random_points(problem.goal.text())) and not has_shorter_proof(problem.goal, dials.depth - 1)
