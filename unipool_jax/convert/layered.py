"""A model as a list of layers: what surgery is done on, and what runs with any of the layers in any order.

The parameter tree stacks layers by pool. Here every layer is a tree of its own, and a bank belongs to the pool.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from unipool_jax.config.schema import Config
from unipool_jax.convert.weights import Weights

Tree = dict[str, Any]


class Layered(NamedTuple):
    """Weights of a model, layer by layer; float32 arrays."""

    ends: Tree
    """`embedding`, `final_norm` and `output`."""
    layers: list[Tree]
    """Parameters of each layer, the dense ones first."""
    biases: list[np.ndarray]
    """Selection bias of each layer with experts, `[E]`."""
    banks: list[Tree]
    """Experts of each pool, `[E, ...]`."""


def layered(config: Config, weights: Weights) -> Layered:
    """The layers of a model; copies."""
    params, dense = weights.params, config.moe.dense_layers
    inner = config.layers_per_pool

    def at(tree: Any, *index: int) -> Any:
        return jax.tree.map(lambda leaf: np.array(leaf[index]), tree)

    first = [at(params["dense"], layer) for layer in range(dense)]
    places = [divmod(layer, inner) for layer in range(config.mixture_layers)]
    return Layered(
        {name: np.array(leaf) for name, leaf in params.items() if name not in ("pools", "dense")},
        [*first, *(at(params["pools"]["layers"], *place) for place in places)],
        [np.array(weights.expert_bias_GNE[place]) for place in places],
        [at(params["pools"]["bank"], pool) for pool in range(config.pool.groups)],
    )


def stacked(config: Config, model: Layered) -> Weights:
    """The inverse of `layered`, for the model of `config`."""
    dense, shape = config.moe.dense_layers, (config.pool.groups, config.layers_per_pool)

    def of_pools(*leaves: np.ndarray) -> np.ndarray:
        return np.stack(leaves).reshape(*shape, *leaves[0].shape)

    params = dict(model.ends)
    if dense:
        params["dense"] = jax.tree.map(lambda *leaves: np.stack(leaves), *model.layers[:dense])
    params["pools"] = {
        "layers": jax.tree.map(of_pools, *model.layers[dense:]),
        "bank": jax.tree.map(lambda *leaves: np.stack(leaves), *model.banks),
    }
    return Weights(params, of_pools(*model.biases))


def pool_of(config: Config, layer: int) -> int | None:
    """The pool of a layer; None for one of moe.dense_layers."""
    first = config.moe.dense_layers
    return None if layer < first else (layer - first) // config.layers_per_pool
