"""Grouped products in plain XLA operations: runs on every platform, the default on CPU.

Each product loops over experts and, inside, over the expert's row tiles: no data-dependent shape, no FLOPs for
experts that own no rows, and at most one partly filled tile per expert.
"""

import jax
import jax.numpy as jnp
from jax import lax

from unipool_jax.kernels.group_plan import GroupPlan


def tile_rows(num_rows: int, num_groups: int) -> int:
    """Rows of a tile: the expected rows per expert, rounded up to a multiple of 16, within 16 and 256."""
    expected = -(-num_rows // num_groups)
    return min(max(16, -(-expected // 16) * 16), 256, num_rows)


def _dot(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
    """2-D product over one axis of each operand, accumulated and returned in float32."""
    dimensions = (((contract_a,), (contract_b,)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _tile(array_RC: jax.Array, start: jax.Array, rows: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(array_RC, start, rows)


def _own_rows(start: jax.Array, end: jax.Array, base: jax.Array, rows: int) -> jax.Array:
    """`[rows, 1]` mask of the tile at `base` that lies in `start:end`."""
    index = base + jnp.arange(rows, dtype=jnp.int32)[:, None]
    return (start <= index) & (index < end)


def matmul(
    rows_RK: jax.Array, bank: jax.Array, plan: GroupPlan, *, transpose_bank: bool
) -> jax.Array:
    """`out[r] = rows[r] @ bank[group of r]`, or its transpose `bank[group of r].T`; zero for rows of no group.

    Shapes: `[R, K]`, `[E, K, N]` (transposed: `[E, N, K]`) -> `[R, N]` in the dtype of the rows.
    """
    num_rows = rows_RK.shape[0]
    num_groups = bank.shape[0]
    width = bank.shape[1] if transpose_bank else bank.shape[2]
    rows = tile_rows(num_rows, num_groups)

    def expert_body(expert: jax.Array, out_RN: jax.Array) -> jax.Array:
        weight = lax.dynamic_index_in_dim(bank, expert, keepdims=False)
        end = plan.offsets[expert + 1]

        def tile_body(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            start, out_RN = carry
            base = jnp.minimum(start, num_rows - rows)
            tile = _dot(_tile(rows_RK, base, rows), weight, 1, 1 if transpose_bank else 0)
            tile = jnp.where(
                _own_rows(start, end, base, rows),
                tile.astype(out_RN.dtype),
                _tile(out_RN, base, rows),
            )
            return start + rows, lax.dynamic_update_slice_in_dim(out_RN, tile, base, 0)

        return lax.while_loop(
            lambda carry: carry[0] < end, tile_body, (plan.offsets[expert], out_RN)
        )[1]

    out_RN = jnp.zeros((num_rows, width), rows_RK.dtype)
    return lax.fori_loop(0, num_groups, expert_body, out_RN)


def bank_gradient(rows_RK: jax.Array, grad_RN: jax.Array, plan: GroupPlan) -> jax.Array:
    """`[E, K, N]` float32: for each expert the sum over its own rows of `rows[r]^T grad[r]`."""
    num_rows, depth = rows_RK.shape
    width = grad_RN.shape[1]
    num_groups = plan.group_sizes.shape[0]
    rows = tile_rows(num_rows, num_groups)

    def expert_body(expert: jax.Array, bank_EKN: jax.Array) -> jax.Array:
        end = plan.offsets[expert + 1]

        def tile_body(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            start, sum_KN = carry
            base = jnp.minimum(start, num_rows - rows)
            mine = _own_rows(start, end, base, rows)
            rows_TK = jnp.where(mine, _tile(rows_RK, base, rows), 0)
            grad_TN = jnp.where(mine, _tile(grad_RN, base, rows), 0)
            return start + rows, sum_KN + _dot(rows_TK, grad_TN, 0, 0)

        sum_KN = lax.while_loop(
            lambda carry: carry[0] < end,
            tile_body,
            (plan.offsets[expert], jnp.zeros((depth, width), jnp.float32)),
        )[1]
        return lax.dynamic_update_index_in_dim(bank_EKN, sum_KN, expert, 0)

    bank_EKN = jnp.zeros((num_groups, depth, width), jnp.float32)
    return lax.fori_loop(0, num_groups, expert_body, bank_EKN)
