"""Which solutions a model is fine-tuned on: rule H of TATA (arXiv 2502.12022), its variants and its control."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from unipool_jax.aptitude.candidates import FORMATS, Format
from unipool_jax.config.errors import UserError

Variant = Literal["tata", "one_format", "both", "cot", "tir", "random"]
"""`tata`: rule H. `one_format`: never both formats of a question (TATA-minus). `both`, `cot`, `tir`: of every question.
`random`: as many questions in both formats as under `tata`, drawn at random."""


@dataclass(frozen=True)
class SourceRule:
    """Rule H for one source."""

    default: Format
    """Of every question."""
    quantile: float
    """Of the differences d: where `cot` is the default, questions below it have `tir` too; where `tir` is, those above
    it have `cot` too."""


class Choice(NamedTuple):
    """What is kept of the questions of one source, in their order."""

    cot_N: np.ndarray
    """bool `[N]`."""
    tir_N: np.ndarray
    """bool `[N]`."""
    threshold: float | None
    """The quantile of d; None where none is asked for or nothing was scored."""


def parse_rule(word: str) -> tuple[str, SourceRule]:
    """`gsm8k:cot:0.3`: a source, its default format, a quantile; raises UserError."""
    source, _, rest = word.rpartition(":")
    name, _, default = source.rpartition(":")
    try:
        quantile = float(rest)
    except ValueError:
        quantile = -1.0
    if not name or default not in FORMATS or not 0 <= quantile <= 1:
        raise UserError(
            f"rules=[{word}]: expected SOURCE:FORMAT:QUANTILE, a format of cot or tir and a quantile of 0 to 1, "
            f"for example rules=[gsm8k:cot:0.3,math:tir:0.65]"
        )
    return name, SourceRule("cot" if default == "cot" else "tir", quantile)


def threshold(difference_N: np.ndarray, quantile: float) -> float | None:
    """The quantile of the differences that are finite, interpolated between neighbors; None where there is none.

    Of n different values `ceil(q (n - 1))` are below it and `ceil((1 - q) (n - 1))` above it. Scores by generation are
    multiples of 1/A, so many are equal to it, and those are neither: sizes are what comes out, not what was asked for.
    """
    known = difference_N[np.isfinite(difference_N)]
    return float(np.quantile(known, quantile)) if len(known) else None


def choose(
    variant: Variant, rule: SourceRule, difference_N: np.ndarray, seed: int = 0, one_quantile: float = 0.5
) -> Choice:
    """What is kept of the questions of one source.

    Args:
      variant: one of them.
      rule: of the source.
      difference_N: score with `cot` minus score with `tir`; NaN for a question without scores, which keeps the default
        format alone.
      seed: of `random`.
      one_quantile: of `one_format`: above it `cot`, else `tir`.
    """
    every_N, none_N = np.ones(len(difference_N), bool), np.zeros(len(difference_N), bool)
    if variant in ("both", "cot", "tir"):
        return Choice(every_N if variant != "tir" else none_N, every_N if variant != "cot" else none_N, None)
    cut = threshold(difference_N, one_quantile if variant == "one_format" else rule.quantile)
    known_N = np.isfinite(difference_N)
    level = np.nan if cut is None else cut
    above_N, below_N = difference_N > level, difference_N < level  # no comparison with NaN holds
    if variant == "one_format":
        cot_N = np.where(known_N, above_N, rule.default == "cot")
        return Choice(cot_N, ~cot_N, cut)
    more_N = below_N if rule.default == "cot" else above_N
    if variant == "random":
        drawn = np.random.default_rng(seed).choice(len(more_N), int(more_N.sum()), replace=False)
        more_N, cut = none_N.copy(), None
        more_N[drawn] = True
    return Choice(every_N, more_N, cut) if rule.default == "cot" else Choice(more_N, every_N, cut)


def check_rules(rules: Mapping[str, SourceRule], sources: Mapping[str, object]) -> None:
    """Raises UserError unless every source has a rule and every rule a source."""
    if missing := sorted(sources.keys() - rules.keys()):
        raise UserError(f"rules: none for the source {missing[0]}; add {missing[0]}:cot:0.3 or {missing[0]}:tir:0.65")
    if strange := sorted(rules.keys() - sources.keys()):
        raise UserError(f"rules: no candidate has the source {strange[0]}; sources are {', '.join(sorted(sources))}")
