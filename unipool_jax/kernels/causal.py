"""Causal attention as plain array operations, in blocks of queries: what the mask hides is mostly never computed.

Long sequences without a narrow window are computed in tiles (`kernels.tiled`).

Arrays are `[B, S, H, C]`. Key and value heads J may be fewer than query heads: each serves H / J adjacent ones. Scores
and softmax are float32, products and results have the dtype of the queries. A query sees the keys up to its own
position; with a window w only the last w of them, its own among them; with segments only keys of its own segment.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from unipool_jax.kernels.tiled import TILE, UNSEEN, WHOLE, Mask, computed_tiles, in_tiles, tiled_attention

QUERY_BLOCKS = 4
"""Blocks of queries in `causal_attention`: 4 skip three eighths of all scores; 8 were no faster."""
_LEAST_BLOCK = 64
"""Queries of a block at least: skipping parts of short sequences saves nothing, and every block is a program part."""


def causal_attention(
    query_BSHC: jax.Array,
    key_BSHC: jax.Array,
    value_BSHC: jax.Array,
    segments_BS: jax.Array | None = None,
    window: int | None = None,
) -> jax.Array:
    """Softmax attention of each position to itself and those before, `[B, S, H, C]` in the dtype of the queries.

    Args:
      query_BSHC: queries.
      key_BSHC, value_BSHC: keys and values, `[B, S, J, C]`.
      segments_BS: int32; a query sees only keys of an equal number. None: a row is one text.
      window: w, positions that a query sees at most, so that time and memory are O(S w); None is all before it.
    """
    return _in_blocks(query_BSHC, key_BSHC, value_BSHC, segments_BS, window)[0]


def causal_attention_of_both(
    query_BSHC: jax.Array,
    key_BSHC: jax.Array,
    value_BSHC: jax.Array,
    segments_BS: jax.Array | None,
    window: int,
) -> tuple[jax.Array, jax.Array]:
    """`causal_attention` to all positions before and to those of the window, for little more than the first alone.

    Keys are split into the window and the rest. With the log-sum-exp of the scores of each, W and R, the rest has the
    weight sigmoid(R - W) in the softmax over both: flash-decoding's merge of two parts (arXiv 2205.14135).

    Returns:
      Attention to all, and to the window.
    """
    narrow_BSHC, window_BSH = _in_blocks(query_BSHC, key_BSHC, value_BSHC, segments_BS, window, normalizer=True)
    rest_BSHC, rest_BSH = _of_rest(query_BSHC, key_BSHC, value_BSHC, segments_BS, window)
    assert window_BSH is not None
    assert rest_BSH is not None
    share_BSH1 = jax.nn.sigmoid(rest_BSH - window_BSH)[..., None]
    full_BSHC = (1 - share_BSH1) * narrow_BSHC + share_BSH1 * rest_BSHC
    return full_BSHC.astype(query_BSHC.dtype), narrow_BSHC


def _of_rest(
    query_BSHC: jax.Array,
    key_BSHC: jax.Array,
    value_BSHC: jax.Array,
    segments_BS: jax.Array | None,
    window: int,
) -> tuple[jax.Array, jax.Array | None]:
    """`_in_blocks` to what the window hides."""
    if in_tiles(query_BSHC.shape[1]):
        return tiled_attention(query_BSHC, key_BSHC, value_BSHC, segments_BS, Mask(window, rest=True))
    return _blocks(query_BSHC, key_BSHC, value_BSHC, segments_BS, window, normalizer=True, rest=True)


def _in_blocks(
    query_BSHC: jax.Array,
    key_BSHC: jax.Array,
    value_BSHC: jax.Array,
    segments_BS: jax.Array | None,
    window: int | None,
    normalizer: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Attention, and the log-sum-exp of every query's scores, float32 `[B, S, H]`, if that is wanted."""
    length = query_BSHC.shape[1]
    narrow = None if window is None or block_of_window(window, length) is None else window
    if in_tiles(length, narrow):
        return tiled_attention(query_BSHC, key_BSHC, value_BSHC, segments_BS, Mask(window))
    if narrow is not None:
        return _banded(query_BSHC, key_BSHC, value_BSHC, segments_BS, narrow, normalizer)
    return _blocks(query_BSHC, key_BSHC, value_BSHC, segments_BS, window, normalizer)


def _blocks(
    query_BSHC: jax.Array,
    key_BSHC: jax.Array,
    value_BSHC: jax.Array,
    segments_BS: jax.Array | None,
    window: int | None,
    normalizer: bool = False,
    rest: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """`_in_blocks` in four blocks, each with the keys that one of its queries sees; `rest` is what the window hides."""
    batch, length, heads, channels = query_BSHC.shape
    # J key-value heads, I query heads for each. With heads ahead of positions each head's matrices lie in one piece.
    query_BJISC = query_BSHC.reshape(batch, length, key_BSHC.shape[2], -1, channels).transpose(0, 2, 3, 1, 4)
    key_BJSC, value_BJSC = key_BSHC.transpose(0, 2, 1, 3), value_BSHC.transpose(0, 2, 1, 3)
    position_S, hidden = jnp.arange(length), UNSEEN if rest else -jnp.inf
    block, mixed, sums = _block(length), list[jax.Array](), list[jax.Array]()
    for start in range(0, length, block):
        rows, end = slice(start, start + block), start + block
        first = 0 if window is None or rest else max(start - window + 1, 0)
        if rest:
            assert window is not None
            # One key at least, of which nothing may be seen.
            end = max(min(end, length) - window, 1)
        seen = slice(first, end)

        scores_BJIST = jnp.einsum(
            "bjisc,bjtc->bjist",
            query_BJISC[..., rows, :],
            key_BJSC[..., seen, :],
            preferred_element_type=jnp.float32,
        )
        own_S = position_S[rows]
        visible_ST = own_S[:, None] >= position_S[seen]
        if window is not None:
            near_ST = own_S[:, None] - position_S[seen] < window
            visible_ST &= ~near_ST if rest else near_ST
        if segments_BS is not None:
            visible_ST = visible_ST & (segments_BS[:, rows, None] == segments_BS[:, None, seen])[:, None, None]
        masked_BJIST = jnp.where(visible_ST, scores_BJIST / math.sqrt(channels), hidden)
        weights_BJIST = jax.nn.softmax(masked_BJIST).astype(value_BSHC.dtype)
        mixed_BJISC = jnp.einsum("bjist,bjtc->bjisc", weights_BJIST, value_BJSC[..., seen, :])
        mixed.append(mixed_BJISC)
        if normalizer:
            sums.append(jax.nn.logsumexp(masked_BJIST, axis=-1))
    mixed_BSHC = jnp.concatenate(mixed, axis=3).transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, channels)
    if not normalizer:
        return mixed_BSHC, None
    return mixed_BSHC, jnp.concatenate(sums, axis=3).transpose(0, 3, 1, 2).reshape(batch, length, heads)


def block_of_window(window: int, length: int) -> int | None:
    """Queries in a block of `_banded`; None where the window is so wide that the blocks of a full layer cost less.

    A query is compared with its block and with enough blocks before it to hold the window: with a quarter of the window
    as block that is 5/4 of the window, which exceeds the 5/8 of the sequence of a full layer from half of it on.
    """
    return None if 2 * window >= length or length <= 2 * _LEAST_BLOCK else max(-(-window // 4), _LEAST_BLOCK)


def computed_scores(length: int, window: int | None = None) -> int:
    """Scores of one head that `causal_attention` computes for a sequence on an accelerator, masked ones included."""
    narrow = None if window is None else block_of_window(window, length)
    if narrow is not None:
        assert window is not None
        return -(-length // narrow) * narrow * narrow * (1 + -(-(window - 1) // narrow))
    if length > WHOLE:
        return computed_tiles(length, Mask(window)) * TILE * TILE
    block, total = _block(length), 0
    for start in range(0, length, block):
        first, end = 0 if window is None else max(start - window + 1, 0), min(start + block, length)
        total += (end - start) * (end - first)
    return total


def _block(length: int) -> int:
    """Queries in a block of `causal_attention`."""
    return max(-(-length // QUERY_BLOCKS), _LEAST_BLOCK)


def _banded(
    query_BSHC: jax.Array,
    key_BSHC: jax.Array,
    value_BSHC: jax.Array,
    segments_BS: jax.Array | None,
    window: int,
    normalizer: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """`_in_blocks` in N equal blocks at once: a loop over them would be a program that grows with S / w."""
    batch, length, heads, channels = query_BSHC.shape
    kv_heads, block = key_BSHC.shape[2], block_of_window(window, length)
    assert block is not None
    blocks, before = -(-length // block), -(-(window - 1) // block)
    behind = blocks * block - length

    def band(array_BS: jax.Array, fill: int = 0) -> jax.Array:
        """`[B, S, ...]` as what each block sees, itself and the blocks before it: `[B, N, T, ...]`."""
        pad = [(0, 0), (before * block, behind), *[(0, 0)] * (array_BS.ndim - 2)]
        padded = jnp.pad(array_BS, pad, constant_values=fill).reshape(batch, -1, block, *array_BS.shape[2:])
        return jnp.concatenate([padded[:, i : i + blocks] for i in range(before + 1)], axis=2)

    def cut(array_BS: jax.Array) -> jax.Array:
        """`[B, S, ...]` in blocks: `[B, N, S / N, ...]`."""
        pad = [(0, 0), (0, behind), *[(0, 0)] * (array_BS.ndim - 2)]
        return jnp.pad(array_BS, pad).reshape(batch, blocks, block, *array_BS.shape[2:])

    query_BJINSC = cut(query_BSHC.reshape(batch, length, kv_heads, -1, channels)).transpose(0, 3, 4, 1, 2, 5)
    key_BJNTC, value_BJNTC = (band(array).transpose(0, 3, 1, 2, 4) for array in (key_BSHC, value_BSHC))
    # Of the padding before the first position nothing is seen; behind the last, queries see themselves at least.
    query_NS1 = jnp.arange(blocks * block).reshape(blocks, block, 1)
    key_N1T = query_NS1[:, :1] + jnp.arange(-before * block, block)
    visible_NST = (key_N1T >= 0) & (key_N1T <= query_NS1) & (query_NS1 - key_N1T < window)
    if segments_BS is not None:
        same_BNST = cut(segments_BS)[..., None] == band(segments_BS)[:, :, None]
        visible_NST = visible_NST & same_BNST[:, None, None]
    scores_BJINST = jnp.einsum(
        "bjinsc,bjntc->bjinst", query_BJINSC, key_BJNTC, preferred_element_type=jnp.float32
    ) / math.sqrt(channels)
    masked_BJINST = jnp.where(visible_NST, scores_BJINST, -jnp.inf)
    weights_BJINST = jax.nn.softmax(masked_BJINST).astype(value_BSHC.dtype)
    mixed_BJINSC = jnp.einsum("bjinst,bjntc->bjinsc", weights_BJINST, value_BJNTC)
    mixed_BSHC = mixed_BJINSC.transpose(0, 3, 4, 1, 2, 5).reshape(batch, -1, heads, channels)[:, :length]
    if not normalizer:
        return mixed_BSHC, None
    sum_BJINS = jax.nn.logsumexp(masked_BJINST, axis=-1)
    return mixed_BSHC, sum_BJINS.transpose(0, 3, 4, 1, 2).reshape(batch, -1, heads)[:, :length]


def cached_attention(
    query_BSHC: jax.Array,
    key_LBTHC: jax.Array,
    value_LBTHC: jax.Array,
    layer: jax.Array | int,
    start_B: jax.Array,
    segments_BT: jax.Array | None = None,
    window: int | None = None,
) -> jax.Array:
    """`causal_attention` to keys and values in T slots a row, of which slot p holds position p.

    Args:
      query_BSHC: queries of the positions `start_B[b] .. start_B[b] + S - 1` of row b.
      key_LBTHC, value_LBTHC: all slots of all layers, `[L, B, T, J, C]`; those behind a query do not matter.
      layer: whose slots are read. They are not cut out before the window is: that would copy all T.
      start_B: position of each row's first query, int32.
      segments_BT: as there, of all slots.
      window: as there. A token then reads w slots, however many there are.
    """
    (batch, length), slots = query_BSHC.shape[:2], key_LBTHC.shape[2]
    block = length if window is None else min(length, max(window, _LEAST_BLOCK))
    size = slots if window is None else min(slots, window + block - 1)

    def attend(query_BSHC: jax.Array, offset: jax.Array | int) -> jax.Array:
        """Queries of one block, the first of which is `offset` positions behind `start_B`."""
        position_BS1 = ((start_B + offset)[:, None] + jnp.arange(query_BSHC.shape[1]))[..., None]
        if window is not None and size < slots:
            first_B = jnp.clip(position_BS1[:, 0, 0] - window + 1, 0, slots - size)
            slot_BT = first_B[:, None] + jnp.arange(size)
            at = layer, jnp.arange(batch)[:, None], slot_BT
            key, value = key_LBTHC[at], value_LBTHC[at]
            segments = None if segments_BT is None else jnp.take_along_axis(segments_BT, slot_BT, axis=1)
        else:
            slot_BT = jnp.broadcast_to(jnp.arange(slots), (batch, slots))
            key, value, segments = key_LBTHC[layer], value_LBTHC[layer], segments_BT
        visible_BST = slot_BT[:, None] <= position_BS1
        if window is not None:
            visible_BST &= position_BS1 - slot_BT[:, None] < window
        if segments_BT is not None and segments is not None:
            own_BS = jnp.take_along_axis(segments_BT, position_BS1[..., 0], axis=1)
            visible_BST &= own_BS[..., None] == segments[:, None]
        return jax.nn.dot_product_attention(query_BSHC, key, value, mask=visible_BST[:, None])

    if block == length:
        return attend(query_BSHC, 0)
    blocks = -(-length // block)
    padded = jnp.pad(query_BSHC, ((0, 0), (0, blocks * block - length), (0, 0), (0, 0)))
    query_NBSHC = jnp.moveaxis(padded.reshape(padded.shape[0], blocks, block, *padded.shape[2:]), 1, 0)
    mixed_NBSHC = jax.lax.map(lambda part: attend(*part), (query_NBSHC, jnp.arange(blocks) * block))
    return jnp.moveaxis(mixed_NBSHC, 0, 1).reshape(padded.shape)[:, :length]
