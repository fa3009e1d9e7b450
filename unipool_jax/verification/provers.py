"""Back ends: z3, which is an extra; Coq where it is installed; Lean 4, which is not there."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

from unipool_jax.config.files import FileError, write_text
from unipool_jax.verification.claims import Claim, Expression
from unipool_jax.verification.states import Outcome, Prover, Verdict

MEMORY_MIB = 1024
"""Of z3, at most."""


class Z3Prover:
    """The SMT solver z3, over real and whole numbers.

    A claim is proved if its hypotheses have a common solution and none of their solutions misses the goal. What is
    divided by must not be zero: that is part of what has to follow.
    """

    name = "z3"

    def unavailable(self) -> str | None:
        """z3 is an extra."""
        if importlib.util.find_spec("z3") is None:
            return 'prover=z3: z3 is not installed; in the checkout: pip install ".[verify]"'
        return None

    def prove(self, claim: Claim, seconds: float) -> Outcome:
        """Judge a claim; each of the two questions has the whole time."""
        import z3

        start = time.monotonic()
        try:
            verdict, evidence = _judge(z3, claim, seconds)
        except z3.Z3Exception as error:
            verdict, evidence = Verdict.ERROR, str(error)
        return Outcome(verdict, evidence, time.monotonic() - start)


def _judge(z3: Any, claim: Claim, seconds: float) -> tuple[Verdict, str]:
    context = z3.Context()
    names = {name: (z3.Int if name in claim.whole else z3.Real)(name, context) for name in claim.variables()}
    nonzero: list[Any] = []
    given = [_formula(z3, one, names, context, nonzero) for one in claim.hypotheses]
    given += [divisor != 0 for divisor in nonzero]
    nonzero.clear()
    goal = z3.And([_formula(z3, claim.goal, names, context, nonzero), *(divisor != 0 for divisor in nonzero)])

    def ask(*formulas: Any) -> tuple[Any, Any]:
        solver = z3.Solver(ctx=context)
        solver.set(timeout=max(1, round(1000 * seconds)), max_memory=MEMORY_MIB)
        solver.add(*formulas)
        return solver.check(), solver

    found, solver = ask(*given)
    if found == z3.unsat:
        return Verdict.VACUOUS, "the hypotheses contradict each other"
    if found == z3.unknown:
        return Verdict.UNKNOWN, f"whether the hypotheses contradict each other: {solver.reason_unknown()}"
    found, solver = ask(*given, z3.Not(goal))
    if found == z3.unsat:
        return Verdict.PROVED, "no solution of the hypotheses misses the goal"
    if found == z3.unknown:
        return Verdict.UNKNOWN, solver.reason_unknown()
    return Verdict.REFUTED, f"counterexample {solver.model()}"


def _formula(z3: Any, part: Expression, names: dict[str, Any], context: Any, nonzero: list[Any]) -> Any:
    """A comparison or a term for z3; adds what is divided by to `nonzero`."""
    if part.op == "number":
        return z3.RealVal(str(Fraction(part.name)), context) if "." in part.name else z3.IntVal(part.name, context)
    if part.op == "variable":
        return names[part.name]
    args = [_formula(z3, arg, names, context, nonzero) for arg in part.args]
    if part.op == "neg":
        return -args[0]
    a, b = args
    if part.op == "**":
        product = z3.IntVal(1, context)
        for _ in range(int(part.args[1].name)):
            product = product * a
        return product
    if part.op == "/":
        nonzero.append(b)
        return (z3.ToReal(a) if z3.is_int(a) else a) / (z3.ToReal(b) if z3.is_int(b) else b)
    if part.op == "%":
        nonzero.append(b)
        return a % b
    operations: dict[str, Any] = {
        "+": lambda: a + b,
        "-": lambda: a - b,
        "*": lambda: a * b,
        "=": lambda: a == b,
        "!=": lambda: a != b,
        "<": lambda: a < b,
        "<=": lambda: a <= b,
        ">": lambda: a > b,
        ">=": lambda: a >= b,
    }
    return operations[part.op]()


class CoqProver:
    """Coq, for linear claims, where `coqc` is installed (Debian: coq).

    The goal and the negation of the hypotheses are proved by `lra` or `lia`. A file that leaves anything open does not
    compile without `Admitted`, and one with `Admitted` or an axiom does not count.
    """

    name = "coq"

    def __init__(self, command: str = "coqc"):
        self._command = command

    def unavailable(self) -> str | None:
        """Whether coqc is there."""
        if shutil.which(self._command) is None:
            return (
                f"prover=coq: {self._command} is not installed; install Coq (Debian: apt install coq), or use prover=z3"
            )
        return None

    def prove(self, claim: Claim, seconds: float) -> Outcome:
        """Judge a claim; of one that is not proved, nothing is known."""
        start = time.monotonic()
        try:
            script = coq_script(claim)
            proved, evidence = self._compiles(script, seconds)
            if proved:
                vacuous, _ = (
                    self._compiles(coq_script(claim, contradiction=True), seconds) if claim.hypotheses else (False, "")
                )
                verdict = Verdict.VACUOUS if vacuous else Verdict.PROVED
            else:
                verdict = Verdict.UNKNOWN
        except (OSError, ValueError, FileError) as error:
            verdict, evidence = Verdict.ERROR, str(error)
        return Outcome(verdict, evidence, time.monotonic() - start)

    def _compiles(self, script: str, seconds: float) -> tuple[bool, str]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "step.v"
            write_text(path, script)
            try:
                ended = subprocess.run(
                    [self._command, "-q", str(path)],
                    capture_output=True,
                    text=True,
                    timeout=seconds,
                    check=False,
                    cwd=folder,
                )
            except subprocess.TimeoutExpired:
                return False, "time is up"
        output = ended.stdout + ended.stderr
        return ended.returncode == 0 and is_complete(script, output), output


def is_complete(script: str, output: str) -> bool:
    """Whether a proof that compiled leaves nothing open: neither `sorry`, `Admitted`, `admit` nor an axiom."""
    words = r"\b(sorry|Admitted|admit|Axiom|Parameter|Conjecture|sorryAx)\b"
    return not re.search(words, script) and not re.search(r"\b(sorry|sorryAx|Axioms|Admitted)\b", output)


def coq_script(claim: Claim, contradiction: bool = False) -> str:
    """A Coq file that proves a claim, or that its hypotheses contradict each other.

    Raises:
      ValueError: numbers of both kinds, or an operation that is neither linear nor of this kind.
    """
    whole = bool(claim.whole)
    if whole and claim.whole != set(claim.variables()):
        raise ValueError("variables of both kinds: Coq's lia and lra prove one kind each")
    kind, tactic, library = ("Z", "lia", "ZArith Lia") if whole else ("R", "lra", "Reals Lra")
    names = "".join(f" ({name} : {kind})" for name in claim.variables())
    parts = [_coq(one) for one in claim.hypotheses] + ["False" if contradiction else _coq(claim.goal)]
    statement = " -> ".join(f"({part})" for part in parts)
    binder = f"forall{names}, " if names else ""
    return (
        f"From Coq Require Import {library}.\nOpen Scope {kind}_scope.\n"
        f"Theorem step : {binder}{statement}.\nProof. intros; {tactic}. Qed.\n"
    )


def _coq(part: Expression) -> str:
    if part.op in ("number", "variable"):
        if "." in part.name:
            fraction = Fraction(part.name)
            return f"({fraction.numerator} / {fraction.denominator})"
        return part.name
    if part.op == "neg":
        return f"(- {_coq(part.args[0])})"
    signs = {"!=": "<>"}
    if part.op in ("%", "**"):
        raise ValueError(f"{part.op}: not linear")
    if part.op == "/" and part.args[1].op != "number":
        raise ValueError("/: only by a number")
    left, right = map(_coq, part.args)
    return f"({left} {signs.get(part.op, part.op)} {right})"


class LeanProver:
    """Lean 4 with Mathlib. It says that it is not available: this project neither ships nor starts it."""

    name = "lean"

    def unavailable(self) -> str | None:
        """Always."""
        return (
            "prover=lean: Lean 4 with Mathlib is not part of this project; use prover=z3, or prover=coq where coqc is "
            "installed"
        )

    def prove(self, claim: Claim, seconds: float) -> Outcome:
        """An error."""
        return Outcome(Verdict.ERROR, str(self.unavailable()), 0.0)


PROVERS: dict[str, Prover] = {"z3": Z3Prover(), "coq": CoqProver(), "lean": LeanProver()}
