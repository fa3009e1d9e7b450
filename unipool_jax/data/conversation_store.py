"""Examples of conversations packed into sequences: a token store that knows which tokens count.

Every document of the store is one packed sequence of exactly S tokens. Windows begin every S tokens, so a window is
one pack whatever the order of documents, and no example is cut.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unipool_jax.data import store_format
from unipool_jax.data.conversations import read_examples
from unipool_jax.data.errors import DataError
from unipool_jax.data.splits import SplitOrder, check_split
from unipool_jax.data.store_reader import TokenStore
from unipool_jax.data.tokenizer import Tokenizer


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which examples share a sequence of `size` tokens: best fit, in their order.

    Args:
      lengths: tokens of each example, each at most `size`.

    Returns:
      For each sequence the indices of its examples, ascending.
    """
    packs: list[list[int]] = []
    open_by_room: list[list[int]] = [[] for _ in range(size + 1)]
    has_room = np.zeros(size + 1, bool)
    for index, length in enumerate(lengths):
        fitting = int(np.argmax(has_room[length:])) + length
        if has_room[fitting]:
            chosen = open_by_room[fitting].pop()
            has_room[fitting] = bool(open_by_room[fitting])
        else:
            chosen, fitting = len(packs), size
            packs.append([])
        packs[chosen].append(index)
        room = fitting - length
        if room:
            open_by_room[room].append(chosen)
            has_room[room] = True
    return packs


class Packed(NamedTuple):
    """Packed examples."""

    tokens_PS: np.ndarray
    """int32; what is left of a sequence is filled with the end-of-document token."""
    counted_PS: np.ndarray
    """Whether a token belongs to a response, bool."""
    examples: int
    """Of the files."""
    left_out: int
    """Examples of them that are longer than a sequence."""


def pack_conversations(files: Sequence[Path], template: str, size: int, tokenizer: Tokenizer) -> Packed:
    """The examples in `files` that are not longer than `size` tokens, packed.

    Raises:
      DataError: as `read_examples`, or every example is longer.
    """
    examples = read_examples(files, template, tokenizer)
    fitting = [example for example in examples if len(example.prompt) + len(example.response) <= size]
    if not fitting:
        raise DataError(
            f"{_name(files)}: every response is longer, with its prompt, than data.sequence_length={size}; raise it"
        )
    packs = pack([len(example.prompt) + len(example.response) for example in fitting], size)
    tokens_PS = np.full((len(packs), size), tokenizer.eod, np.int32)
    counted_PS = np.zeros((len(packs), size), bool)
    for row, members in enumerate(packs):
        start = 0
        for example in (fitting[index] for index in members):
            middle = start + len(example.prompt)
            end = middle + len(example.response)
            tokens_PS[row, start:middle], tokens_PS[row, middle:end] = example.prompt, example.response
            counted_PS[row, middle:end] = True
            start = end
    return Packed(tokens_PS, counted_PS, len(examples), len(examples) - len(fitting))


class ConversationStore(TokenStore):
    """Packed examples; each is a document to `data.document_mask`, as it ends with the end-of-document token.

    Tokens count, as targets, where they belong to a response.

    Args:
      path: what it was made of, for messages.
      packed: the examples.
    """

    def __init__(
        self, path: Path, packed: Packed, tokenizer: Tokenizer, split: Sequence[float], split_order: SplitOrder
    ):
        (packs, size), tokens, counted = packed.tokens_PS.shape, packed.tokens_PS, packed.counted_PS
        self.path, self._tokens, self._counted = path, tokens.reshape(-1), counted.reshape(-1)
        self.all_count = False
        self.num_tokens, self.num_documents = self._tokens.size, packs
        self.document_offsets = np.arange(packs + 1, dtype=np.int64) * size
        self.dtype = np.dtype(np.int32)
        self._tokenizer, self.tokenizer_name, self.tokenizer_sha256 = tokenizer, tokenizer.name, tokenizer.sha256
        self.vocab_size, self.eod = tokenizer.vocab_size, tokenizer.eod
        self.split, self.split_order = check_split(split, split_order), split_order
        self.text_bytes, self.manifest = None, {}

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def _read_many(self, starts: Sequence[int], stops: Sequence[int]) -> list[np.ndarray]:
        return [self._tokens[start:stop] for start, stop in zip(starts, stops, strict=True)]

    def count_many(self, starts: Sequence[int], stops: Sequence[int]) -> list[np.ndarray]:
        return [self._counted[start:stop] for start, stop in zip(starts, stops, strict=True)]

    def _block_hashes(self) -> list[str]:
        """Those of the tokens, and one of which of them count."""
        return [*super()._block_hashes(), store_format.json_sha256(np.packbits(self._counted).tobytes().hex())]

    def verify(self) -> None:
        """It is in memory, made from its files or read with check sums."""


def conversation_store(
    files: Sequence[Path], packed: Packed, tokenizer: Tokenizer, split: Sequence[float], split_order: SplitOrder
) -> ConversationStore:
    """The store of the conversations in `files`; says how many examples are too long and left out."""
    if packed.left_out:
        print(
            f"{_name(files)}: {packed.left_out:,} of {packed.examples:,} responses left out: with their prompt they "
            f"are longer than data.sequence_length={packed.tokens_PS.shape[1]}",
            file=sys.stderr,
        )
    return ConversationStore(files[0], packed, tokenizer, split, split_order)


def _name(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files))
