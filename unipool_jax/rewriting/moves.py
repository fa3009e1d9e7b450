"""Moves: a rule applied at a place of an equation, as text, by exact matching, and all that are possible."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from unipool_jax.rewriting.rules import RULES, Rule
from unipool_jax.rewriting.terms import COMMUTATIVE, PLACEHOLDERS, Path, Term, read_prefix

DIRECTIONS = ("backward", "forward")
SIDES = ("left", "right")
PATH_WORDS = ("first", "second")
GOAL, STEP, EQUALS = "GOAL", "STEP", "="


class IllegalMoveError(ValueError):
    """A move that is no move, or cannot be made here."""


class State(NamedTuple):
    """An equation that is to be proved."""

    left: Term
    right: Term

    @property
    def solved(self) -> bool:
        """Whether both sides are the same term."""
        return self.left == self.right

    def text(self) -> str:
        """Its text, as a model reads it."""
        return f"{GOAL} {self.left} {EQUALS} {self.right}"


class Move(NamedTuple):
    """A rule, its direction, the place where it is applied, and terms for what the place does not determine."""

    rule: str
    forward: bool
    side: int
    path: Path = ()
    terms: tuple[tuple[str, Term], ...] = ()

    def text(self) -> str:
        """Its text, as a model writes it."""
        words = [self.rule, DIRECTIONS[self.forward], SIDES[self.side], *(PATH_WORDS[index] for index in self.path)]
        return " ".join(words + [f"{name} {EQUALS} {term}" for name, term in self.terms])


def read_state(text: str) -> State:
    """The state of a text; raises ValueError if it is none."""
    words = text.split()
    if words[:1] != [GOAL] or words.count(EQUALS) != 1:
        raise ValueError(f"{text}: not a goal")
    cut = words.index(EQUALS)
    return State(read_prefix(words[1:cut]), read_prefix(words[cut + 1 :]))


def read_move(text: str) -> Move:
    """The move of a text.

    Raises:
      IllegalMoveError: it is none.
    """
    words = text.split()
    if len(words) < 3 or words[0] not in RULES or words[1] not in DIRECTIONS or words[2] not in SIDES:
        raise IllegalMoveError(f"{text}: not a rule, a direction and a side")
    place = 3
    while place < len(words) and words[place] in PATH_WORDS:
        place += 1
    terms, starts = [], [index for index in range(place, len(words)) if words[index] in PLACEHOLDERS]
    if (starts or [len(words)])[0] != place:
        raise IllegalMoveError(f"{text}: {words[place]} stands where a place ends")
    for start, end in itertools.pairwise([*starts, len(words)]):
        if words[start + 1 : start + 2] != [EQUALS]:
            raise IllegalMoveError(f"{text}: no {EQUALS} after {words[start]}")
        try:
            terms.append((words[start], read_prefix(words[start + 2 : end])))
        except ValueError as error:
            raise IllegalMoveError(str(error)) from error
    if len(dict(terms)) < len(terms):
        raise IllegalMoveError(f"{text}: gives two terms for one placeholder")
    path = tuple(PATH_WORDS.index(word) for word in words[3:place])
    return Move(words[0], words[1] == DIRECTIONS[1], SIDES.index(words[2]), path, tuple(terms))


Binding = dict[str, Term]


def match(pattern: Term, term: Term, bound: Binding) -> Iterator[Binding]:
    """Every way in which `term` is `pattern` with terms for its placeholders, given some of them."""
    if pattern.op in PLACEHOLDERS:
        if pattern.op in bound:
            if bound[pattern.op] == term:
                yield bound
        elif pattern.op != "K" or term.is_number:
            yield bound | {pattern.op: term}
    elif pattern.op == term.op:
        yield from _match_all(pattern.args, term.args, bound)
        if pattern.op in COMMUTATIVE and term.args[0] != term.args[1]:
            yield from _match_all(pattern.args, term.args[::-1], bound)


def _match_all(patterns: tuple[Term, ...], terms: tuple[Term, ...], bound: Binding) -> Iterator[Binding]:
    if not patterns:
        yield bound
        return
    for found in match(patterns[0], terms[0], bound):
        yield from _match_all(patterns[1:], terms[1:], found)


def rewritten(rule: Rule, forward: bool, term: Term, terms: Binding) -> Term:
    """What a rule makes of a whole term: of several ways to match it, the first.

    Raises:
      IllegalMoveError: it does not match, or `terms` are not those that it leaves open.
    """
    old, new = rule.sides(forward)
    if sorted(terms) != sorted(rule.unbound(forward)) or not all(terms[k].is_number for k in terms if k == "K"):
        raise IllegalMoveError(f"{rule.name}: needs terms for {rule.unbound(forward)}, not {sorted(terms)}")
    found = next(match(old, term, {}), None)
    if found is None:
        raise IllegalMoveError(f"{rule.name}: {term} is not {old}")
    return new.substituted(found | terms)


def apply(state: State, move: Move) -> State:
    """The equation after a move; raises IllegalMoveError."""
    side = state[move.side]
    try:
        part = side.at(move.path)
    except IndexError as error:
        raise IllegalMoveError(f"{side} has no part at {move.path}") from error
    new, _ = side.replaced(move.path, rewritten(RULES[move.rule], move.forward, part, dict(move.terms)))
    return State(new, state.right) if move.side == 0 else State(state.left, new)


def _by_head() -> dict[str, list[tuple[Rule, bool]]]:
    """Rules and directions that leave nothing open, by the operation that they replace."""
    found: dict[str, list[tuple[Rule, bool]]] = {}
    for rule in RULES.values():
        for forward in (True, False):
            if not rule.unbound(forward):
                found.setdefault(rule.sides(forward)[0].op, []).append((rule, forward))
    return found


_BY_HEAD = _by_head()

Rewrite = tuple[str, bool, Path, Term]
"""Rule, direction, place, and the whole term afterwards."""


@functools.lru_cache(maxsize=1 << 16)
def rewrites(term: Term) -> tuple[Rewrite, ...]:
    """Every way to rewrite a term or a part of it in which nothing is left open."""
    found: list[Rewrite] = []
    for rule, forward in _BY_HEAD.get(term.op, ()):
        old, new = rule.sides(forward)
        binding = next(match(old, term, {}), None)
        if binding is not None:
            found.append((rule.name, forward, (), new.substituted(binding)))
    for index, child in enumerate(term.args):
        if index and child == term.args[0]:
            continue  # the same again
        for name, forward, path, part in rewrites(child):
            args = [part if place == index else arg for place, arg in enumerate(term.args)]
            found.append((name, forward, (index, *path), Term(term.op, *args)))
    return tuple(found)


def bound_moves(state: State) -> Iterator[tuple[Move, State]]:
    """Every move in which nothing is left open, and what it makes."""
    for side in (0, 1):
        for name, forward, path, new in rewrites(state[side]):
            after = State(new, state.right) if side == 0 else State(state.left, new)
            yield Move(name, forward, side, path), after


def reach(term: Term, moves: int) -> list[set[Term]]:
    """What a term becomes in exactly 0, 1, ..., `moves` moves in which nothing is left open, and not in fewer."""
    found = [{term}]
    seen = {term}
    for _ in range(moves):
        new = {after for before in found[-1] for *_, after in rewrites(before)} - seen
        seen |= new
        found.append(new)
    return found


def has_shorter_proof(state: State, moves: int, each_side: int = 2) -> bool:
    """Whether at most `moves` moves make the sides equal, with at most `each_side` on either side.

    Moves that leave terms open are not tried: what they make of one side, a move that leaves nothing open on the other
    side undoes, except where such a term comes and goes within the proof.
    """
    left, right = (reach(side, min(moves, each_side)) for side in state)
    return any(a & b for i, a in enumerate(left) for j, b in enumerate(right) if i + j <= moves)
