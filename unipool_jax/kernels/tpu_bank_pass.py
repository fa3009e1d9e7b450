"""The bank pass on TPU: adds the outer products of rows to the gradient of a bank, in place.

The kernel runs once for each tile of columns, of the wider axis of the gradient; narrower rows are then read
repeatedly. Within, a pipeline goes over the visits of `tpu_visits`: it holds the tile of one group's gradient in
vector memory, two slots of it, and moves it only when the group changes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from unipool_jax.kernels import tpu_tiles
from unipool_jax.kernels.group_plan import GroupPlan
from unipool_jax.kernels.tpu_call import call, dot, like, tile_columns
from unipool_jax.kernels.tpu_copies import RowBuffers, RowReader
from unipool_jax.kernels.tpu_layouts import padded, padded_rows, row_shape
from unipool_jax.kernels.tpu_tiles import LANES
from unipool_jax.kernels.tpu_visits import Visits, make_visits

BANK_PASS = "grouped_bank_gradient"


def bank_pass(
    rows_RK: jax.Array, grad_RN: jax.Array, into_EKN: jax.Array, plan: GroupPlan, place: jax.Array | None = None
) -> jax.Array:
    """`[E, K, N]` float32: `into` plus each group's sum of outer products `rows[r] grad[r]^T`.

    The narrower of rows and gradients may be halved, `[R, 2, K / 2]`, or a stack of such, `[L, R, 2, K / 2]`, read at
    `place`. The result reuses the buffer of `into` where XLA can donate it.
    """
    tile_rows, shape = plan.tiling.tile_rows, into_EKN.shape
    rows_RK, grad_RN, into_EKN = padded_rows(rows_RK), padded_rows(grad_RN), padded(into_EKN)
    rows_width, grad_width = into_EKN.shape[1:]
    narrow, width = sorted((rows_width, grad_width))
    itemsize, dtype = rows_RK.dtype.itemsize, rows_RK.dtype
    columns = tile_columns(
        tpu_tiles.columns_key(BANK_PASS, narrow, width, dtype.name, tile_rows),
        width,
        fixed_bytes=2 * tile_rows * narrow * itemsize,
        # The gradient before and after, each double-buffered, and the product.
        bytes_per_column=2 * tile_rows * itemsize + 5 * narrow * 4,
    )
    divides_rows = rows_width > grad_width
    one_row = [(columns,), row_shape(grad_RN)] if divides_rows else [row_shape(rows_RK), (columns,)]
    (out_EKN,) = call(
        functools.partial(_kernel, columns, divides_rows),
        make_visits(plan, place),
        (rows_RK, grad_RN, into_EKN),
        [like(into_EKN, into_EKN.shape)],
        column_tiles=width // columns,
        scratch=(RowBuffers.allocated(one_row, tile_rows, dtype),),
        in_place=1,
        stacks=[array for array in (rows_RK, grad_RN) if array.ndim == 4],
        name=BANK_PASS,
        flops=2 * plan.row_group.shape[0] * rows_width * grad_width,
    )
    return out_EKN[:, : shape[1], : shape[2]]


def _kernel(
    columns: int,
    divides_rows: bool,
    visits: Visits,
    rows: Any,
    grad: Any,
    into: Any,
    outputs: list[Any],
    buffers: RowBuffers,
) -> None:
    """One tile of columns: of the rows, if these are divided, else of their gradients."""
    rows, grad = (ref.at[visits.place[0]] if len(ref.shape) == 4 else ref for ref in (rows, grad))
    column, num_visits = pl.program_id(0), visits.tiles[0]
    of_tile = pl.ds(pl.multiple_of(column * columns, LANES), columns)
    sources = [rows.at[:, of_tile], grad] if divides_rows else [rows, grad.at[:, of_tile]]
    reader = RowReader(visits, sources, buffers)

    def index(visit: jax.Array) -> tuple[jax.Array, jax.Array | int, jax.Array | int]:
        return (visits.group[visit], column, 0) if divides_rows else (visits.group[visit], 0, column)

    @pl.when(num_visits > 0)
    def _() -> None:
        reader.start(0)

    rows_width, grad_width = into.shape[1:]
    spec = pl.BlockSpec((None, columns, grad_width) if divides_rows else (None, rows_width, columns), index)
    step = functools.partial(_visit, visits, num_visits, reader)
    pltpu.emit_pipeline(step, grid=(num_visits,), in_specs=[spec], out_specs=[spec])(into, *outputs)


def _visit(visits: Visits, num_visits: jax.Array, reader: RowReader, into: jax.Ref, out: jax.Ref) -> None:
    """Add the outer products of a tile's rows, while the rows of the next tile arrive."""
    visit = pl.program_id(0)
    slot, group = lax.rem(visit, 2), visits.group[visit]
    reader.wait(visit)

    @pl.when(visit + 1 < num_visits)
    def _() -> None:
        reader.start(visit + 1)

    first, end = visits.offsets[group], visits.offsets[group + 1]
    tile_rows = reader.buffers.tiles[0].shape[1]
    row_T1 = visits.start[visit] + lax.broadcasted_iota(jnp.int32, (tile_rows, 1), 0)
    in_group_T1 = (first <= row_T1) & (row_T1 < end)
    # Zero times NaN is NaN: select in both factors.
    rows_TK, grad_TN = (jnp.where(in_group_T1, tile, 0) for tile in reader.tiles(slot, tile_rows))
    product = dot(rows_TK, grad_TN, 0, 0)
    is_first = visits.start[visit] <= first

    @pl.when(is_first)
    def _() -> None:
        out[...] = into[...] + product

    @pl.when(jnp.logical_not(is_first))
    def _() -> None:
        out[...] += product
