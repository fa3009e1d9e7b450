"""Places experts on devices so that loads are balanced; checkpoints and metrics keep the experts' order."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from unipool_jax.config.files import read_array
from unipool_jax.config.schema import Config
from unipool_jax.moe.bank import BANK_AXES
from unipool_jax.moe.placement import exchange_rounds, measured_placement
from unipool_jax.moe.visibility import expert_order
from unipool_jax.parallel.mesh import on_mesh, spec
from unipool_jax.training.metrics import pool_layers
from unipool_jax.training.sharding import parameter_spec
from unipool_jax.training.state import TrainState

_EXPERT_AXIS = {"router": 2, "expert_bias_GNE": 2, "previous_load_GE": 1}
"""Axis of the experts, by the last part of an array's name, in arrays that are not sharded along it (banks are)."""


class Placement:
    """A permutation of the experts of each pool.

    Router rows follow their experts, but for windows, whose tables of the model are in the order of places.

    Permuting experts together with their router rows does not change the function of the model; only ties between
    router scores, and the order of summation in the gradient norm, can differ. Experts move one at a time, array by
    array, so a device needs memory for one more array of its shard of the bank.

    Args:
      config: of the run.
      mesh: of the run.
      orders_GE: the expert at each position of each pool.
    """

    def __init__(self, config: Config, mesh: Mesh, orders_GE: np.ndarray):
        self._positions_GE = np.argsort(orders_GE, axis=1)
        self._apply = _exchange(config, mesh, orders_GE)
        self._undo = _exchange(config, mesh, self._positions_GE)

    def apply(self, state: TrainState) -> TrainState:
        """A state in the experts' order, with its experts permuted; `state` is donated."""
        return self._apply(state)

    def undo(self, state: TrainState) -> TrainState:
        """The inverse of `apply`; `state` is donated."""
        return self._undo(state)

    def counts(self, counts_LE: np.ndarray) -> np.ndarray:
        """Counts per layer and position, `[L, E]`, in the experts' order."""
        positions_LE = np.repeat(self._positions_GE, len(counts_LE) // len(self._positions_GE), axis=0)
        return np.take_along_axis(counts_LE, positions_LE, axis=1)


def _exchange(config: Config, mesh: Mesh, orders_GE: np.ndarray) -> Callable[[TrainState], TrainState]:
    """The function that permutes the experts of a state."""
    axes = {name: axis for name, axis in _EXPERT_AXIS.items() if name != "router" or config.windows is None}
    rounds_G = [exchange_rounds(order_E, mesh.shape["expert"]) for order_E in orders_GE]

    def between_devices(own_GE: jax.Array) -> jax.Array:
        moved_GE, me = own_GE, jax.lax.axis_index("expert")
        for pool, rounds in enumerate(rounds_G):
            for to_P, sent_P, kept_P in rounds:
                expert = jax.lax.dynamic_index_in_dim(own_GE[pool], jnp.array(sent_P)[me], keepdims=False)
                received = jax.lax.ppermute(expert, "expert", list(enumerate(to_P)))
                moved_GE = moved_GE.at[pool, jnp.array(kept_P)[me]].set(received)
        return moved_GE

    @functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
    def moved(leaf: jax.Array, name: str) -> jax.Array:
        last = name.rpartition(".")[2]
        if last in BANK_AXES:
            specs = spec(None, *BANK_AXES[last])
            return jax.shard_map(between_devices, mesh=mesh, in_specs=specs, out_specs=specs)(leaf)
        axis = axes[last]
        order = orders_GE.reshape(len(orders_GE), *(1,) * (axis - 1), -1, *(1,) * (leaf.ndim - axis - 1))
        sharding = NamedSharding(mesh, parameter_spec(name, leaf.ndim, config))
        return jax.lax.with_sharding_constraint(jnp.take_along_axis(leaf, order, axis=axis), sharding)

    def move(path: tuple[object, ...], leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        last = name.rpartition(".")[2]
        return moved(leaf, name) if last in BANK_AXES or last in axes else leaf

    return lambda state: jax.tree_util.tree_map_with_path(move, state)


def with_placement(config: Config, mesh: Mesh | None) -> Config:
    """`config` with the placement of a run on `mesh` in place of `auto`, and the sizes of the mesh."""
    return placed(on_mesh(config, mesh))


def placed(config: Config) -> Config:
    """`config` with a placement in place of `auto`; its mesh has the sizes of that of the run."""
    kind = config.mesh.expert_placement
    if kind == "auto":
        kind = "contiguous" if config.windows is None else "strided"
    if config.mesh.expert == 1:
        kind = "contiguous"
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, expert_placement=kind))


def strided(config: Config, mesh: Mesh) -> Placement:
    """The placement that spreads windows over all devices; `config` as of `with_placement`."""
    return Placement(config, mesh, np.tile(expert_order(config), (config.pool.groups, 1)))


def newest_counts(routing: Path, step: int) -> np.ndarray | None:
    """Routing counts per layer and expert of the last evaluation up to `step`, int64 `[L, E]`; None without one."""
    steps = [int(path.stem) for path in routing.glob("*.npy") if path.stem.isdigit() and int(path.stem) <= step]
    return read_array(routing / f"{max(steps)}.npy", "delete it; an earlier one is then used") if steps else None


def measured(config: Config, mesh: Mesh, counts_LE: np.ndarray) -> Placement:
    """The placement that balances the loads `counts_LE`, pool by pool."""
    pools_GNE = pool_layers(counts_LE, config.pool.groups)
    return Placement(config, mesh, np.stack([measured_placement(c, mesh.shape["expert"]) for c in pools_GNE]))
