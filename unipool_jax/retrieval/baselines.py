"""What stands beside a model: BM25, and chance."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy import sparse

from unipool_jax.retrieval.search import Scorer

K1, B = 1.2, 0.75
"""Of BM25, as in Lucene."""

_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """The words that BM25 counts: runs of letters and digits in lower case, identifiers taken apart.

    >>> words("def readLines(max_size):")
    ['def', 'read', 'lines', 'max', 'size']
    """
    return _WORD.findall(_HUMP.sub(" ", text).lower())


def bm25_scorer(queries: Sequence[str], texts: Sequence[str], k1: float = K1, b: float = B) -> Scorer:
    """BM25 over the words of texts (Robertson and Zaragoza, 2009, equation 3.15).

    A word that is in n of U texts weighs log(1 + (U - n + 1/2) / (n + 1/2)), as in Lucene, which is never negative; one
    that a query has twice counts twice.

    Args:
      queries: to search for.
      texts: to search in, from which the statistics are.
      k1: how slowly further occurrences of a word stop to count.
      b: how far occurrences are divided by the length of a text; 0 to 1.
    """
    column: dict[str, int] = {}
    counts_UW = _counts([words(text) for text in texts], column, grow=True)
    counts_QW = _counts([words(query) for query in queries], column, grow=False)
    length_U = np.asarray(counts_UW.sum(axis=1)).ravel()
    texts_W = np.bincount(counts_UW.indices, minlength=len(column))
    weight_W = np.log1p((len(texts) - texts_W + 0.5) / (texts_W + 0.5))
    norm_U = k1 * (1 - b + b * length_U / max(length_U.mean(), 1e-30))
    row = np.repeat(np.arange(len(texts)), np.diff(counts_UW.indptr))
    occurrences = counts_UW.data
    counts_UW.data = occurrences * (k1 + 1) / (occurrences + norm_U[row]) * weight_W[counts_UW.indices]
    weights_WU = counts_UW.T.tocsr()

    def score(part: slice) -> np.ndarray:
        found: np.ndarray = (counts_QW[part] @ weights_WU).toarray().astype(np.float32)
        return found

    return score


def _counts(texts: Sequence[Sequence[str]], column: dict[str, int], grow: bool) -> sparse.csr_matrix:
    """How often each text has each word, float64; words get columns in the order in which they are seen."""
    rows, columns, values = list[int](), list[int](), list[float]()
    for row, found in enumerate(texts):
        for word, count in Counter(found).items():
            if grow:
                column.setdefault(word, len(column))
            if word in column:
                rows.append(row)
                columns.append(column[word])
                values.append(count)
    shape = (len(texts), len(column))
    return sparse.csr_matrix((np.array(values, float), (np.array(rows, int), np.array(columns, int))), shape)


def random_scorer(texts: int, seed: int) -> Scorer:
    """Scores drawn at random, the same for a query whichever others it is scored with.

    Args:
      texts: how many there are.
      seed: of the draws.
    """
    return lambda part: np.stack(
        [np.random.default_rng([seed, query]).random(texts, np.float32) for query in range(part.start, part.stop)]
    )
