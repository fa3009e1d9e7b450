"""Documents that share a row without seeing each other (data.document_mask).

A segment id says which document a token belongs to: tokens of a row see each other only where their ids are equal.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def segment_ids(tokens_BS: jax.Array, end: int) -> jax.Array:
    """As `data.documents.segment_ids`, for tokens on devices: each token's document within its row, int32, from 1."""
    ends_BS = (tokens_BS == end).astype(jnp.int32)
    return 1 + jnp.cumsum(ends_BS, axis=1) - ends_BS


def document_positions(segments_BS: jax.Array) -> jax.Array:
    """Position of each token within its document, int32 `[B, S]`, from 0 where the row or the document begins.

    Tokens of a document are adjacent.
    """
    index_S = jnp.arange(segments_BS.shape[1], dtype=jnp.int32)
    begins_BS = segments_BS != jnp.roll(segments_BS, 1, axis=1)
    # The first position of the row is compared with the last one by `roll`; it is a maximum of 0 either way.
    return index_S - jax.lax.cummax(jnp.where(begins_BS, index_S, 0), axis=1)
