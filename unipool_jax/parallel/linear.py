"""Products with, and lookups in, weights that a mesh may split; their gradients are summed in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from unipool_jax.parallel.mesh import RULES, active_mesh, constrain, gathered, gathered_axes, num_shards, spec

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
    pair = (grad, inputs) if transposed else (inputs, grad)

    def own_part(rows_C: jax.Array, rows_K: jax.Array) -> jax.Array:
        return jnp.einsum("...c,...k->ck", rows_C, rows_K, preferred_element_type=jnp.float32)

    if "vocab" in axes:
        places = [
            spec("batch", *(None,) * (x.ndim - 2), name) for x, name in zip(pair, gathered_axes(axes), strict=True)
        ]
        return to_inputs.astype(inputs.dtype), _summed(own_part, pair, places, axes)
    # Matrices of layers are small and many: the compiler joins the sums of a layer, which saves more than bytes cost.
    return to_inputs.astype(inputs.dtype), constrain(own_part(*pair), *axes)


linear.defvjp(_forward, _backward)


def _summed(
    own_part: Callable[..., jax.Array], rows: Sequence[jax.Array], places: Sequence[PartitionSpec], axes: Axes
) -> jax.Array:
    """The gradient of a table over the vocabulary, from the part that each device makes of its rows of the batch.

    Over a mesh it is scattered over the fsdp axis first, and only what a device keeps is summed over the others: left
    to itself the compiler sums whole tables over all devices, or gathers the rows, which can be more.

    Args:
      own_part: makes the part, float32, from a device's own `rows`.
      rows: arrays whose first axis is that of the batch.
      places: how each is laid out over a mesh.
      axes: those of the table, `vocab` and `embed`.
    """
    mesh = active_mesh()
    if mesh is None:
        return own_part(*rows)

    def on_device(*rows: jax.Array) -> jax.Array:
        part = jax.lax.psum_scatter(own_part(*rows), "fsdp", scatter_dimension=axes.index("embed"), tiled=True)
        return jax.lax.psum(part, ("data", "expert"))

    return jax.shard_map(on_device, mesh=mesh, in_specs=tuple(places), out_specs=spec(*axes))(*rows)


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
    mesh = active_mesh()
    own_rows = rows.shape[0] // (1 if mesh is None else num_shards(mesh, "vocab"))

    def own_part(tokens: jax.Array, grad: jax.Array) -> jax.Array:
        if mesh is not None:
            tokens = tokens - jax.lax.axis_index(RULES["vocab"]) * own_rows
        # Rows of other devices lie outside; a negative index would count from the end.
        place = jnp.where((tokens >= 0) & (tokens < own_rows), tokens, own_rows)
        zeros_VD = jnp.zeros((own_rows, grad.shape[-1]), jnp.float32)
        return zeros_VD.at[place].add(grad.astype(jnp.float32), mode="drop")

    return _summed(own_part, (tokens, grad), [spec("batch")] * 2, axes), None


lookup.defvjp(_lookup_forward, _lookup_backward)
