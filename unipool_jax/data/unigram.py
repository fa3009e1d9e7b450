"""The loss of the unigram model, a baseline that any trained model has to beat."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unipool_jax.data.errors import DataError
from unipool_jax.data.splits import SplitName
from unipool_jax.data.store_reader import TokenStore
from unipool_jax.data.streams import DocumentStream, count_ranges, read_ranges

_BLOCK = 1 << 20


class UnigramLoss(NamedTuple):
    """Cross-entropy per target token in nats, and in bits per byte (None without byte counts)."""

    nats_per_token: float
    bits_per_byte: float | None


def token_counts(stores: Sequence[TokenStore], split: SplitName) -> np.ndarray:
    """Occurrences of each id, where it counts as a target, in a split of `stores`, int64 `[vocab_size]`."""
    counts = np.zeros(stores[0].vocab_size, np.int64)
    for store in stores:
        stream = DocumentStream(store, store.split_documents(split))
        for start in range(0, stream.num_tokens, _BLOCK):
            ranges = [(0, start, min(start + _BLOCK, stream.num_tokens))]
            tokens = read_ranges([stream], ranges)
            if not store.all_count:
                tokens = tokens[count_ranges([stream], ranges)]
            counts += np.bincount(tokens, minlength=len(counts))
    return counts


def unigram_loss(
    train_counts: np.ndarray, eval_counts: np.ndarray, token_bytes: np.ndarray | None = None
) -> UnigramLoss:
    """Loss of the unigram model `p(t) = (train_counts[t] + 1) / (sum + V)`.

    Args:
      train_counts: `[V]`, from `token_counts(stores, "train")`.
      eval_counts: `[V]`, from `EvalWindows.target_counts()`.
      token_bytes: `[V]`, from `Tokenizer.token_bytes`.

    Raises:
      DataError: counts of different vocabularies, or no target tokens.
    """
    if train_counts.shape != eval_counts.shape or eval_counts.sum() == 0:
        raise DataError(
            f"unigram counts of shapes {train_counts.shape} and {eval_counts.shape} with "
            f"{eval_counts.sum()} targets: need equal vocabularies and at least one target"
        )
    smoothed = train_counts.astype(np.float64) + 1.0
    nats = float(-(eval_counts * np.log(smoothed / smoothed.sum())).sum())
    bits = None
    if token_bytes is not None and (size := int(eval_counts @ token_bytes)) > 0:
        bits = nats / math.log(2.0) / size
    return UnigramLoss(nats / float(eval_counts.sum()), bits)
