"""Which experts each layer sees, and over which layers the pool loss averages.

Experts of all pools are counted through: expert e of pool p is p M / G + e, of M in all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.pytorch_baseline.settings import Settings


def seen_experts(settings: Settings, layer: int) -> list[int]:
    """The experts of a layer by number in its bank, in the order of its router's rows."""
    if settings.starts is None or settings.widths is None:
        return list(range(settings.experts_per_pool))
    return [(settings.starts[layer] + row) % settings.experts_per_pool for row in range(settings.widths[layer])]


class BalanceSet(NamedTuple):
    """Layers whose loads and scores the pool loss averages."""

    layers: list[int]
    weight: float
    """Factor on the loss of these layers."""
    target: dict[int, float]
    """Share of the choices of these layers that each of their experts has under even routing."""


def balance_sets(settings: Settings) -> list[BalanceSet]:
    """The sets of `settings.scope`: layers that share experts, each layer, or all layers."""
    seen = []
    for layer in range(settings.num_layers):
        first = layer // settings.layers_per_pool * settings.experts_per_pool
        seen.append({first + expert for expert in seen_experts(settings, layer)})
    sets: list[list[int]] = []
    for layer in range(settings.num_layers):
        if settings.scope == "bank":
            joined = sets
        elif settings.scope == "layer":
            joined = []
        else:
            joined = [members for members in sets if any(seen[layer] & seen[other] for other in members)]
        sets = [members for members in sets if members not in joined]
        sets.append([*(other for members in joined for other in members), layer])

    found = []
    for members in sets:
        target: dict[int, float] = {}
        for layer in members:
            for expert in seen[layer]:
                target[expert] = target.get(expert, 0.0) + 1 / (len(seen[layer]) * len(members))
        weight = len(members) / settings.num_layers if settings.pressure == "layer" else 1.0
        found.append(BalanceSet(members, weight, target))
    return found


def counted_through(settings: Settings, layer: int, values_M: Tensor) -> Tensor:
    """Values of the experts of a layer's bank among those of the experts of all pools."""
    if settings.num_pools == 1:
        return values_M
    before = layer // settings.layers_per_pool
    parts = [torch.zeros_like(values_M)] * settings.num_pools
    return torch.cat([*parts[:before], values_M, *parts[before + 1 :]])
