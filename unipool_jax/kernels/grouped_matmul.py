"""Grouped matrix product: each row of a sorted buffer times the matrix of its expert."""

from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from unipool_jax.kernels import mosaic_gpu, pallas_gpu, pallas_tpu, reference, xla
from unipool_jax.kernels.group_plan import GroupPlan
from unipool_jax.kernels.implementations import Implementation

Operands = TypeVar("Operands")
Three = tuple[jax.Array, jax.Array, jax.Array]


class BackEnd(Protocol):
    """Functions that an implementation provides. Operands share one dtype; products accumulate in float32."""

    def matmul(self, rows_RK: jax.Array, bank: jax.Array, plan: GroupPlan, *, transpose_bank: bool) -> jax.Array:
        """`out[r] = rows[r] @ bank[group of r]`, or with that matrix transposed; zero for rows of no group."""

    def bank_gradient(
        self, rows_RK: jax.Array, grad_RN: jax.Array, plan: GroupPlan, into_EKN: jax.Array | None = None
    ) -> jax.Array:
        """`[E, K, N]` float32: `into` (default zero) plus each group's sum of outer products `rows[r] grad[r]^T`."""

    def ffn_forward(
        self,
        rows_RD: jax.Array,
        gate_EDF: jax.Array,
        up_EDF: jax.Array,
        down_EFD: jax.Array,
        plan: GroupPlan,
        *,
        keep_products: bool,
    ) -> tuple[jax.Array, Any]:
        """Gated expert FFN `[R, D]`, and the residuals of `ffn_backward`, which are valid only if `keep_products`."""

    def ffn_backward(
        self,
        grad_RD: jax.Array,
        rows_RD: jax.Array,
        gate_EDF: jax.Array,
        up_EDF: jax.Array,
        down_EFD: jax.Array,
        plan: GroupPlan,
        residuals: Any,
        into: Three | None = None,
    ) -> tuple[jax.Array, Three]:
        """Gradient of the rows, and those of the three banks added to `into` (default zero) in float32."""


BACK_ENDS: dict[Implementation, BackEnd] = {
    "xla": xla,
    "pallas_tpu": pallas_tpu,
    "pallas_gpu": pallas_gpu,
    "mosaic_gpu": mosaic_gpu,
}


def grouped_matmul(
    rows_RK: jax.Array,
    bank_EKN: jax.Array,
    plan: GroupPlan,
) -> jax.Array:
    """`out[r] = rows[r] @ bank[group of r]`; zero for rows past the last group.

    Products accumulate in float32. A float32 bank is cast to the dtype of the rows, and its gradient is float32;
    otherwise the gradient is accumulated in float32 and rounded once to the dtype of the bank. Rows past the last group
    are zero in the output and in the row gradient, and never contribute to the bank's gradient, even if the buffer or
    the cotangent holds NaN there. Reverse-mode differentiation only.

    Args:
        rows_RK: `[R, K]` rows sorted by group.
        bank_EKN: `[E, K, N]` one matrix per expert, in the dtype of the rows or float32.
        plan: from `make_group_plan(sizes, R)`; names the implementation.

    Returns:
        `[R, N]` in the rows' dtype.

    Raises:
        ValueError: shapes or dtypes that do not match.

    Example:
        >>> from unipool_jax.kernels.group_plan import make_group_plan
        >>> rows, bank = jnp.ones((3, 2)), jnp.stack([jnp.eye(2), 2 * jnp.eye(2)])
        >>> grouped_matmul(rows, bank, make_group_plan(jnp.array([1, 1]), 3)).tolist()
        [[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]]
    """
    check_operands({"rows_RK": rows_RK}, {"bank_EKN": bank_EKN}, plan)
    if rows_RK.shape[1] != bank_EKN.shape[1]:
        raise ValueError(
            f"rows_RK has shape {rows_RK.shape}; expected [R, {bank_EKN.shape[1]}] to match bank_EKN {bank_EKN.shape}"
        )
    if rows_RK.shape[0] == 0:
        return jnp.zeros((0, bank_EKN.shape[2]), rows_RK.dtype)
    rows_RK, bank_EKN, plan = vary_alike((rows_RK, bank_EKN, plan))
    if plan.tiling.implementation == "reference":
        return reference.grouped_matmul(rows_RK, bank_EKN.astype(rows_RK.dtype), plan)
    return _matmul(rows_RK, bank_EKN, plan)


def check_operands(rows: dict[str, jax.Array], banks: dict[str, jax.Array], plan: GroupPlan) -> None:
    """Raise ValueError unless rows and banks, keyed by argument name, match the plan in shape and agree in dtype."""
    num_rows, num_groups = plan.row_group.shape[0], plan.group_sizes.shape[0]
    ((rows_name, rows_array),) = rows.items()
    if rows_array.ndim != 2 or rows_array.shape[0] != num_rows:
        raise ValueError(
            f"{rows_name} has shape {rows_array.shape}; expected two dimensions and the plan's {num_rows} rows"
        )
    if not jnp.issubdtype(rows_array.dtype, jnp.floating):
        raise ValueError(f"{rows_name} has dtype {rows_array.dtype}; expected a floating-point dtype")
    for name, bank in banks.items():
        if bank.ndim != 3 or bank.shape[0] != num_groups:
            raise ValueError(
                f"{name} has shape {bank.shape}; expected three dimensions and the plan's {num_groups} experts"
            )
        if bank.dtype not in (rows_array.dtype, jnp.float32):
            raise ValueError(
                f"{name} has dtype {bank.dtype} but {rows_name} has {rows_array.dtype}; "
                "cast the bank to the rows' dtype or to float32"
            )


def vary_alike(operands: Operands) -> Operands:
    """Inside `shard_map`, mark all operands as varying over every mesh axis that any of them varies over.

    The cotangents of a `custom_vjp` must vary over the same axes as its operands. Casting the operands before the call
    lets JAX insert the sum over devices for replicated operands, such as a bank.
    """
    leaves = jax.tree.leaves(operands)
    axes = frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in leaves))

    def mark(leaf: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - jax.typeof(leaf).manual_axis_type.varying))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, operands)


@jax.custom_vjp
def _matmul(rows_RK: jax.Array, bank_EKN: jax.Array, plan: GroupPlan) -> jax.Array:
    back_end = BACK_ENDS[plan.tiling.implementation]
    return back_end.matmul(rows_RK, bank_EKN.astype(rows_RK.dtype), plan, transpose_bank=False)


def _forward(
    rows_RK: jax.Array, bank_EKN: jax.Array, plan: GroupPlan
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, GroupPlan]]:
    return _matmul(rows_RK, bank_EKN, plan), (rows_RK, bank_EKN, plan)


def _backward(
    residuals: tuple[jax.Array, jax.Array, GroupPlan], grad_RN: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    rows_RK, bank_EKN, plan = residuals
    back_end = BACK_ENDS[plan.tiling.implementation]
    rows_grad_RK = back_end.matmul(grad_RN, bank_EKN.astype(rows_RK.dtype), plan, transpose_bank=True)
    bank_grad_EKN = back_end.bank_gradient(rows_RK, grad_RN, plan).astype(bank_EKN.dtype)
    return rows_grad_RK, bank_grad_EKN, None


_matmul.defvjp(_forward, _backward)
