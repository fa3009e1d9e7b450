"""Grouped products for TPU, optimized for many experts with few rows each. The kernels are in `tpu_row_pass` and
`tpu_bank_pass`.

On a single device that is not a TPU, Pallas's TPU interpreter runs them, slowly. To compile ahead of time for a TPU,
trace under `jax.set_mesh` with a mesh of its devices.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from unipool_jax.kernels.epilogues import Three, gated, gated_and_products, gated_backward, summed, unchanged
from unipool_jax.kernels.group_plan import GroupPlan
from unipool_jax.kernels.tpu_bank_pass import bank_pass
from unipool_jax.kernels.tpu_row_pass import row_pass


def matmul(rows_RK: jax.Array, bank: jax.Array, plan: GroupPlan, *, transpose_bank: bool) -> jax.Array:
    """`out[r] = rows[r] @ bank[group of r]`, or with that matrix transposed; zero for rows of no group.

    Shapes: `[R, K]`, `[E, K, N]` (transposed: `[E, N, K]`) -> `[R, N]` in the dtype of the rows.
    """
    name = "grouped_matmul_transposed" if transpose_bank else "grouped_matmul"
    return row_pass(unchanged, 1, [rows_RK], [bank], plan, transpose_bank=transpose_bank, name=name)[0]


def bank_gradient(
    rows_RK: jax.Array,
    grad_RN: jax.Array,
    plan: GroupPlan,
    into_EKN: jax.Array | None = None,
    place: jax.Array | None = None,
) -> jax.Array:
    """`[E, K, N]` float32: `into` (default zero) plus each group's sum of outer products `rows[r] grad[r]^T`.

    The result reuses the buffer of `into` where XLA can donate it. Experts without rows are neither read nor written.
    """
    if into_EKN is None:
        shape = (plan.group_sizes.shape[0], rows_RK.shape[1], grad_RN.shape[1])
        into_EKN = jnp.zeros_like(rows_RK, jnp.float32, shape=shape)
    return bank_pass(rows_RK, grad_RN, into_EKN, plan, place)


def ffn_forward(
    rows_RD: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    plan: GroupPlan,
    *,
    keep_products: bool,
    stacks: Sequence[jax.Array] = (),
    place: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Gated expert FFN. Returns `[R, D]` and, with `keep_products`, the gate and up products for `ffn_backward`.

    Given `stacks` of products of several layers, the products are written into them at `place`. Of halved rows
    `[R, 2, D / 2]`, or a stack of such, the outputs are halved too, and arbitrary for rows of no group.
    """
    epilogue, outputs = (gated_and_products, 3) if keep_products else (gated, 1)
    halved = rows_RD.ndim > 2
    hidden_RF, *products = row_pass(
        epilogue, outputs, [rows_RD], [gate_EDF, up_EDF], plan, stacks=stacks, place=place, clear=False,
        name="expert_ffn_in",
    )  # fmt: skip
    (out_RD,) = row_pass(
        unchanged, 1, [hidden_RF], [down_EFD], plan, clear=not halved, halved=halved, name="grouped_matmul"
    )
    return out_RD, tuple(products)


def ffn_backward(
    grad_RD: jax.Array,
    rows_RD: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    plan: GroupPlan,
    residuals: tuple[jax.Array, jax.Array],
    into: Three | None = None,
    place: jax.Array | None = None,
) -> tuple[jax.Array, Three]:
    """Gradients of `ffn_forward`: of the rows in their dtype, of the three banks in float32, added to `into`.

    `residuals` may be stacks of several layers, of which `place` says which one. The gradient of the output is halved
    as `rows_RD` is, or both are not.
    """
    rows_grad_RD, hidden_RF, gate_grad_RF, up_grad_RF = row_gradients(
        grad_RD, gate_EDF, up_EDF, down_EFD, plan, residuals, place
    )
    gate_into, up_into, down_into = into or (None, None, None)
    return rows_grad_RD, (
        bank_gradient(rows_RD, gate_grad_RF, plan, gate_into, place),
        bank_gradient(rows_RD, up_grad_RF, plan, up_into, place),
        bank_gradient(hidden_RF, grad_RD, plan, down_into),
    )


def row_gradients(
    grad_RD: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    plan: GroupPlan,
    residuals: tuple[jax.Array, jax.Array],
    place: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The part of `ffn_backward` that goes over rows: their gradient, and what the gradients of the banks are made of.

    That is the input of the down matrices, and the gradients of the gate and up products, `[R, F]` each.
    """
    halved = grad_RD.ndim > 2
    hidden_RF, gate_grad_RF, up_grad_RF = row_pass(
        gated_backward, 3, [grad_RD], [down_EFD], plan, beside=residuals, place=place, clear=False, transpose_bank=True,
        name="expert_ffn_gate_gradient",
    )  # fmt: skip
    (rows_grad_RD,) = row_pass(
        summed, 1, [gate_grad_RF, up_grad_RF], [gate_EDF, up_EDF], plan, clear=not halved, halved=halved,
        transpose_bank=True, name="expert_ffn_rows_gradient",
    )  # fmt: skip
    return rows_grad_RD, hidden_RF, gate_grad_RF, up_grad_RF
