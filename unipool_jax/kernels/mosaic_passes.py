"""The two kernels of `mosaic_gpu`, for Hopper: rows times the matrices of their groups, and the gradient of the bank.

Tiles come and go as a whole between memory and shared memory (TMA), and a warpgroup of 128 threads multiplies them from
there (`wgmma`). A persistent grid runs over the visits, so that the two blocks of a multiprocessor are at different
places: one computes while the other loads or stores.

The row pass is swapped. It computes `out^T = bank^T rows^T`, because one dimension of `wgmma` is always a multiple of
64 and the other any multiple of 8: experts have more columns than rows. Its tiles start at a multiple of 8 rows, which
is what TMA and `wgmma` see as one row of tiles, and so hold rows of other groups at both ends. Those become columns of
the product that are never stored: a store takes exactly the rows of the group. NaNs there stay where they are.

What no interpreter can see (waits for `wgmma`, fences before it, multiples of 8 and of 64) is listed in
docs/kernels.md, with where the code has it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from unipool_jax.kernels.group_plan import GroupPlan
from unipool_jax.kernels.mosaic_tiles import ROWS, BankTile, RowTile

# Its signatures changed from JAX 0.10 to 0.11, and mypy checks with both.
plgpu: Any = mosaic_gpu
_SWAPPED = (1, 0)


def row_pass(
    epilogue: Callable[..., tuple[jax.Array, ...]],
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
    (num_rows, depth), dtype = rows[0].shape, rows[0].dtype
    num_groups, width = banks[0].shape[0], banks[0].shape[1 if transpose_bank else 2]
    column_tiles = pl.cdiv(width, tile.columns)
    sums = [plgpu.ACC((tile.columns, tile.rows))] * (len(banks) if len(rows) == 1 else 1)
    shape = (tile.rows, tile.columns)

    def kernel(group_ref: Any, start_ref: Any, offsets_ref: Any, count_ref: Any, *refs: Any) -> None:
        rows_refs, refs = refs[: len(rows)], refs[len(rows) :]
        bank_refs, refs = refs[: len(banks)], refs[len(banks) :]
        beside_refs, out_refs = refs[: len(beside)], refs[len(beside) :]

        def visit(index: jax.Array) -> None:
            tile_index, column = lax.div(index, jnp.int32(column_tiles)), lax.rem(index, jnp.int32(column_tiles))
            group, at = group_ref[tile_index], pl.multiple_of(start_ref[tile_index], ROWS)
            columns = pl.ds(column * tile.columns, tile.columns)

            def multiply(*sum_refs: Any) -> list[jax.Array]:
                # Tiles of rows of no group multiply nothing, and store the zeros that sums start as.
                @pl.when(group < num_groups)
                def _() -> None:
                    of_rows = _loaded((pl.Element(tile.rows), tile.depth), dtype, lambda k: (at, k))
                    of_bank = (
                        _loaded((tile.columns, tile.depth), dtype, lambda k: (column, k))
                        if transpose_bank
                        else _loaded((tile.depth, tile.columns), dtype, lambda k: (k, column))
                    )
                    plgpu.emit_pipeline(
                        functools.partial(_multiply, sum_refs, len(rows), transpose_bank),
                        grid=(pl.cdiv(depth, tile.depth),),
                        in_specs=[of_rows] * len(rows) + [of_bank] * len(banks),
                        max_concurrent_steps=tile.stages,
                    )(*rows_refs, *(ref.at[jnp.minimum(group, num_groups - 1)] for ref in bank_refs))
                    # Behind this branch sums may be moved between registers: not while `wgmma` writes them.
                    plgpu.wgmma_wait(0)

                return [ref[...] for ref in sum_refs]

            def finish(held: Sequence[Any], barrier: Any = None) -> None:
                for ref, buffer in zip(beside_refs, held, strict=True):
                    plgpu.copy_gmem_to_smem(ref.at[pl.ds(at, tile.rows), columns], buffer, barrier)
                products = pl.run_scoped(multiply, *sums)
                if held:
                    plgpu.barrier_wait(barrier)

                # Allocated behind the product, so in the memory of its loads.
                @functools.partial(pl.run_scoped, outs=[_buffer(shape, dtype, rows=1)] * num_outputs)
                def _(outs: Sequence[Any]) -> None:
                    inputs = [*products, *held]
                    for row in range(0, tile.rows, tile.chunk):
                        part = slice(row, min(row + tile.chunk, tile.rows))
                        outputs = epilogue(*(_part(array, part) for array in inputs))
                        for buffer, output in zip(outs, outputs, strict=True):
                            _store_part(buffer, part, output.astype(dtype))
                    plgpu.commit_smem()
                    end = jnp.where(group < num_groups, offsets_ref[jnp.minimum(group + 1, num_groups)], num_rows)
                    first = jnp.maximum(at, offsets_ref[group])
                    for buffer, ref in zip(outs, out_refs, strict=True):
                        _store_rows(buffer, ref, at, first, jnp.minimum(end, at + tile.rows) - first, columns)
                    plgpu.commit_smem_to_gmem_group()
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            if beside:
                barrier = plgpu.Barrier(num_arrivals=len(beside))
                pl.run_scoped(finish, [_buffer(shape, dtype)] * len(beside), barrier)
            else:
                finish([])

        _persistent(count_ref[0] * column_tiles, tile.blocks, visit)

    tables = (plan.tile_group, plan.tile_start, plan.offsets, (plan.num_tiles + plan.num_tail_tiles)[None])
    outputs = [jax.ShapeDtypeStruct((num_rows, width), dtype)] * num_outputs
    return list(_call(kernel, outputs, tile.blocks, name, interpret)(*tables, *rows, *banks, *beside))


def _multiply(sums: Sequence[Any], num_rows: int, transpose_bank: bool, _: Any, *refs: Any) -> None:
    """Add the products of one step's tiles, and return while they are computed."""
    banks = refs[num_rows:]
    for index, bank in enumerate(banks):
        rows, total = refs[min(index, num_rows - 1)], sums[min(index, len(sums) - 1)]
        plgpu.wgmma(total, bank if transpose_bank else bank.transpose(_SWAPPED), rows.transpose(_SWAPPED))
    # `delay_release=1` gives the tiles of the step before to the next load: its products must be done by now.
    plgpu.wgmma_wait(len(banks))


def _part(array: Any, part: slice) -> jax.Array:
    """Some rows of a product, or of a buffer of rows, as float32 `[columns, rows]`."""
    if isinstance(array, jax.Array):
        return array[:, part]
    rows = array.at[pl.ds(part.start, part.stop - part.start)].transpose(_SWAPPED)
    loaded = plgpu.load(rows, layout=plgpu.Layout.WGMMA_TRANSPOSED)
    return plgpu.layout_cast(loaded, plgpu.Layout.WGMMA).astype(jnp.float32)


def _store_part(buffer: Any, part: slice, value: jax.Array) -> None:
    """The inverse: some rows of a buffer from `[columns, rows]`."""
    rows = buffer.at[pl.ds(part.start, part.stop - part.start)].transpose(_SWAPPED)
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
    depth_tiles, column_tiles = pl.cdiv(depth, tile.depth), pl.cdiv(width, tile.columns)

    def kernel(offsets_ref: Any, rows_ref: Any, grad_ref: Any, into_ref: Any) -> None:
        def visit(index: jax.Array) -> None:
            group, place = (
                lax.div(index, jnp.int32(depth_tiles * column_tiles)),
                lax.div(index, jnp.int32(column_tiles)),
            )
            k, n = lax.rem(place, jnp.int32(depth_tiles)), lax.rem(index, jnp.int32(column_tiles))
            start, end = offsets_ref[group], offsets_ref[group + 1]
            at = pl.multiple_of(lax.div(start, jnp.int32(ROWS)) * ROWS, ROWS)
            home = into_ref.at[group, pl.ds(k * tile.depth, tile.depth), pl.ds(n * tile.columns, tile.columns)]

            def multiply(total_ref: Any) -> jax.Array:
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

                    plgpu.wgmma(total_ref, rows.transpose(_SWAPPED), grad)
                    # The next load takes the place of these tiles.
                    plgpu.wgmma_wait(0)

                specs = [
                    _loaded(
                        (pl.Element(tile.rows), tile.depth), rows_RK.dtype, lambda i: (at + i * tile.rows, k), delay=0
                    ),
                    _loaded(
                        (pl.Element(tile.rows), tile.columns), grad_RN.dtype, lambda i: (at + i * tile.rows, n), delay=0
                    ),
                ]
                steps = lax.div(end - at + (tile.rows - 1), jnp.int32(tile.rows))
                plgpu.emit_pipeline(step, grid=(steps,), in_specs=specs, max_concurrent_steps=tile.stages)(
                    rows_ref, grad_ref
                )
                return total_ref[...]

            def add(sums: Any, barrier: Any) -> None:
                plgpu.copy_gmem_to_smem(home, sums, barrier)  # arrives while the product is computed
                total = pl.run_scoped(multiply, plgpu.ACC((tile.depth, tile.columns)))
                plgpu.barrier_wait(barrier)
                sums[...] = total + plgpu.load(sums, layout=plgpu.Layout.WGMMA)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(sums, home)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(end > start)
            def _() -> None:
                pl.run_scoped(add, _buffer((tile.depth, tile.columns), jnp.float32), plgpu.Barrier())

        _persistent(jnp.int32(num_groups * depth_tiles * column_tiles), tile.blocks, visit)

    # `plgpu.kernel` has no aliases of inputs and outputs: a Ref among its operands is both.
    into_ref = jax.new_ref(into_EKN)
    _call(kernel, (), tile.blocks, "grouped_bank_gradient", interpret)(offsets, rows_RK, grad_RN, into_ref)
    return jax.freeze(into_ref)


def _persistent(count: jax.Array, blocks: int, visit: Callable[[jax.Array], None]) -> None:
    """Every `blocks`-th of `count` visits, from that of this block on."""
    block = lax.axis_index("block")
    visits = lax.div(count - block + (blocks - 1), jnp.int32(blocks))
    lax.fori_loop(0, visits, lambda turn, _: visit(block + turn * blocks), None)


def _transforms(columns: int, dtype: jax.typing.DTypeLike, rows: int) -> tuple[Any, Any]:
    """The order of a tile in shared memory that `wgmma` and TMA agree on."""
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * size * 8)
    return plgpu.TilingTransform((rows, swizzle // size)), plgpu.SwizzleTransform(swizzle)


def _buffer(shape: tuple[int, int], dtype: jax.typing.DTypeLike, rows: int = ROWS) -> Any:
    """Shared memory. With `rows=1` any of its rows can be the first of a copy."""
    return plgpu.SMEM(shape, dtype, transforms=_transforms(shape[1], dtype, rows))


def _loaded(shape: tuple[Any, int], dtype: jax.typing.DTypeLike, index: Callable[..., Any], delay: int = 1) -> Any:
    """A block that a pipeline loads, and may replace `delay` steps behind its use."""
    return plgpu.BlockSpec(shape, index, transforms=_transforms(shape[1], dtype, ROWS), delay_release=delay)


def _call(kernel: Callable[..., None], outputs: Any, blocks: int, name: str, interpret: Any) -> Callable[..., Any]:
    kernel.__name__ = name
    return plgpu.kernel(kernel, out_type=outputs, grid=(blocks,), grid_names=("block",), interpret=interpret)
