"""A state whose experts are laid out for even device loads, while files and metrics keep the order of the experts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from unipool_jax.config.schema import Config
from unipool_jax.moe.bank import BANK_AXES
from unipool_jax.moe.placement import exchange_rounds, measured_placement
from unipool_jax.parallel.mesh import spec
from unipool_jax.training.metrics import pool_layers
from unipool_jax.training.sharding import parameter_spec
from unipool_jax.training.state import TrainState

_WHOLE_AXIS = {"router": 2, "expert_bias_GNE": 2, "previous_load_GE": 1}
"""Axis of the experts in arrays that are whole along it, by the last part of their names; a bank's is dealt out."""


class Placement:
    """One order of the experts of each pool, for all layers.

    Exchanging experts together with their router rows changes no value of the model; only ties between router scores,
    and the order in which squares are added to the norm, can differ. Experts go from device to device one at a time,
    array by array, so a device never holds more than one array of its part of the bank besides its state.

    Args:
      orders_GE: the expert at each place of each pool.
    """

    def __init__(self, config: Config, mesh: Mesh, orders_GE: np.ndarray):
        self._places_GE = np.argsort(orders_GE, axis=1)
        self._apply = _exchange(config, mesh, orders_GE)
        self._undo = _exchange(config, mesh, self._places_GE)

    def apply(self, state: TrainState) -> TrainState:
        """A state in the order of the experts, laid out over devices; `state` is used up."""
        return self._apply(state)

    def undo(self, state: TrainState) -> TrainState:
        """The inverse of `apply`."""
        return self._undo(state)

    def counts(self, counts_LE: np.ndarray) -> np.ndarray:
        """Counts per layer and place, in the order of the experts."""
        places_LE = np.repeat(self._places_GE, len(counts_LE) // len(self._places_GE), axis=0)
        return np.take_along_axis(counts_LE, places_LE, axis=1)


def _exchange(config: Config, mesh: Mesh, orders_GE: np.ndarray) -> Callable[[TrainState], TrainState]:
    """The function that brings the experts of a state into another order."""
    rounds_G = [exchange_rounds(order_E, mesh.shape["expert"]) for order_E in orders_GE]

    def between_devices(own_GE: jax.Array) -> jax.Array:
        moved_GE, me = own_GE, jax.lax.axis_index("expert")
        for pool, rounds in enumerate(rounds_G):
            for to_P, sent_P, kept_P in rounds:
                expert = jax.lax.dynamic_index_in_dim(own_GE[pool], jnp.array(sent_P)[me], keepdims=False)
                arrived = jax.lax.ppermute(expert, "expert", list(enumerate(to_P)))
                moved_GE = moved_GE.at[pool, jnp.array(kept_P)[me]].set(arrived)
        return moved_GE

    @functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
    def moved(leaf: jax.Array, name: str) -> jax.Array:
        last = name.rpartition(".")[2]
        if last in BANK_AXES:
            places = spec(None, *BANK_AXES[last])
            return jax.shard_map(between_devices, mesh=mesh, in_specs=places, out_specs=places)(leaf)
        axis = _WHOLE_AXIS[last]
        order = orders_GE.reshape(len(orders_GE), *(1,) * (axis - 1), -1, *(1,) * (leaf.ndim - axis - 1))
        place = NamedSharding(mesh, parameter_spec(name, leaf.ndim, config))
        return jax.lax.with_sharding_constraint(jnp.take_along_axis(leaf, order, axis=axis), place)

    def move(path: tuple[object, ...], leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        last = name.rpartition(".")[2]
        return moved(leaf, name) if last in BANK_AXES or last in _WHOLE_AXIS else leaf

    return lambda state: jax.tree_util.tree_map_with_path(move, state)


def newest_counts(routing: Path, step: int) -> np.ndarray | None:
    """Choices per layer and expert of the last evaluation up to `step`, int64 `[L, E]`; None if there was none."""
    steps = [int(path.stem) for path in routing.glob("*.npy") if path.stem.isdigit() and int(path.stem) <= step]
    return np.load(routing / f"{max(steps)}.npy", allow_pickle=False) if steps else None


def measured(config: Config, mesh: Mesh, counts_LE: np.ndarray) -> Placement:
    """The placement for the measured loads, pool by pool."""
    pools_GNE = pool_layers(counts_LE, config.pool.groups)
    return Placement(config, mesh, np.stack([measured_placement(c, mesh.shape["expert"]) for c in pools_GNE]))
