"""What became of a step, and what a prover says of a claim.

The design is that of Safe (arXiv 2506.04592): every step of an answer becomes a claim, a prover judges it, and one of
four states is left. Evidence of a solver such as z3 is no proof in Lean.
"""

from __future__ import annotations

import enum
from typing import NamedTuple, Protocol

from unipool_jax.verification.claims import Claim


class StepState(enum.IntEnum):
    """What became of a step; the numbers are the positions in its one-hot vector."""

    PROOF_FAILED = 0
    PROOF_OK = 1
    NOT_NEEDED = 2
    FORMAL_FAILED = 3


class Verdict(enum.Enum):
    """What a prover says."""

    PROVED = "proved"
    """The goal follows from the hypotheses, which do not contradict each other; the proof is complete."""
    REFUTED = "refuted"
    """There is a counterexample."""
    UNKNOWN = "unknown"
    """Neither was found, in time or at all, or the proof is incomplete."""
    VACUOUS = "vacuous"
    """The hypotheses contradict each other: everything follows from them, and nothing was shown."""
    ERROR = "error"
    """The prover failed or is not there."""


class Outcome(NamedTuple):
    """The answer of a prover."""

    verdict: Verdict
    evidence: str
    """A counterexample, the output of the prover, or why it failed."""
    seconds: float


class Prover(Protocol):
    """A back end."""

    name: str

    def unavailable(self) -> str | None:
        """Why it cannot be used here, and what to do; None if it can."""

    def prove(self, claim: Claim, seconds: float) -> Outcome:
        """Judge a claim within a time limit."""


def step_state(outcome: Outcome) -> StepState:
    """The state of a step whose claim was judged; only a complete proof counts."""
    return StepState.PROOF_OK if outcome.verdict is Verdict.PROVED else StepState.PROOF_FAILED
