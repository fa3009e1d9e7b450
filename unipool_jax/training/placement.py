"""A state whose experts are laid out for even device loads, while files and metrics keep the order of the experts."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unipool_jax.config import Config
from unipool_jax.moe.placement import measured_placement
from unipool_jax.sharding import state_shardings
from unipool_jax.training.metrics import pool_layers
from unipool_jax.training.step import TrainState

_EXPERT_AXIS = {"gate": 1, "up": 1, "down": 1, "router": 2, "expert_bias_GNE": 2, "previous_load_GE": 1}
"""Axis of the experts in each array that has one, by the last part of its name."""


class Placement:
    """One order of the experts of each pool, for all layers.

    Exchanging experts together with their router rows changes no value of the model; only ties between router scores,
    and the order in which squares are added to the norm, can differ.

    Args:
      orders_GE: the expert at each place of each pool.
    """

    def __init__(self, config: Config, mesh: Mesh, orders_GE: np.ndarray):
        self._orders_GE = orders_GE
        self._places_GE = np.argsort(orders_GE, axis=1)
        self._apply = self._permuting(config, mesh, self._orders_GE)
        self._undo = self._permuting(config, mesh, self._places_GE)

    @staticmethod
    def _permuting(config: Config, mesh: Mesh, orders_GE: np.ndarray) -> jax.stages.Wrapped:
        def permute(path: tuple[object, ...], leaf: jax.Array) -> jax.Array:
            axis = _EXPERT_AXIS.get(jax.tree_util.keystr(path[-1:], simple=True))
            if axis is None:
                return leaf
            order = orders_GE.reshape(len(orders_GE), *(1,) * (axis - 1), -1, *(1,) * (leaf.ndim - axis - 1))
            return jnp.take_along_axis(leaf, order, axis=axis)

        def permuted(state: TrainState) -> TrainState:
            return jax.tree_util.tree_map_with_path(permute, state)

        @functools.partial(jax.jit)
        def placed(state: TrainState) -> TrainState:
            return jax.lax.with_sharding_constraint(permuted(state), state_shardings(config, mesh, state))

        return placed

    def apply(self, state: TrainState) -> TrainState:
        """A state in the order of the experts, laid out over devices."""
        return self._apply(state)

    def undo(self, state: TrainState) -> TrainState:
        """The inverse of `apply`."""
        return self._undo(state)

    def counts(self, counts_LE: np.ndarray) -> np.ndarray:
        """Counts per layer and place, in the order of the experts."""
        places_LE = np.repeat(self._places_GE, len(counts_LE) // len(self._places_GE), axis=0)
        return np.take_along_axis(counts_LE, places_LE, axis=1)


def newest_counts(routing: Path, step: int) -> np.ndarray | None:
    """Choices per layer and expert of the last evaluation up to `step`, int64 `[L, E]`; None if there was none."""
    steps = [int(path.stem) for path in routing.glob("*.npy") if path.stem.isdigit() and int(path.stem) <= step]
    return np.load(routing / f"{max(steps)}.npy", allow_pickle=False) if steps else None


def measured(config: Config, mesh: Mesh, counts_LE: np.ndarray) -> Placement:
    """The placement for the measured loads, pool by pool."""
    pools_GNE = pool_layers(counts_LE, config.pool.groups)
    return Placement(config, mesh, np.stack([measured_placement(c, mesh.shape["expert"]) for c in pools_GNE]))
