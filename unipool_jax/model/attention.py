"""Causal grouped-query attention with rotary positions (method M1.3)."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike

from unipool_jax.config.schema import ModelConfig
from unipool_jax.model.documents import document_positions
from unipool_jax.parallel.linear import linear
from unipool_jax.parallel.mesh import constrain

_QUERY_BLOCKS = 4
"""Blocks of queries in `causal_attention`: 4 skip three eighths of all scores; 8 were no faster."""
_LEAST_BLOCK = 64
"""Queries of a block at least: skipping parts of short sequences saves nothing, and every block is a program part."""


class KeyValueCache(NamedTuple):
    """Keys (after rotation) and values of earlier positions in T slots a row; position p is in slot p.

    A query sees the slots up to its own position, so what later slots hold does not matter: rows of a batch may be at
    different positions, and padding behind a row is overwritten before it is seen. A model has one cache per layer,
    stacked to `[G, L/G, B, T, H, C]`.
    """

    key_BTHC: jax.Array
    value_BTHC: jax.Array

    def write(self, key_BSHC: jax.Array, value_BSHC: jax.Array, positions_BS: jax.Array) -> KeyValueCache:
        """The cache with keys and values of these positions put in."""
        row_B1 = jnp.arange(positions_BS.shape[0])[:, None]
        return KeyValueCache(
            self.key_BTHC.at[row_B1, positions_BS].set(key_BSHC),
            self.value_BTHC.at[row_B1, positions_BS].set(value_BSHC),
        )


def rotate(heads_BSHC: jax.Array, positions_BS: jax.Array, base: float) -> jax.Array:
    """Rotary position embedding over the whole head (arXiv 2104.09864).

    Half-rotation layout: channel i is paired with channel i + C/2. Angles and products are float32.

    Args:
      heads_BSHC: queries or keys, `[B, S, H, C]` with even C.
      positions_BS: int32 `[B, S]`, or `[S]` where all rows have the same.
      base: base of the frequencies `base^(-2 i / C)`.
    """
    channels = heads_BSHC.shape[3]
    frequencies = base ** (-jnp.arange(0, channels, 2, dtype=jnp.float32) / channels)
    angles_BS1C = positions_BS.astype(jnp.float32)[..., None, None] * frequencies
    cos, sin = jnp.cos(angles_BS1C), jnp.sin(angles_BS1C)
    first, second = jnp.split(heads_BSHC.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(heads_BSHC.dtype)


def causal_attention(
    query_BSHC: jax.Array, key_BSHC: jax.Array, value_BSHC: jax.Array, segments_BS: jax.Array | None = None
) -> jax.Array:
    """Softmax attention of each position to itself and those before, `[B, S, H, C]` in the dtype of the queries.

    With `segments_BS`, int32, a position sees only those before that have its segment id.

    Scores and softmax are float32. Key and value heads may be fewer: each serves H / (its number) adjacent query heads.
    Queries are taken in blocks, each with the keys up to its end, so most of what the mask hides is never computed.
    """
    batch, length, heads, channels = query_BSHC.shape
    # J key-value heads, I query heads for each. With heads ahead of positions each head's matrices lie in one piece.
    query_BJISC = query_BSHC.reshape(batch, length, key_BSHC.shape[2], -1, channels).transpose(0, 2, 3, 1, 4)
    key_BJSC, value_BJSC = key_BSHC.transpose(0, 2, 1, 3), value_BSHC.transpose(0, 2, 1, 3)
    position_S = jnp.arange(length)
    block, mixed = max(-(-length // _QUERY_BLOCKS), _LEAST_BLOCK), []
    for start in range(0, length, block):
        rows, seen = slice(start, start + block), slice(start + block)
        scores_BJIST = jnp.einsum(
            "bjisc,bjtc->bjist", query_BJISC[..., rows, :], key_BJSC[..., seen, :], preferred_element_type=jnp.float32
        )
        visible = position_S[rows, None] >= position_S[seen]
        if segments_BS is not None:
            same_BST = segments_BS[:, rows, None] == segments_BS[:, None, seen]
            visible = visible & same_BST[:, None, None]
        weights_BJIST = jax.nn.softmax(jnp.where(visible, scores_BJIST / math.sqrt(channels), -jnp.inf))
        mixed.append(jnp.einsum("bjist,bjtc->bjisc", weights_BJIST.astype(value_BSHC.dtype), value_BJSC[..., seen, :]))
    return jnp.concatenate(mixed, axis=3).transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, channels)


class AttentionWeights(NamedTuple):
    """Parameters of one attention block, float32; head channels are the last axis but for `output`."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    output: jax.Array


class Attention(nn.Module):
    """Creates `AttentionWeights`."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> AttentionWeights:
        config, width = self.config, self.config.hidden_size
        keys = width // config.num_heads * config.num_kv_heads
        init = nn.initializers.normal(config.init_std)
        init_output = nn.initializers.normal(config.init_std / math.sqrt(2 * config.num_layers))
        return AttentionWeights(
            query=self.param("query", init, (width, width), jnp.float32),
            key=self.param("key", init, (width, keys), jnp.float32),
            value=self.param("value", init, (width, keys), jnp.float32),
            output=self.param("output", init_output, (width, width), jnp.float32),
        )


def attention(
    config: ModelConfig,
    hidden_BSD: jax.Array,
    weights: AttentionWeights,
    cache: KeyValueCache | None = None,
    start_B: jax.Array | None = None,
    segments: ArrayLike | None = None,
) -> tuple[jax.Array, KeyValueCache | None]:
    """Attention block without its norm and residual: `[B, S, D] -> [B, S, D]`, and the cache with these positions.

    Without a cache the S positions are 0..S-1 and see each other; with one they begin at `start_B` and see the cache.
    `segments` are the ids of documents, int32 `[B, S]`, with a cache those of its slots, `[B, T]`; rotary positions
    then count from the beginning of each document.
    """
    positions = jnp.arange(hidden_BSD.shape[1])
    if start_B is not None:
        positions = start_B[:, None] + positions
    turned = positions
    if segments is not None:
        segments = jnp.asarray(segments)
        turned = document_positions(segments)
        turned = turned if start_B is None else jnp.take_along_axis(turned, positions, axis=1)
    query = rotate(_heads(config, hidden_BSD, weights.query), turned, config.rope_base)
    key = rotate(_heads(config, hidden_BSD, weights.key), turned, config.rope_base)
    value = _heads(config, hidden_BSD, weights.value)
    if cache is None:
        mixed_BSHC = causal_attention(query, key, value, segments)
    else:
        cache = cache.write(key, value, positions)
        seen_B1ST = jnp.arange(cache.key_BTHC.shape[1]) <= positions[:, None, :, None]
        if segments is not None:
            own_BS = jnp.take_along_axis(segments, positions, axis=1)
            seen_B1ST &= segments[:, None, None, :] == own_BS[:, None, :, None]
        mixed_BSHC = jax.nn.dot_product_attention(query, *cache, mask=seen_B1ST)
    return linear(mixed_BSHC.reshape(hidden_BSD.shape), weights.output, ("heads", "embed")), cache


def _heads(config: ModelConfig, hidden_BSD: jax.Array, weights: jax.Array) -> jax.Array:
    """One projection, split into heads: `[B, S, H, C]`."""
    batch, length, width = hidden_BSD.shape
    heads_BSHC = linear(hidden_BSD, weights, ("embed", "heads")).reshape(batch, length, -1, width // config.num_heads)
    return constrain(heads_BSHC, "batch", None, "heads", None)
