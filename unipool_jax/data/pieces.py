"""Cuts a few long texts into documents, because splits are made of whole documents and one book would be all of them.

The rule depends on nothing but the texts and the split, and is part of the identity of the store that it makes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from unipool_jax.data.readers import Record, document_text, read_texts
from unipool_jax.data.splits import SPLIT_NAMES, SplitOrder, check_split, split_documents

RULE = 1
"""Version of the rule; another one makes another store."""

MIN_DOCUMENTS = 20
"""With fewer documents each split gets text; from here on only train and valid must have some."""

_LONGEST = 4000
_PARAGRAPH_END, _LINE_END, _BLANK = re.compile(r"\n[^\S\n]*\n\s*"), re.compile(r"\n"), re.compile(r"\s")


class Cut(NamedTuple):
    """How texts are cut."""

    size: int
    """Characters of a piece at least; at most about twice as many."""
    documents: int
    """Documents before."""

    def note(self) -> str:
        """A sentence about what happens."""
        texts = "1 document is" if self.documents == 1 else f"{self.documents} documents are"
        return (
            f"{texts} too few for the splits: cut into pieces of {self.size:,} characters or more, at the ends of "
            "paragraphs where there are any; each piece counts as one document"
        )


def plan_cut(files: Sequence[Path], split: Sequence[float], split_order: SplitOrder, field: str = "text") -> Cut | None:
    """How `files` are cut; None where their documents are enough.

    They are too few if train or valid would be empty, and below `MIN_DOCUMENTS` if test would be. A split of weight 0
    may be empty, and a corpus that is all one split is never cut. Reads as many documents as decide it.

    Raises:
      DataError: an invalid split, or a file that cannot be read.
    """
    weights = check_split(split, split_order)
    if sum(weight > 0 for weight in weights) < 2:
        return None
    # From this number on, no rounding leaves train or valid empty.
    enough = max(MIN_DOCUMENTS, *(math.ceil(sum(weights) / weight) for weight in weights[:2] if weight > 0))
    documents = characters = 0
    for text in read_texts(files, field):
        if text.strip():
            documents, characters = documents + 1, characters + len(text)
        if documents == enough:
            return None
    needed = SPLIT_NAMES if documents < MIN_DOCUMENTS else SPLIT_NAMES[:2]
    if all(
        len(split_documents(documents, weights, split_order, name)) > 0
        for name, weight in zip(needed, weights, strict=False)
        if weight > 0
    ):
        return None
    # Pieces are shorter than twice their size, so there will be at least twice as many as needed.
    return Cut(max(1, min(_LONGEST, characters // (4 * enough))), documents)


def cut_records(path: Path, records: Iterator[Record], field: str, cut: Cut) -> Iterator[Record]:
    """The pieces of every record, each as a record of its own; arguments and errors as `document_text`."""
    for record in records:
        for piece in pieces(document_text(path, record, field), cut.size):
            yield record[0], piece


def pieces(text: str, size: int) -> Iterator[str]:
    """`text` in pieces of `size` to `2 size` characters, the last one maybe shorter; together they are `text`.

    A piece ends with the first paragraph that ends in that range, else with a line, else with a word.
    """
    start = 0
    while len(text) - start > 2 * size:
        low, high = start + size, start + 2 * size
        ends = (pattern.search(text, low - 1, high) for pattern in (_PARAGRAPH_END, _LINE_END, _BLANK))
        end = next((found.end() for found in ends if found), low)
        yield text[start:end]
        start = end
    yield text[start:]
