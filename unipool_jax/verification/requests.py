"""Settings of the commands `steps check`, `steps train` and `steps select`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from unipool_jax.config.ranges import Range
from unipool_jax.config.words import Positional
from unipool_jax.verification.selection import Rule


@dataclass(frozen=True, kw_only=True)
class CheckRequest:
    """Prove the steps of answers one by one, and write what became of each.

    A file of answers has one JSON object a line: `problem` (what is answered), `steps` (a list of texts), `answer`
    (null if there is none), `correct`, and for `unipool steps select` `reward`, what a reward model says. A step
    carries its claim: "So x is three. [[given 2*x = 6 show x = 3]]"; one that makes none says `[[no claim]]`.

        unipool steps check answers.jsonl out=checked.jsonl
        unipool steps check answers.jsonl out=checked.jsonl prover=coq seconds=60
    """

    answers: Annotated[str, Positional()]
    """File of answers."""
    out: str
    """File to write: the same with `states`, a number for each step, and `evidence`."""
    prover: Literal["z3", "coq", "lean"] = "z3"
    """`z3`: the extra `verify`. `coq`: linear claims, where coqc is installed. `lean`: not available, and says so."""
    seconds: Annotated[float, Range(0, 3600, open_low=True)] = 10.0
    """Time for each question to the prover."""


@dataclass(frozen=True, kw_only=True)
class AggregatorRequest:
    """Train the LSTM that tells right answers from the states of their steps.

    All answers to a problem are on one side of the split; the epoch with the best balanced accuracy on the problems
    held out is kept.

        unipool steps train checked.jsonl out=aggregator.safetensors
    """

    answers: Annotated[str, Positional()]
    """File written by `unipool steps check`."""
    out: str
    """File to write."""
    epochs: Annotated[int, Range(1, 100_000)] = 200
    """Passes over the answers at most."""
    learning_rate: Annotated[float, Range(0, 1, open_low=True)] = 1e-4
    """Of Adam."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Of the parameters, the split and the order."""


@dataclass(frozen=True, kw_only=True)
class SelectRequest:
    """Choose one answer to each problem, and say what choosing is worth.

    Prints shares of problems: one sample, plurality, at least half correct, any correct, and the chosen answer; last,
    one line of JSON. Without alpha, the weight of the steps is chosen on half of the problems, and the others are
    reported.

        unipool steps select checked.jsonl aggregator=aggregator.safetensors
        unipool steps select checked.jsonl aggregator=aggregator.safetensors alpha=0.5 rule=weighted
    """

    answers: Annotated[str, Positional()]
    """File written by `unipool steps check`, of other problems than the aggregator was trained on."""
    aggregator: str
    """File written by `unipool steps train`."""
    alpha: Annotated[float | None, Range(0, 1)] = None
    """Weight of the steps beside the reward; null tries 0, 0.05, ..., 1 on every second problem."""
    rule: Rule = "geometric"
    """How both are fused; `geometric` takes rewards that are probabilities, the others any."""

    def problems(self) -> Iterator[str]:
        """What does not go together."""
        if self.alpha is not None and self.rule not in ("geometric", "weighted"):
            yield f"alpha={self.alpha}: rule={self.rule} has no weight; leave alpha out"
