"""What a ranking is worth: the measures of trec_eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

DEPTH = 1000
"""Documents that are ranked for each query, as in trec_eval and BEIR."""


class Quality(NamedTuple):
    """Measures by query, float64 `[Q]`; 0 for a query without a relevant document."""

    ndcg_10: np.ndarray
    """Discounted cumulative gain of the first 10, as a share of the best possible."""
    map: np.ndarray
    """Mean of the precision at the rank of each relevant document; 0 for those that are not ranked."""
    recall_100: np.ndarray
    """Share of the relevant documents among the first 100."""
    first: np.ndarray
    """Whether the first document is relevant."""


def measure(ranked_QK: np.ndarray, grades: Sequence[Mapping[int, int]]) -> Quality:
    """Measures of rankings.

    The gain of a document is its grade, or 0 below that; its discount at rank r is log2(r + 1) (Järvelin and
    Kekäläinen, 2002; `ndcg_cut_10`, `map` and `recall_100` of trec_eval).

    Args:
      ranked_QK: documents in the order of their ranks, int `[Q, K]`; none twice in a row.
      grades: by query, the grades of judged documents.
    """
    return Quality(*np.array([_of_query(row, one) for row, one in zip(ranked_QK, grades, strict=True)]).T)


def _of_query(ranked_K: np.ndarray, grades: Mapping[int, int]) -> tuple[float, float, float, float]:
    gains_K = np.array([max(grades.get(document, 0), 0) for document in ranked_K.tolist()], float)
    ideal = np.array(sorted((grade for grade in grades.values() if grade > 0), reverse=True), float)
    if not len(ideal):
        return 0.0, 0.0, 0.0, 0.0
    (hits,) = np.nonzero(gains_K)
    precision = np.arange(1, len(hits) + 1) / (hits + 1)
    recall = np.count_nonzero(hits < 100) / len(ideal)
    return _gain(gains_K) / _gain(ideal), precision.sum() / len(ideal), recall, float(gains_K[0] > 0)


def _gain(gains_K: np.ndarray, cutoff: int = 10) -> float:
    first = gains_K[:cutoff]
    return float(np.sum(first / np.log2(np.arange(2, len(first) + 2))))
