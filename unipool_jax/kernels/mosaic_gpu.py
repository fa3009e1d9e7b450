"""Grouped products for NVIDIA GPUs of compute capability 9.0 (Hopper), in Pallas with its Mosaic GPU back end.

The kernels, in `mosaic_row_pass` and `mosaic_bank_pass`, take operands of 16 bits and widths that are multiples of 64;
other products are those of `xla`. Where no GPU is compiled for they are interpreted, slowly, which is for tests and
needs JAX 0.12.
"""

from typing import Any

import jax
import jax.numpy as jnp

from unipool_jax.kernels import xla
from unipool_jax.kernels.epilogues import Three, gated, gated_and_products, gated_backward, unchanged
from unipool_jax.kernels.group_plan import GroupPlan, make_group_plan
from unipool_jax.kernels.implementations import hopper_problem, target_device_kind
from unipool_jax.kernels.mosaic_bank_pass import bank_pass
from unipool_jax.kernels.mosaic_row_pass import row_pass
from unipool_jax.kernels.mosaic_shared import plgpu
from unipool_jax.kernels.mosaic_tiles import COLUMNS, ROWS, bank_tile, row_tile

# How kernels are interpreted without a GPU, if not as Pallas does by default; tests turn on the race detector here.
INTERPRET: Any = None


def takes(dtype: jax.typing.DTypeLike, *widths: int) -> bool:
    """Whether the kernels multiply matrices of these widths in this dtype."""
    return jnp.dtype(dtype).itemsize == 2 and not any(width % COLUMNS for width in widths)


def notice(dtype: jax.typing.DTypeLike, width: int, hidden: int) -> str | None:
    """What a run says at its start if its experts' products are XLA's, else None."""
    if takes(dtype, width, hidden):
        return None
    return (
        f"kernels.implementation=mosaic_gpu: its kernels take 16 bits and widths that are multiples of {COLUMNS}; "
        f"products of {width} x {hidden} in {jnp.dtype(dtype).name} are those of kernels.implementation=xla"
    )


def matmul(rows_RK: jax.Array, bank: jax.Array, plan: GroupPlan, *, transpose_bank: bool) -> jax.Array:
    """`out[r] = rows[r] @ bank[group of r]`, or with that matrix transposed; zero for rows of no group.

    Shapes: `[R, K]`, `[E, K, N]` (transposed: `[E, N, K]`) -> `[R, N]` in the dtype of the rows.
    """
    if not takes(rows_RK.dtype, *bank.shape[1:]):
        return xla.matmul(rows_RK, bank, _of_xla(plan), transpose_bank=transpose_bank)
    name = "grouped_matmul_transposed" if transpose_bank else "grouped_matmul"
    return _row_pass(unchanged, 1, [rows_RK], [bank], plan, transpose_bank=transpose_bank, name=name)[0]


def bank_gradient(
    rows_RK: jax.Array, grad_RN: jax.Array, plan: GroupPlan, into_EKN: jax.Array | None = None
) -> jax.Array:
    """`[E, K, N]` float32: `into` (default zero) plus each group's sum of outer products `rows[r] grad[r]^T`.

    The result reuses the buffer of `into` where XLA can donate it. Experts without rows are neither read nor written.
    """
    (_, depth), (_, width) = rows_RK.shape, grad_RN.shape
    if not takes(rows_RK.dtype, depth, width):
        return xla.bank_gradient(rows_RK, grad_RN, _of_xla(plan), into_EKN)
    if into_EKN is None:
        into_EKN = jnp.zeros_like(rows_RK, jnp.float32, shape=(plan.group_sizes.shape[0], depth, width))
    rows_RK, grad_RN = _padded(rows_RK), _padded(grad_RN)
    return bank_pass(rows_RK, grad_RN, plan.offsets, into_EKN, bank_tile(), _interpret())


def ffn_forward(
    rows_RD: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    plan: GroupPlan,
    *,
    keep_products: bool,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Gated expert FFN. Returns `[R, D]` and, with `keep_products`, the residuals of `ffn_backward`."""
    if not takes(rows_RD.dtype, *gate_EDF.shape[1:]):
        return xla.ffn_forward(rows_RD, gate_EDF, up_EDF, down_EFD, _of_xla(plan), keep_products=keep_products)
    epilogue, outputs = (gated_and_products, 3) if keep_products else (gated, 1)
    hidden_RF, *products = _row_pass(epilogue, outputs, [rows_RD], [gate_EDF, up_EDF], plan, name="expert_ffn_in")
    return matmul(hidden_RF, down_EFD, plan, transpose_bank=False), tuple(products)


def ffn_backward(
    grad_RD: jax.Array,
    rows_RD: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    plan: GroupPlan,
    residuals: Any,
    into: Three | None = None,
) -> tuple[jax.Array, Three]:
    """Gradients of `ffn_forward`: of the rows in their dtype, of the three banks in float32, added to `into`."""
    if not takes(rows_RD.dtype, *gate_EDF.shape[1:]):
        return xla.ffn_backward(grad_RD, rows_RD, gate_EDF, up_EDF, down_EFD, _of_xla(plan), residuals, into)
    hidden_RF, gate_grad_RF, up_grad_RF = _row_pass(
        gated_backward, 3, [grad_RD], [down_EFD], plan, beside=residuals, transpose_bank=True,
        name="expert_ffn_gate_gradient",
    )  # fmt: skip
    (rows_grad_RD,) = _row_pass(
        unchanged, 1, [gate_grad_RF, up_grad_RF], [gate_EDF, up_EDF], plan, transpose_bank=True,
        name="expert_ffn_rows_gradient",
    )  # fmt: skip
    gate_into, up_into, down_into = into or (None, None, None)
    return rows_grad_RD, (
        bank_gradient(rows_RD, gate_grad_RF, plan, gate_into),
        bank_gradient(rows_RD, up_grad_RF, plan, up_into),
        bank_gradient(hidden_RF, grad_RD, plan, down_into),
    )


def _row_pass(
    epilogue: Any,
    num_outputs: int,
    rows: list[jax.Array],
    banks: list[jax.Array],
    plan: GroupPlan,
    *,
    name: str,
    transpose_bank: bool = False,
    beside: tuple[jax.Array, ...] = (),
) -> list[jax.Array]:
    """`row_pass` for any number of rows."""
    num_rows = rows[0].shape[0]
    tile = row_tile(plan.tiling.tile_rows, len(rows), len(banks), len(beside))
    outputs = row_pass(
        epilogue,
        num_outputs,
        [_padded(array) for array in rows],
        banks,
        plan,
        tile,
        transpose_bank=transpose_bank,
        name=name,
        beside=[_padded(array) for array in beside],
        interpret=_interpret(),
    )
    return [output[:num_rows] for output in outputs]


def _padded(rows: jax.Array) -> jax.Array:
    """With rows to a multiple of 8; usually unchanged."""
    missing = -rows.shape[0] % ROWS
    return jnp.pad(rows, ((0, missing), (0, 0))) if missing else rows


def _of_xla(plan: GroupPlan) -> GroupPlan:
    """The plan of the same groups for the products that are XLA's."""
    return make_group_plan(plan.group_sizes, plan.row_group.shape[0], implementation="xla")


def _interpret() -> Any:
    """None where a Hopper is compiled for, parameters of Pallas's interpreter on a CPU.

    Raises:
      NotImplementedError: another device, or too old a JAX.
    """
    if (kind := target_device_kind()) == "cpu":
        return INTERPRET or plgpu.InterpretGPUParams()
    if problem := hopper_problem(kind):
        raise NotImplementedError(problem)
    return None
