"""Products with, and lookups in, weights that a mesh may split; their gradients are summed in float32."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from unipool_jax.mesh import constrain, gathered

Axes = tuple[str | None, str | None]
"""Logical axes of a matrix, see `mesh.RULES`."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def linear(
    inputs: jax.Array, weights: jax.Array, axes: Axes, transposed: bool = False, wide: bool = False
) -> jax.Array:
    """`inputs @ weights`, or `inputs @ weights.T`, in the dtype of the inputs.

    Derived by autodiff the gradient of float32 weights that are used in bfloat16 is bfloat16: each device would round
    its part, and the parts be added in bfloat16. Here it is float32 from the product on.

    Args:
      inputs: `[..., C]`.
      weights: `[C, K]`, or `[K, C]` if `transposed`; float32 parameters.
      axes: logical axes of `weights`.
      transposed: whether the output axis of `weights` is the first.
      wide: float32 output, as logits have.

    Returns:
      `[..., K]`.
    """
    return _forward(inputs, weights, axes, transposed, wide)[0]


def _forward(
    inputs: jax.Array, weights: jax.Array, axes: Axes, transposed: bool, wide: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    used = gathered(weights.astype(inputs.dtype), *axes)
    equation = "...c,kc->...k" if transposed else "...c,ck->...k"
    dtype = jnp.float32 if wide else inputs.dtype
    return jnp.einsum(equation, inputs, used, preferred_element_type=dtype), (inputs, used)


def _backward(
    axes: Axes, transposed: bool, wide: bool, saved: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    inputs, used = saved
    to_inputs = jnp.einsum("...k,kc->...c" if transposed else "...k,ck->...c", grad, used)
    equation = "...k,...c->kc" if transposed else "...c,...k->ck"
    pair = (grad, inputs) if transposed else (inputs, grad)
    to_weights = jnp.einsum(equation, *pair, preferred_element_type=jnp.float32)
    return to_inputs.astype(inputs.dtype), constrain(to_weights, *axes)


linear.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def lookup(table_VD: jax.Array, tokens: jax.Array, axes: Axes, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`table[tokens]` in `dtype`; gradients of a token's many places add up in float32.

    The table is gathered whole: looking rows up in one that is split along its rows or its width moves activations.

    Args:
      table_VD: float32 parameters.
      tokens: rows of the table, integers of any shape.
      axes: logical axes of the table.
      dtype: of the result.

    Returns:
      `[*tokens.shape, D]`.
    """
    return constrain(table_VD.astype(dtype), None, None)[tokens]


def _lookup_forward(
    table_VD: jax.Array, tokens: jax.Array, axes: Axes, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # An array without elements remembers the number of rows.
    return lookup(table_VD, tokens, axes, dtype), (tokens, table_VD[:, :0])


def _lookup_backward(
    axes: Axes, dtype: jax.typing.DTypeLike, saved: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, None]:
    tokens, rows = saved
    zeros_VD = jnp.zeros((rows.shape[0], grad.shape[-1]), jnp.float32)
    return constrain(zeros_VD.at[tokens].add(grad.astype(jnp.float32)), *axes), None


lookup.defvjp(_lookup_forward, _lookup_backward)
