"""Grouped products in plain XLA operations: runs on every platform, the default on CPU.

Two stages, both of static shape. First, the leading T rows of every group are gathered into a padded block
`[E, T, ...]` and multiplied in one batched product, which reads each matrix once. Then a loop visits the overflow tiles
of groups with more than T rows. Its trip count is the number of such tiles: almost none with balanced routing, and at
most one more pass over the rows if one expert has all of them. T and the tile size come from the plan's tiling.

Gathered values are masked to the rows of their group before any sum, so rows of no group, and NaNs in them, affect no
result.
"""

import jax
import jax.numpy as jnp
from jax import lax

from unipool_jax.kernels import xla_loops
from unipool_jax.kernels.epilogues import Three, gated, gated_backward
from unipool_jax.kernels.group_plan import GroupPlan


def matmul(rows_RK: jax.Array, bank: jax.Array, plan: GroupPlan, *, transpose_bank: bool) -> jax.Array:
    """`out[r] = rows[r] @ bank[group of r]`, or with that matrix transposed; zero for rows of no group.

    Shapes: `[R, K]`, `[E, K, N]` (transposed: `[E, N, K]`) -> `[R, N]` in the dtype of the rows.
    """
    contract = 1 if transpose_bank else 0
    out_RN = _from_blocks(_batched_dot(_to_blocks(rows_RK, plan), bank, 1, contract), plan, rows_RK.dtype)

    def visit(tile: jax.Array, out_RN: jax.Array) -> jax.Array:
        group, base, in_group_T1 = _tile(tile, plan)
        product_TN = _dot(_take(rows_RK, base, in_group_T1), _matrix(bank, group), 1, contract)
        return _put(out_RN, product_TN, base, in_group_T1)

    return lax.fori_loop(0, plan.num_tiles, visit, out_RN)


def bank_gradient(
    rows_RK: jax.Array, grad_RN: jax.Array, plan: GroupPlan, into_EKN: jax.Array | None = None
) -> jax.Array:
    """`[E, K, N]` float32: `into` (default zero) plus each group's sum of outer products `rows[r] grad[r]^T`."""
    bank_EKN = _outer_products(_to_blocks(rows_RK, plan), _to_blocks(grad_RN, plan), into_EKN)

    def visit(tile: jax.Array, bank_EKN: jax.Array) -> jax.Array:
        group, base, in_group_T1 = _tile(tile, plan)
        product_KN = _dot(_take(rows_RK, base, in_group_T1), _take(grad_RN, base, in_group_T1), 0, 0)
        return _add(bank_EKN, product_KN, group)

    return lax.fori_loop(0, plan.num_tiles, visit, bank_EKN)


def ffn_forward(
    rows_RD: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    plan: GroupPlan,
    *,
    keep_products: bool,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Gated expert FFN. Returns `[R, D]` and, with `keep_products`, the products of the blocks for `ffn_backward`.

    The padded layout is kept between the products, so that only `[R, D]` arrays are gathered and scattered. Wide
    experts with many rows go through `xla_loops`, whose products are not padded.
    """
    if xla_loops.suits(rows_RD, gate_EDF, plan):
        return xla_loops.ffn_forward(rows_RD, gate_EDF, up_EDF, down_EFD, plan, keep_products=keep_products)
    dtype = rows_RD.dtype
    block_ETD = _to_blocks(rows_RD, plan)
    gate_ETF = _batched_dot(block_ETD, gate_EDF, 1, 0)
    up_ETF = _batched_dot(block_ETD, up_EDF, 1, 0)
    hidden_ETF = gated(gate_ETF, up_ETF)[0].astype(dtype)
    out_RD = _from_blocks(_batched_dot(hidden_ETF, down_EFD, 1, 0), plan, dtype)

    def visit(tile: jax.Array, out_RD: jax.Array) -> jax.Array:
        group, base, in_group_T1 = _tile(tile, plan)
        rows_TD = _take(rows_RD, base, in_group_T1)
        gate_TF = _dot(rows_TD, _matrix(gate_EDF, group), 1, 0)
        up_TF = _dot(rows_TD, _matrix(up_EDF, group), 1, 0)
        hidden_TF = gated(gate_TF, up_TF)[0].astype(dtype)
        return _put(out_RD, _dot(hidden_TF, _matrix(down_EFD, group), 1, 0), base, in_group_T1)

    products = (gate_ETF.astype(dtype), up_ETF.astype(dtype)) if keep_products else ()
    return lax.fori_loop(0, plan.num_tiles, visit, out_RD), products


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
    """Gradients of `ffn_forward`: of the rows in their dtype, of the three banks in float32, added to `into`.

    Overflow tiles recompute their gate and up products: storing them would take another pair of `[R, F]` buffers for
    rows that balanced routing does not have.
    """
    if xla_loops.suits(rows_RD, gate_EDF, plan):
        return xla_loops.ffn_backward(grad_RD, rows_RD, gate_EDF, up_EDF, down_EFD, plan, residuals, into)
    dtype = rows_RD.dtype
    block_ETD = _to_blocks(rows_RD, plan)
    grad_ETD = _to_blocks(grad_RD, plan)
    hidden_ETF, gate_grad_ETF, up_grad_ETF = _gated_backward(*residuals, _batched_dot(grad_ETD, down_EFD, 1, 1), dtype)
    gate_into_EDF, up_into_EDF, down_into_EFD = into or (None, None, None)
    gate_bank_EDF = _outer_products(block_ETD, gate_grad_ETF, gate_into_EDF)
    up_bank_EDF = _outer_products(block_ETD, up_grad_ETF, up_into_EDF)
    down_bank_EFD = _outer_products(hidden_ETF, grad_ETD, down_into_EFD)
    rows_grad_ETD = _batched_dot(gate_grad_ETF, gate_EDF, 1, 1) + _batched_dot(up_grad_ETF, up_EDF, 1, 1)
    rows_grad_RD = _from_blocks(rows_grad_ETD, plan, dtype)

    def visit(tile: jax.Array, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        rows_grad_RD, gate_bank_EDF, up_bank_EDF, down_bank_EFD = gradients
        group, base, in_group_T1 = _tile(tile, plan)
        rows_TD, grad_TD = _take(rows_RD, base, in_group_T1), _take(grad_RD, base, in_group_T1)
        gate_DF, up_DF, down_FD = (_matrix(bank, group) for bank in (gate_EDF, up_EDF, down_EFD))
        hidden_TF, gate_grad_TF, up_grad_TF = _gated_backward(
            _dot(rows_TD, gate_DF, 1, 0), _dot(rows_TD, up_DF, 1, 0), _dot(grad_TD, down_FD, 1, 1), dtype
        )
        rows_grad_TD = _dot(gate_grad_TF, gate_DF, 1, 1) + _dot(up_grad_TF, up_DF, 1, 1)
        return (
            _put(rows_grad_RD, rows_grad_TD, base, in_group_T1),
            _add(gate_bank_EDF, _dot(rows_TD, gate_grad_TF, 0, 0), group),
            _add(up_bank_EDF, _dot(rows_TD, up_grad_TF, 0, 0), group),
            _add(down_bank_EFD, _dot(hidden_TF, grad_TD, 0, 0), group),
        )

    gradients = (rows_grad_RD, gate_bank_EDF, up_bank_EDF, down_bank_EFD)
    rows_grad_RD, *bank_gradients = lax.fori_loop(0, plan.num_tiles, visit, gradients)
    return rows_grad_RD, tuple(bank_gradients)


def _gated_backward(
    gate: jax.Array, up: jax.Array, hidden_grad: jax.Array, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`gated_backward`, computed in float32, rounded to `dtype`."""
    hidden, gate_grad, up_grad = gated_backward(hidden_grad, gate.astype(jnp.float32), up.astype(jnp.float32))
    return hidden.astype(dtype), gate_grad.astype(dtype), up_grad.astype(dtype)


def _dot(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
    """Product over one axis of each matrix, accumulated and returned in float32."""
    dimensions = (((contract_a,), (contract_b,)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _batched_dot(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
    """`_dot` batched over experts, the first axis of both; the contracted axes count from the second."""
    dimensions = (((contract_a + 1,), (contract_b + 1,)), ((0,), (0,)))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _outer_products(a_ETK: jax.Array, b_ETN: jax.Array, into_EKN: jax.Array | None) -> jax.Array:
    """`into` (default zero) plus the product of each expert's two blocks over their rows, float32 `[E, K, N]`.

    With `into`, one expert at a time, so that each product is added while it is in cache. A batched product would write
    an array of the bank's size to memory and read it back.
    """
    if into_EKN is None:
        return _batched_dot(a_ETK, b_ETN, 0, 0)

    def add_expert(expert: jax.Array, total_EKN: jax.Array) -> jax.Array:
        return _add(total_EKN, _dot(_matrix(a_ETK, expert), _matrix(b_ETN, expert), 0, 0), expert)

    return lax.fori_loop(0, into_EKN.shape[0], add_expert, into_EKN)


def _to_blocks(rows_RC: jax.Array, plan: GroupPlan) -> jax.Array:
    """`[E, T, C]`: the first T rows of each group, zero where the group has fewer."""
    row_ET = plan.offsets[:-1, None] + jnp.arange(plan.tiling.block_rows, dtype=jnp.int32)
    rows_ETC = jnp.take(rows_RC, row_ET, axis=0, mode="clip")
    return jnp.where((row_ET < plan.offsets[1:, None])[..., None], rows_ETC, 0)


def _from_blocks(blocks_ETC: jax.Array, plan: GroupPlan, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`[R, C]`: the inverse of `_to_blocks`; zero for rows of no group and for rows beyond their group's block."""
    groups, block, width = blocks_ETC.shape
    position_R = jnp.arange(plan.row_group.shape[0], dtype=jnp.int32) - jnp.take(
        plan.offsets, plan.row_group, mode="clip"
    )
    source_R = plan.row_group * block + position_R
    rows_RC = jnp.take(blocks_ETC.reshape(groups * block, width), source_R, axis=0, mode="clip")
    in_block_R = (plan.row_group < groups) & (position_R < block)
    return jnp.where(in_block_R[:, None], rows_RC, 0).astype(dtype)


def _tile(tile: jax.Array, plan: GroupPlan) -> tuple[jax.Array, jax.Array, jax.Array]:
    """An overflow tile's group, the first row it reads, and the `[rows, 1]` mask of the rows that belong to it.

    A tile that would extend past the buffer reads from an earlier row, and masks the rows before its start.
    """
    num_rows, rows = plan.row_group.shape[0], plan.tiling.tile_rows
    group, start = plan.tile_group[tile], plan.tile_start[tile]
    base = jnp.minimum(start, num_rows - rows)
    row_T1 = base + jnp.arange(rows, dtype=jnp.int32)[:, None]
    return group, base, (start <= row_T1) & (row_T1 < plan.offsets[group + 1])


def _take(rows_RC: jax.Array, base: jax.Array, in_group_T1: jax.Array) -> jax.Array:
    return jnp.where(in_group_T1, lax.dynamic_slice_in_dim(rows_RC, base, in_group_T1.shape[0]), 0)


def _put(rows_RC: jax.Array, tile_TC: jax.Array, base: jax.Array, in_group_T1: jax.Array) -> jax.Array:
    there_TC = lax.dynamic_slice_in_dim(rows_RC, base, in_group_T1.shape[0])
    tile_TC = jnp.where(in_group_T1, tile_TC.astype(rows_RC.dtype), there_TC)
    return lax.dynamic_update_slice_in_dim(rows_RC, tile_TC, base, 0)


def _matrix(bank: jax.Array, group: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(bank, group, keepdims=False)


def _add(bank: jax.Array, matrix: jax.Array, group: jax.Array) -> jax.Array:
    # Of this shape XLA adds in place; a matrix without the first axis is copied out of the bank first.
    there = lax.dynamic_slice_in_dim(bank, group, 1)
    return lax.dynamic_update_slice_in_dim(bank, there + matrix[None], group, 0)
