"""Exact search: every query is compared with every text."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Scorer = Callable[[slice], np.ndarray]
"""Scores of some queries with all texts, float32 `[q, U]`; the higher, the better."""

MAX_SCORES = 1 << 24
"""Scores that are in memory at a time: 64 MB."""


def search(scorer: Scorer, queries: int, text_D: np.ndarray, depth: int, max_scores: int = MAX_SCORES) -> np.ndarray:
    """The best documents of every query, best first.

    Documents with the same text get the same score, to the last bit: texts are scored, not documents. Of equal scores
    the document that is first in `text_D` ranks first.

    Args:
      scorer: compares queries and texts.
      queries: how many there are, Q.
      text_D: the text of each document, see `Index`; of a search among texts, their numbers.
      depth: documents to return for each query; fewer if there are not so many.
      max_scores: scores that are in memory at a time, except that a query is never split.

    Returns:
      Places of documents, int32 `[Q, K]`, K = min(depth, D).
    """
    depth, rows = min(depth, len(text_D)), max(1, max_scores // len(text_D))
    ranked_QK = np.empty((queries, depth), np.int32)
    for start in range(0, queries, rows):
        part = slice(start, min(start + rows, queries))
        for query, scores_D in enumerate(scorer(part)[:, text_D], start):
            ranked_QK[query] = best(scores_D, depth)
    return ranked_QK


def best(scores_D: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` highest scores in descending order, the first of equal ones first."""
    (near,) = np.nonzero(scores_D >= np.partition(scores_D, -count)[-count])
    found: np.ndarray = near[np.argsort(-scores_D[near], kind="stable")][:count]
    return found


def cosine_scorer(queries_QC: np.ndarray, texts_UC: np.ndarray) -> Scorer:
    """Cosines of vectors; a vector of zeros has cosine 0 with all others.

    Args:
      queries_QC: of the queries.
      texts_UC: of the texts.
    """
    queries_QC, texts_UC = unit(queries_QC), unit(texts_UC)
    return lambda part: queries_QC[part] @ texts_UC.T


def unit(vectors_NC: np.ndarray) -> np.ndarray:
    """Vectors of length 1 and the same direction, float32; zeros stay."""
    wide_NC = vectors_NC.astype(np.float64)
    found: np.ndarray = wide_NC / np.maximum(np.linalg.norm(wide_NC, axis=1, keepdims=True), 1e-30)
    return found.astype(np.float32)
