"""The plan of a grouped product: which rows of a sorted buffer belong to which expert.

A plan is made once per MoE layer, for one implementation, and shared by all grouped products of that layer, forward and
backward.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from unipool_jax.kernels import gpu_tiles, mosaic_tiles, tpu_tiles
from unipool_jax.kernels.implementations import Implementation, resolve, target_device_kind


class Tiling(NamedTuple):
    """How an implementation divides the rows of a group into tiles. Static: part of the compilation key.

    Attributes:
        implementation: the implementation that the plan is for.
        block_rows: leading rows of every group that are processed in one batched product; 0 where tiles cover all rows.
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
    """The positions of E groups in a buffer of R rows sorted by group. A pytree of int32 arrays.

    Attributes:
        group_sizes: `[E]` rows of each group, possibly zero.
        offsets: `[E + 1]` exclusive prefix sums: group e owns rows `offsets[e]:offsets[e + 1]`. Rows from
            `offsets[E]` on belong to no group: products write zeros there and ignore their content.
        row_group: `[R]` group of each row, E for rows of no group.
        tile_group: `[B]` group of each tile, in row order; E for tiles of rows of no group.
        tile_start: `[B]` first row of each tile.
        num_tiles: `[]` number of tiles that hold rows of a group; an empty group has none.
        num_tail_tiles: `[]` number of tiles after those that cover the rows of no group.
        tiling: the static sizes of the tiles.
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
    """The tiling for `num_rows` rows in `num_groups` groups."""
    expected = num_rows / num_groups
    if implementation == "pallas_tpu":
        tile_rows = tpu_tiles.tile_rows(target_device_kind(), expected)
        return Tiling(implementation, 0, tile_rows, tpu_tiles.ROW_ALIGNMENT)
    if implementation == "pallas_gpu":
        return Tiling(implementation, 0, gpu_tiles.tile_rows(expected), 1)
    if implementation == "mosaic_gpu":
        return Tiling(implementation, 0, mosaic_tiles.tile_rows(num_rows, num_groups), mosaic_tiles.ROWS)
    block, tile = block_shape(num_rows, num_groups)
    return Tiling(implementation, block, tile, 1)


def block_shape(num_rows: int, num_groups: int) -> tuple[int, int]:
    """Rows per group of the batched product, and rows of the tiles that cover the rest.

    The block holds the expected rows per group plus half a standard deviation of uniform random routing: a larger
    block multiplies padding, a smaller one sends every group through the tile loop. Chosen by measurement with
    `python -m benchmarks.grouped_matmul`.
    """
    expected = num_rows / num_groups
    block = max(8, math.ceil((expected + math.sqrt(expected) / 2) / 8) * 8)
    if block > 48:  # on CPU a batched product of more rows reads each matrix twice, which pays only well beyond 48
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
    """The plan for groups that are contiguous from row 0 of a buffer.

    Args:
        group_sizes_E: `[E]` integer array, rows of each group.
        num_rows: R, rows of the buffer. The sizes must sum to at most R. Their sum is traced and therefore not
            checked; rows beyond the buffer are dropped, so no product reads or writes outside it.
        implementation: computes the products of this plan; "auto" chooses by platform.
        expected_rows: mean number of rows in all groups together, if below R; tile sizes are chosen for it.

    Raises:
        ValueError: `group_sizes_E` is not a non-empty integer vector, `num_rows` is negative, or the implementation
            is unknown.

    Example:
        >>> plan = make_group_plan(jnp.array([2, 0, 3]), num_rows=6)
        >>> plan.offsets.tolist(), plan.row_group.tolist()
        ([0, 2, 2, 5], [0, 0, 2, 2, 2, 3])
    """
    group_sizes_E = jnp.asarray(group_sizes_E)
    if group_sizes_E.ndim != 1 or group_sizes_E.shape[0] == 0:
        raise ValueError(f"group_sizes_E has shape {group_sizes_E.shape}; expected [E] with E >= 1")
    if not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
        raise ValueError(f"group_sizes_E has dtype {group_sizes_E.dtype}; expected an integer dtype")
    if num_rows < 0:
        raise ValueError(f"num_rows is {num_rows}; expected zero or more rows")

    num_groups = group_sizes_E.shape[0]
    ends_E = jnp.minimum(jnp.cumsum(group_sizes_E.astype(jnp.int32)), num_rows)
    starts_E = jnp.concatenate([jnp.zeros_like(ends_E[:1]), ends_E[:-1]])
    offsets = jnp.concatenate([starts_E[:1], ends_E])
    row_group = _count_up_to(ends_E, jnp.arange(num_rows, dtype=jnp.int32))

    tiling = choose_tiling(resolve(implementation), expected_rows or num_rows, num_groups)
    block, tile, alignment = tiling.block_rows, tiling.tile_rows, tiling.alignment
    first_E = starts_E // alignment * alignment + block
    tiles_E = jnp.where(ends_E > starts_E, -(-jnp.maximum(ends_E - first_E, 0) // tile), 0)
    # The rows of no group form one more group. With blocks it needs no tiles: `_from_blocks` zeros these rows. On TPU
    # the last group zeros those that share its last block.
    shared = tiling.implementation == "pallas_tpu"
    tail = (ends_E[-1:] + (alignment - 1) * shared) // alignment * alignment
    tail_tiles = -(-(num_rows - tail) // tile) if block == 0 else jnp.zeros_like(tail)
    if alignment > 1 and not shared:
        # Rounded down, it may start before the last row without having any.
        tail_tiles = jnp.where(ends_E[-1:] < num_rows, tail_tiles, 0)
    tile_ends = jnp.cumsum(jnp.concatenate([tiles_E, tail_tiles]))
    if block:
        # A tile is at most as large as a block, so a group of n rows overflows into at most n // tile tiles.
        most_tiles = num_rows // tile
    else:
        unaligned = min(num_groups + (not shared), num_rows)
        most_tiles = min(num_groups, num_rows) + 1 + (num_rows + unaligned * (alignment - 1)) // tile
    index_B = jnp.arange(most_tiles, dtype=jnp.int32)
    tile_group = jnp.minimum(_count_up_to(tile_ends, index_B), num_groups)
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
    """The stable permutation that sorts rows by group, and the sizes of the groups.

    Args:
        group_ids_R: `[R]` non-negative integer group of each row. Ids of `num_groups` or more mean "no group": such
            rows are sorted last and not counted, which is how a caller drops rows.
        num_groups: E.

    Returns:
        `order_R` int32, such that `group_ids_R[order_R]` ascends (rows of no group keep their order), ties in their
        original order; and `group_sizes_E` int32.

    Raises:
        ValueError: `group_ids_R` is not an integer vector, or `num_groups` is not positive.

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
        # Pack group and row into one integer: on CPU, sorting one array is several times faster than an argsort.
        row_R = jnp.arange(num_rows, dtype=jnp.int32)
        sorted_ids_R, order_R = jnp.divmod(jnp.sort(group_ids_R * num_rows + row_R), max(1, num_rows))
    else:
        order_R = jnp.argsort(group_ids_R, stable=True).astype(jnp.int32)
        sorted_ids_R = group_ids_R[order_R]
    ends_E = _count_up_to(sorted_ids_R, jnp.arange(num_groups, dtype=jnp.int32))
    return order_R, jnp.diff(ends_E, prepend=0)


def _count_up_to(ascending: jax.Array, values: jax.Array) -> jax.Array:
    """How many of the ascending integers are at most each value, int32; by binary search.

    On a GPU the search is unrolled into few kernels: as a loop it launches four for each of its dozen turns.
    """

    def search(method: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
        return lambda a, v: jnp.searchsorted(a, v, side="right", method=method).astype(jnp.int32)

    unrolled = search("scan_unrolled")
    return lax.platform_dependent(ascending, values, cuda=unrolled, rocm=unrolled, default=search("scan"))
