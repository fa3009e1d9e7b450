"""Grouped matrix product: each row of a sorted buffer times its own expert's matrix. The public face."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from unipool_jax.kernels import reference, xla
from unipool_jax.kernels.group_plan import GroupPlan

Implementation = Literal["auto", "reference", "xla"]

# What "auto" means on each platform; every platform not named here uses "xla".
PLATFORM_IMPLEMENTATION: dict[str, Implementation] = {"cpu": "xla"}


def resolve(implementation: Implementation) -> Implementation:
    """The implementation that `implementation` stands for on the default backend.

    Code compiled ahead of time for another platform should name its implementation instead of "auto".

    Raises:
        ValueError: if it is none of "auto", "reference", "xla".
    """
    if implementation == "auto":
        return PLATFORM_IMPLEMENTATION.get(jax.default_backend(), "xla")
    if implementation not in ("reference", "xla"):
        raise ValueError(
            f"implementation is {implementation!r}; expected 'auto', 'reference' or 'xla'"
        )
    return implementation


def grouped_matmul(
    rows_RK: jax.Array,
    bank_EKN: jax.Array,
    plan: GroupPlan,
    *,
    implementation: Implementation = "auto",
) -> jax.Array:
    """`out[r] = rows[r] @ bank[group of r]`; zero for rows past the last group.

    Products accumulate in float32. The bank's gradient is summed in float32 and rounded once to the bank's
    dtype. Rows past the last group are zero in the output and in the row gradient and never reach the bank's
    gradient, whatever the buffer or the cotangent holds there (NaN included). Reverse mode only.

    Args:
        rows_RK: `[R, K]` rows sorted by group.
        bank_EKN: `[E, K, N]` one matrix per expert, of the rows' dtype.
        plan: from `make_group_plan(sizes, R)`.
        implementation: "auto" chooses by platform.

    Returns:
        `[R, N]` in the rows' dtype.

    Raises:
        ValueError: on shapes or dtypes that do not fit together, or an unknown implementation.
    """
    if bank_EKN.ndim != 3:
        raise ValueError(f"bank_EKN has shape {bank_EKN.shape}; expected [E, K, N]")
    check_operands(rows_RK, {"bank_EKN": bank_EKN}, plan)
    if rows_RK.shape[1] != bank_EKN.shape[1]:
        raise ValueError(
            f"rows_RK has shape {rows_RK.shape}; expected [R, {bank_EKN.shape[1]}] "
            f"to fit bank_EKN {bank_EKN.shape}"
        )
    if resolve(implementation) == "reference":
        return reference.grouped_matmul(rows_RK, bank_EKN, plan)
    return _xla_matmul(rows_RK, bank_EKN, plan)


def check_operands(rows: jax.Array, banks: dict[str, jax.Array], plan: GroupPlan) -> None:
    """Raise ValueError unless rows, banks (by argument name) and plan agree in rank, dtype and groups."""
    if rows.ndim != 2:
        raise ValueError(f"rows has shape {rows.shape}; expected two dimensions [rows, width]")
    num_groups = plan.group_sizes.shape[0]
    for name, bank in banks.items():
        if bank.shape[0] != num_groups:
            raise ValueError(
                f"{name} has shape {bank.shape}; expected {num_groups} experts on its first axis, "
                "one per group of the plan"
            )
        if bank.dtype != rows.dtype:
            raise ValueError(
                f"{name} has dtype {bank.dtype} and rows {rows.dtype}; expected one dtype: "
                "cast the bank once per step, not once per layer"
            )
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        raise ValueError(f"rows has dtype {rows.dtype}; expected a floating-point dtype")


@jax.custom_vjp
def _xla_matmul(rows_RK: jax.Array, bank_EKN: jax.Array, plan: GroupPlan) -> jax.Array:
    return xla.matmul(rows_RK, bank_EKN, plan, transpose_bank=False)


def _forward(rows_RK: jax.Array, bank_EKN: jax.Array, plan: GroupPlan):
    return _xla_matmul(rows_RK, bank_EKN, plan), (rows_RK, bank_EKN, plan)


def _backward(residuals: tuple[jax.Array, jax.Array, GroupPlan], grad_RN: jax.Array):
    rows_RK, bank_EKN, plan = residuals
    rows_grad = xla.matmul(grad_RN, bank_EKN, plan, transpose_bank=True)
    bank_grad = xla.bank_gradient(rows_RK, grad_RN, plan).astype(bank_EKN.dtype)
    return rows_grad, bank_grad, None


_xla_matmul.defvjp(_forward, _backward)
