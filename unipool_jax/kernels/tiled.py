"""Causal attention of long sequences in tiles of scores that stay in cache: FlashAttention (arXiv 2205.14135) as loops.

Scores of one block of queries with one block of keys are in memory at a time. The softmax is carried from tile to tile
by the maximum and the sum so far, and the backward pass computes the scores again from the log-sum-exp.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from unipool_jax.kernels.implementations import target_device_kind

TILE = 256
"""Queries, and keys, of a tile; the queries of all heads that share a key are in it. 128 and 512 were slower."""
LEAST = 1024
"""Positions from which sequences are computed so on a CPU. The whole blocks of shorter ones fit its cache."""
WHOLE = 4096
"""Positions beyond which all are, wherever they run: memory of whole blocks would grow with their square."""
UNSEEN = -1e30
"""Log-sum-exp of nothing: finite, so that gradients of a query that sees nothing are zero and not NaN."""


@dataclass(frozen=True)
class Mask:
    """Which of the positions before it a query sees."""

    window: int | None = None
    """The last so many, its own among them; None is all."""
    rest: bool = False
    """Those that the window hides, in its place."""

    def visible(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """Whether queries at these positions see keys at those, bool, broadcast."""
        if self.window is None:
            return query >= key
        near = query - key < self.window
        return (query >= key) & (~near if self.rest else near)

    def tiles(self, block: Any, maximum: Callable[[Any, int], Any] = jnp.maximum) -> tuple[Any, Any]:
        """The first block of keys of which a block of queries sees any, and the one behind the last."""
        if self.window is None:
            return 0, block + 1
        if self.rest:
            return 0, maximum((block * TILE + TILE - 1 - self.window) // TILE + 1, 0)
        return maximum(block * TILE - self.window + 1, 0) // TILE, block + 1


def in_tiles(length: int, narrow: int | None = None) -> bool:
    """Whether sequences are computed so on the device that is compiled for; `narrow` is a window that need not be."""
    if target_device_kind() == "cpu":
        return length >= LEAST and (narrow is None or narrow >= TILE)
    return length > WHOLE and narrow is None


def computed_tiles(length: int, mask: Mask) -> int:
    """Tiles of one head for a sequence."""
    bounds = [mask.tiles(block, max) for block in range(-(-length // TILE))]
    return sum(end - first for first, end in bounds)


def tiled_attention(
    query_BSHC: jax.Array,
    key_BSHC: jax.Array,
    value_BSHC: jax.Array,
    segments_BS: jax.Array | None,
    mask: Mask,
) -> tuple[jax.Array, jax.Array]:
    """`causal.causal_attention`, and the log-sum-exp of every query's scores, float32 `[B, S, H]`."""
    batch, length, heads, channels = query_BSHC.shape
    pad = -length % TILE
    # What is padded is behind every query that counts, and a padded query has no gradient.
    query_BSHC, key_BSHC, value_BSHC = (
        jnp.pad(array, ((0, 0), (0, pad), (0, 0), (0, 0))) for array in (query_BSHC, key_BSHC, value_BSHC)
    )
    if segments_BS is not None:
        segments_BS = jnp.pad(segments_BS, ((0, 0), (0, pad)), mode="edge")
    query_BJISC = query_BSHC.reshape(batch, length + pad, key_BSHC.shape[2], -1, channels).transpose(0, 2, 3, 1, 4)
    key_BJSC, value_BJSC = key_BSHC.transpose(0, 2, 1, 3), value_BSHC.transpose(0, 2, 1, 3)
    mixed_BJISC, sum_BJIS = _tiled(mask, query_BJISC, key_BJSC, value_BJSC, segments_BS)
    mixed_BSHC = mixed_BJISC.transpose(0, 3, 1, 2, 4).reshape(batch, -1, heads, channels)
    return mixed_BSHC[:, :length], sum_BJIS.transpose(0, 3, 1, 2).reshape(batch, -1, heads)[:, :length]


def _cut(array: jax.Array, block: jax.Array, axis: int) -> jax.Array:
    """The positions of a block."""
    return jax.lax.dynamic_slice_in_dim(array, block * TILE, TILE, axis)


def _rows(array_BJIS: jax.Array, block: jax.Array) -> jax.Array:
    """A block of queries of all heads of a key head, `[B, J, I TILE, ...]`: one matrix for each key head."""
    cut = _cut(array_BJIS, block, 3)
    return cut.reshape(*cut.shape[:2], -1, *cut.shape[4:])


def _joined(array_NBJR: jax.Array, heads: int) -> jax.Array:
    """The inverse of `_rows`, for blocks along a first axis: `[B, J, I, S, ...]`."""
    blocks, batch, kv_heads, _, *rest = array_NBJR.shape
    cut = array_NBJR.reshape(blocks, batch, kv_heads, heads, TILE, *rest)
    return jnp.moveaxis(cut, 0, 3).reshape(batch, kv_heads, heads, -1, *rest)


def _scores(
    mask: Mask,
    query_BJRC: jax.Array,
    key_BJTC: jax.Array,
    segments_BS: jax.Array | None,
    block: jax.Array,
    other: jax.Array,
) -> jax.Array:
    """Scores of a block of queries with another of keys, float32 `[B, J, R, T]`, -inf where a key is not seen."""
    batch, kv_heads, rows, channels = query_BJRC.shape
    scores = jnp.einsum("bjrc,bjtc->bjrt", query_BJRC, key_BJTC, preferred_element_type=jnp.float32)
    place = jnp.arange(TILE)
    visible_ST = mask.visible(block * TILE + place[:, None], other * TILE + place)
    if segments_BS is not None:
        same_BST = _cut(segments_BS, block, 1)[:, :, None] == _cut(segments_BS, other, 1)[:, None]
        visible_ST = visible_ST & same_BST[:, None, None]
    by_head = scores.reshape(batch, kv_heads, -1, TILE, TILE) / math.sqrt(channels)
    return jnp.where(visible_ST, by_head, -jnp.inf).reshape(batch, kv_heads, rows, TILE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled(
    mask: Mask,
    query_BJISC: jax.Array,
    key_BJSC: jax.Array,
    value_BJSC: jax.Array,
    segments_BS: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of I query heads to each of J key heads, and log-sum-exp, float32 `[B, J, I, S]`."""
    batch, kv_heads, heads, length, channels = query_BJISC.shape
    rows = (batch, kv_heads, heads * TILE)

    def attend(block: jax.Array) -> tuple[jax.Array, jax.Array]:
        query_BJRC = _rows(query_BJISC, block)

        def add(other: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            highest_BJR, total_BJR, mixed_BJRC = carry
            scores_BJRT = _scores(mask, query_BJRC, _cut(key_BJSC, other, 2), segments_BS, block, other)
            new_BJR = jnp.maximum(highest_BJR, jnp.max(scores_BJRT, axis=-1))
            weights_BJRT = jnp.exp(scores_BJRT - new_BJR[..., None])
            before_BJR = jnp.exp(highest_BJR - new_BJR)
            values_BJRC = jnp.einsum(
                "bjrt,bjtc->bjrc",
                weights_BJRT.astype(value_BJSC.dtype),
                _cut(value_BJSC, other, 2),
                preferred_element_type=jnp.float32,
            )
            total_BJR = total_BJR * before_BJR + jnp.sum(weights_BJRT, axis=-1)
            return new_BJR, total_BJR, mixed_BJRC * before_BJR[..., None] + values_BJRC

        empty = jnp.full(rows, UNSEEN), jnp.zeros(rows), jnp.zeros((*rows, channels))
        highest_BJR, total_BJR, mixed_BJRC = jax.lax.fori_loop(*mask.tiles(block), add, empty)
        # Of nothing the sum is 0, and every other one is at least 1.
        total_BJR = jnp.maximum(total_BJR, 1e-30)
        mixed_BJRC = mixed_BJRC / total_BJR[..., None]
        return mixed_BJRC.astype(query_BJISC.dtype), highest_BJR + jnp.log(total_BJR)

    mixed_NBJRC, sum_NBJR = jax.lax.map(attend, jnp.arange(length // TILE))
    return _joined(mixed_NBJRC, heads), _joined(sum_NBJR, heads)


_Kept = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array, jax.Array]


def _forward(
    mask: Mask,
    query_BJISC: jax.Array,
    key_BJSC: jax.Array,
    value_BJSC: jax.Array,
    segments_BS: jax.Array | None,
) -> tuple[tuple[jax.Array, jax.Array], _Kept]:
    found = _tiled(mask, query_BJISC, key_BJSC, value_BJSC, segments_BS)
    return found, (query_BJISC, key_BJSC, value_BJSC, segments_BS, *found)


def _backward(
    mask: Mask, kept: _Kept, upstream: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """Gradients of queries, keys and values (arXiv 2205.14135, appendix B.2). That of the log-sum-exp, of which the
    derivative by a score is its weight, joins the term that all scores of a query have in common."""
    query_BJISC, key_BJSC, value_BJSC, segments_BS, mixed_BJISC, sum_BJIS = kept
    upstream_BJISC, of_sum_BJIS = upstream
    heads, length, channels = query_BJISC.shape[2:]
    common_BJIS = jnp.sum(upstream_BJISC.astype(jnp.float32) * mixed_BJISC, axis=-1) - of_sum_BJIS
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def gradients(
        total: tuple[jax.Array, jax.Array], block: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        query_BJRC, upstream_BJRC = _rows(query_BJISC, block), _rows(upstream_BJISC, block)
        sum_BJR, common_BJR = _rows(sum_BJIS, block), _rows(common_BJIS, block)

        def add(other: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            of_key, of_value, of_query_BJRC = carry
            key_BJTC, value_BJTC = _cut(key_BJSC, other, 2), _cut(value_BJSC, other, 2)
            scores_BJRT = _scores(mask, query_BJRC, key_BJTC, segments_BS, block, other)
            weights_BJRT = jnp.exp(scores_BJRT - sum_BJR[..., None])
            of_weights_BJRT = dot("bjrc,bjtc->bjrt", upstream_BJRC, value_BJTC) - common_BJR[..., None]
            of_scores_BJRT = (weights_BJRT * of_weights_BJRT / math.sqrt(channels)).astype(query_BJISC.dtype)
            weights_BJRT = weights_BJRT.astype(value_BJSC.dtype)

            def plus(total_BJSC: jax.Array, part_BJTC: jax.Array) -> jax.Array:
                sums = _cut(total_BJSC, other, 2) + part_BJTC
                return jax.lax.dynamic_update_slice_in_dim(total_BJSC, sums, other * TILE, 2)

            return (
                plus(of_key, dot("bjrt,bjrc->bjtc", of_scores_BJRT, query_BJRC)),
                plus(of_value, dot("bjrt,bjrc->bjtc", weights_BJRT, upstream_BJRC)),
                of_query_BJRC + dot("bjrt,bjtc->bjrc", of_scores_BJRT, key_BJTC),
            )

        start = *total, jnp.zeros(query_BJRC.shape)
        of_key, of_value, of_query_BJRC = jax.lax.fori_loop(*mask.tiles(block), add, start)
        return (of_key, of_value), of_query_BJRC

    zeros = jnp.zeros(key_BJSC.shape)
    (of_key, of_value), of_query_NBJRC = jax.lax.scan(gradients, (zeros, zeros), jnp.arange(length // TILE))
    of_query = _joined(of_query_NBJRC, heads).astype(query_BJISC.dtype)
    return of_query, of_key.astype(key_BJSC.dtype), of_value.astype(value_BJSC.dtype), None


_tiled.defvjp(_forward, _backward)
