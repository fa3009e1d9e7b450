"""The windows of `config.visibility` inside the model: a router row for each expert of the bank, zeros where hidden.

A layer's router has one row per visible expert. Spread to the experts of the bank, with rows of zeros for the hidden
ones, everything behind it (choice, counts, losses, dispatch) speaks of the bank's experts, whatever the layer sees.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from unipool_jax.config.schema import Config
from unipool_jax.moe.placement import strided_placement
from unipool_jax.moe.routing import score_constant


class Window(NamedTuple):
    """What one layer sees of a bank; stacked to `[L, ...]` for a scan over layers."""

    slots_E: ArrayLike
    """Router row of each expert, int32; rows that do not exist for hidden ones."""
    visible_E: ArrayLike
    """Whether the layer sees the expert, bool."""
    constant: ArrayLike
    """NormRouter's constant for so many experts, float32: see `routing.score_constant`."""


def expert_order(config: Config) -> np.ndarray:
    """The expert at each place of the bank, `[E]`: their own order, or with mesh.expert_placement=strided that one.

    What the model knows of experts by number is in the order of places: see `training.placement`.
    """
    if config.mesh.expert_placement == "strided" and config.mesh.expert > 1:
        return strided_placement(config.experts_per_pool, config.mesh.expert)
    return np.arange(config.experts_per_pool)


def exposure(config: Config) -> np.ndarray:
    """u, the number of layers that see each expert, int64 `[G, E]`; of a bank with windows in the order of places.

    After a lock every expert has one layer.
    """
    if config.windows is None:
        return np.full((config.pool.groups, config.experts_per_pool), config.layers_per_pool)
    return config.windows.exposure()[None, expert_order(config)]


def layer_windows(config: Config) -> Window | None:
    """The windows of all layers, constants `[L, ...]`; None where layers see all experts of their pool."""
    windows = config.windows
    if windows is None:
        return None
    moe, order_E = config.moe, expert_order(config)
    assert moe.router != "none"
    constants = [score_constant(moe.router, moe.score_constant, width, moe.top_k) for width in windows.widths]
    return Window(windows.slots()[:, order_E], windows.visible()[:, order_E], np.array(constants, np.float32))


def spread(router_WD: jax.Array, window: Window) -> jax.Array:
    """Router rows of the bank's experts, `[E, D]`, from those of the visible ones; zeros for the hidden ones."""
    rows_ED: jax.Array = jnp.take(router_WD, window.slots_E, axis=0, mode="fill", fill_value=0)
    return rows_ED
