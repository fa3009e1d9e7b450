"""Anchors: few questions that stand for all of a source, one from each cluster of their embeddings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unipool_jax.aptitude.candidates import Candidate, by_source, fingerprint
from unipool_jax.config.errors import UserError
from unipool_jax.config.files import check_fields, read_json

MOST_WORDS = 2048
"""Columns of `tf_idf`."""


def tf_idf(texts: Sequence[str]) -> np.ndarray:
    """Embeddings by words: counts times `ln((1 + N) / (1 + n)) + 1`, where n of N texts have the word; rows of norm 1.

    Words are lower case; of more than `MOST_WORDS`, those in the most texts, in alphabetical order among equals.

    Returns:
      float64 `[N, words]`; a text without words is a row of zeros.
    """
    counts = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    spread = Counter(word for count in counts for word in count)
    words = sorted(spread, key=lambda word: (-spread[word], word))[:MOST_WORDS]
    column = {word: number for number, word in enumerate(words)}
    vectors_NW = np.zeros((len(texts), max(1, len(words))))
    for row, count in enumerate(counts):
        for word in count.keys() & column.keys():
            weight = np.log((1 + len(texts)) / (1 + spread[word])) + 1
            vectors_NW[row, column[word]] = count[word] * weight
    norm_N = np.linalg.norm(vectors_NW, axis=1, keepdims=True)
    return vectors_NW / np.where(norm_N > 0, norm_N, 1)


def squared_distances(points_ND: np.ndarray, centers_KD: np.ndarray) -> np.ndarray:
    """Between all points and centers, float64 `[N, K]`, not below 0."""
    cross_NK = points_ND @ centers_KD.T
    found = (points_ND**2).sum(1)[:, None] - 2 * cross_NK + (centers_KD**2).sum(1)
    return np.asarray(np.maximum(found, 0.0))


def k_means(points_ND: np.ndarray, clusters: int, seed: int, iterations: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's algorithm from centers drawn far from each other (k-means++, Arthur and Vassilvitskii 2007).

    A cluster that lost its points takes the point farthest from its center, so none is empty.

    Args:
      points_ND: with at least `clusters` rows.
      clusters: K.
      seed: of the first centers.
      iterations: at most.

    Returns:
      The cluster of each point, int `[N]`, and the means, float64 `[K, D]`.
    """
    rng = np.random.default_rng(seed)
    chosen = [int(rng.integers(len(points_ND)))]
    nearest_N = squared_distances(points_ND, points_ND[chosen])[:, 0]
    while len(chosen) < clusters:
        nearest_N[chosen] = 0.0
        total = nearest_N.sum()
        left = np.setdiff1d(np.arange(len(points_ND)), chosen)  # all others are copies of what was drawn
        new = int(rng.choice(len(points_ND), p=nearest_N / total) if total > 0 else rng.choice(left))
        chosen.append(new)
        nearest_N = np.minimum(nearest_N, squared_distances(points_ND, points_ND[[new]])[:, 0])
    centers_KD = points_ND[chosen].astype(np.float64)
    cluster_N = np.full(len(points_ND), -1)
    for _ in range(iterations):
        distances_NK = squared_distances(points_ND, centers_KD)
        new_N = _filled(np.argmin(distances_NK, axis=1), distances_NK)
        if np.array_equal(new_N, cluster_N):
            break
        cluster_N = new_N
        centers_KD = np.stack([points_ND[cluster_N == k].mean(axis=0) for k in range(clusters)])
    return cluster_N, centers_KD


def _filled(cluster_N: np.ndarray, distances_NK: np.ndarray) -> np.ndarray:
    """The clusters, with a point in each."""
    far_N = distances_NK[np.arange(len(cluster_N)), cluster_N]
    for empty in np.setdiff1d(np.arange(distances_NK.shape[1]), cluster_N):
        alone_N = np.bincount(cluster_N, minlength=distances_NK.shape[1])[cluster_N] == 1
        point = int(np.argmax(np.where(alone_N, -1.0, far_N)))
        cluster_N[point], far_N[point] = empty, 0.0
    return cluster_N


def medoids(points_ND: np.ndarray, cluster_N: np.ndarray, centers_KD: np.ndarray) -> np.ndarray:
    """The point of each cluster that is nearest to its center, the first among equals; int `[K]`."""
    distances_NK = squared_distances(points_ND, centers_KD)
    own_NK = cluster_N[:, None] == np.arange(len(centers_KD))
    return np.argmin(np.where(own_NK, distances_NK, np.inf), axis=0)


def choose_anchors(
    candidates: Sequence[Candidate], vectors_ND: np.ndarray, count: int, seed: int
) -> dict[str, list[Candidate]]:
    """Anchors of each source, in the order of their ids; the order of the candidates does not matter.

    Args:
      candidates: N of them.
      vectors_ND: their embeddings.
      count: anchors of each source.
      seed: of the clustering.

    Raises:
      UserError: a source has fewer candidates.
    """
    found = {}
    for source, places in by_source(candidates).items():
        if len(places) < count:
            raise UserError(f"count={count}: source {source} has {len(places)} candidates; ask for at most that many")
        points_ND = vectors_ND[places]
        chosen = sorted(medoids(points_ND, *k_means(points_ND, count, seed)).tolist())
        found[source] = [candidates[places[place]] for place in chosen]
    return found


def anchors_document(
    candidates: Sequence[Candidate], anchors: dict[str, list[Candidate]], embedding: str, seed: int
) -> dict[str, Any]:
    """What a file of anchors holds."""
    return {
        "candidates_sha256": fingerprint(candidates),
        "embedding": embedding,
        "seed": seed,
        "anchors": {
            source: [{"id": one.id, "question": one.question, "answer": one.answer} for one in found]
            for source, found in anchors.items()
        },
    }


def read_anchors(path: Path) -> dict[str, Any]:
    """What a file of anchors holds; raises FileError."""
    advice = "make one with unipool aptitude anchors"
    document = read_json(path, advice)
    fields = {f"anchors.*.*.{name}": str for name in ("id", "question", "answer")}
    check_fields(document, path, {"candidates_sha256": str, "anchors": dict, "anchors.*": list} | fields, advice)
    return document
