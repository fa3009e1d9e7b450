"""The two TPU kernels of the grouped products: `row_pass` and `bank_pass`.

Both iterate over the plan's tiles in row order, so each expert's matrix is read once per pass, and prefetched while the
previous one is in use. Rows are read once too, one tile ahead.

DMAs move blocks of 16 rows, so a tile starts at its group's first row rounded down to a multiple of 16, and two groups
may share a block. The second group copies it from the previous tile's buffer. Computing a block for both groups costs
less than 16 rows, but writing it twice would be a race: the row pass writes a block only after its last group, and
keeps the unfinished block in a carry until then.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from unipool_jax.kernels import tpu_tiles
from unipool_jax.kernels.group_plan import GroupPlan
from unipool_jax.kernels.implementations import target_device_kind
from unipool_jax.kernels.tpu_tiles import LANES
from unipool_jax.kernels.tpu_tiles import ROW_ALIGNMENT as ALIGNMENT

BANK_PASS = "grouped_bank_gradient"
# How kernels are interpreted without a TPU; tests turn on the race detector here.
INTERPRET = pltpu.InterpretParams()


HALVED_ON = ("TPU v5 lite", "TPU v5")
"""Devices for which kernels on halved rows have been compiled."""


class _Visits(NamedTuple):
    """Per-tile metadata, prefetched into scalar memory: int32 vectors."""

    group: jax.Array
    """Group of the tile, E for rows of no group."""
    start: jax.Array
    """First row of the tile."""
    read: jax.Array
    """Rows that the tile reads, a multiple of 16."""
    shared: jax.Array
    """How many of them are in the previous tile's buffer: 16 or 0."""
    write: jax.Array
    """Rows that are final after this tile, a multiple of 16: all but a block that the next group shares."""
    offsets: jax.Array
    """`[E + 1]`, the plan's offsets."""
    tiles: jax.Array
    """`[2]`: the number of tiles with rows of a group, and of all tiles."""
    place: jax.Array
    """`[1]`: which of the arrays of a stack is meant."""


def _visits(plan: GroupPlan, place: jax.Array | None = None) -> _Visits:
    num_groups, num_rows = plan.group_sizes.shape[0], _round_up_to_block(plan.row_group.shape[0])
    tile_rows, offsets = plan.tiling.tile_rows, plan.offsets
    of_group = plan.tile_group < num_groups
    end = jnp.where(of_group, offsets[jnp.minimum(plan.tile_group + 1, num_groups)], num_rows)
    last_block = _round_up_to_block(end)
    complete = jnp.where(of_group & (end < offsets[-1]), end // ALIGNMENT * ALIGNMENT, last_block)
    read = jnp.where(of_group, jnp.clip(last_block - plan.tile_start, 0, tile_rows), 0)
    read_before = jnp.pad((plan.tile_start + read)[:-1], (1, 0))
    return _Visits(
        group=plan.tile_group,
        start=plan.tile_start,
        read=read,
        shared=jnp.where(of_group & (plan.tile_start < read_before), ALIGNMENT, 0),
        write=jnp.clip(complete - plan.tile_start, 0, tile_rows),
        offsets=offsets,
        tiles=jnp.stack([plan.num_tiles, plan.num_tiles + plan.num_tail_tiles]),
        place=jnp.zeros_like(offsets[:1]) if place is None else place.reshape(1),
    )


def _copy_rows(
    visits: _Visits,
    visit: jax.Array | int,
    sources: Sequence[Any],
    buffers: Sequence[Any],
    semaphore: Any,
    action: Literal["start", "wait"],
) -> None:
    """Start or await the copies of a tile's rows into its slot: a shared block from the other slot, others from HBM."""
    slot, shared, read = lax.rem(visit, 2), visits.shared[visit], visits.read[visit]
    fresh, skip = pl.multiple_of(read - shared, ALIGNMENT), pl.multiple_of(shared, ALIGNMENT)
    start = pl.multiple_of(visits.start[visit] + shared, ALIGNMENT)

    @pl.when(shared > 0)
    def _() -> None:
        last = pl.multiple_of(visits.read[visit - 1] - ALIGNMENT, ALIGNMENT)
        for index, buffer in enumerate(buffers):
            block, target = buffer.at[1 - slot, pl.ds(last, ALIGNMENT)], buffer.at[slot, pl.ds(0, ALIGNMENT)]
            getattr(pltpu.make_async_copy(block, target, semaphore.at[slot, 0, index]), action)()

    @pl.when(fresh > 0)
    def _() -> None:
        for index, (source, buffer) in enumerate(zip(sources, buffers, strict=True)):
            block, target = source.at[pl.ds(start, fresh)], buffer.at[slot, pl.ds(skip, fresh)]
            getattr(pltpu.make_async_copy(block, target, semaphore.at[slot, 1, index]), action)()


def _round_up_to_block(rows: jax.Array | int) -> jax.Array | int:
    return (rows + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def row_pass(
    epilogue: Callable[..., tuple[jax.Array, ...]],
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
        beside: further inputs of the epilogue, `[R, N]` each, or stacks `[L, R, N]`, of which `place` is read.
        stacks: the last outputs are written to these, `[L, R, N]` each, at `place`, and the stacks returned: the
            kernel writes where the arrays are to stay. R and N are as `stack_shape` says.
        place: int32 scalar.
        clear: whether rows of no group are written. Without, they hold what the memory held, NaN perhaps, and no
            kernel of this module reads them.
        halved: whether the output, which is then the only one, is `[R, 2, N / 2]`: see `can_be_halved`.
        name: of the kernel, in profiles and in the table of tile sizes.
    """
    num_rows, num_groups, tile_rows = plan.row_group.shape[0], plan.group_sizes.shape[0], plan.tiling.tile_rows
    dtype, num_columns, num_row_arrays = rows[0].dtype, banks[0].shape[1 if transpose_bank else 2], len(rows)
    rows, beside = ([array if array.ndim > 2 else _padded(array) for array in arrays] for arrays in (rows, beside))
    banks, num_whole = [_padded(bank) for bank in banks], num_outputs - len(stacks)
    padded_rows, width = stack_shape(num_rows, num_columns)
    contracted = sum(math.prod(_row(array)) for array in rows)
    columns = _columns(
        tpu_tiles.columns_key(name, contracted, width, dtype.name, tile_rows),
        width,
        fixed_bytes=2 * tile_rows * contracted * dtype.itemsize,
        # All buffers are double-buffered; the accumulators are float32.
        bytes_per_column=2 * dtype.itemsize * sum(bank.shape[2 if transpose_bank else 1] for bank in banks)
        + tile_rows * (2 * dtype.itemsize * (len(beside) + num_outputs + halved) + 4 * max(len(banks), num_outputs)),
    )
    if halved and columns % (2 * LANES):
        columns = 2 * LANES
    parts, part = (2, columns // 2) if halved else (1, columns)

    def kernel(*refs: Any) -> None:
        visits = _Visits(*refs[: len(_Visits._fields)])
        inputs, others = _split(refs[len(_Visits._fields) :], len(rows))
        inputs_beside, others = _split(others, len(beside))
        matrices, others = _split(others, len(banks))
        _, others = _split(others, len(stacks))
        outputs, (buffer, *halves, carry, semaphore) = _split(others[: num_outputs + 3 + halved], num_outputs)
        *row_buffers, row_semaphore = others[num_outputs + 3 + halved :]
        column, num_visits = pl.program_id(0), visits.tiles[1 if clear else 0]
        column_slice = pl.ds(pl.multiple_of(column * columns, LANES), columns)
        layer = visits.place[0]
        sources = [ref.at[layer] if len(ref.shape) == 4 else ref for ref in inputs]
        sources += [(ref.at[layer] if len(ref.shape) == 3 else ref).at[:, column_slice] for ref in inputs_beside]
        targets = [*outputs[:num_whole], *(ref.at[layer] for ref in outputs[num_whole:])]

        def copy_out(visit: jax.Array, action: Literal["start", "wait"]) -> None:
            """Start or await the copies of a tile's final rows to HBM."""
            size = pl.multiple_of(visits.write[visit], ALIGNMENT)
            start, slot = pl.multiple_of(visits.start[visit], ALIGNMENT), lax.rem(visit, 2)

            @pl.when(size > 0)
            def _() -> None:
                for index, output in enumerate(targets):
                    if halved:
                        source = halves[0].at[slot, pl.ds(0, size)]
                        target = output.at[pl.ds(start, size), :, pl.ds(pl.multiple_of(column * part, LANES), part)]
                    else:
                        source = buffer.at[slot, index, pl.ds(0, size)]
                        target = output.at[pl.ds(start, size), column_slice]
                    getattr(pltpu.make_async_copy(source, target, semaphore.at[slot, index]), action)()

        def compute(*matrices: jax.Ref) -> None:
            visit = pl.program_id(0)
            slot, group = lax.rem(visit, 2), visits.group[visit]
            _copy_rows(visits, visit, sources, row_buffers, row_semaphore, "wait")

            @pl.when(visit + 1 < num_visits)
            def _() -> None:
                _copy_rows(visits, visit + 1, sources, row_buffers, row_semaphore, "start")

            @pl.when(visit >= 2)
            def _() -> None:
                copy_out(visit - 2, "wait")

            @pl.when(group == num_groups)
            def _() -> None:
                buffer[slot] = jnp.zeros(buffer.shape[1:], dtype)

            @pl.when(group < num_groups)
            def _() -> None:
                tiles = [_tile(row_buffer, slot) for row_buffer in row_buffers]
                products = [
                    jnp.concatenate(
                        [
                            _dot(tiles[index % num_row_arrays], matrix[...], 1, 1 if transpose_bank else 0)
                            for matrix in matrices[parts * index : parts * (index + 1)]
                        ],
                        axis=1,
                    )
                    for index in range(len(banks))
                ]
                values = epilogue(*products, *(tile.astype(jnp.float32) for tile in tiles[num_row_arrays:]))
                first, end = visits.offsets[group], visits.offsets[group + 1]
                start = visits.start[visit]
                row_T1 = start + lax.broadcasted_iota(jnp.int32, (tile_rows, 1), 0)
                for index, value in enumerate(values):
                    buffer[slot, index] = jnp.where(row_T1 < end, value, 0).astype(dtype)

                @pl.when(start < first)
                def _() -> None:
                    of_this_group = row_T1[:ALIGNMENT] >= first
                    for index in range(num_outputs):
                        block = buffer[slot, index, :ALIGNMENT]
                        buffer[slot, index, :ALIGNMENT] = jnp.where(of_this_group, block, carry[index])

                @pl.when(visits.write[visit] < visits.read[visit])
                def _() -> None:
                    unfinished = pl.multiple_of(visits.write[visit], ALIGNMENT)
                    for index in range(num_outputs):
                        carry[index] = buffer[slot, index, pl.ds(unfinished, ALIGNMENT)]

            if halved:
                halves[0][slot] = buffer[slot, 0].reshape(tile_rows, 2, part)
            copy_out(visit, "start")

        def bank_block(bank: jax.Array, half: int) -> pl.BlockSpec:
            def index(visit: jax.Array) -> tuple[jax.Array, jax.Array | int, jax.Array | int]:
                group, place = jnp.minimum(visits.group[visit], num_groups - 1), column + half * (width // columns)
                return (group, place, 0) if transpose_bank else (group, 0, place)

            block = (None, part, bank.shape[2]) if transpose_bank else (None, bank.shape[1], part)
            # With lookahead the next group's matrix is prefetched during all tiles of this group, not only the last.
            return pl.BlockSpec(block, index, pipeline_mode=pl.Buffered(2, use_lookahead=True))

        @pl.when(num_visits > 0)
        def first_rows() -> None:
            _copy_rows(visits, 0, sources, row_buffers, row_semaphore, "start")

        # Of a halved output, a tile has the same columns of both halves.
        blocks = [
            (matrix, bank_block(bank, half))
            for matrix, bank in zip(matrices, banks, strict=True)
            for half in range(parts)
        ]
        pltpu.emit_pipeline(compute, grid=(num_visits,), in_specs=[spec for _, spec in blocks])(*(m for m, _ in blocks))
        for back in (2, 1):

            @pl.when(num_visits >= back)
            def _(back: int = back) -> None:
                copy_out(num_visits - back, "wait")

    whole = (num_rows, 2, width // 2) if halved else (padded_rows, width)
    first_stack = len(_Visits._fields) + len(rows) + len(beside) + len(banks)
    outputs = _call(
        kernel,
        _visits(plan, place),
        [*rows, *beside, *banks, *stacks],
        [*[_like(rows[0], whole)] * num_whole, *(_like(stack, stack.shape) for stack in stacks)],
        column_tiles=width // columns,
        scratch=[
            pltpu.VMEM((2, num_outputs, tile_rows, columns), dtype),
            *[pltpu.VMEM((2, tile_rows, 2, part), dtype)] * halved,
            pltpu.VMEM((num_outputs, ALIGNMENT, columns), dtype),
            pltpu.SemaphoreType.DMA((2, num_outputs)),
            *_row_buffers([*map(_row, rows), *[(columns,)] * len(beside)], tile_rows, dtype),
        ],
        aliases={first_stack + index: num_whole + index for index in range(len(stacks))},
        other_layers=[*(array for array in rows if array.ndim == 4), *(array for array in beside if array.ndim == 3)]
        + 2 * [*stacks],
        name=name,
        flops=2 * num_rows * width * contracted * len(banks) // num_row_arrays,
    )
    if halved:
        return outputs
    return [*(output[:num_rows, :num_columns] for output in outputs[:num_whole]), *outputs[num_whole:]]


def stack_shape(rows: int, columns: int) -> tuple[int, int]:
    """R and N of the stacks that a kernel reads from and writes to."""
    return -(-rows // ALIGNMENT) * ALIGNMENT, -(-columns // LANES) * LANES


def can_be_halved(rows: int, width: int, hidden: int, dtype: jax.typing.DTypeLike) -> bool:
    """Whether the kernels take and give rows of experts as `[R, 2, D / 2]`, with the halves of a row on an own axis.

    That is how XLA lays out what a ragged all-to-all sends and receives: a row of 16-bit numbers is then in one piece
    of memory. Tiles of columns of each half are shared by the cores of a device, and of the two axes of a bank's
    gradient, the wider one is divided into tiles.
    """
    with _device():
        return halved_on(target_device_kind(), pltpu.get_tpu_info().num_cores, rows, width, hidden, dtype)


def halved_on(device_kind: str, cores: int, rows: int, width: int, hidden: int, dtype: jax.typing.DTypeLike) -> bool:
    """`can_be_halved` on a device of this kind with so many cores."""
    return (
        device_kind in HALVED_ON
        and jnp.dtype(dtype) == jnp.bfloat16
        and rows % ALIGNMENT == 0
        and width % (2 * LANES * cores) == 0
        and hidden > width
    )


def _row(rows: jax.Array) -> tuple[int, ...]:
    """Shape of one row: `[K]`, or halved `[2, K / 2]`."""
    return rows.shape[1:] if rows.ndim == 2 else rows.shape[-2:]


def _tile(buffer: Any, slot: jax.Array) -> jax.Array:
    """`[T, K]` of a double buffer of rows."""
    return buffer[slot].reshape(buffer.shape[1], -1)


def bank_pass(
    rows_RK: jax.Array, grad_RN: jax.Array, into_EKN: jax.Array, plan: GroupPlan, place: jax.Array | None = None
) -> jax.Array:
    """`bank_gradient` with `into`. Tiles divide the wider axis of the gradient: narrower rows are read repeatedly.

    The narrower of the two may be halved, `[R, 2, K / 2]`, or a stack of such, `[L, R, 2, K / 2]`, read at `place`.
    """
    tile_rows, shape = plan.tiling.tile_rows, into_EKN.shape
    rows_RK, grad_RN = (array if array.ndim > 2 else _padded(array) for array in (rows_RK, grad_RN))
    into_EKN = _padded(into_EKN)
    _, rows_width, grad_width = into_EKN.shape
    tile_rows_axis = rows_width > grad_width
    width = max(rows_width, grad_width)
    narrow, itemsize = min(rows_width, grad_width), rows_RK.dtype.itemsize
    columns = _columns(
        tpu_tiles.columns_key(BANK_PASS, narrow, width, rows_RK.dtype.name, tile_rows),
        width,
        fixed_bytes=2 * tile_rows * narrow * itemsize,
        # The gradient before and after, each double-buffered, and the product.
        bytes_per_column=2 * tile_rows * itemsize + 5 * narrow * 4,
    )

    def kernel(*refs: Any) -> None:
        visits = _Visits(*refs[: len(_Visits._fields)])
        rows, grad, into, out, *row_buffers, row_semaphore = refs[len(_Visits._fields) :]
        rows, grad = (ref.at[visits.place[0]] if len(ref.shape) == 4 else ref for ref in (rows, grad))
        column, num_visits = pl.program_id(0), visits.tiles[0]
        column_slice = pl.ds(pl.multiple_of(column * columns, LANES), columns)
        sources = [rows.at[:, column_slice], grad] if tile_rows_axis else [rows, grad.at[:, column_slice]]

        def compute(into: jax.Ref, out: jax.Ref) -> None:
            visit = pl.program_id(0)
            slot, group = lax.rem(visit, 2), visits.group[visit]
            _copy_rows(visits, visit, sources, row_buffers, row_semaphore, "wait")

            @pl.when(visit + 1 < num_visits)
            def _() -> None:
                _copy_rows(visits, visit + 1, sources, row_buffers, row_semaphore, "start")

            first, end = visits.offsets[group], visits.offsets[group + 1]
            row_T1 = visits.start[visit] + lax.broadcasted_iota(jnp.int32, (tile_rows, 1), 0)
            in_group_T1 = (first <= row_T1) & (row_T1 < end)
            rows_TK, grad_TN = (jnp.where(in_group_T1, _tile(buffer, slot), 0) for buffer in row_buffers)
            product = _dot(rows_TK, grad_TN, 0, 0)
            is_first = visits.start[visit] <= first

            @pl.when(is_first)
            def _() -> None:
                out[...] = into[...] + product

            @pl.when(jnp.logical_not(is_first))
            def _() -> None:
                out[...] += product

        def index(visit: jax.Array) -> tuple[jax.Array, jax.Array | int, jax.Array | int]:
            return (visits.group[visit], column, 0) if tile_rows_axis else (visits.group[visit], 0, column)

        block = (None, columns, grad_width) if tile_rows_axis else (None, rows_width, columns)

        @pl.when(num_visits > 0)
        def _() -> None:
            _copy_rows(visits, 0, sources, row_buffers, row_semaphore, "start")

        spec = pl.BlockSpec(block, index)
        pltpu.emit_pipeline(compute, grid=(num_visits,), in_specs=[spec], out_specs=[spec])(into, out)

    (out_EKN,) = _call(
        kernel,
        _visits(plan, place),
        [rows_RK, grad_RN, into_EKN],
        [_like(into_EKN, into_EKN.shape)],
        column_tiles=width // columns,
        scratch=_row_buffers(
            [(columns,), _row(grad_RN)] if tile_rows_axis else [_row(rows_RK), (columns,)], tile_rows, rows_RK.dtype
        ),
        aliases={len(_Visits._fields) + 2: 0},
        other_layers=[array for array in (rows_RK, grad_RN) if array.ndim == 4],
        name=BANK_PASS,
        flops=2 * plan.row_group.shape[0] * rows_width * grad_width,
    )
    return out_EKN[:, : shape[1], : shape[2]]


def _call(
    kernel: Callable[..., None],
    visits: _Visits,
    operands: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    column_tiles: int,
    scratch: Sequence[Any] = (),
    aliases: dict[int, int] | None = None,
    other_layers: Sequence[jax.Array] = (),
    name: str,
    flops: int,
) -> list[jax.Array]:
    """Run a kernel over tiles of columns, which the cores of a device share."""
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    arrays: list[Any] = [*operands, *outputs]
    bytes_accessed = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
    # Of a stack, one layer.
    bytes_accessed -= sum((len(stack) - 1) * stack.size // len(stack) * stack.dtype.itemsize for stack in other_layers)
    interpret = False if _on_tpu() else INTERPRET
    with _device():
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(_Visits._fields),
                grid=(column_tiles,),
                in_specs=[anywhere] * len(operands),
                out_specs=[anywhere] * len(outputs),
                scratch_shapes=scratch,
            ),
            out_shape=list(outputs),
            input_output_aliases=aliases or {},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",), vmem_limit_bytes=pltpu.get_tpu_info().vmem_capacity_bytes * 7 // 8
            ),
            cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=bytes_accessed, transcendentals=0),
            interpret=interpret,
            name=name,
        )(*visits, *operands)


def _columns(key: str, width: int, *, fixed_bytes: int, bytes_per_column: int) -> int:
    with _device():
        device = pltpu.get_tpu_info()
        # Of the 7/8 that `_call` allows a kernel, 1/8 is left to the compiler's temporaries.
        budget = device.vmem_capacity_bytes * 3 // 4
        return tpu_tiles.columns(
            target_device_kind(), key, width, fixed_bytes, bytes_per_column, budget, device.num_cores
        )


def _on_tpu() -> bool:
    """Whether kernels are compiled for a TPU rather than interpreted."""
    return target_device_kind().startswith("TPU")


def _device() -> contextlib.AbstractContextManager[None]:
    """A context in which Pallas sees a TPU: without one, an abstract device that the interpreter emulates."""
    mesh = jax.sharding.get_abstract_mesh()
    if not _on_tpu():
        if not mesh.empty:
            raise NotImplementedError(
                f"kernels.implementation=pallas_tpu: cannot be interpreted on a mesh of {target_device_kind()} "
                "devices; set kernels.implementation=xla"
            )
        mesh = mesh.update(abstract_device=jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu"))
    return jax.sharding.use_abstract_mesh(mesh)


def _row_buffers(rows: Sequence[tuple[int, ...]], tile_rows: int, dtype: jnp.dtype) -> list[Any]:
    """Double buffers for a tile of each array of rows, of which the shape of one is given, and their semaphores."""
    buffers = [pltpu.VMEM((2, tile_rows, *row), dtype) for row in rows]
    return [*buffers, pltpu.SemaphoreType.DMA((2, 2, len(rows)))]


def _split(refs: Sequence[Any], count: int) -> tuple[Sequence[Any], Sequence[Any]]:
    return refs[:count], refs[count:]


def _padded(array: jax.Array) -> jax.Array:
    """Rows `[R, C]` or a bank `[E, K, N]`, zero-padded to multiples of 16 rows and 128 columns; usually unchanged."""
    granules = (ALIGNMENT, LANES) if array.ndim == 2 else (1, LANES, LANES)
    missing = [(0, -size % granule) for size, granule in zip(array.shape, granules, strict=True)]
    return jnp.pad(array, missing) if any(after for _, after in missing) else array


def _like(array: jax.Array, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Shape of an output that varies over the same mesh axes as `array`."""
    return jax.ShapeDtypeStruct(shape, array.dtype, manual_axis_type=jax.typeof(array).manual_axis_type)


def _dot(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
    """Product over one axis of each matrix, accumulated and returned in float32; exact for float32 operands."""
    dimensions = (((contract_a,), (contract_b,)), ((), ()))
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
