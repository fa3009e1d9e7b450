"""How much each part of a model matters: measured on text, by the size of its weights, or drawn at random.

Measured as in Pangu Light (arXiv 2505.20155) where its summaries say how, and by our own choice where they do not:

    channel k             sum over norms and tokens of |RMSNorm(x)_k|
    head j of layer l     sum over tokens of |output of the head|_2; a group of heads is the sum of its heads
    neuron i of expert e  sum over the tokens that any layer sends to e of |silu(x gate)_i (x up)_i|
    expert e              sum over layers and tokens sent to e of gate |E_e(x)|_2
    layer l               1 - mean over tokens of cos(h_(l-1), h_l)

The last two and the norms in the others are ours. Which layers go can also follow from losses: `choice`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from unipool_jax.config.schema import Config
from unipool_jax.convert.layered import Layered, Tree
from unipool_jax.convert.walk import Probe, Walk, counted
from unipool_jax.data.pipeline import Batch


class Scores(NamedTuple):
    """Importance of every part, float64; more is more important. Only scores of one kind and place compare."""

    layers_L: np.ndarray
    channels_D: np.ndarray
    groups_LG: np.ndarray
    """Key-value groups: a key and a value head with the query heads that read them."""
    blocks: list[np.ndarray | None]
    """Neurons, by layer, of the block that every token visits: `[F]`; None where there is none."""
    neurons: list[np.ndarray]
    """By pool, `[E, F]`."""
    experts: list[np.ndarray]
    """By layer with experts, `[E]`."""
    traffic: list[np.ndarray]
    """Choices of each expert by layer with experts, `[E]`: always measured."""


def measured(walk: Walk, batches: Sequence[Batch]) -> Scores:
    """Scores on a text: one pass over it."""
    config = walk.config
    model, dense = config.model, config.moe.dense_layers
    found: dict[int, Probe] = {}
    channels_D = np.zeros(model.hidden_size)
    for batch in batches:
        hidden = walk.embed(batch)
        for layer in range(model.num_layers):
            hidden, probe = walk.probe(layer, hidden, batch)
            wide = jax.tree.map(np.float64, jax.device_get(probe))
            found[layer] = jax.tree.map(np.add, found[layer], wide) if layer in found else wide
        channels_D += np.asarray(walk.final_channels(hidden, batch), np.float64)
    probes: list[Any] = list(found.values())
    size, routed = config.layers_per_pool, probes[dense:]
    return Scores(
        layers_L=1 - np.array([probe.cosine for probe in probes]) / counted(batches),
        channels_D=channels_D + sum(probe.channels_D for probe in probes),
        groups_LG=np.array([probe.heads_H for probe in probes])
        .reshape(model.num_layers, model.num_kv_heads, -1)
        .sum(axis=2),
        blocks=[probe.block_F for probe in probes],
        neurons=[sum(probe.neurons_EF for probe in routed[pool * size :][:size]) for pool in range(config.pool.groups)],
        experts=[probe.outputs_E for probe in routed],
        traffic=[probe.counts_E for probe in routed],
    )


def by_magnitude(config: Config, model: Layered, traffic: list[np.ndarray]) -> Scores:
    """Scores that are norms of weights: of all that belong to a part alone, as a control."""
    blocks = [_block(layer) for layer in model.layers]
    experts = [np.sqrt(sum(_square(bank[name], (1, 2)) for name in bank)) for bank in model.banks]
    return Scores(
        layers_L=np.array([np.sqrt(sum(_square(leaf) for leaf in jax.tree.leaves(tree))) for tree in model.layers]),
        channels_D=np.sqrt(_channel_squares([model.ends, model.layers, model.banks])),
        groups_LG=np.stack([_group_norms(config, layer["attention"]) for layer in model.layers]),
        blocks=[None if block is None else _neurons(block) for block in blocks],
        neurons=[_neurons(bank) for bank in model.banks],
        experts=[experts[row // config.layers_per_pool] for row in range(config.mixture_layers)],
        traffic=traffic,
    )


def at_random(scores: Scores, seed: int) -> Scores:
    """Scores of the same shapes, drawn uniformly, as a control."""
    random = np.random.default_rng(seed)
    drawn = jax.tree.map(lambda array: random.random(np.shape(array)), scores._replace(traffic=[], experts=[]))
    # All layers of a pool agree on the experts that matter.
    pooled = [random.random(len(neurons)) for neurons in scores.neurons]
    per_pool = len(scores.experts) // len(pooled)
    experts = [pooled[row // per_pool] for row in range(len(scores.experts))]
    return drawn._replace(experts=experts, traffic=scores.traffic)


CHANNEL_AXIS = {"query": -2, "key": -2, "value": -2, "gate": -2, "up": -2, "scale": None}
"""Where the channels of the residual stream lie in an array, by its name; the last axis of those not here."""


def channel_axis(path: tuple[object, ...]) -> int | None:
    """The axis of the channels of the residual stream in the array at `path` of a tree; None without one."""
    return CHANNEL_AXIS.get(str(getattr(path[-1], "key", path[-1])), -1)


def _channel_squares(tree: object) -> np.ndarray:
    total: np.ndarray | float = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if (axis := channel_axis(path)) is not None:
            total = total + _square(leaf, tuple(np.delete(np.arange(leaf.ndim), axis)))
    return np.asarray(total)


def _block(layer: Tree) -> Tree | None:
    return layer.get("block") or layer.get("shared", {}).get("block")


def _neurons(weights: Tree) -> np.ndarray:
    """Norms by neuron of a block, `[F]`, or of the experts of a bank, `[E, F]`."""
    return np.sqrt(_square(weights["gate"], -2) + _square(weights["up"], -2) + _square(weights["down"], -1))


def _group_norms(config: Config, attention: Tree) -> np.ndarray:
    groups = config.model.num_kv_heads
    columns = sum(_square(attention[name], 0).reshape(groups, -1).sum(axis=1) for name in ("query", "key", "value"))
    return np.sqrt(columns + _square(attention["output"], 1).reshape(groups, -1).sum(axis=1))


def _square(array: np.ndarray, axis: int | tuple[int, ...] | None = None) -> np.ndarray:
    return np.sum(np.square(array, dtype=np.float64), axis=axis)
