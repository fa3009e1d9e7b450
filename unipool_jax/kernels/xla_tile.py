"""Rows of one group in a buffer, and the products and sums that the XLA back end makes of them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from unipool_jax.kernels.epilogues import gated_backward


class Tile(NamedTuple):
    """The rows `base:base + T` of the buffer, of which those of one group count."""

    group: jax.Array
    base: jax.Array
    own_T1: jax.Array

    def take(self, rows_RC: jax.Array) -> jax.Array:
        """The rows, zero where they are of others."""
        return jnp.where(self.own_T1, lax.dynamic_slice_in_dim(rows_RC, self.base, self.own_T1.shape[0]), 0)

    def put(self, tile_TC: jax.Array, rows_RC: jax.Array) -> jax.Array:
        """The buffer with these rows; those of others stay."""
        there_TC = lax.dynamic_slice_in_dim(rows_RC, self.base, self.own_T1.shape[0])
        tile_TC = jnp.where(self.own_T1, tile_TC.astype(rows_RC.dtype), there_TC)
        return lax.dynamic_update_slice_in_dim(rows_RC, tile_TC, self.base, 0)


def tile_at(group: jax.Array, start: jax.Array, end: jax.Array, rows: int, num_rows: int) -> Tile:
    """The tile of so many rows in a buffer of `num_rows`, of which those from `start` up to `end` are the group's.

    One that would extend past the buffer begins at an earlier row, and masks the rows before its start.
    """
    base = jnp.minimum(start, num_rows - rows)
    row_T1 = base + jnp.arange(rows, dtype=jnp.int32)[:, None]
    return Tile(group, base, (start <= row_T1) & (row_T1 < end))


def dot(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
    """Product over one axis of each matrix, accumulated and returned in float32."""
    dimensions = (((contract_a,), (contract_b,)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def gated_gradients(
    gate: jax.Array, up: jax.Array, hidden_grad: jax.Array, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`gated_backward`, computed in float32, rounded to `dtype`."""
    hidden, gate_grad, up_grad = gated_backward(hidden_grad, gate.astype(jnp.float32), up.astype(jnp.float32))
    return hidden.astype(dtype), gate_grad.astype(dtype), up_grad.astype(dtype)


def matrix(bank: jax.Array, group: jax.Array) -> jax.Array:
    """That of the group."""
    return lax.dynamic_index_in_dim(bank, group, keepdims=False)


def add(matrix: jax.Array, bank: jax.Array, group: jax.Array) -> jax.Array:
    """The bank with `matrix` added to that of the group."""
    # Of this shape XLA adds in place; a matrix without the first axis is copied out of the bank first.
    there = lax.dynamic_slice_in_dim(bank, group, 1)
    return lax.dynamic_update_slice_in_dim(bank, there + matrix[None], group, 0)
