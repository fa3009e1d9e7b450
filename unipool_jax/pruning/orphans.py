"""Experts of a shared pool that are left alone when layers go, and the layers that take them over.

Pools are not pruned in Pangu Light; this is ours. An expert is an orphan if nearly all of its tokens came from layers
that go. The nearest layer below that stays gets the router row of the layer that used it most.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from unipool_jax.config.schema import Config
from unipool_jax.convert.layered import Layered
from unipool_jax.pruning.choice import Choice
from unipool_jax.pruning.cut import gain_ratio

ORPHAN = 0.9
"""Share of an expert's tokens from layers that go, from which on it is an orphan."""


class Orphan(NamedTuple):
    """An expert that stays without the layers that used it."""

    pool: int
    expert: int
    share: float
    """Of its tokens that came from layers that go."""
    tokens: int
    """That all layers sent to it."""
    giver: int
    """Of the layers that go, the one that used it most."""
    taker: int
    """The layer that gets the row."""


def find_orphans(config: Config, traffic: list[np.ndarray], choice: Choice) -> list[Orphan]:
    """Orphans among the experts that stay."""
    size, dense, found = config.layers_per_pool, config.moe.dense_layers, []
    for pool, experts_E in zip(choice.pools, choice.experts, strict=True):
        layers = [dense + pool * size + inner for inner in range(size)]
        counts_LE = np.stack([traffic[layer - dense] for layer in layers])
        gone_L = np.array([layer not in choice.layers for layer in layers])
        left_E, total_E = counts_LE[gone_L].sum(axis=0), counts_LE.sum(axis=0)
        for expert in experts_E:
            if total_E[expert] == 0 or left_E[expert] < ORPHAN * total_E[expert]:
                continue
            giver = int(np.argmax(np.where(gone_L, counts_LE[:, expert], -1)))
            stay = np.flatnonzero(~gone_L)
            below = stay[stay < giver]
            taker = int(below[-1] if len(below) else stay[0])
            share = float(left_E[expert] / total_E[expert])
            found.append(Orphan(pool, int(expert), share, int(total_E[expert]), layers[giver], layers[taker]))
    return found


def hand_over(config: Config, model: Layered, orphans: list[Orphan]) -> Layered:
    """The source with the rows of orphans, and their selection biases, in the layers that take them.

    A row reads the gains of the norm before its router; they are multiplied into it as in attention.
    """
    layers, biases = list(model.layers), list(model.biases)
    dense = config.moe.dense_layers
    for orphan in orphans:
        giver, taker = layers[orphan.giver], layers[orphan.taker]
        rows_ED = taker["mixture"]["router"].copy()
        ratio_D = gain_ratio(giver["ffn_norm"], taker["ffn_norm"])
        rows_ED[orphan.expert] = giver["mixture"]["router"][orphan.expert] * ratio_D
        layers[orphan.taker] = taker | {"mixture": taker["mixture"] | {"router": rows_ED}}
        bias_E = biases[orphan.taker - dense].copy()
        bias_E[orphan.expert] = biases[orphan.giver - dense][orphan.expert]
        biases[orphan.taker - dense] = bias_E
    return model._replace(layers=layers, biases=biases)
