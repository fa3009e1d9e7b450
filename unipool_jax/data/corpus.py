"""The text of a run: from `DataConfig` to a tokenizer and token stores."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unipool_jax.config.schema import DataConfig
from unipool_jax.data.errors import DataError
from unipool_jax.data.hashing import REMEMBERED
from unipool_jax.data.inputs import find_inputs
from unipool_jax.data.losses import loss_report
from unipool_jax.data.pieces import plan_cut
from unipool_jax.data.splits import SPLIT_NAMES, SplitName
from unipool_jax.data.token_store import TokenStore, cached_store, demo_corpus_path, open_store
from unipool_jax.data.tokenizer import Tokenizer, load_tokenizer


class Corpus(NamedTuple):
    """A tokenizer and the stores it made."""

    tokenizer: Tokenizer
    stores: list[TokenStore]
    names: tuple[str, ...] = ()
    """What each store was made of, for people: files, or its own path."""

    def num_tokens(self, split: SplitName) -> int:
        """Tokens in one split of all stores."""
        return sum(int(store.document_lengths(store.split_documents(split)).sum()) for store in self.stores)

    def splits(self) -> list[SplitName]:
        """Splits that hold at least one token to predict."""
        return [split for split in SPLIT_NAMES if self.num_tokens(split) >= 2]

    def token_bytes(self, vocab_size: int) -> np.ndarray | None:
        """UTF-8 bytes per token, int32 `[vocab_size]`, 0 for padding ids; None where they do not add up to a text."""
        table = self.tokenizer.piece_bytes if all(map(self._is_exact, self.stores)) else None
        return None if table is None else np.pad(table.astype(np.int32), (0, vocab_size - len(table)))

    def _is_exact(self, store: TokenStore) -> bool:
        """Whether the bytes of each document are those of its tokens: counted when the store was built."""
        counts = [entry.get("inexact_documents") for entry in store.manifest.get("inputs", [])]
        return self.tokenizer.lossless or (bool(counts) and all(count == 0 for count in counts))


def open_corpus(data: DataConfig, vocab_size: int) -> Corpus:
    """The tokenizer and stores of `data`; text is tokenized into `data.cache_dir` on first use.

    Args:
      data: the section of the configuration.
      vocab_size: rows of the model's embedding.

    Raises:
      DataError: missing or damaged data, or a tokenizer with more ids than the embedding has rows.
    """
    tokenizer = load_tokenizer(data.tokenizer)
    names: tuple[str, ...]
    stores: list[TokenStore]
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"model.vocab_size={vocab_size}: data.tokenizer={data.tokenizer} has {tokenizer.vocab_size} ids; "
            f"set model.vocab_size to {tokenizer.vocab_size} or more"
        )
    if data.source == "conversations":
        stores, names = [_conversations(data, tokenizer)], (", ".join(data.files),)
    elif data.source == "stores":
        stores, names = [_open(path, tokenizer, data) for path in data.stores], data.stores
    else:
        stores = [_cached(data, tokenizer)]
        names = ("the demo corpus" if data.source == "demo" else ", ".join(data.files),)
    if data.document_mask and (unknown := [found for store in stores if (found := store.document_problem())]):
        raise DataError(f"data.document_mask=true: {'; '.join(unknown)}, or set data.document_mask=false")
    for store in stores:
        if report := loss_report(store):
            print(report, file=sys.stderr)
    return Corpus(tokenizer, stores, names)


def _conversations(data: DataConfig, tokenizer: Tokenizer) -> TokenStore:
    """The store of the conversations in data.files, packed if they are not in the cache."""
    from unipool_jax.data.conversation_cache import cached_conversations
    from unipool_jax.data.conversation_store import conversation_store

    inputs = find_inputs(data.files)
    if note := inputs.note():
        print(note, file=sys.stderr)
    packed = cached_conversations(inputs.files, data.template, data.sequence_length, tokenizer, Path(data.cache_dir))
    return conversation_store(inputs.files, packed, tokenizer, data.split, data.split_order)


def _cached(data: DataConfig, tokenizer: Tokenizer) -> TokenStore:
    """The store of data.files or of the demo corpus, built if it is not in the cache."""
    place = data.cache_dir, tokenizer, data.split, data.split_order
    if data.source == "demo":
        return cached_store([demo_corpus_path()], *place, progress=True)
    inputs = find_inputs(data.files)
    cut = plan_cut(inputs.files, data.split, data.split_order)
    return cached_store(inputs.files, *place, progress=True, cut=cut, notes=[inputs.note()])


def open_texts(data: DataConfig, files: Sequence[str], vocab_size: int) -> Corpus:
    """The corpus of `files`, all of it in the test split; arguments and errors as `open_corpus`."""
    texts = dataclasses.replace(data, source="files", files=tuple(files), split=(0, 0, 1), split_order="contiguous")
    return open_corpus(texts, vocab_size)


def _open(path: str, tokenizer: Tokenizer, data: DataConfig) -> TokenStore:
    """Open one of `data.stores`; only Megatron pairs take their split from `data`."""
    split = () if Path(path).is_dir() else (data.split, data.split_order)
    store = open_store(path, tokenizer, *split)
    store.memory = Path(data.cache_dir) / REMEMBERED
    return store
