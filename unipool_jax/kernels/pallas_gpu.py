"""Grouped products for GPU, in Pallas with its Triton back end.

There are two kernels. In a row pass, each program handles one tile of the plan and a range of columns: it multiplies
the tile's rows by one or two matrices of their expert, and an epilogue turns the float32 products into outputs while
they are in registers. In the bank gradient, each program accumulates one tile of one expert's matrix over the rows of
that expert: no two programs add to the same number, so no atomics are needed and results are deterministic.

All loads and stores are masked, so sizes need not be multiples of the tiles. Rows past the end of a group load as zero,
so rows of other groups or of none, and NaNs in them, enter no sum.

The platform is decided when a program is lowered: for a GPU the kernels are compiled (also ahead of time, without one),
for other platforms they are interpreted, slowly. Interpreted, they cannot run inside a `shard_map` that checks varying
axes, because Pallas's interpreter fails that check.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from unipool_jax.kernels.epilogues import Three, gated, gated_and_products, gated_backward, summed, unchanged
from unipool_jax.kernels.gpu_tiles import GpuTile, bank_tile, row_pass_tile
from unipool_jax.kernels.group_plan import GroupPlan


def matmul(rows_RK: jax.Array, bank: jax.Array, plan: GroupPlan, *, transpose_bank: bool) -> jax.Array:
    """`out[r] = rows[r] @ bank[group of r]`, or with that matrix transposed; zero for rows of no group.

    Shapes: `[R, K]`, `[E, K, N]` (transposed: `[E, N, K]`) -> `[R, N]` in the dtype of the rows.
    """
    name = "grouped_matmul_transposed" if transpose_bank else "grouped_matmul"
    return _row_pass(unchanged, 1, (rows_RK,), (bank,), plan, transpose_bank=transpose_bank, name=name)[0]


def bank_gradient(
    rows_RK: jax.Array, grad_RN: jax.Array, plan: GroupPlan, into_EKN: jax.Array | None = None
) -> jax.Array:
    """`[E, K, N]` float32: `into` (default zero) plus each group's sum of outer products `rows[r] grad[r]^T`.

    The result reuses the buffer of `into` where XLA can donate it. Experts without rows are neither read nor written.
    """
    (_, depth), (_, width) = rows_RK.shape, grad_RN.shape
    num_groups = plan.group_sizes.shape[0]
    tile = bank_tile(rows_RK.dtype.itemsize, depth, width)

    def kernel(offsets_ref: Any, rows_ref: Any, grad_ref: Any, *into_and_out_ref: Any) -> None:
        # `into`, if given, aliases the output.
        out_ref = into_and_out_ref[-1]
        group = pl.program_id(2)
        depths = _Span(pl.program_id(1) * tile.rows, tile.rows, depth)
        columns = _Span(pl.program_id(0) * tile.columns, tile.columns, width)
        start, end = offsets_ref[group], offsets_ref[group + 1]

        def add_rows(step: jax.Array, total_KN: jax.Array) -> jax.Array:
            rows = _Span(start + step * tile.contraction, tile.contraction, end)
            return total_KN + _dot(_load(rows_ref, rows, depths), _load(grad_ref, rows, columns), 0, 0)

        steps = lax.div(end - start + (tile.contraction - 1), tile.contraction)
        total_KN = lax.fori_loop(0, steps, add_rows, jnp.zeros((tile.rows, tile.columns), jnp.float32))
        if into_EKN is None:
            _store(out_ref, total_KN, group, depths, columns)
        else:

            @pl.when(end > start)
            def _() -> None:
                _store(out_ref, _load(out_ref, group, depths, columns) + total_KN, group, depths, columns)

    return _call(
        kernel,
        tile,
        (pl.cdiv(width, tile.columns), pl.cdiv(depth, tile.rows), num_groups),
        (plan.offsets, rows_RK, grad_RN, *(() if into_EKN is None else (into_EKN,))),
        [_like(rows_RK, (num_groups, depth, width), jnp.float32)],
        "grouped_bank_gradient",
        aliases={} if into_EKN is None else {3: 0},
    )[0]


def ffn_forward(
    rows_RD: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    plan: GroupPlan,
    *,
    keep_products: bool,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Gated expert FFN. Returns `[R, D]` and, with `keep_products`, the gate and up products for `ffn_backward`."""
    epilogue, num_outputs = (gated_and_products, 3) if keep_products else (gated, 1)
    hidden_RF, *products = _row_pass(
        epilogue, num_outputs, (rows_RD,), (gate_EDF, up_EDF), plan, transpose_bank=False, name="expert_ffn_in"
    )
    return matmul(hidden_RF, down_EFD, plan, transpose_bank=False), tuple(products)


def ffn_backward(
    grad_RD: jax.Array,
    rows_RD: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    plan: GroupPlan,
    residuals: tuple[jax.Array, jax.Array],
    into: Three | None = None,
) -> tuple[jax.Array, Three]:
    """Gradients of `ffn_forward`: of the rows in their dtype, of the three banks in float32, added to `into`."""
    hidden_RF, gate_grad_RF, up_grad_RF = _row_pass(
        gated_backward, 3, (grad_RD,), (down_EFD,), plan, transpose_bank=True, beside=residuals,
        name="expert_ffn_gate_gradient",
    )  # fmt: skip
    (rows_grad_RD,) = _row_pass(
        summed, 1, (gate_grad_RF, up_grad_RF), (gate_EDF, up_EDF), plan, transpose_bank=True,
        name="expert_ffn_rows_gradient",
    )  # fmt: skip
    into_gate, into_up, into_down = into or (None, None, None)
    return rows_grad_RD, (
        bank_gradient(rows_RD, gate_grad_RF, plan, into_gate),
        bank_gradient(rows_RD, up_grad_RF, plan, into_up),
        bank_gradient(hidden_RF, grad_RD, plan, into_down),
    )


def _row_pass(
    epilogue: Callable[..., tuple[jax.Array, ...]],
    num_outputs: int,
    rows: Sequence[jax.Array],
    banks: Sequence[jax.Array],
    plan: GroupPlan,
    *,
    transpose_bank: bool,
    name: str,
    beside: Sequence[jax.Array] = (),
) -> list[jax.Array]:
    """`epilogue(products..., beside...)` for every row of a group, zero for the others.

    Args:
        epilogue: elementwise function of float32 tiles that maps zeros to zeros.
        num_outputs: number of arrays `[R, N]` it returns, in the dtype of the rows.
        rows: `[R, K]`; one array per bank, or one for all of them.
        banks: `[E, K, N]` (transposed: `[E, N, K]`); one product for each.
        plan: of the R rows.
        transpose_bank: whether rows are multiplied by the transposed matrices.
        name: of the kernel in compiled programs and profiles.
        beside: `[R, N]` further inputs of the epilogue, zero in rows of no group.
    """
    num_rows, depth = rows[0].shape
    num_groups, width = plan.group_sizes.shape[0], banks[0].shape[1 if transpose_bank else 2]
    tile = row_pass_tile(plan.tiling.tile_rows, len(banks) + len(beside), rows[0].dtype.itemsize, depth, width)

    def kernel(tile_group_ref: Any, tile_start_ref: Any, offsets_ref: Any, *refs: Any) -> None:
        rows_refs, refs = refs[: len(rows)], refs[len(rows) :]
        bank_refs, refs = refs[: len(banks)], refs[len(banks) :]
        beside_refs, out_refs = refs[: len(beside)], refs[len(beside) :]
        group, start = tile_group_ref[pl.program_id(1)], tile_start_ref[pl.program_id(1)]
        columns = _Span(pl.program_id(0) * tile.columns, tile.columns, width)
        # A tile of rows of no group takes no step, and so stores zeros. Unused tiles of the plan do the same but start
        # past the last row, where all loads and stores are masked.
        in_group = group < num_groups
        end = jnp.where(in_group, offsets_ref[jnp.minimum(group + 1, num_groups)], num_rows)
        rows_of_group = _Span(start, tile.rows, end)

        def add_depths(step: jax.Array, products: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            depths = _Span(step * tile.contraction, tile.contraction, depth)
            left = [_load(ref, rows_of_group, depths) for ref in rows_refs] * (len(banks) // len(rows))
            index = (columns, depths) if transpose_bank else (depths, columns)
            right = [_load(ref, group, *index) for ref in bank_refs]
            return tuple(
                product + _dot(a, b, 1, 1 if transpose_bank else 0)
                for product, a, b in zip(products, left, right, strict=True)
            )

        # Not `where(in_group, steps, 0)`: Pallas lowers a select of two literals to a Triton select of booleans.
        steps = in_group.astype(jnp.int32) * pl.cdiv(depth, tile.contraction)
        zeros = tuple(jnp.zeros((tile.rows, tile.columns), jnp.float32) for _ in banks)
        products = lax.fori_loop(0, steps, add_depths, zeros)
        outputs = epilogue(*products, *(_load(ref, rows_of_group, columns).astype(jnp.float32) for ref in beside_refs))
        for out_ref, output in zip(out_refs, outputs, strict=True):
            _store(out_ref, output, rows_of_group, columns)

    return _call(
        kernel,
        tile,
        (pl.cdiv(width, tile.columns), plan.tile_group.shape[0]),
        (plan.tile_group, plan.tile_start, plan.offsets, *rows, *banks, *beside),
        [_like(rows[0], (num_rows, width), rows[0].dtype)] * num_outputs,
        name,
    )


class _Span(NamedTuple):
    """`size` indices along one axis from `start`; those at or past `end` are masked."""

    start: jax.Array
    size: int
    end: int | jax.Array


def _masked(ref: Any, index: Sequence[jax.Array | _Span]) -> tuple[Any, jax.Array]:
    """The view of `ref` at two spans and any number of scalar indices, and its mask."""
    view = ref.at[tuple(pl.ds(at.start, at.size) if isinstance(at, _Span) else at for at in index)]
    first, second = (at.start + jnp.arange(at.size, dtype=jnp.int32) < at.end for at in index if isinstance(at, _Span))
    return view, first[:, None] & second[None, :]


def _load(ref: Any, *index: jax.Array | _Span) -> jax.Array:
    view, mask = _masked(ref, index)
    return plgpu.load(view, mask=mask, other=0)


def _store(ref: Any, tile: jax.Array, *index: jax.Array | _Span) -> None:
    view, mask = _masked(ref, index)
    plgpu.store(view, tile.astype(ref.dtype), mask=mask)


def _dot(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
    """Product over one axis of each matrix, accumulated in float32; HIGHEST keeps float32 products out of TF32."""
    dimensions = (((contract_a,), (contract_b,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _like(array: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
    """An output that, inside `shard_map`, varies over the same mesh axes as `array`."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(array).manual_axis_type)


def _call(
    kernel: Callable[..., None],
    tile: GpuTile,
    grid: tuple[int, ...],
    operands: Sequence[jax.Array],
    outputs: list[jax.ShapeDtypeStruct],
    name: str,
    aliases: dict[int, int] | None = None,
) -> list[jax.Array]:
    """Run `kernel` at every point of the grid, the first axis fastest: compiled on a GPU, elsewhere interpreted."""

    def call(interpret: bool) -> Callable[..., list[jax.Array]]:
        return pl.pallas_call(
            kernel,
            outputs,
            grid=grid,
            input_output_aliases=aliases or {},
            compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
            interpret=interpret,
            name=name,
        )

    compiled = call(False)
    return lax.platform_dependent(*operands, cuda=compiled, rocm=compiled, default=call(True))
