"""Claims and provers: what is proved is true, nothing follows from a contradiction, and an incomplete proof is none."""

from __future__ import annotations

import random
import shutil
from fractions import Fraction
from pathlib import Path

import pytest

from unipool_jax.verification.checking import check_step, check_steps
from unipool_jax.verification.claims import ClaimError, claim_of_step, parse_claim
from unipool_jax.verification.provers import PROVERS, CoqProver, LeanProver, Z3Prover, coq_script, is_complete
from unipool_jax.verification.selection import Candidate, select
from unipool_jax.verification.states import Outcome, StepState, Verdict, step_state

Z3 = Z3Prover()
SECONDS = 5.0


def verdict(text: str, seconds: float = SECONDS) -> Verdict:
    return Z3.prove(parse_claim(text), seconds).verdict


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("show 17*23 = 391", Verdict.PROVED),
        ("show 0.1 + 0.2 = 0.3", Verdict.PROVED),
        ("show 7/2 = 3.5", Verdict.PROVED),
        ("show -2**2 = -4", Verdict.PROVED),
        ("given 2*x + 1 = 7 show x = 3", Verdict.PROVED),
        ("given 2*x + 1 = 7 show x = 4", Verdict.REFUTED),
        ("given x**2 = 4, x > 0 show x = 2", Verdict.PROVED),
        ("given x**2 = 4 show x = 2", Verdict.REFUTED),
        ("given integer n, n > 3 show n >= 4", Verdict.PROVED),
        ("given n > 3 show n >= 4", Verdict.REFUTED),
        ("given integer n show (n**2 + n) % 2 = 0", Verdict.PROVED),
        ("given x != 0 show x/x = 1", Verdict.PROVED),
        ("show x/x = 1", Verdict.REFUTED),  # x may be zero
        ("given x = 2 show 1/(x - 2) = 1/(x - 2)", Verdict.REFUTED),
        ("given x > 0, x < 0 show 1 = 1", Verdict.VACUOUS),
        ("given x > 0, x < 0 show x = 7", Verdict.VACUOUS),
        ("given 1/(x - x) = y show y = 3", Verdict.VACUOUS),
        ("given 0 = 1 show 1 = 1", Verdict.VACUOUS),
    ],
)
def test_verdicts(text: str, expected: Verdict) -> None:
    outcome = Z3.prove(parse_claim(text), SECONDS)
    assert outcome.verdict is expected, outcome
    assert outcome.evidence
    assert outcome.seconds < SECONDS


def test_what_takes_too_long_is_unknown() -> None:
    text = "given integer x, integer y, integer z, x > 0, y > 0, z > 0 show x**3 + y**3 != z**3"
    assert verdict(text, 0.05) is Verdict.UNKNOWN


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x = 3",
        "show",
        "show x",
        "show 1 < x < 3",
        "prove x = 3",
        "given x show y = 1",
        "given x = 1 x = 2 show x = 1",
        "show f(x) = 1",
        "show x**y = 1",
        "show x**99 = 1",
        "show x % 2 = 0",
        "given integer n show (n/2) % 2 = 0",
        "show __import__('os') = 1",
        "show 1e400 = 1",
        "show x = True",
        "show x = 'False'",
        "show " + "(" * 300 + "1" + ")" * 300 + " = 1",
        "show 1" + " + 1" * 900 + " = 1",
    ],
)
def test_a_text_that_states_no_claim(text: str) -> None:
    with pytest.raises(ClaimError):
        parse_claim(text)


@pytest.mark.parametrize(
    ("step", "state"),
    [
        ("Divide by two. [[given 2*x = 6 show x = 3]]", StepState.PROOF_OK),
        ("Divide by two. [[given 2*x = 6 show x = 4]]", StepState.PROOF_FAILED),
        ("So anything. [[given x = 1, x = 2 show x = 3]]", StepState.PROOF_FAILED),
        ("Let us think. [[no claim]]", StepState.NOT_NEEDED),
        ("This is False. [[no claim]]", StepState.NOT_NEEDED),
        ("False as it sounds: [[show 1 + 1 = 2]]", StepState.PROOF_OK),  # the word decides nothing
        ("There are 12 apples. [[no claim]]", StepState.FORMAL_FAILED),  # numbers are always checked
        ("Let us think.", StepState.FORMAL_FAILED),
        ("[[three is four]]", StepState.FORMAL_FAILED),
        ("[[show 1 = 1]] and [[show 2 = 2]]", StepState.FORMAL_FAILED),
    ],
)
def test_states_of_steps(step: str, state: StepState) -> None:
    found = check_step(step, Z3, SECONDS)
    assert found.state is state, found.reason
    assert found.vacuous == ("anything" in step)


def test_states_have_the_published_numbers() -> None:
    assert [state.name for state in StepState] == ["PROOF_FAILED", "PROOF_OK", "NOT_NEEDED", "FORMAL_FAILED"]
    assert list(StepState) == [0, 1, 2, 3]
    for one in Verdict:
        assert (step_state(Outcome(one, "", 0.0)) is StepState.PROOF_OK) == (one is Verdict.PROVED)


def chain(rng: random.Random, corrupt: bool) -> tuple[list[str], list[bool], str]:
    """Steps that solve a linear equation, whether each is right, and the answer; a corrupted one is off by one."""
    a, b, x = rng.randint(2, 9), rng.randint(1, 20), rng.randint(-9, 9)
    right, total = a * x + b, a * x
    place = rng.randrange(3) if corrupt else None
    first = total + (place == 0)
    second = Fraction(first, a) + (place == 1)
    third = second * 2 + (place == 2)
    steps = [
        f"Subtract {b}. [[given {a}*x + {b} = {right} show {a}*x = {first}]]",
        f"Divide by {a}. [[given {a}*x = {first} show x = {second}]]",
        f"Double it. [[given x = {second}, y = 2*x show y = {third}]]",
    ]
    return steps, [place != step for step in range(3)], str(third)


def test_a_corrupted_step_is_never_proved_and_a_right_one_always_is() -> None:
    rng = random.Random(0)
    for number in range(20):
        steps, right, _ = chain(rng, corrupt=number % 2 == 0)
        found = check_steps(steps, Z3, SECONDS)
        assert [step.state is StepState.PROOF_OK for step in found] == right
        assert not any(step.vacuous for step in found)


def test_the_best_of_five_beats_a_single_sample() -> None:
    """Chains with faults at random; each answer is scored by the share of its steps that are proved."""
    rng, problems = random.Random(1), []
    for _ in range(12):
        seed, answers = rng.random(), []
        for _ in range(5):
            steps, right, answer = chain(random.Random(seed), corrupt=False)
            if rng.random() < 0.6:
                other = random.Random(seed)
                steps, right, answer = chain(other, corrupt=True)
            states = [one.state for one in check_steps(steps, Z3, SECONDS)]
            retro = sum(state is StepState.PROOF_OK for state in states) / len(states)
            answers.append(Candidate(answer, all(right), retro, 0.5))
        problems.append(answers)
    found = select(problems, 1.0)
    assert found.picked == found.any_correct > found.mean
    assert 0 <= found.plurality <= found.any_correct


def test_lean_says_that_it_is_not_there() -> None:
    lean = LeanProver()
    assert "prover=z3" in str(lean.unavailable())
    assert lean.prove(parse_claim("show 1 = 1"), SECONDS).verdict is Verdict.ERROR
    assert PROVERS["z3"].unavailable() is None


def test_coq_that_is_not_there(tmp_path: Path) -> None:
    missing = CoqProver(str(tmp_path / "coqc"))
    assert "not installed" in str(missing.unavailable())
    assert missing.prove(parse_claim("show 1 = 1"), SECONDS).verdict is Verdict.ERROR


def fake_coq(folder: Path, script: str) -> CoqProver:
    """A program in place of coqc."""
    path = folder / "coqc"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return CoqProver(str(path))


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("grep -q False $2 && exit 1; exit 0", Verdict.PROVED),
        ("exit 0", Verdict.VACUOUS),  # also proves that the hypotheses contradict each other
        ("echo 'Error: Tactic failure'; exit 1", Verdict.UNKNOWN),
        ("echo \"declaration uses 'sorry'\"; exit 0", Verdict.UNKNOWN),
        ("echo 'Axioms: classic'; exit 0", Verdict.UNKNOWN),
        ("exec sleep 5", Verdict.UNKNOWN),
    ],
)
def test_what_coq_says(script: str, expected: Verdict, tmp_path: Path) -> None:
    prover = fake_coq(tmp_path, script)
    assert prover.unavailable() is None
    assert prover.prove(parse_claim("given 2*x = 6 show x = 3"), 0.3).verdict is expected


def test_an_incomplete_proof_is_none() -> None:
    script = coq_script(parse_claim("given 2*x = 6 show x = 3"))
    assert is_complete(script, "")
    for wrong in ("Admitted.", "admit.", "sorry", "Axiom a : False."):
        assert not is_complete(f"{script}\n{wrong}", "")
    assert not is_complete(script, "warning: declaration uses 'sorry'")


def test_claims_for_coq() -> None:
    script = coq_script(parse_claim("given integer n, n > 3 show n >= 4"))
    assert "Theorem step : forall (n : Z), ((n > 3)) -> ((n >= 4))." in script
    assert "lia" in script
    assert "(1 / 10)" in coq_script(parse_claim("show x = 0.1"))
    for text in ("given integer n, x > 0 show n = x", "show x**2 = 4", "show 1/x = 2"):
        with pytest.raises(ValueError, match=r"kinds|linear|number"):
            coq_script(parse_claim(text))


@pytest.mark.skipif(shutil.which("coqc") is None, reason="Coq is not installed (Debian: coq)")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("given 2*x + 1 = 7 show x = 3", Verdict.PROVED),
        ("given 2*x + 1 = 7 show x = 4", Verdict.UNKNOWN),
        ("given integer n, n > 3 show n >= 4", Verdict.PROVED),
        ("given x > 0, x < 0 show x = 7", Verdict.VACUOUS),
        ("show 0.1 + 0.2 = 0.3", Verdict.PROVED),
    ],
)
def test_coq_itself(text: str, expected: Verdict) -> None:
    outcome = CoqProver().prove(parse_claim(text), 60.0)
    assert outcome.verdict is expected, outcome.evidence


def test_a_claim_is_found_in_its_step() -> None:
    assert claim_of_step("It is 4: [[show 2 + 2 = 4]].") == parse_claim("show 2 + 2 = 4")
    assert claim_of_step("Hm. [[no claim]]") is None
