"""A gradient of the gate matrices that a layer leaves to the layer below it, to compute while that layer waits.

In the backward pass a layer first waits for the gradients of its outputs, which are sent to its experts. Nothing of the
layer itself can be computed meanwhile, but a part of the bank's gradient of the layer above can, if that layer has left
it. The gate's costs least to keep: of its two factors the rows are in a stack of all layers already.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from unipool_jax.kernels import pallas_tpu
from unipool_jax.kernels.group_plan import GroupPlan, make_group_plan


class Pending(NamedTuple):
    """What is left to be added. It travels from layer to layer as a cotangent; forward it says that nothing is left."""

    grad_RF: jax.Array
    """Gradient of the gate products of a layer, in the dtype of its rows."""
    plan: GroupPlan
    """Of that layer's rows, its integers as float32: a cotangent of integers carries no values. They are below 2^24."""
    place: jax.Array
    """Where its rows are in the stack, float32 scalar."""


def left(grad_RF: jax.Array, plan: GroupPlan, place: jax.Array) -> Pending:
    """The gradient of the gate products of the layer at `place`, to be added later."""
    return jax.tree.map(lambda x: x if x is grad_RF else x.astype(jnp.float32), Pending(grad_RF, plan, place))


def nothing_left(
    parts: int, rows: int, hidden: int, experts: int, dtype: jax.typing.DTypeLike, expected_rows: int
) -> Pending:
    """`left` of no rows on each of so many devices, `[X, ...]`: for buffers of `rows` rows, with the tiling of
    `make_group_plan` for `expected_rows`."""
    sizes_E = jnp.zeros((experts,), jnp.int32)
    plan = make_group_plan(sizes_E, rows, implementation="pallas_tpu", expected_rows=expected_rows)
    plan, place = jax.tree.map(lambda x: jnp.broadcast_to(x, (parts, *x.shape)), (plan, jnp.zeros((), jnp.int32)))
    return left(jax.lax.empty((parts, rows, hidden), dtype), plan, place)


def added(pending: Pending, rows_LR2H: jax.Array, into_EDF: jax.Array) -> jax.Array:
    """`into`, the gradient of the gate matrices, with what is left; rows of all layers as in `Products`."""
    plan, place = jax.tree.map(lambda x: x.astype(jnp.int32), (pending.plan, pending.place))
    return pallas_tpu.bank_gradient(rows_LR2H, pending.grad_RF, plan, into_EDF, place)
