"""The gated expert block as loops over the experts: what `xla` does for wide experts with many rows on a CPU.

A turn multiplies the rows of one expert, where they lie in the buffer, by its matrices. Shapes are static, so the
number of rows of a turn is a multiple of a step, and turns of one number have a loop of their own. A conditional in one
loop would copy every array that its branches write, which is why there is a loop for each number.

Beside the padded blocks of `xla` a turn copies its matrices out of the bank. But a batched product on a CPU reads and
packs each matrix as often, blocks pad every expert to one size, and a tile of an expert that is larger reads all of its
matrices, and its gradients, once more.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from unipool_jax.kernels.epilogues import Three, gated
from unipool_jax.kernels.group_plan import GroupPlan
from unipool_jax.kernels.implementations import target_device_kind
from unipool_jax.kernels.xla_tile import Tile, add, dot, gated_gradients, matrix, tile_at

Arrays = tuple[jax.Array, ...]
Rows = TypeVar("Rows", jax.Array, NDArray[np.float64])

LEAST_ROWS = 64
"""Rows of a block, about those of a mean expert, from which loops are used. With fewer, copying the matrices costs more
than the products."""
LEAST_WEIGHTS = 2**20
"""Elements of a matrix from which they are: blocks are better while matrices stay in cache."""
PARTS = 12
"""Loops, and steps of the largest turn: one and a half times the rows of a mean expert or more."""


def suits(rows_RD: jax.Array, gate_EDF: jax.Array, plan: GroupPlan) -> bool:
    """Whether loops are the faster form of these products; measured for float32 only."""
    _, width, hidden = gate_EDF.shape
    return pay(plan.tiling.block_rows, width * hidden, rows_RD.dtype.name, target_device_kind())


def pay(block_rows: int, weights: int, dtype: str, device_kind: str) -> bool:
    """`suits` for blocks of so many rows, matrices of so many weights, and rows of that type."""
    wide = weights >= LEAST_WEIGHTS and block_rows >= LEAST_ROWS
    return wide and dtype == "float32" and device_kind == "cpu"


def ffn_forward(
    rows_RD: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    plan: GroupPlan,
    *,
    keep_products: bool,
) -> tuple[jax.Array, Arrays]:
    """`xla.ffn_forward`; the products are `[R, F]`."""
    dtype, wide = rows_RD.dtype, (rows_RD.shape[0], gate_EDF.shape[2])

    def visit(turn: Tile, kept: Arrays) -> Arrays:
        gate_DF, up_DF, down_FD = (matrix(bank, turn.group) for bank in (gate_EDF, up_EDF, down_EFD))
        rows_TD = turn.take(rows_RD)
        gate_TF, up_TF = dot(rows_TD, gate_DF, 1, 0), dot(rows_TD, up_DF, 1, 0)
        hidden_TF = gated(gate_TF, up_TF)[0].astype(dtype)
        found = (dot(hidden_TF, down_FD, 1, 0), gate_TF, up_TF)
        return tuple(turn.put(tile, array) for tile, array in zip(found, kept, strict=False))

    shapes = [rows_RD.shape, *([wide, wide] if keep_products else [])]
    out_RD, *products = _each_turn(plan, visit, tuple(_zeros(plan, shape, dtype) for shape in shapes))
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
) -> tuple[jax.Array, Three]:
    """`xla.ffn_backward`."""
    banks, dtype = (gate_EDF, up_EDF, down_EFD), rows_RD.dtype

    def visit(turn: Tile, sums: Arrays) -> Arrays:
        gate_DF, up_DF, down_FD = (matrix(bank, turn.group) for bank in banks)
        rows_TD, grad_TD = turn.take(rows_RD), turn.take(grad_RD)
        gate_TF, up_TF = (turn.take(product_RF) for product_RF in residuals)
        hidden_TF, gate_grad_TF, up_grad_TF = gated_gradients(gate_TF, up_TF, dot(grad_TD, down_FD, 1, 1), dtype)
        rows_grad_TD = dot(gate_grad_TF, gate_DF, 1, 1) + dot(up_grad_TF, up_DF, 1, 1)
        return (
            turn.put(rows_grad_TD, sums[0]),
            add(dot(rows_TD, gate_grad_TF, 0, 0), sums[1], turn.group),
            add(dot(rows_TD, up_grad_TF, 0, 0), sums[2], turn.group),
            add(dot(hidden_TF, grad_TD, 0, 0), sums[3], turn.group),
        )

    totals = into or tuple(_zeros(plan, bank.shape, jnp.float32) for bank in banks)
    rows_grad_RD, gate_sum, up_sum, down_sum = _each_turn(plan, visit, (_zeros(plan, rows_RD.shape, dtype), *totals))
    return rows_grad_RD, (gate_sum, up_sum, down_sum)


def step_rows(block_rows: int) -> int:
    """Rows by which the sizes of turns differ: about an eighth of those of a mean expert, a multiple of 16."""
    # A block holds up to 16 rows more than a mean expert.
    return 16 * max(1, -(-(block_rows - 16) // 128))


def turns_and_steps(rows: Rows, step: int) -> tuple[Rows, Rows]:
    """Turns for so many rows of one expert, and steps that these compute: the last is padded to a whole one."""
    return -(-rows // (PARTS * step)), -(-rows // step)


def _each_turn(plan: GroupPlan, visit: Callable[[Tile, Arrays], Arrays], carry: Arrays) -> Arrays:
    """What `visit` makes of `carry`, for turns that cover the rows of all experts, those of few rows first."""
    num_rows, experts = plan.row_group.shape[0], plan.group_sizes.shape[0]
    step = step_rows(plan.tiling.block_rows)
    most = PARTS * step
    # A row of the table for each turn that there may be: every expert has its own, and one for each full tile.
    turns_E, _ = turns_and_steps(plan.group_sizes, step)
    ends_E = jnp.cumsum(turns_E)
    turn_B = jnp.arange(experts + num_rows // most, dtype=jnp.int32)
    expert_B = jnp.minimum(jnp.searchsorted(ends_E, turn_B, side="right").astype(jnp.int32), experts - 1)
    start_B = plan.offsets[expert_B] + (turn_B - (ends_E - turns_E)[expert_B]) * most
    rows_B = jnp.minimum(plan.offsets[expert_B + 1] - start_B, most)
    steps_B = jnp.where(turn_B < ends_E[-1], turns_and_steps(rows_B, step)[1], PARTS + 1)
    order_B = jnp.argsort(steps_B, stable=True)
    bounds = jnp.searchsorted(steps_B[order_B], jnp.arange(PARTS + 1), side="right").astype(jnp.int32)

    for steps, (first, end) in enumerate(itertools.pairwise(bounds), start=1):
        size = min(steps * step, num_rows)

        def at(place: jax.Array, carry: Arrays, size: int = size) -> Arrays:
            turn = order_B[place]
            start = start_B[turn]
            return visit(tile_at(expert_B[turn], start, start + rows_B[turn], size, num_rows), carry)

        carry = lax.fori_loop(first, end, at, carry)
    return carry


def _zeros(plan: GroupPlan, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
    """Zeros that vary over the devices of a mesh as the plan does."""
    return jnp.broadcast_to((plan.num_tiles * 0).astype(dtype), shape)
