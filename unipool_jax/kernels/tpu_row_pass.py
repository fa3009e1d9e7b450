"""The row pass on TPU: for every row, an elementwise function of its products with matrices of its group.

The kernel (`_kernel`) runs once for each tile of columns. Within, a pipeline goes over the visits of `tpu_visits`; it
fetches the matrices of the next group during all visits of this one. A visit (`_visit`) computes one tile of rows:

1. Its rows have arrived; those of the next visit are sent for.
2. Products and epilogue fill a slot of the output buffer (`_compute`). Of a large tile with few rows only the first
   part is computed (`row_counts`). In the bank pass that would not pay: memory decides there at large tiles.
3. Blocks of 16 rows that two groups share pass through a carry (`_complete_blocks`).
4. The completed rows leave for HBM.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from unipool_jax.kernels import tpu_tiles
from unipool_jax.kernels.group_plan import GroupPlan
from unipool_jax.kernels.tpu_call import call, dot, like, tile_columns
from unipool_jax.kernels.tpu_copies import RowBuffers, RowReader, RowWriter
from unipool_jax.kernels.tpu_layouts import padded, padded_rows, row_shape, stack_shape
from unipool_jax.kernels.tpu_tiles import LANES
from unipool_jax.kernels.tpu_visits import BLOCK, Visits, make_visits

Epilogue = Callable[..., tuple[jax.Array, ...]]


def row_pass(
    epilogue: Epilogue,
    num_outputs: int,
    rows: Sequence[jax.Array],
    banks: Sequence[jax.Array],
    plan: GroupPlan,
    *,
    beside: Sequence[jax.Array] = (),
    stacks: Sequence[jax.Array] = (),
    place: jax.Array | None = None,
    clear: bool = True,
    halved: bool = False,
    transpose_bank: bool = False,
    name: str,
) -> list[jax.Array]:
    """`epilogue(products..., beside...)` for every row of a group; with `clear`, zero for the others.

    Args:
        epilogue: elementwise function of float32 tiles.
        num_outputs: number of arrays `[R, N]` it returns, in the dtype of the rows.
        rows: `[R, K]`, halved `[R, 2, K / 2]`, or a stack of such, `[L, R, 2, K / 2]`; one array for each bank, or one
            for all of them.
        banks: `[E, K, N]` each (transposed: `[E, N, K]`). A product is `rows[r] @ bank[group of r]`.
        beside: further inputs of the epilogue, `[R, N]` each, or stacks `[L, R, N]`, of which `place` is read. Not with
            `halved`.
        stacks: the last outputs are written to these, `[L, R, N]` each, at `place`, and the stacks returned: the
            kernel writes where the arrays are to stay. R and N are as `stack_shape` says.
        place: int32 scalar.
        clear: whether rows of no group are written. Without, they hold what the memory held, NaN perhaps, and neither
            kernel reads them.
        halved: whether the output, which is then the only one, is `[R, 2, N / 2]`: see `can_be_halved`.
        name: of the kernel, in profiles and in the table of tile sizes.
    """
    num_rows, num_columns = plan.row_group.shape[0], banks[0].shape[1 if transpose_bank else 2]
    height, width = stack_shape(num_rows, num_columns)
    operands = _Operands([*map(padded_rows, rows)], [*map(padded_rows, beside)], [*map(padded, banks)], [*stacks])
    columns = _columns(operands, num_outputs, plan.tiling.tile_rows, width, halved, transpose_bank, name)
    num_whole = num_outputs - len(stacks)
    whole = like(operands.rows[0], (num_rows, 2, width // 2) if halved else (height, width))
    outputs = call(
        functools.partial(_kernel, _Formula(epilogue, len(rows), len(banks), transpose_bank), clear),
        make_visits(plan, place),
        (operands,),
        [*[whole] * num_whole, *(like(stack, stack.shape) for stack in stacks)],
        column_tiles=width // columns,
        scratch=(_allocated(operands, num_outputs, plan.tiling.tile_rows, columns, halved),),
        in_place=len(stacks),
        stacks=operands.stacked(),
        name=name,
        flops=2 * num_rows * width * operands.contracted() * len(banks) // len(rows),
    )
    if halved:
        return outputs
    return [*(output[:num_rows, :num_columns] for output in outputs[:num_whole]), *outputs[num_whole:]]


class _Operands(NamedTuple):
    """Arrays as `row_pass` describes them, padded; in the kernel, references to them in HBM."""

    rows: list[Any]
    beside: list[Any]
    banks: list[Any]
    stacks: list[Any]
    """The last outputs take their places."""

    def contracted(self) -> int:
        """Sum of the widths of all rows."""
        return sum(math.prod(row_shape(array)) for array in self.rows)

    def stacked(self) -> list[jax.Array]:
        """Operands and outputs of which one layer is meant."""
        inputs = [
            *(array for array in self.rows if array.ndim == 4),
            *(array for array in self.beside if array.ndim == 3),
        ]
        return inputs + 2 * self.stacks

    def layer(self, place: jax.Array) -> list[Any]:
        """References to rows, and to what is beside products, at this place of stacks."""
        return [
            *(ref.at[place] if len(ref.shape) == 4 else ref for ref in self.rows),
            *(ref.at[place] if len(ref.shape) == 3 else ref for ref in self.beside),
        ]


def _columns(
    operands: _Operands,
    num_outputs: int,
    tile_rows: int,
    width: int,
    halved: bool,
    transpose_bank: bool,
    name: str,
) -> int:
    """Columns of a tile of the outputs: as many as the vector memory allows."""
    dtype, contracted, num_banks = operands.rows[0].dtype, operands.contracted(), len(operands.banks)
    buffers = len(operands.beside) + num_outputs + halved
    columns = tile_columns(
        tpu_tiles.columns_key(name, contracted, width, dtype.name, tile_rows),
        width,
        fixed_bytes=2 * tile_rows * contracted * dtype.itemsize,
        # All buffers are double-buffered; the accumulators are float32.
        bytes_per_column=2 * dtype.itemsize * sum(bank.shape[2 if transpose_bank else 1] for bank in operands.banks)
        + tile_rows * (2 * dtype.itemsize * buffers + 4 * max(num_banks, num_outputs)),
    )
    return 2 * LANES if halved and columns % (2 * LANES) else columns


class _Scratch(NamedTuple):
    """Vector memory for tiles of T rows and C columns, O outputs: what the kernel asks for, and references in it."""

    outputs: Any
    """`[2, O, T, C]`: two slots."""
    halved: Any
    """`[2, T, 2, C / 2]`: the only output in the layout of halved rows; None where it is not halved."""
    carry: Any
    """`[O, 16, C]`: a block whose last group is still to come."""
    left: Any
    """`[2, O]` semaphores of the copies to HBM."""
    rows: RowBuffers
    """For the rows, and for what the epilogue takes beside products."""


def _allocated(operands: _Operands, num_outputs: int, tile_rows: int, columns: int, halved: bool) -> _Scratch:
    dtype = operands.rows[0].dtype
    one_row = [*map(row_shape, operands.rows), *[(columns,)] * len(operands.beside)]
    return _Scratch(
        outputs=pltpu.VMEM((2, num_outputs, tile_rows, columns), dtype),
        halved=pltpu.VMEM((2, tile_rows, 2, columns // 2), dtype) if halved else None,
        carry=pltpu.VMEM((num_outputs, BLOCK, columns), dtype),
        left=pltpu.SemaphoreType.DMA((2, num_outputs)),
        rows=RowBuffers.allocated(one_row, tile_rows, dtype),
    )


class _Formula(NamedTuple):
    """What a row pass computes of a tile."""

    epilogue: Epilogue
    num_rows: int
    """Arrays of rows: one for each bank, or one for all of them."""
    num_banks: int
    transpose_bank: bool

    def __call__(self, tiles: Sequence[jax.Array], matrices: Sequence[jax.Ref]) -> tuple[jax.Array, ...]:
        """Values `[T, C]`, float32, of tiles `[T, K]` of all rows, then `[T, C]` of what is beside them.

        The columns of each bank's matrix may come in several pieces; those of the first bank come first.
        """
        pieces = len(matrices) // self.num_banks
        products = [
            jnp.concatenate(
                [
                    dot(tiles[index % self.num_rows], matrix[...], 1, 1 if self.transpose_bank else 0)
                    for matrix in matrices[pieces * index : pieces * (index + 1)]
                ],
                axis=1,
            )
            for index in range(self.num_banks)
        ]
        return self.epilogue(*products, *(tile.astype(jnp.float32) for tile in tiles[self.num_rows :]))


def _kernel(
    formula: _Formula, clear: bool, visits: Visits, operands: _Operands, outputs: list[Any], scratch: _Scratch
) -> None:
    """One tile of columns; of a halved output, the same columns of both halves."""
    tiles, halves = (scratch.outputs, 1) if scratch.halved is None else (scratch.halved, 2)
    columns = tiles.shape[-1]
    column, num_visits = pl.program_id(0), visits.tiles[1 if clear else 0]
    of_tile = pl.ds(pl.multiple_of(column * columns, LANES), columns)
    layer, num_rows, num_whole = visits.place[0], len(operands.rows), len(outputs) - len(operands.stacks)
    sources = operands.layer(layer)
    sources[num_rows:] = [ref.at[:, of_tile] for ref in sources[num_rows:]]
    targets = [*outputs[:num_whole], *(ref.at[layer] for ref in outputs[num_whole:])]
    reader = RowReader(visits, sources, scratch.rows)
    writer = RowWriter(visits, tiles, targets, of_tile, scratch.left)

    @pl.when(num_visits > 0)
    def _() -> None:
        reader.start(0)

    pieces = [(bank, half) for bank in operands.banks for half in range(halves)]
    tiles_of_half = outputs[0].shape[-1] // columns
    specs = [
        _piece_spec(visits, bank, columns, column, half * tiles_of_half, formula.transpose_bank)
        for bank, half in pieces
    ]
    step = functools.partial(_visit, formula, visits, num_visits, reader, writer, scratch)
    pltpu.emit_pipeline(step, grid=(num_visits,), in_specs=specs)(*(bank for bank, _ in pieces))
    # The last two visits, which no other visit has waited for.
    for back in (2, 1):

        @pl.when(num_visits >= back)
        def _(back: int = back) -> None:
            writer.wait(num_visits - back)


def _piece_spec(
    visits: Visits, bank: Any, columns: int, column: jax.Array, first: int, transpose_bank: bool
) -> pl.BlockSpec:
    """What the pipeline fetches of a bank for a visit: a piece of its group's matrix, `column` tiles behind `first`."""

    def index(visit: jax.Array) -> tuple[jax.Array, jax.Array | int, jax.Array | int]:
        # Tiles of rows of no group, which come last, keep the last matrix.
        group, place = jnp.minimum(visits.group[visit], visits.num_groups - 1), column + first
        return (group, place, 0) if transpose_bank else (group, 0, place)

    piece = (None, columns, bank.shape[2]) if transpose_bank else (None, bank.shape[1], columns)
    # With lookahead the next group's matrix is prefetched during all tiles of this group, not only the last.
    return pl.BlockSpec(piece, index, pipeline_mode=pl.Buffered(2, use_lookahead=True))


def _visit(
    formula: _Formula,
    visits: Visits,
    num_visits: jax.Array,
    reader: RowReader,
    writer: RowWriter,
    scratch: _Scratch,
    *matrices: jax.Ref,
) -> None:
    """One tile of rows, by the matrices of its group."""
    visit, outputs = pl.program_id(0), scratch.outputs
    slot, group = lax.rem(visit, 2), visits.group[visit]
    reader.wait(visit)

    @pl.when(visit + 1 < num_visits)
    def _() -> None:
        reader.start(visit + 1)

    # It filled the slot of the outputs that this visit is to fill.
    @pl.when(visit >= 2)
    def _() -> None:
        writer.wait(visit - 2)

    @pl.when(group == visits.num_groups)
    def _() -> None:
        outputs[slot] = jnp.zeros(outputs.shape[1:], outputs.dtype)

    @pl.when(group < visits.num_groups)
    def _() -> None:
        counts = tpu_tiles.row_counts(outputs.shape[2])
        rank = sum((visits.read[visit] > count).astype(jnp.int32) for count in counts[:-1])
        compute = functools.partial(_compute, formula, visits, reader, outputs, matrices, visit)
        lax.switch(rank, [functools.partial(compute, count) for count in counts])
        _complete_blocks(visits, outputs, scratch.carry, visit, slot, group)

    if scratch.halved is not None:
        scratch.halved[slot] = outputs[slot, 0].reshape(scratch.halved.shape[1:])
    writer.start(visit)


def _compute(
    formula: _Formula,
    visits: Visits,
    reader: RowReader,
    outputs: Any,
    matrices: Sequence[jax.Ref],
    visit: jax.Array,
    count: int,
) -> None:
    """Fill the first `count` rows of the outputs' slot, those behind the group with zeros.

    Those of a group before, in the first block, are products with the wrong matrix: `_complete_blocks` replaces them.
    """
    slot, group = lax.rem(visit, 2), visits.group[visit]
    values = formula([*reader.tiles(slot, count)], matrices)
    row_T1 = visits.start[visit] + lax.broadcasted_iota(jnp.int32, (count, 1), 0)
    for index, value in enumerate(values):
        own = jnp.where(row_T1 < visits.offsets[group + 1], value, 0)
        outputs[slot, index, :count] = own.astype(outputs.dtype)


def _complete_blocks(
    visits: Visits, outputs: Any, carry: Any, visit: jax.Array, slot: jax.Array, group: jax.Array
) -> None:
    """Take the rows of groups before from the carry, and leave it a block that the next group shares."""
    first, start = visits.offsets[group], visits.start[visit]

    @pl.when(start < first)
    def _() -> None:
        of_this_group = start + lax.broadcasted_iota(jnp.int32, (BLOCK, 1), 0) >= first
        for index in range(outputs.shape[1]):
            block = outputs[slot, index, :BLOCK]
            outputs[slot, index, :BLOCK] = jnp.where(of_this_group, block, carry[index])

    @pl.when(visits.write[visit] < visits.read[visit])
    def _() -> None:
        unfinished = pl.multiple_of(visits.write[visit], BLOCK)
        for index in range(outputs.shape[1]):
            carry[index] = outputs[slot, index, pl.ds(unfinished, BLOCK)]
