"""One of N answers to a problem: scores from the steps and from a reward model, and how good the choice is.

Formulas are those of Safe (arXiv 2506.04592). An answer is chosen from scores of any sign, among equals the first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

Rule = Literal["geometric", "weighted", "sum", "product", "min", "max"]
RULES: tuple[Rule, ...] = get_args(Rule)


class Candidate(NamedTuple):
    """An answer to a problem."""

    answer: str | None
    """As it is compared; None if there is none."""
    correct: bool
    retro: float
    """Probability of being right, from the states of its steps."""
    pro: float
    """What a reward model says of it; a probability, where it is fused by `geometric`."""


def fuse(retro: float, pro: float, alpha: float, rule: Rule = "geometric") -> float:
    """A score from both judgements.

    Args:
      retro: probability from the steps.
      pro: from the reward model.
      alpha: weight of the steps, 0 to 1; of `geometric` (`retro^alpha pro^(1-alpha)`) and `weighted` (their mean).
      rule: how they are fused.

    Raises:
      ValueError: `geometric` with a negative reward that is not taken as it is (alpha 0) or left out (alpha 1).
    """
    if rule == "geometric":
        if pro < 0 and 0 < alpha < 1:
            raise ValueError(
                f"a reward of {pro}: fused by geometric it must be a probability; use weighted, or a sigmoid"
            )
        return retro if alpha == 1 else pro if alpha == 0 else retro**alpha * pro ** (1 - alpha)
    others: dict[Rule, Callable[[], float]] = {
        "weighted": lambda: alpha * retro + (1 - alpha) * pro,
        "sum": lambda: retro + pro,
        "product": lambda: retro * pro,
        "min": lambda: min(retro, pro),
        "max": lambda: max(retro, pro),
    }
    return others[rule]()


def pick(scores: Sequence[float]) -> int:
    """The position of the highest score, among equals the first; a score that is not a number is never higher."""
    best, chosen = -math.inf, 0
    for position, score in enumerate(scores):
        if score > best:
            best, chosen = score, position
    return chosen


def plurality(answers: Sequence[str | None]) -> int | None:
    """The position of the first answer that is given most often, among equals the first; None without an answer."""
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return None
    most = max(counts.values())
    return next(place for place, answer in enumerate(answers) if answer is not None and counts[answer] == most)


class Selection(NamedTuple):
    """Shares of problems."""

    problems: int
    mean: float
    """Right answers among all: what one sample is worth."""
    plurality: float
    """The answer given most often is right."""
    half_correct: float
    """At least half of the answers are right; published as "Majority@N", which it is not."""
    any_correct: float
    """Some answer is right; nothing that chooses does better."""
    picked: float
    """The chosen answer is right."""


def select(problems: Sequence[Sequence[Candidate]], alpha: float, rule: Rule = "geometric") -> Selection:
    """What choosing by the fused score is worth, beside what it must beat.

    Args:
      problems: the answers to each; at least one each.
      alpha: weight of the steps.
      rule: how both judgements are fused.
    """

    def share(right: Callable[[Sequence[Candidate]], float]) -> float:
        return sum(right(one) for one in problems) / len(problems)

    def by_plurality(one: Sequence[Candidate]) -> float:
        place = plurality([candidate.answer for candidate in one])
        return 0.0 if place is None else float(one[place].correct)

    def correct(one: Sequence[Candidate]) -> float:
        return sum(candidate.correct for candidate in one) / len(one)

    return Selection(
        len(problems),
        share(correct),
        share(by_plurality),
        share(lambda one: float(correct(one) >= 0.5)),
        share(lambda one: float(correct(one) > 0)),
        share(lambda one: float(one[pick([fuse(c.retro, c.pro, alpha, rule) for c in one])].correct)),
    )


ALPHAS = tuple(round(0.05 * step, 2) for step in range(21))
"""Weights that are tried."""


def tune(problems: Sequence[Sequence[Candidate]], rule: Rule = "geometric") -> tuple[float, dict[float, float]]:
    """The first weight that picks most right answers, and what each of `ALPHAS` picks.

    The problems must be others than those of which a result is reported.
    """
    curve = {alpha: select(problems, alpha, rule).picked for alpha in ALPHAS}
    return max(curve, key=lambda alpha: curve[alpha]), curve
