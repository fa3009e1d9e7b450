"""The plan of a grouped product: which rows of a sorted buffer belong to which expert.

A plan is made once per MoE layer and shared by all of that layer's grouped products, forward and backward.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class GroupPlan(NamedTuple):
    """Where each of E groups lies in a buffer of R rows sorted by group. A pytree of int32 arrays.

    The portable path works on the first `block_rows` rows of every group at once and visits what is left of
    the larger groups tile by tile; `block_shape` gives both sizes, and so the number of tiles B.

    Attributes:
        group_sizes: `[E]` rows of each group; zero is allowed.
        offsets: `[E + 1]` exclusive prefix sums: group e owns rows `offsets[e]:offsets[e + 1]`. Rows from
            `offsets[E]` on belong to no group: products write zeros there and never use what they hold.
        row_group: `[R]` group of each row, E for rows of no group.
        tile_group: `[B]` group of each overflow tile.
        tile_start: `[B]` first row of each overflow tile.
        num_tiles: `[]` how many of the B overflow tiles exist.
    """

    group_sizes: jax.Array
    offsets: jax.Array
    row_group: jax.Array
    tile_group: jax.Array
    tile_start: jax.Array
    num_tiles: jax.Array


def block_shape(num_rows: int, num_groups: int) -> tuple[int, int]:
    """Rows per group handled in one batched product, and rows of the tiles that visit the rest.

    The block holds the expected rows per group and half a standard deviation of even random routing: a larger
    block multiplies padding, a smaller one sends every group through the tile loop. On CPU a batched product
    of more than 48 rows passes over each matrix a second time, which pays only well beyond 48 rows. Chosen by
    measurement with `python -m benchmarks.grouped_matmul`.
    """
    expected = num_rows / num_groups
    block = max(8, math.ceil((expected + math.sqrt(expected) / 2) / 8) * 8)
    if block > 48:
        block = 48 if expected <= 72 else math.ceil(block / 16) * 16
    tile = 32 if block <= 48 else 64
    return block, max(1, min(block, tile, num_rows))


def make_group_plan(group_sizes_E: jax.Array, num_rows: int) -> GroupPlan:
    """Plan for groups laid one after another from row 0 of a buffer.

    Args:
        group_sizes_E: `[E]` integer array, rows of each group.
        num_rows: R, rows of the buffer. The sizes must sum to at most R. That sum is a traced value and is
            not checked: rows beyond the buffer are cut off, so no product reads or writes outside it.

    Raises:
        ValueError: if `group_sizes_E` is not a non-empty vector of integers, or `num_rows` is negative.

    Example:
        >>> plan = make_group_plan(jnp.array([2, 0, 3]), num_rows=6)
        >>> plan.offsets.tolist(), plan.row_group.tolist()
        ([0, 2, 2, 5], [0, 0, 2, 2, 2, 3])
    """
    group_sizes_E = jnp.asarray(group_sizes_E)
    if group_sizes_E.ndim != 1 or group_sizes_E.shape[0] == 0:
        raise ValueError(f"group_sizes_E has shape {group_sizes_E.shape}; expected [E] with at least one group")
    if not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
        raise ValueError(f"group_sizes_E has dtype {group_sizes_E.dtype}; expected an integer dtype")
    if num_rows < 0:
        raise ValueError(f"num_rows is {num_rows}; expected zero or more rows")

    num_groups = group_sizes_E.shape[0]
    ends_E = jnp.minimum(jnp.cumsum(group_sizes_E.astype(jnp.int32)), num_rows)
    starts_E = jnp.concatenate([jnp.zeros_like(ends_E[:1]), ends_E[:-1]])
    row_group = jnp.searchsorted(ends_E, jnp.arange(num_rows, dtype=jnp.int32), side="right")

    block, tile = block_shape(num_rows, num_groups)
    tiles_E = -(-jnp.maximum(ends_E - starts_E - block, 0) // tile)
    tile_ends_E = jnp.cumsum(tiles_E)
    # A tile is no larger than a block, so a group of n rows overflows into at most n // tile tiles.
    index_B = jnp.arange(num_rows // tile, dtype=jnp.int32)
    tile_group = jnp.minimum(jnp.searchsorted(tile_ends_E, index_B, side="right"), num_groups - 1)
    tile_in_group = index_B - (tile_ends_E - tiles_E)[tile_group]
    return GroupPlan(
        group_sizes=ends_E - starts_E,
        offsets=jnp.concatenate([starts_E[:1], ends_E]),
        row_group=row_group.astype(jnp.int32),
        tile_group=tile_group.astype(jnp.int32),
        tile_start=(starts_E[tile_group] + block + tile_in_group * tile).astype(jnp.int32),
        num_tiles=tile_ends_E[-1].astype(jnp.int32),
    )


def sort_by_group(group_ids_R: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array]:
    """Stable order that brings the rows of each group together, and the groups' sizes.

    Args:
        group_ids_R: `[R]` integer group of each row, zero or more. Ids of `num_groups` or more mean "no group":
            such rows come last and are counted nowhere, which is how a caller drops rows.
        num_groups: E.

    Returns:
        `order_R` int32, such that `group_ids_R[order_R]` ascends up to the rows of no group, ties (and those
        rows) in their original order; and `group_sizes_E` int32.

    Raises:
        ValueError: if `group_ids_R` is not an integer vector or `num_groups` is not positive.

    Example:
        >>> order, sizes = sort_by_group(jnp.array([1, 0, 1]), num_groups=2)
        >>> order.tolist(), sizes.tolist()
        ([1, 0, 2], [1, 2])
    """
    if group_ids_R.ndim != 1 or not jnp.issubdtype(group_ids_R.dtype, jnp.integer):
        raise ValueError(
            f"group_ids_R has shape {group_ids_R.shape} and dtype {group_ids_R.dtype}; expected an integer vector [R]"
        )
    if num_groups < 1:
        raise ValueError(f"num_groups is {num_groups}; expected at least 1")
    num_rows = group_ids_R.shape[0]
    group_ids_R = jnp.minimum(group_ids_R, num_groups).astype(jnp.int32)
    if (num_groups + 1) * num_rows <= jnp.iinfo(jnp.int32).max:
        # Group and row in one integer: sorting a single array is several times faster on CPU than an argsort.
        row_R = jnp.arange(num_rows, dtype=jnp.int32)
        sorted_ids_R, order_R = jnp.divmod(jnp.sort(group_ids_R * num_rows + row_R), max(1, num_rows))
    else:
        order_R = jnp.argsort(group_ids_R, stable=True).astype(jnp.int32)
        sorted_ids_R = group_ids_R[order_R]
    ends_E = jnp.searchsorted(sorted_ids_R, jnp.arange(num_groups, dtype=jnp.int32), side="right")
    return order_R, jnp.diff(ends_E, prepend=0).astype(jnp.int32)
