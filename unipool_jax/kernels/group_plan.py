"""The plan of a grouped product: which rows of a sorted buffer belong to which expert.

A plan is made once per MoE layer, for one implementation, and shared by all of that layer's grouped products,
forward and backward.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from unipool_jax.kernels import gpu_tiles, tpu_tiles
from unipool_jax.kernels.implementations import Implementation, resolve, target_device_kind


class Tiling(NamedTuple):
    """How an implementation walks over the rows of a group; static, part of what a plan is compiled for.

    Attributes:
        implementation: the one that the plan is for.
        block_rows: leading rows of every group that are handled apart from the tiles; 0 where tiles do it all.
        tile_rows: rows of a tile.
        alignment: a group's first tile starts at its first row rounded down to a multiple of this.
    """

    implementation: Implementation
    block_rows: int
    tile_rows: int
    alignment: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GroupPlan:
    """Where each of E groups lies in a buffer of R rows sorted by group. A pytree of int32 arrays.

    Attributes:
        group_sizes: `[E]` rows of each group; zero is allowed.
        offsets: `[E + 1]` exclusive prefix sums: group e owns rows `offsets[e]:offsets[e + 1]`. Rows from
            `offsets[E]` on belong to no group: products write zeros there and never use what they hold.
        row_group: `[R]` group of each row, E for rows of no group.
        tile_group: `[B]` group of each tile, in the order of the rows; E for tiles of rows of no group.
        tile_start: `[B]` first row of each tile.
        num_tiles: `[]` how many of the B tiles hold rows of a group; an empty group has none.
        num_tail_tiles: `[]` how many tiles after those cover the rows of no group.
        tiling: the static sizes behind the tiles.
    """

    group_sizes: jax.Array
    offsets: jax.Array
    row_group: jax.Array
    tile_group: jax.Array
    tile_start: jax.Array
    num_tiles: jax.Array
    num_tail_tiles: jax.Array
    tiling: Tiling = field(metadata={"static": True})


def choose_tiling(implementation: Implementation, num_rows: int, num_groups: int) -> Tiling:
    """Sizes of blocks and tiles for `num_rows` rows in `num_groups` groups."""
    expected = num_rows / num_groups
    if implementation == "pallas_tpu":
        tile_rows = tpu_tiles.tile_rows(target_device_kind(), expected)
        return Tiling(implementation, 0, tile_rows, tpu_tiles.ROW_ALIGNMENT)
    if implementation == "pallas_gpu":
        return Tiling(implementation, 0, gpu_tiles.tile_rows(expected), 1)
    block, tile = block_shape(num_rows, num_groups)
    return Tiling(implementation, block, tile, 1)


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


def make_group_plan(
    group_sizes_E: jax.Array,
    num_rows: int,
    *,
    implementation: Implementation = "auto",
    expected_rows: int | None = None,
) -> GroupPlan:
    """Plan for groups laid one after another from row 0 of a buffer.

    Args:
        group_sizes_E: `[E]` integer array, rows of each group.
        num_rows: R, rows of the buffer. The sizes must sum to at most R. That sum is a traced value and is
            not checked: rows beyond the buffer are cut off, so no product reads or writes outside it.
        implementation: what computes the products of this plan; "auto" chooses by platform.
        expected_rows: rows that all groups have together on average, where the buffer has room for more; sizes of
            tiles are chosen for it.

    Raises:
        ValueError: if `group_sizes_E` is not a non-empty vector of integers, `num_rows` is negative, or the
            implementation is unknown.

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
    offsets = jnp.concatenate([starts_E[:1], ends_E])
    row_group = jnp.searchsorted(ends_E, jnp.arange(num_rows, dtype=jnp.int32), side="right").astype(jnp.int32)

    tiling = choose_tiling(resolve(implementation), expected_rows or num_rows, num_groups)
    block, tile, alignment = tiling.block_rows, tiling.tile_rows, tiling.alignment
    first_E = starts_E // alignment * alignment + block
    tiles_E = jnp.where(ends_E > starts_E, -(-jnp.maximum(ends_E - first_E, 0) // tile), 0)
    # The rows of no group, as one more group; where blocks do part of the work they also see to these rows.
    tail = -(-ends_E[-1:] // alignment) * alignment
    tail_tiles = -(-(num_rows - tail) // tile) if block == 0 else jnp.zeros_like(tail)
    tile_ends = jnp.cumsum(jnp.concatenate([tiles_E, tail_tiles]))
    if block:
        # A tile is no larger than a block, so a group of n rows overflows into at most n // tile tiles.
        most_tiles = num_rows // tile
    else:
        most_tiles = min(num_groups, num_rows) + 1 + (num_rows + min(num_groups, num_rows) * (alignment - 1)) // tile
    index_B = jnp.arange(most_tiles, dtype=jnp.int32)
    tile_group = jnp.minimum(jnp.searchsorted(tile_ends, index_B, side="right"), num_groups).astype(jnp.int32)
    first_tile = jnp.concatenate([jnp.zeros_like(tile_ends[:1]), tile_ends[:-1]])[tile_group]
    tile_start = jnp.concatenate([first_E, tail])[tile_group] + (index_B - first_tile) * tile
    return GroupPlan(
        group_sizes=ends_E - starts_E,
        offsets=offsets,
        row_group=row_group,
        tile_group=tile_group,
        tile_start=tile_start.astype(jnp.int32),
        num_tiles=tile_ends[-2].astype(jnp.int32),
        num_tail_tiles=tail_tiles[0].astype(jnp.int32),
        tiling=tiling,
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
