"""Exchange between nodes: a token crosses to each other node once, and one sum of its outputs there crosses back.

With `mesh.expert_nodes` above 1 the devices of an expert group are those of several nodes, node by node. A device first
gathers the tokens of the devices at its place in the other nodes. From then on every node holds all tokens, and what
goes to experts stays inside. Outputs are added up in each node before they return. With one node nothing happens here.

The functions run inside `shard_map`, over its axis `expert`. M is tokens of one place in all nodes, node by node.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

Groups = list[list[int]] | None


def devices_inside(nodes: int) -> int:
    """Devices of the expert group that are in each of its nodes."""
    return jax.lax.axis_size("expert") // nodes


def inside(nodes: int) -> Groups:
    """The expert group in parts that are in one node each, as `axis_index_groups`; None if it is one node."""
    here = devices_inside(nodes)
    return None if nodes == 1 else [[node * here + place for place in range(here)] for node in range(nodes)]


def between(nodes: int) -> Groups:
    """The expert group in parts that have one device of each node, as `axis_index_groups`."""
    here = devices_inside(nodes)
    return [[node * here + place for node in range(nodes)] for place in range(here)]


def gathered_numbers(x_N: jax.Array, nodes: int) -> jax.Array:
    """`gathered` for integers, `[N, ...]` to `[M, ...]`, which have no gradient."""
    if nodes == 1:
        return x_N
    return jax.lax.all_gather(x_N, "expert", axis_index_groups=between(nodes), tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(x_ND: jax.Array, nodes: int) -> jax.Array:
    """The rows of this device and of those at its place in the other nodes, `[M, D]`, node by node."""
    return gathered_numbers(x_ND, nodes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def summed(x_MD: jax.Array, nodes: int) -> jax.Array:
    """The transpose of `gathered`: for the tokens of this device the sum of what each node has for them, `[N, D]`.

    Parts travel in the dtype of `x_MD` and are added in float32: a reduce-scatter would send the same bytes, but round
    after every addition, or with parts in float32 send twice as many.
    """
    if nodes == 1:
        return x_MD
    parts = jax.lax.all_to_all(x_MD, "expert", 0, 0, axis_index_groups=between(nodes), tiled=True)
    total = jnp.sum(parts.reshape(nodes, -1, *x_MD.shape[1:]), axis=0, dtype=jnp.float32)
    return total.astype(x_MD.dtype)


gathered.defvjp(lambda x_ND, nodes: (gathered(x_ND, nodes), None), lambda nodes, _, grad_MD: (summed(grad_MD, nodes),))
summed.defvjp(lambda x_MD, nodes: (summed(x_MD, nodes), None), lambda nodes, _, grad_ND: (gathered(grad_ND, nodes),))
