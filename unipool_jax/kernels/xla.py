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
from unipool_jax.kernels.epilogues import Three, gated
from unipool_jax.kernels.group_plan import GroupPlan
from unipool_jax.kernels.xla_tile import Tile, add, dot, gated_gradients, matrix, tile_at


def matmul(rows_RK: jax.Array, bank: jax.Array, plan: GroupPlan, *, transpose_bank: bool) -> jax.Array:
    """`out[r] = rows[r] @ bank[group of r]`, or with that matrix transposed; zero for rows of no group.

    Shapes: `[R, K]`, `[E, K, N]` (transposed: `[E, N, K]`) -> `[R, N]` in the dtype of the rows.
    """
    contract = 1 if transpose_bank else 0
    out_RN = _from_blocks(_batched_dot(_to_blocks(rows_RK, plan), bank, 1, contract), plan, rows_RK.dtype)

    def visit(tile: jax.Array, out_RN: jax.Array) -> jax.Array:
        at = _tile(tile, plan)
        return at.put(dot(at.take(rows_RK), matrix(bank, at.group), 1, contract), out_RN)

    return lax.fori_loop(0, plan.num_tiles, visit, out_RN)


def bank_gradient(
    rows_RK: jax.Array, grad_RN: jax.Array, plan: GroupPlan, into_EKN: jax.Array | None = None
) -> jax.Array:
    """`[E, K, N]` float32: `into` (default zero) plus each group's sum of outer products `rows[r] grad[r]^T`."""
    bank_EKN = _outer_products(_to_blocks(rows_RK, plan), _to_blocks(grad_RN, plan), into_EKN)

    def visit(tile: jax.Array, bank_EKN: jax.Array) -> jax.Array:
        at = _tile(tile, plan)
        return add(dot(at.take(rows_RK), at.take(grad_RN), 0, 0), bank_EKN, at.group)

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
        at = _tile(tile, plan)
        rows_TD = at.take(rows_RD)
        gate_TF = dot(rows_TD, matrix(gate_EDF, at.group), 1, 0)
        up_TF = dot(rows_TD, matrix(up_EDF, at.group), 1, 0)
        hidden_TF = gated(gate_TF, up_TF)[0].astype(dtype)
        return at.put(dot(hidden_TF, matrix(down_EFD, at.group), 1, 0), out_RD)

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
    hidden_ETF, gate_grad_ETF, up_grad_ETF = gated_gradients(*residuals, _batched_dot(grad_ETD, down_EFD, 1, 1), dtype)
    gate_into_EDF, up_into_EDF, down_into_EFD = into or (None, None, None)
    gate_bank_EDF = _outer_products(block_ETD, gate_grad_ETF, gate_into_EDF)
    up_bank_EDF = _outer_products(block_ETD, up_grad_ETF, up_into_EDF)
    down_bank_EFD = _outer_products(hidden_ETF, grad_ETD, down_into_EFD)
    rows_grad_ETD = _batched_dot(gate_grad_ETF, gate_EDF, 1, 1) + _batched_dot(up_grad_ETF, up_EDF, 1, 1)
    rows_grad_RD = _from_blocks(rows_grad_ETD, plan, dtype)

    def visit(tile: jax.Array, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        rows_grad_RD, gate_bank_EDF, up_bank_EDF, down_bank_EFD = gradients
        at = _tile(tile, plan)
        rows_TD, grad_TD = at.take(rows_RD), at.take(grad_RD)
        gate_DF, up_DF, down_FD = (matrix(bank, at.group) for bank in (gate_EDF, up_EDF, down_EFD))
        hidden_TF, gate_grad_TF, up_grad_TF = gated_gradients(
            dot(rows_TD, gate_DF, 1, 0), dot(rows_TD, up_DF, 1, 0), dot(grad_TD, down_FD, 1, 1), dtype
        )
        rows_grad_TD = dot(gate_grad_TF, gate_DF, 1, 1) + dot(up_grad_TF, up_DF, 1, 1)
        return (
            at.put(rows_grad_TD, rows_grad_RD),
            add(dot(rows_TD, gate_grad_TF, 0, 0), gate_bank_EDF, at.group),
            add(dot(rows_TD, up_grad_TF, 0, 0), up_bank_EDF, at.group),
            add(dot(hidden_TF, grad_TD, 0, 0), down_bank_EFD, at.group),
        )

    gradients = (rows_grad_RD, gate_bank_EDF, up_bank_EDF, down_bank_EFD)
    rows_grad_RD, *bank_gradients = lax.fori_loop(0, plan.num_tiles, visit, gradients)
    return rows_grad_RD, tuple(bank_gradients)


def _batched_dot(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
    """`dot` batched over experts, the first axis of both; the contracted axes count from the second."""
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
        return add(dot(matrix(a_ETK, expert), matrix(b_ETN, expert), 0, 0), total_EKN, expert)

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


def _tile(tile: jax.Array, plan: GroupPlan) -> Tile:
    """An overflow tile. One that would extend past the buffer reads from an earlier row."""
    group, start = plan.tile_group[tile], plan.tile_start[tile]
    return tile_at(group, start, plan.offsets[group + 1], plan.tiling.tile_rows, plan.row_group.shape[0])
