"""What of a model stays: the parts with the highest scores, and layers one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from unipool_jax.config.schema import Config
from unipool_jax.convert.errors import ConversionError
from unipool_jax.convert.layered import pool_of
from unipool_jax.pruning.scores import Scores

Harm = Callable[[tuple[int, ...]], float]
"""How bad a model of only these layers is."""


class Removal(NamedTuple):
    """One decision about layers."""

    layers: tuple[int, ...]
    """Those that went: one, or all of a pool."""
    harms: dict[tuple[int, ...], float]
    """What spoke against each of the candidates; the smallest won."""


class Group(NamedTuple):
    """A key-value group of the source, with its query heads."""

    layer: int
    place: int
    """In its layer."""


class Choice(NamedTuple):
    """What stays, by index in the source and in ascending order."""

    layers: tuple[int, ...]
    channels_D: np.ndarray
    groups: list[list[Group]]
    """Attention of each layer that stays."""
    pools: tuple[int, ...]
    experts: list[np.ndarray]
    """By pool that stays."""
    neurons: list[np.ndarray]
    """Of these experts, `[E, F]`."""
    blocks: list[np.ndarray | None]
    """Of the block that every token visits, by layer that stays, `[F]`."""
    rows: list[np.ndarray]
    """Router rows, by layer with experts that stays."""


def best(scores: np.ndarray, number: int) -> np.ndarray:
    """Indices of the largest scores on the last axis, ascending; of equal ones the first."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    return np.sort(order[..., :number], axis=-1)


def remaining_layers(config: Config, target: Config, harm: Harm) -> tuple[tuple[int, ...], list[Removal]]:
    """The layers that stay, and how it came to that: the one that harms least goes, and the others are looked at again.

    The first and the last layer stay, and so do moe.dense_layers. Pools lose as many layers each, or go as a whole.

    Raises:
      ConversionError: no layer may go.
    """
    kept, removals = tuple(range(config.model.num_layers)), list[Removal]()
    while len(kept) > target.model.num_layers:
        candidates = _candidates(config, target, kept)
        if not candidates:
            raise ConversionError(
                f"model.num_layers={target.model.num_layers}: no layer may go, as the first, the last and those of "
                "moe.dense_layers stay, and pools lose as many layers each, or all; choose a larger number"
            )
        harms = {out: harm(tuple(layer for layer in kept if layer not in out)) for out in candidates}
        worst = min(harms, key=harms.__getitem__)
        kept = tuple(layer for layer in kept if layer not in worst)
        removals.append(Removal(worst, harms))
    return kept, removals


def _candidates(config: Config, target: Config, kept: tuple[int, ...]) -> list[tuple[int, ...]]:
    """What may go next; each is removed as a whole."""
    by_pool: dict[int, list[int]] = {}
    for layer in kept:
        if (pool := pool_of(config, layer)) is not None:
            by_pool.setdefault(pool, []).append(layer)
    if target.pool.groups == config.pool.groups:
        spare = [layers for layers in by_pool.values() if len(layers) > target.layers_per_pool]
        found = [[layer] for layers in spare for layer in layers]
    else:
        found = list(by_pool.values())
    ends = {0, config.model.num_layers - 1}
    return [tuple(layers) for layers in found if not ends & set(layers)]


def choose(config: Config, target: Config, scores: Scores, layers: tuple[int, ...], merge: bool) -> Choice:
    """What stays of everything else, once layers are chosen.

    Args:
      config: of the source.
      target: of the pruned model.
      scores: of the source's parts.
      layers: that stay.
      merge: whether groups of a layer that goes compete with those of the layer below it that stays (CLAP), or go too.
    """
    pools = tuple(sorted({pool for layer in layers if (pool := pool_of(config, layer)) is not None}))
    size, dense = config.layers_per_pool, config.moe.dense_layers
    experts, neurons = [], []
    for pool in pools:
        total_E = np.sum(scores.experts[pool * size :][:size], axis=0)
        experts.append(best(total_E, target.experts_per_pool))
        neurons.append(best(scores.neurons[pool][experts[-1]], target.model.ffn_size))
    blocks: list[np.ndarray | None] = []
    for layer in layers:
        own, width = scores.blocks[layer], target.dense_width if layer < dense else target.shared_width
        blocks.append(None if own is None else best(own, width))
    routed, widths = [layer for layer in layers if layer >= dense], np.arange(config.router_width)
    return Choice(
        layers=layers,
        channels_D=best(scores.channels_D, target.model.hidden_size),
        groups=[
            _groups(scores.groups_LG, near, target.model.num_kv_heads) for near in _attention(config, layers, merge)
        ],
        pools=pools,
        experts=experts,
        neurons=neurons,
        blocks=blocks,
        # Windows, and the experts in them, stay as they are.
        rows=[widths if config.windows else experts[pools.index((layer - dense) // size)] for layer in routed],
    )


def _attention(config: Config, layers: tuple[int, ...], merge: bool) -> list[list[int]]:
    """Whose groups compete for the places in each layer that stays: its own, and those of layers that go behind it."""
    ends = [*layers[1:], config.model.num_layers]
    return [list(range(layer, end if merge else layer + 1)) for layer, end in zip(layers, ends, strict=True)]


def _groups(scores_LG: np.ndarray, layers: list[int], number: int) -> list[Group]:
    flat = best(scores_LG[layers].reshape(-1), number)
    count = scores_LG.shape[1]
    return [Group(layers[place // count], int(place % count)) for place in flat]
