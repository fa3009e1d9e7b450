"""Matrix products and embedding lookups with weights that may be sharded; gradients are reduced in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from unipool_jax.parallel.mesh import (
    RULES,
    active_mesh,
    constrain,
    gathered,
    gathered_axes,
    num_shards,
    scattered_dimension,
    spec,
)

Axes = tuple[str | None, str | None]
"""Logical axes of a matrix; see `mesh.RULES`."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def linear(
    inputs: jax.Array, weights: jax.Array, axes: Axes, transposed: bool = False, wide: bool = False
) -> jax.Array:
    """`inputs @ weights`, or `inputs @ weights.T`, in the dtype of the inputs.

    With autodiff, the gradient of float32 weights that are cast to bfloat16 is bfloat16: each device would round its
    part, and the parts would be summed in bfloat16. Here the weight gradient is float32 from the product on.

    Args:
      inputs: `[..., C]`.
      weights: `[C, K]`, or `[K, C]` if `transposed`; float32 parameters.
      axes: logical axes of `weights`.
      transposed: whether the output axis of `weights` comes first.
      wide: whether the output is float32, as for logits.

    Returns:
      `[..., K]` in the dtype of `inputs`, or float32 if `wide`.
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
    inputs_grad = jnp.einsum("...k,kc->...c" if transposed else "...k,ck->...c", grad, used)
    pair = (grad, inputs) if transposed else (inputs, grad)

    def local_gradient(rows_C: jax.Array, rows_K: jax.Array) -> jax.Array:
        return jnp.einsum("...c,...k->ck", rows_C, rows_K, preferred_element_type=jnp.float32)

    if "vocab" in axes:
        specs = [
            spec("batch", *(None,) * (x.ndim - 2), name) for x, name in zip(pair, gathered_axes(axes), strict=True)
        ]
        return inputs_grad.astype(inputs.dtype), _reduced_gradient(local_gradient, pair, specs, axes)
    # A layer has many small matrices: the compiler fuses their reductions, which saves more than scattering first.
    return inputs_grad.astype(inputs.dtype), constrain(local_gradient(*pair), *axes)


linear.defvjp(_forward, _backward)


def _reduced_gradient(
    local_gradient: Callable[..., jax.Array], rows: Sequence[jax.Array], specs: Sequence[PartitionSpec], axes: Axes
) -> jax.Array:
    """The gradient of a vocabulary table, reduced over the devices that share the batch.

    It is reduce-scattered over the fsdp axis first, and only each device's shard is all-reduced over the other axes.
    The compiler by itself all-reduces full tables, or gathers the rows, which can move more.

    Args:
      local_gradient: float32 gradient of the table from a device's own `rows`.
      rows: arrays whose first axis is the batch.
      specs: the sharding of each of `rows`.
      axes: logical axes of the table, `vocab` and `embed`.
    """
    mesh = active_mesh()
    if mesh is None:
        return local_gradient(*rows)

    def on_device(*rows: jax.Array) -> jax.Array:
        part = jax.lax.psum_scatter(
            local_gradient(*rows), "fsdp", scatter_dimension=scattered_dimension(axes), tiled=True
        )
        return jax.lax.psum(part, ("data", "expert"))

    return jax.shard_map(on_device, mesh=mesh, in_specs=tuple(specs), out_specs=spec(*axes))(*rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def lookup(table_VD: jax.Array, tokens: jax.Array, axes: Axes, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`table[tokens]` in `dtype`; the gradient sums over all occurrences of a token in float32.

    The full table is gathered on every device: a lookup in a sharded table would communicate activations.

    Args:
      table_VD: float32 parameters.
      tokens: row indices, integers of any shape.
      axes: logical axes of the table.
      dtype: dtype of the result.

    Returns:
      `[*tokens.shape, D]`.
    """
    return constrain(table_VD.astype(dtype), None, None)[tokens]


def _lookup_forward(
    table_VD: jax.Array, tokens: jax.Array, axes: Axes, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # The empty slice keeps the number of rows without keeping the table.
    return lookup(table_VD, tokens, axes, dtype), (tokens, table_VD[:, :0])


def _lookup_backward(
    axes: Axes, dtype: jax.typing.DTypeLike, saved: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, None]:
    tokens, rows = saved
    mesh = active_mesh()
    local_rows = rows.shape[0] // (1 if mesh is None else num_shards(mesh, "vocab"))

    def local_gradient(tokens: jax.Array, grad: jax.Array) -> jax.Array:
        if mesh is not None:
            tokens = tokens - jax.lax.axis_index(RULES["vocab"]) * local_rows
        # Tokens of other vocabulary shards get the index `local_rows`, which `mode="drop"` ignores; a negative index
        # would count from the end.
        index = jnp.where((tokens >= 0) & (tokens < local_rows), tokens, local_rows)
        zeros_VD = jnp.zeros((local_rows, grad.shape[-1]), jnp.float32)
        return zeros_VD.at[index].add(grad.astype(jnp.float32), mode="drop")

    return _reduced_gradient(local_gradient, (tokens, grad), [spec("batch")] * 2, axes), None


lookup.defvjp(_lookup_forward, _lookup_backward)
