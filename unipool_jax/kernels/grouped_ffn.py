"""Gated expert feed-forward network on a group plan: the one symbol that the layers above import."""

import jax
import jax.numpy as jnp

from unipool_jax.kernels import reference
from unipool_jax.kernels.group_plan import GroupPlan
from unipool_jax.kernels.grouped_matmul import (
    Implementation,
    check_operands,
    grouped_matmul,
    resolve,
)


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

    SiLU is computed in float32, products accumulate in float32, weight gradients are summed in float32 and
    rounded once to the weights' dtype. Rows past the last group are zero in the output and in the row
    gradient and never reach a weight gradient, even where they hold NaN. Reverse mode only.

    Args:
        rows_RD: `[R, D]` rows sorted by group.
        gate_EDF: `[E, D, F]` gate projections, of the rows' dtype.
        up_EDF: `[E, D, F]` up projections.
        down_EFD: `[E, F, D]` down projections.
        plan: from `make_group_plan(sizes, R)`.
        implementation: "auto" chooses by platform.

    Returns:
        `[R, D]` in the rows' dtype.

    Raises:
        ValueError: on shapes or dtypes that do not fit together, or an unknown implementation.
    """
    if gate_EDF.ndim != 3:
        raise ValueError(f"gate_EDF has shape {gate_EDF.shape}; expected [E, D, F]")
    experts, width, hidden = gate_EDF.shape
    check_operands(rows_RD, {"gate_EDF": gate_EDF, "up_EDF": up_EDF, "down_EFD": down_EFD}, plan)
    expected = {
        "rows_RD": (rows_RD.shape[1:], (width,)),
        "up_EDF": (up_EDF.shape, (experts, width, hidden)),
        "down_EFD": (down_EFD.shape, (experts, hidden, width)),
    }
    for name, (actual, wanted) in expected.items():
        if actual != wanted:
            raise ValueError(
                f"{name} has (trailing) shape {actual}; expected {wanted} to fit gate_EDF {gate_EDF.shape}"
            )
    if resolve(implementation) == "reference":
        return reference.grouped_ffn(rows_RD, gate_EDF, up_EDF, down_EFD, plan)
    gate_RF = grouped_matmul(rows_RD, gate_EDF, plan, implementation=implementation)
    up_RF = grouped_matmul(rows_RD, up_EDF, plan, implementation=implementation)
    hidden_RF = jax.nn.silu(gate_RF.astype(jnp.float32)) * up_RF.astype(jnp.float32)
    return grouped_matmul(
        hidden_RF.astype(rows_RD.dtype), down_EFD, plan, implementation=implementation
    )
