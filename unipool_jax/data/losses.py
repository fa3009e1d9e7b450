"""What a text loses by being tokenized: letters without a token, and what a normalizer or pre-tokenizer changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from unipool_jax.data.errors import DataError
from unipool_jax.data.tokenizer import Tokenizer, VocabularyTokenizer

if TYPE_CHECKING:
    from unipool_jax.data.store_reader import TokenStore


class Losses(NamedTuple):
    """Per text, arrays `[n]`."""

    characters: np.ndarray
    """int64; characters that its tokens do not give back."""
    changed: np.ndarray
    """bool; whether its tokens give back another text."""
    inexact: np.ndarray
    """bool; whether its bytes are not the sum of the tokenizer's `piece_bytes`."""

    def part(self, texts: slice) -> Losses:
        """Those of some texts."""
        return Losses(*(array[texts] for array in self))


def measure(tokenizer: Tokenizer, texts: Sequence[str], rows: Sequence[np.ndarray]) -> Losses:
    """Compare `texts` with their token ids `rows`: by the bytes of the tokens, and where these say nothing, decoded."""
    losses = Losses(np.zeros(len(rows), np.int64), np.zeros(len(rows), bool), np.zeros(len(rows), bool))
    if tokenizer.lossless:
        return losses
    table = tokenizer.piece_bytes
    for number, (text, row) in enumerate(zip(texts, rows, strict=True)):
        if table is not None and int(table[row].sum()) == len(text.encode()):
            continue
        losses.inexact[number] = True
        back = given_back(tokenizer, row)
        # A space before the first word is how some tokenizers mark words.
        if text in (back, back.removeprefix(" ")):
            continue
        losses.changed[number] = True
        losses.characters[number] = sum((Counter(text) - Counter(back)).values())
    return losses


def given_back(tokenizer: Tokenizer, row: np.ndarray) -> str:
    """The text of token ids, without tokens for unknown text."""
    if isinstance(tokenizer, VocabularyTokenizer) and tokenizer.unknown is not None:
        row = row[row != tokenizer.unknown]
    return tokenizer.decode(row)


def check_not_empty(tokenizer: Tokenizer, text: str, place: str) -> None:
    """Raises DataError if `text`, which has no tokens, has visible characters; `place` is the file and line."""
    if any(letter.isprintable() and not letter.isspace() for letter in text):
        letters = "".join(dict.fromkeys(text.split()[0]))[:20]
        raise DataError(
            f"{place}: tokenizer {tokenizer.name}: none of {len(text):,} characters ({letters}) has a token, and none "
            "stands for unknown text; use a tokenizer that covers this text, such as gpt2, or one with byte fallback"
        )


def loss_report(store: TokenStore) -> str | None:
    """A sentence on what the documents of a store lost when it was built; None if nothing."""
    inputs = store.manifest.get("inputs", [])
    changed, lost = (sum(entry.get(name, 0) for entry in inputs) for name in ("changed_documents", "lost_characters"))
    if not changed:
        return None
    return (
        f"{store.path}: tokenizer {store.tokenizer_name} changed {changed:,} of {store.num_documents:,} documents and "
        f"lost {lost:,} of their characters, which have no token or are replaced by its own rules"
    )
