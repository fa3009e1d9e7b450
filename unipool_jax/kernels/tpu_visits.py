"""The visits of the TPU kernels: which rows each one reads, and which it completes.

Both kernels visit the tiles of a plan in row order, so each expert's matrix is read once per pass, and so are the rows.

Memory moves in blocks of 16 rows. A tile starts at its group's first row rounded down to a multiple of 16, and two
groups may share a block. With tiles of 32 rows, group 0 of 20 rows and group 1 of 40:

    block of 16 rows       0        1        2        3
    its groups             0        0, 1     1        1
    visit 0, group 0     reads    reads                     completes block 0
    visit 1, group 1              shares   reads            completes blocks 1 and 2
    visit 2, group 1                                reads   completes block 3

The later group finds the shared block in the buffer of the visit before. Computing a block for both groups costs less
than 16 rows, but writing it twice would be a race: only the visit that completes a block writes it.
"""

from typing import NamedTuple, overload

import jax
import jax.numpy as jnp

from unipool_jax.kernels.group_plan import GroupPlan
from unipool_jax.kernels.tpu_tiles import ROW_ALIGNMENT

BLOCK = ROW_ALIGNMENT
"""Rows of a block."""


class Visits(NamedTuple):
    """What each visit is about: int32 vectors, in a kernel references to scalar memory.

    The first five have an element for each visit; all but the group are numbers of rows, multiples of a block.
    """

    group: jax.Array
    """Group of the tile, E for rows of no group."""
    start: jax.Array
    """First row of the tile."""
    read: jax.Array
    """Rows that the visit reads."""
    shared: jax.Array
    """How many of them are in the buffer of the visit before: one block or none."""
    write: jax.Array
    """Rows that it completes: all that it reads but a block that the next group shares."""
    offsets: jax.Array
    """`[E + 1]`, the plan's offsets."""
    tiles: jax.Array
    """`[2]`: the number of tiles with rows of a group, and of all tiles."""
    place: jax.Array
    """`[1]`: which of the arrays of a stack is meant."""

    @property
    def num_groups(self) -> int:
        """E."""
        return self.offsets.shape[0] - 1


def make_visits(plan: GroupPlan, place: jax.Array | None) -> Visits:
    """A visit for each tile of the plan, and the place in stacks, if there are any."""
    num_groups, num_rows = plan.group_sizes.shape[0], round_up_to_block(plan.row_group.shape[0])
    tile_rows, offsets = plan.tiling.tile_rows, plan.offsets
    of_group = plan.tile_group < num_groups
    end = jnp.where(of_group, offsets[jnp.minimum(plan.tile_group + 1, num_groups)], num_rows)
    last_block = round_up_to_block(end)
    # The last group completes its last block too: no group follows that could.
    complete = jnp.where(of_group & (end < offsets[-1]), end // BLOCK * BLOCK, last_block)
    read = jnp.where(of_group, jnp.clip(last_block - plan.tile_start, 0, tile_rows), 0)
    read_before = jnp.pad((plan.tile_start + read)[:-1], (1, 0))
    return Visits(
        group=plan.tile_group,
        start=plan.tile_start,
        read=read,
        shared=jnp.where(of_group & (plan.tile_start < read_before), BLOCK, 0),
        write=jnp.clip(complete - plan.tile_start, 0, tile_rows),
        offsets=offsets,
        tiles=jnp.stack([plan.num_tiles, plan.num_tiles + plan.num_tail_tiles]),
        place=jnp.zeros_like(offsets[:1]) if place is None else place.reshape(1),
    )


@overload
def round_up_to_block(rows: int) -> int: ...
@overload
def round_up_to_block(rows: jax.Array) -> jax.Array: ...
def round_up_to_block(rows: jax.Array | int) -> jax.Array | int:
    """The least multiple of a block that is not below `rows`."""
    return (rows + BLOCK - 1) // BLOCK * BLOCK
