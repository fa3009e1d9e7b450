"""Which document each token of a row belongs to.

The end-of-document token is the last token of its document, so the next token begins another one. What the store says
of ends and what the tokens say is the same: every document ends with that token, and no text makes it.
"""

from __future__ import annotations

import numpy as np


def segment_ids(tokens_BS: np.ndarray, end: int, real_BS: np.ndarray | None = None) -> np.ndarray:
    """The number of each token's document within its row, int32 `[B, S]`, from 1; 0 is padding.

    A row that begins in the middle of a document begins with number 1 all the same.

    Args:
      tokens_BS: token ids.
      end: the end-of-document token.
      real_BS: which tokens are text, bool; None is all of them.
    """
    ended_BS = np.cumsum(tokens_BS == end, axis=1, dtype=np.int32)
    # An end is still a token of the document that it ends.
    ids_BS = 1 + ended_BS - (tokens_BS == end)
    return (ids_BS if real_BS is None else ids_BS * real_BS).astype(np.int32)
