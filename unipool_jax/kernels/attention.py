"""Causal attention of a training sequence, by implementation: ours in blocks, and those of libraries.

All take what `causal.causal_attention` takes and compute the same function; see there. They run on one device's part of
the batch and of the heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from unipool_jax.kernels.causal import causal_attention
from unipool_jax.kernels.implementations import target_device_kind

LANES = 128
"""Positions that a tile of splash attention holds at least, and copies of a row's log-sum-exp that it writes."""
_LARGEST_TILE = 512


def splash_tile(length: int) -> int:
    """Positions of a tile: the largest of 512, 256 and 128 that divides the sequence, padded to a multiple of 128."""
    padded = -(-length // LANES) * LANES
    return math.gcd(padded, _LARGEST_TILE)


def splash_tiles(length: int, window: int | None = None) -> int:
    """Tiles of scores that `splash_attention` computes for one head: those that the mask does not hide whole."""
    tile = splash_tile(length)
    before = length if window is None else -(-(window - 1) // tile)
    return sum(min(row, before) + 1 for row in range(-(-length // tile)))


def splash_attention(
    query_BSHC: jax.Array,
    key_BSHC: jax.Array,
    value_BSHC: jax.Array,
    segments_BS: jax.Array | None = None,
    window: int | None = None,
) -> jax.Array:
    """JAX's kernels for TPU (arXiv 2205.14135, with masks that skip tiles); on other devices they are interpreted."""
    # Here, so that nothing but its use depends on an experimental module.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads, channels = query_BSHC.shape[1:]
    tile = splash_tile(length)
    # Padding is behind every query that counts, so the mask hides it.
    pad = -length % tile
    # The kernel does not scale scores. One rounding of the queries, none where the root of C is a power of two.
    query_BSHC = (query_BSHC.astype(jnp.float32) / math.sqrt(channels)).astype(query_BSHC.dtype)
    query_BHSC, key_BHSC, value_BHSC = (
        jnp.pad(array, ((0, 0), (0, pad), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
        for array in (query_BSHC, key_BSHC, value_BSHC)
    )
    shape = (length + pad, length + pad)
    mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=tile,
            block_kv=tile,
            block_q_dkv=tile,
            block_kv_dkv=tile,
            block_q_dq=tile,
            block_kv_dq=tile,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret="tpu" not in target_device_kind().lower(),
    )
    segments = None
    if segments_BS is not None:
        padded_BS = jnp.pad(segments_BS, ((0, 0), (0, pad)))
        segments = splash.SegmentIds(padded_BS, padded_BS)
    mixed_BHSC = jax.vmap(kernel)(query_BHSC, key_BHSC, value_BHSC, segments)
    return mixed_BHSC.transpose(0, 2, 1, 3)[:, :length]


def cudnn_attention(
    query_BSHC: jax.Array,
    key_BSHC: jax.Array,
    value_BSHC: jax.Array,
    segments_BS: jax.Array | None = None,
    window: int | None = None,
) -> jax.Array:
    """cuDNN's fused attention on NVIDIA GPUs, for 16-bit operands. Segments are a mask of S x S bits a row."""
    length, same = query_BSHC.shape[1], None
    if segments_BS is not None:
        # With a mask cuDNN has gradients for even lengths alone. What is padded is behind every query that counts.
        odd = length % 2
        segments_BS = jnp.pad(segments_BS, ((0, 0), (0, odd)), mode="edge")
        query_BSHC, key_BSHC, value_BSHC = (
            jnp.pad(array, ((0, 0), (0, odd), (0, 0), (0, 0))) for array in (query_BSHC, key_BSHC, value_BSHC)
        )
        same = (segments_BS[:, :, None] == segments_BS[:, None])[:, None]
    mixed_BSHC = jax.nn.dot_product_attention(
        query_BSHC,
        key_BSHC,
        value_BSHC,
        mask=same,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return mixed_BSHC[:, :length]


PRODUCTS: dict[str, Callable[..., jax.Array]] = {
    "blocks": causal_attention,
    "splash": splash_attention,
    "cudnn": cudnn_attention,
}
"""Of each of `implementations.Attention` but "auto"."""
