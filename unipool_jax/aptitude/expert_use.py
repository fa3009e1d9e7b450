"""Which experts the tokens of both demonstrations visit, and whether that goes with the difference of their scores.

A measurement of this project: TATA (arXiv 2502.12022) has no mixture and says nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from scipy.stats import spearmanr

from unipool_jax.analysis.observe import make_observed_step, text_positions
from unipool_jax.analysis.usage import expert_counts, row_shares
from unipool_jax.aptitude.likelihood import demonstration
from unipool_jax.aptitude.scores import Score, Use
from unipool_jax.evaluation.scoring import LanguageModel, encode_pairs, window_batches


def share_distance(first_LE: np.ndarray, second_LE: np.ndarray) -> float:
    """Total variation between the shares of experts, `1/2 sum_e |p_e - q_e|`, mean over layers; 0 to 1.

    Args:
      first_LE: counts of one text, int.
      second_LE: of the other.
    """
    return float(np.abs(row_shares(first_LE) - row_shares(second_LE)).sum(axis=1).mean() / 2)


class UseObserver:
    """Compares the experts of two solutions to one question, at the positions that predict them.

    Args:
      model: with routers, on one device.
    """

    def __init__(self, model: LanguageModel):
        self._model = model
        self._step = make_observed_step(model.config)

    def __call__(self, question: str, cot: str, tir: str) -> Use | None:
        """What is written beside a score; None for texts that the model cannot read."""
        model = self._model
        context = demonstration(question, "").rstrip()
        windows = encode_pairs(model.tokenizer, [(context, f" {solution}") for solution in (cot, tir)])
        if any(len(one.context) + len(one.continuation) > model.max_length + 1 for one in windows):
            return None
        end = model.tokenizer.eod if model.config.data.document_mask else None
        experts, layers = model.config.experts_per_pool, model.config.mixture_layers
        counts_2LE = np.zeros((2, layers, experts), np.int64)
        for numbers_B, batch in window_batches(windows, model.max_length, model.batch_tokens, end):
            experts_LNK = np.asarray(self._step(model.params, model.balance, jax.device_put(batch), None).experts_LNK)
            text_BS = text_positions(batch).reshape(batch.inputs.shape)
            for row, number in enumerate(numbers_B):
                if number >= 0:
                    chosen_BS = text_BS & (np.arange(len(numbers_B)) == row)[:, None]
                    counts_2LE[number] = expert_counts(experts_LNK[:, chosen_BS.reshape(-1)], experts)
        return Use(share_distance(*counts_2LE), len(windows[0].continuation), len(windows[1].continuation))


class Correlation(NamedTuple):
    """Spearman's."""

    rho: float
    low: float
    """95% interval by Fisher's transformation with the variance 1.06 / (n - 3) (Fieller, Hartley and Pearson 1957)."""
    high: float
    questions: int


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> Correlation | None:
    """Of two measures of the same questions; None for fewer than ten, or where one never varies."""
    if len(first) < 10 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    rho = float(spearmanr(first, second).statistic)
    half = 1.959964 * math.sqrt(1.06 / (len(first) - 3))
    center = math.atanh(min(max(rho, -1 + 1e-12), 1 - 1e-12))
    return Correlation(rho, math.tanh(center - half), math.tanh(center + half), len(first))


def correlations(scores: Sequence[Score]) -> dict[str, Correlation | None]:
    """Of expert use with scores, and, beside it, of length, which moves both."""
    known = [(one.difference, one.use) for one in scores if one.use is not None and math.isfinite(one.difference)]
    difference = [d for d, _ in known]
    distance = [use.distance for _, use in known]
    longer = [float(use.tokens_cot - use.tokens_tir) for _, use in known]
    return {
        "expert_distance_and_d": rank_correlation(distance, difference),
        "expert_distance_and_size_of_d": rank_correlation(distance, [abs(d) for d in difference]),
        "length_difference_and_d": rank_correlation(longer, difference),
        "expert_distance_and_size_of_length_difference": rank_correlation(distance, [abs(n) for n in longer]),
    }
