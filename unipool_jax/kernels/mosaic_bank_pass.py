"""The bank pass on Hopper: adds each group's outer products of rows to the gradient of the bank, in place.

A visit (`_visit`) is one tile of one group's matrix. Its sums so far are loaded while the product is computed, over
the group's rows in tiles of them; then both are added and stored.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from unipool_jax.kernels.mosaic_shared import SWAPPED, buffer, call, loaded, persistent, plgpu
from unipool_jax.kernels.mosaic_tiles import ROWS, BankTile


def bank_pass(
    rows_RK: jax.Array,
    grad_RN: jax.Array,
    offsets: jax.Array,
    into_EKN: jax.Array,
    tile: BankTile,
    interpret: Any = None,
) -> jax.Array:
    """`into` plus each group's sum of outer products `rows[r] grad[r]^T`, in its buffer where XLA can donate it.

    Args:
        rows_RK: `[R, K]` of 16 bits, R a multiple of 8 and K of 64.
        grad_RN: `[R, N]` of the same dtype, N a multiple of 64.
        offsets: `[E + 1]` group e owns rows `offsets[e]:offsets[e + 1]`.
        into_EKN: `[E, K, N]` float32. Groups without rows are neither read nor written.
        tile: sizes.
        interpret: Pallas's parameters to interpret the kernel; None compiles it.
    """
    num_groups, depth, width = into_EKN.shape
    visits = num_groups * pl.cdiv(depth, tile.depth) * pl.cdiv(width, tile.columns)

    def kernel(*refs: Any) -> None:
        persistent(jnp.int32(visits), tile.blocks, functools.partial(_visit, tile, _Refs(*refs)))

    # `plgpu.kernel` has no aliases of inputs and outputs: a Ref among its operands is both.
    into_ref = jax.new_ref(into_EKN)
    call(kernel, (), tile.blocks, "grouped_bank_gradient", interpret)(offsets, rows_RK, grad_RN, into_ref)
    return jax.freeze(into_ref)


class _Refs(NamedTuple):
    """References to the operands of `bank_pass`."""

    offsets: Any
    rows: Any
    grad: Any
    into: Any


class _Place(NamedTuple):
    """The group's rows, `start:end`, and the tile of its matrix."""

    start: jax.Array
    end: jax.Array
    at: jax.Array
    """First row that is loaded: `start` rounded down to a multiple of 8."""
    k: jax.Array
    """Which tile along K."""
    n: jax.Array
    """Which tile along N."""


def _visit(tile: BankTile, refs: _Refs, index: jax.Array) -> None:
    """One tile of one group's matrix, if the group has rows."""
    depth, width = refs.into.shape[1:]
    depth_tiles, column_tiles = pl.cdiv(depth, tile.depth), pl.cdiv(width, tile.columns)
    group = lax.div(index, jnp.int32(depth_tiles * column_tiles))
    of_matrix = lax.div(index, jnp.int32(column_tiles))
    k, n = lax.rem(of_matrix, jnp.int32(depth_tiles)), lax.rem(index, jnp.int32(column_tiles))
    start, end = refs.offsets[group], refs.offsets[group + 1]
    place = _Place(start, end, pl.multiple_of(lax.div(start, jnp.int32(ROWS)) * ROWS, ROWS), k, n)
    home = refs.into.at[group, pl.ds(k * tile.depth, tile.depth), pl.ds(n * tile.columns, tile.columns)]

    @pl.when(end > start)
    def _() -> None:
        add = functools.partial(_add, tile, refs, place, home)
        pl.run_scoped(add, buffer((tile.depth, tile.columns), jnp.float32), plgpu.Barrier())


def _add(tile: BankTile, refs: _Refs, place: _Place, home: Any, sums: Any, barrier: Any) -> None:
    """Add the product to the sums at `home`, by way of a buffer for them."""
    plgpu.copy_gmem_to_smem(home, sums, barrier)  # arrives while the product is computed
    multiply = functools.partial(_multiply, tile, refs, place)
    total = pl.run_scoped(multiply, plgpu.ACC((tile.depth, tile.columns)))
    plgpu.barrier_wait(barrier)
    sums[...] = total + plgpu.load(sums, layout=plgpu.Layout.WGMMA)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(sums, home)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _multiply(tile: BankTile, refs: _Refs, place: _Place, total: Any) -> jax.Array:
    """The group's product, added up in `total`, which begins with zeros."""
    start, end, at, k, n = place

    def step(indices: Any, rows: Any, grad: Any) -> None:
        first = at + indices[0] * tile.rows

        # Rows of other groups, or of none, are at both ends only. Zero times NaN is NaN: select in both.
        @pl.when((first < start) | (first + tile.rows > end))
        def _() -> None:
            for ref in (rows, grad):
                row = first + plgpu.broadcasted_iota(jnp.int32, ref.shape, 0, layout=plgpu.Layout.WGMMA)
                value = plgpu.load(ref, layout=plgpu.Layout.WGMMA)
                ref[...] = jnp.where((row >= start) & (row < end), value, jnp.zeros_like(value))
            plgpu.commit_smem()

        plgpu.wgmma(total, rows.transpose(SWAPPED), grad)
        # The next load takes the place of these tiles.
        plgpu.wgmma_wait(0)

    shapes = (pl.Element(tile.rows), tile.depth), (pl.Element(tile.rows), tile.columns)
    specs = [
        loaded(shapes[0], refs.rows.dtype, lambda i: (at + i * tile.rows, k), delay=0),
        loaded(shapes[1], refs.grad.dtype, lambda i: (at + i * tile.rows, n), delay=0),
    ]
    steps = lax.div(end - at + (tile.rows - 1), jnp.int32(tile.rows))
    pipeline = plgpu.emit_pipeline(step, grid=(steps,), in_specs=specs, max_concurrent_steps=tile.stages)
    pipeline(refs.rows, refs.grad)
    return total[...]
