"""From the steps of an answer to their states."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from unipool_jax.verification.claims import ClaimError, claim_of_step
from unipool_jax.verification.states import Outcome, Prover, StepState, Verdict, step_state

_NUMBER = re.compile(r"\d")


class CheckedStep(NamedTuple):
    """A step and what became of it."""

    text: str
    state: StepState
    outcome: Outcome | None
    """None where no prover was asked."""
    reason: str

    @property
    def vacuous(self) -> bool:
        """Whether its hypotheses contradict each other."""
        return self.outcome is not None and self.outcome.verdict is Verdict.VACUOUS


def check_step(text: str, prover: Prover, seconds: float) -> CheckedStep:
    """Judge one step. One with numbers in it is always checked: without a claim, it is FORMAL_FAILED."""
    try:
        claim = claim_of_step(text)
    except ClaimError as error:
        return CheckedStep(text, StepState.FORMAL_FAILED, None, str(error))
    if claim is None:
        if _NUMBER.search(text):
            return CheckedStep(text, StepState.FORMAL_FAILED, None, "numbers, and no claim about them")
        return CheckedStep(text, StepState.NOT_NEEDED, None, "no claim")
    outcome = prover.prove(claim, seconds)
    return CheckedStep(text, step_state(outcome), outcome, f"{outcome.verdict.value}: {outcome.evidence}")


def check_steps(steps: Sequence[str], prover: Prover, seconds: float) -> list[CheckedStep]:
    """Judge every step of an answer."""
    return [check_step(step, prover, seconds) for step in steps]
