"""The unigram baseline against its definition."""

import math
from pathlib import Path

import numpy as np
import pytest

from unipool_jax.data.errors import DataError
from unipool_jax.data.pipeline import EvalWindows
from unipool_jax.data.token_store import build_store
from unipool_jax.data.unigram import token_counts, unigram_loss


def test_loss_by_hand() -> None:
    # p = (3+1, 0+1, 1+1) / 7; targets: id 0 twice, id 1 once; bytes 1 and 2.
    loss = unigram_loss(np.array([3, 0, 1]), np.array([2, 1, 0]), np.array([1, 2, 5], np.int32))
    nats = -(2 * math.log(4 / 7) + math.log(1 / 7))
    assert loss.nats_per_token == pytest.approx(nats / 3, rel=1e-12)
    assert loss.bits_per_byte == pytest.approx(nats / math.log(2) / 4, rel=1e-12)


def test_missing_byte_counts_and_refusals() -> None:
    assert unigram_loss(np.array([1, 1]), np.array([1, 0])).bits_per_byte is None
    with pytest.raises(DataError, match="at least one target"):
        unigram_loss(np.array([1, 1]), np.array([0, 0]))
    with pytest.raises(DataError, match="equal vocabularies"):
        unigram_loss(np.array([1, 1]), np.array([1, 0, 0]))


def test_counts_of_a_store(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "abba"}\n{"text": "cab"}\n{"text": "aaa"}\n')
    store = build_store([tmp_path / "a.jsonl"], tmp_path / "s", "bytes", (1, 1, 1), progress=False)
    counts = token_counts([store], "train")
    assert (counts[ord("a")], counts[ord("b")], counts[256], counts.sum()) == (2, 2, 1, 5)
    assert token_counts([store, store], "train").sum() == 10
    targets = EvalWindows(store, "valid", 2).target_counts()  # "cab" and its end, without the first
    assert (targets[ord("c")], targets[ord("a")], targets[ord("b")], targets[256]) == (0, 1, 1, 1)
    loss = unigram_loss(counts, targets, store.tokenizer.token_bytes)
    nats = -(2 * math.log(3 / 262) + math.log(2 / 262))
    assert loss.nats_per_token == pytest.approx(nats / 3, rel=1e-12)
    assert loss.bits_per_byte == pytest.approx(nats / math.log(2) / 2, rel=1e-12)
