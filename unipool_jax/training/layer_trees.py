"""Layers of a model taken by number: to unroll a deeper network, to fold its gradients back, and to grow.

What there is of each layer is stacked to `[G, L/G, ...]`, what there is of each pool to `[G, ...]`. An index says which
of N layers stands at each of D places, and `groups` over how many pools the D layers are spread: as many as layers,
and each has a pool of its own, which goes with it; otherwise pools stay what they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Index = tuple[int, ...]
Change = Callable[[jax.Array], jax.Array]


def uses(index: Index) -> np.ndarray:
    """At how many places each of the N layers stands, int32 `[N]`."""
    return np.bincount(index).astype(np.int32)


def unrolled(tree: Any, index: Index, groups: int) -> Any:
    """Parameters, moments or balance state of the D layers `index`, from those of N; traceable."""
    own = groups == len(index)
    return map_layers(tree, lambda leaf: take_layers(leaf, index, groups), lambda leaf: _at(leaf, index), own=own)


def folded(tree: Any, index: Index, groups: int) -> Any:
    """The transpose of `unrolled`, for gradients: those of a layer, or of its own pool, are summed over its places."""
    own = groups == len(index)
    return map_layers(tree, lambda leaf: sum_layers(leaf, index), lambda leaf: sum_places(leaf, index), own=own)


def map_layers(tree: Any, by_layer: Change, by_pool: Change, *, own: bool) -> Any:
    """`tree` with every array of layers changed, and with `own` pools every array of pools."""

    def change(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        match kind_of(path):
            case "layer":
                return by_layer(leaf)
            case "pool" if own:
                return by_pool(leaf)
        return leaf

    return jax.tree_util.tree_map_with_path(change, tree)


def kind_of(path: Sequence[Any]) -> str:
    """`layer` or `pool`, for an array of a training state that is stacked over them; else empty."""
    keys = [str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path]
    if "layers" in keys or keys[-1] == "expert_bias_GNE":
        return "layer"
    return "pool" if "bank" in keys or keys[-1] == "previous_load_GE" else ""


def take_layers(leaf: jax.Array, index: Index, groups: int) -> jax.Array:
    """`[G, N/G, ...]` to `[groups, D/groups, ...]`."""
    rest = leaf.shape[2:]
    return _at(leaf.reshape(-1, *rest), index).reshape(groups, -1, *rest)


def sum_layers(leaf: jax.Array, index: Index) -> jax.Array:
    """`[G, D/G, ...]` to `[G, N/G, ...]`, or to `[N, 1, ...]` where each layer has its own pool."""
    groups, rest = leaf.shape[0], leaf.shape[2:]
    total = sum_places(leaf.reshape(-1, *rest), index)
    return total.reshape(len(total) if groups == len(index) else groups, -1, *rest)


def sum_places(
    places: jax.Array, index: Index, add: Callable[[jax.Array, jax.Array], jax.Array] = jnp.add
) -> jax.Array:
    """`[D, ...]` to `[N, ...]`: what stands at the places of each layer, added up in their order.

    Not a scatter, whose order of sums a GPU does not keep.
    """
    places_of = [np.flatnonzero(np.array(index) == layer) for layer in range(max(index) + 1)]
    return jnp.stack([functools.reduce(add, [places[place] for place in found]) for found in places_of])


def _at(leaf: jax.Array, index: Index) -> jax.Array:
    return leaf[np.array(index)]
