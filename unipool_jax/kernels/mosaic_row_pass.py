"""The row pass on Hopper: for every row, an elementwise function of its products with matrices of its group.

It is swapped: it computes `out^T = bank^T rows^T`, because one dimension of `wgmma` is always a multiple of 64 and the
other any multiple of 8: experts have more columns than rows. Its tiles start at a multiple of 8 rows, which is what TMA
and `wgmma` see as one row of tiles, and so hold rows of other groups at both ends. Those become columns of the product
that are never stored: a store takes exactly the rows of the group. NaNs there stay where they are.

A visit (`_visit`) is one tile of rows and columns: the product in registers (`_products`), then the epilogue and the
stores (`_store`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from unipool_jax.kernels.group_plan import GroupPlan
from unipool_jax.kernels.mosaic_shared import SWAPPED, buffer, call, loaded, persistent, plgpu
from unipool_jax.kernels.mosaic_tiles import ROWS, RowTile

Epilogue = Callable[..., tuple[jax.Array, ...]]


def row_pass(
    epilogue: Epilogue,
    num_outputs: int,
    rows: Sequence[jax.Array],
    banks: Sequence[jax.Array],
    plan: GroupPlan,
    tile: RowTile,
    *,
    transpose_bank: bool,
    name: str,
    beside: Sequence[jax.Array] = (),
    interpret: Any = None,
) -> list[jax.Array]:
    """`epilogue(products..., beside...)` for every row of a group, zero for the others.

    Args:
        epilogue: elementwise function of float32 tiles that maps zeros to zeros.
        num_outputs: number of arrays `[R, N]` it returns, in the dtype of the rows.
        rows: `[R, K]` of 16 bits, R a multiple of 8. One array for all banks, and each bank has its product; or one
            for each bank, and there is one product, their sum.
        banks: `[E, K, N]` (transposed: `[E, N, K]`), K and N multiples of 64.
        plan: of the R rows, with tiles of `tile.rows` rows that start at multiples of 8.
        tile: sizes.
        transpose_bank: whether rows are multiplied by the transposed matrices.
        name: of the kernel in compiled programs and profiles.
        beside: `[R, N]` further inputs of the epilogue, zero in rows of no group.
        interpret: Pallas's parameters to interpret the kernel; None compiles it.
    """
    num_rows, width = rows[0].shape[0], banks[0].shape[1 if transpose_bank else 2]
    settings = _Settings(epilogue, tile, pl.cdiv(width, tile.columns), transpose_bank)

    def kernel(*refs: Any) -> None:
        named = _Refs.of(refs, len(rows), len(banks), len(beside))
        visits = named.count[0] * settings.column_tiles
        persistent(visits, tile.blocks, functools.partial(_visit, settings, named))

    tables = (plan.tile_group, plan.tile_start, plan.offsets, (plan.num_tiles + plan.num_tail_tiles)[None])
    outputs = [jax.ShapeDtypeStruct((num_rows, width), rows[0].dtype)] * num_outputs
    return list(call(kernel, outputs, tile.blocks, name, interpret)(*tables, *rows, *banks, *beside))


class _Settings(NamedTuple):
    """What is known when the kernel is compiled."""

    epilogue: Epilogue
    tile: RowTile
    column_tiles: int
    transpose_bank: bool


class _Refs(NamedTuple):
    """References to the kernel's operands and outputs: the plan's tables, then what `row_pass` is given."""

    group: Any
    """Group of each tile of rows, E for rows of no group."""
    start: Any
    """First row of each tile."""
    offsets: Any
    count: Any
    """`[1]`: the number of tiles."""
    rows: Sequence[Any]
    banks: Sequence[Any]
    beside: Sequence[Any]
    outputs: Sequence[Any]

    @classmethod
    def of(cls, refs: Sequence[Any], num_rows: int, num_banks: int, num_beside: int) -> _Refs:
        """From a flat sequence."""
        group, start, offsets, count, *refs = refs
        rows, refs = refs[:num_rows], refs[num_rows:]
        banks, refs = refs[:num_banks], refs[num_banks:]
        return cls(group, start, offsets, count, rows, banks, refs[:num_beside], refs[num_beside:])

    @property
    def num_groups(self) -> int:
        """E."""
        return int(self.banks[0].shape[0])


class _Place(NamedTuple):
    """The tile of a visit."""

    group: jax.Array
    row: jax.Array
    """Its first row."""
    column: jax.Array
    """Which tile of columns it is."""
    columns: Any
    """Its columns, a `pl.ds`."""


def _visit(settings: _Settings, refs: _Refs, index: jax.Array) -> None:
    """One tile of rows and columns."""
    tile, column_tiles = settings.tile, settings.column_tiles
    tile_index, column = lax.div(index, jnp.int32(column_tiles)), lax.rem(index, jnp.int32(column_tiles))
    group, row = refs.group[tile_index], pl.multiple_of(refs.start[tile_index], ROWS)
    place = _Place(group, row, column, pl.ds(column * tile.columns, tile.columns))
    finish = functools.partial(_finish, settings, refs, place)
    if refs.beside:
        barrier = plgpu.Barrier(num_arrivals=len(refs.beside))
        pl.run_scoped(finish, [buffer((tile.rows, tile.columns), refs.rows[0].dtype)] * len(refs.beside), barrier)
    else:
        finish([])


def _finish(settings: _Settings, refs: _Refs, place: _Place, held: Sequence[Any], barrier: Any = None) -> None:
    """Products, epilogue and stores; in `held` arrives meanwhile what the epilogue takes beside products."""
    tile, dtype = settings.tile, refs.rows[0].dtype
    for ref, target in zip(refs.beside, held, strict=True):
        plgpu.copy_gmem_to_smem(ref.at[pl.ds(place.row, tile.rows), place.columns], target, barrier)
    sums = [plgpu.ACC((tile.columns, tile.rows))] * (len(refs.banks) if len(refs.rows) == 1 else 1)
    products = pl.run_scoped(functools.partial(_products, settings, refs, place), *sums)
    if held:
        plgpu.barrier_wait(barrier)
    store = functools.partial(_store, settings, refs, place, [*products, *held])
    # Allocated behind the product, so in the memory of its loads.
    pl.run_scoped(store, [buffer((tile.rows, tile.columns), dtype, rows=1)] * len(refs.outputs))


def _products(settings: _Settings, refs: _Refs, place: _Place, *sums: Any) -> list[jax.Array]:
    """`[columns, rows]`, float32, added up in `sums`, which begin with zeros."""
    tile, dtype = settings.tile, refs.rows[0].dtype

    # Tiles of rows of no group multiply nothing, and store the zeros that sums start as.
    @pl.when(place.group < refs.num_groups)
    def _() -> None:
        of_rows = loaded((pl.Element(tile.rows), tile.depth), dtype, lambda k: (place.row, k))
        of_bank = (
            loaded((tile.columns, tile.depth), dtype, lambda k: (place.column, k))
            if settings.transpose_bank
            else loaded((tile.depth, tile.columns), dtype, lambda k: (k, place.column))
        )
        plgpu.emit_pipeline(
            functools.partial(_multiply, sums, len(refs.rows), settings.transpose_bank),
            grid=(pl.cdiv(refs.rows[0].shape[1], tile.depth),),
            in_specs=[of_rows] * len(refs.rows) + [of_bank] * len(refs.banks),
            max_concurrent_steps=tile.stages,
        )(*refs.rows, *(ref.at[jnp.minimum(place.group, refs.num_groups - 1)] for ref in refs.banks))
        # Behind this branch sums may be moved between registers: not while `wgmma` writes them.
        plgpu.wgmma_wait(0)

    return [ref[...] for ref in sums]


def _multiply(sums: Sequence[Any], num_rows: int, transpose_bank: bool, _: Any, *refs: Any) -> None:
    """Add the products of one step's tiles, and return while they are computed."""
    banks = refs[num_rows:]
    for index, bank in enumerate(banks):
        rows, total = refs[min(index, num_rows - 1)], sums[min(index, len(sums) - 1)]
        plgpu.wgmma(total, bank if transpose_bank else bank.transpose(SWAPPED), rows.transpose(SWAPPED))
    # `delay_release=1` gives the tiles of the step before to the next load: its products must be done by now.
    plgpu.wgmma_wait(len(banks))


def _store(settings: _Settings, refs: _Refs, place: _Place, inputs: Sequence[Any], buffers: Sequence[Any]) -> None:
    """The epilogue, some rows at a time, of products and of buffers of rows; then the stores of its outputs."""
    tile, num_groups = settings.tile, refs.num_groups
    for row in range(0, tile.rows, tile.chunk):
        part = slice(row, min(row + tile.chunk, tile.rows))
        outputs = settings.epilogue(*(_part(array, part) for array in inputs))
        for target, output in zip(buffers, outputs, strict=True):
            _store_part(target, part, output.astype(target.dtype))
    plgpu.commit_smem()
    num_rows = refs.outputs[0].shape[0]
    end = jnp.where(place.group < num_groups, refs.offsets[jnp.minimum(place.group + 1, num_groups)], num_rows)
    first = jnp.maximum(place.row, refs.offsets[place.group])
    for source, ref in zip(buffers, refs.outputs, strict=True):
        _store_rows(source, ref, place.row, first, jnp.minimum(end, place.row + tile.rows) - first, place.columns)
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _part(array: Any, part: slice) -> jax.Array:
    """Some rows of a product, or of a buffer of rows, as float32 `[columns, rows]`."""
    if isinstance(array, jax.Array):
        return array[:, part]
    rows = array.at[pl.ds(part.start, part.stop - part.start)].transpose(SWAPPED)
    loaded = plgpu.load(rows, layout=plgpu.Layout.WGMMA_TRANSPOSED)
    return plgpu.layout_cast(loaded, plgpu.Layout.WGMMA).astype(jnp.float32)


def _store_part(buffer: Any, part: slice, value: jax.Array) -> None:
    """The inverse: some rows of a buffer from `[columns, rows]`."""
    rows = buffer.at[pl.ds(part.start, part.stop - part.start)].transpose(SWAPPED)
    rows[...] = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)


def _store_rows(buffer: Any, ref: Any, at: jax.Array, first: jax.Array, count: jax.Array, columns: Any) -> None:
    """Start to store `count` rows from `first` on, of a buffer that holds the rows from `at` on.

    TMA stores a number of rows that is known when compiling: there is a store for each bit of `count`.
    """
    size = 1 << (buffer.shape[0].bit_length() - 1)
    while size:

        @pl.when((count & size) != 0)
        def _(first: jax.Array = first, size: int = size) -> None:
            to = ref.at[pl.ds(first, size), columns]
            plgpu.copy_smem_to_gmem(buffer.at[pl.ds(first - at, size)], to, commit_group=False)

        first, size = first + (count & size), size // 2
