"""Gated expert feed-forward network on a group plan: the one symbol that the layers above import."""

import jax
import jax.numpy as jnp

from unipool_jax.kernels import reference, xla
from unipool_jax.kernels.group_plan import GroupPlan
from unipool_jax.kernels.grouped_matmul import Implementation, check_operands, resolve, vary_alike

Operands = tuple[jax.Array, jax.Array, jax.Array, jax.Array, GroupPlan]


def grouped_ffn(
    rows_RD: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    plan: GroupPlan,
    *,
    implementation: Implementation = "auto",
) -> jax.Array:
    """SwiGLU of each row with its own expert: `(silu(x Wg) * (x Wu)) Wd` (Shazeer 2020, arXiv:2002.05202).

    SiLU is computed in float32 and products accumulate in float32. Float32 weights are used in the rows' dtype and
    their gradients stay float32, so a scan over layers adds them up without rounding; gradients of narrower weights
    are summed in float32 and rounded once. Rows past the last group are zero in the output and in the row gradient
    and never reach a weight gradient, even where they hold NaN. Reverse-mode derivatives only; the backward
    pass keeps the rows and the gate and up products, so wrap the call in `jax.checkpoint` to save those two.

    Args:
        rows_RD: `[R, D]` rows sorted by group.
        gate_EDF: `[E, D, F]` gate projections, of the rows' dtype or float32.
        up_EDF: `[E, D, F]` up projections.
        down_EFD: `[E, F, D]` down projections.
        plan: from `make_group_plan(sizes, R)`.
        implementation: "auto" chooses by platform.

    Returns:
        `[R, D]` in the rows' dtype.

    Raises:
        ValueError: on shapes or dtypes that do not fit together, or an unknown implementation.
    """
    check_operands({"rows_RD": rows_RD}, {"gate_EDF": gate_EDF, "up_EDF": up_EDF, "down_EFD": down_EFD}, plan)
    rows, (experts, width, hidden) = rows_RD.shape[0], gate_EDF.shape
    expected = {
        "rows_RD": (rows_RD.shape, (rows, width)),
        "up_EDF": (up_EDF.shape, (experts, width, hidden)),
        "down_EFD": (down_EFD.shape, (experts, hidden, width)),
    }
    for name, (actual, wanted) in expected.items():
        if actual != wanted:
            raise ValueError(f"{name} has shape {actual}; expected {wanted} to fit gate_EDF {gate_EDF.shape}")
    implementation = resolve(implementation)
    if rows == 0:
        return jnp.zeros_like(rows_RD)
    operands = vary_alike((rows_RD, gate_EDF, up_EDF, down_EFD, plan))
    if implementation == "reference":
        return reference.grouped_ffn(*_in_rows_dtype(*operands))
    return _xla_ffn(*operands)


@jax.custom_vjp
def _xla_ffn(
    rows_RD: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array, plan: GroupPlan
) -> jax.Array:
    return xla.ffn_forward(*_in_rows_dtype(rows_RD, gate_EDF, up_EDF, down_EFD, plan))[0]


def _in_rows_dtype(
    rows_RD: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array, plan: GroupPlan
) -> Operands:
    dtype = rows_RD.dtype
    return rows_RD, gate_EDF.astype(dtype), up_EDF.astype(dtype), down_EFD.astype(dtype), plan


def _forward(*operands: *Operands) -> tuple[jax.Array, tuple[Operands, tuple[jax.Array, jax.Array]]]:
    out_RD, products = xla.ffn_forward(*_in_rows_dtype(*operands))
    return out_RD, (operands, products)


def _backward(
    residuals: tuple[Operands, tuple[jax.Array, jax.Array]], grad_RD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, None]:
    operands, products = residuals
    rows_grad_RD, *bank_grads = xla.ffn_backward(grad_RD, *_in_rows_dtype(*operands), products)
    gate_grad, up_grad, down_grad = (
        gradient.astype(bank.dtype) for gradient, bank in zip(bank_grads, operands[1:4], strict=True)
    )
    return rows_grad_RD, gate_grad, up_grad, down_grad, None


_xla_ffn.defvjp(_forward, _backward)
