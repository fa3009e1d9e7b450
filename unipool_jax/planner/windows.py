"""What windows over one bank change in the work of a layer: how many experts have rows, and how evenly on devices."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from unipool_jax.config.schema import Config
from unipool_jax.moe.placement import device_load
from unipool_jax.moe.visibility import expert_order
from unipool_jax.training.placement import placed


class LayerLoad(NamedTuple):
    """The experts of one layer on its busiest device, when every layer routes evenly to the experts that it sees."""

    share: float
    """Experts with rows over all experts of the bank, W / M."""
    busiest: float
    """Rows of that device over the mean of the devices."""


def layer_loads(config: Config, sizes: dict[str, int]) -> tuple[LayerLoad, ...]:
    """The load of each layer on a mesh of these sizes, with the placement of `mesh.expert_placement`."""
    visible_LM = config.visible
    if visible_LM is None:
        return (LayerLoad(1.0, 1.0),) * config.model.num_layers
    devices = sizes["expert"]
    order_M = expert_order(placed(dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, expert=devices))))
    share_L = visible_LM.mean(axis=1)
    even_LM = visible_LM / visible_LM.sum(axis=1, keepdims=True)
    busiest_L = device_load(even_LM, order_M, devices).max(axis=1) * devices
    return tuple(LayerLoad(float(share), float(busiest)) for share, busiest in zip(share_L, busiest_L, strict=True))


def mean_width(config: Config) -> float:
    """Experts that a layer sees, averaged over layers."""
    return config.experts_per_pool if config.widths is None else float(np.mean(config.widths))
