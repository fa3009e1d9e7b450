"""The stages of a run that grows in depth: its model, its step, and the state after a growth."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unipool_jax.config.growth_schedule import (
    depths,
    grows,
    layer_map,
    layers_at,
    saved_layers,
    stages,
    with_layers,
)
from unipool_jax.config.schema import Config
from unipool_jax.moe.lock import init_candidate
from unipool_jax.training.growth_costs import cost_lines
from unipool_jax.training.growth_step import GrowthStep, Unrolling, unrolling
from unipool_jax.training.layer_trees import Index, kind_of, take_layers, unrolled
from unipool_jax.training.metrics import Value
from unipool_jax.training.state import TrainState, state_shapes

Moments = Literal["copy", "official", "zero"]


def first_stage(config: Config, state: TrainState) -> TrainState:
    """The first layers of a new run, from the state that it would have with all of them; traceable.

    So their initial weights are those of a model of full depth, which is in the scale of some.
    """
    layers = config.growth.layers[0]
    kept: TrainState = unrolled(state, tuple(range(layers)), with_layers(config, layers).pool.groups)
    return kept._replace(balance=kept.balance._replace(lock=None))


def grown_state(config: Config, state: TrainState, before: int, after: int, mesh: Mesh | None = None) -> TrainState:
    """The state of `after` layers from that of `before`, at a growth of a run of `config`; `state` is donated.

    Layers are copied as `growth.map` says, with their routers, selection biases and, as `growth.moments` says, moments.
    A shared pool stays what it is. One array at a time, each freed as it is replaced.
    """
    model = with_layers(config, after)
    groups, index = model.pool.groups, layer_map(config.growth.map, before, after)

    def grow(path: tuple[Any, ...], leaf: jax.Array, moments: Moments) -> jax.Array:
        kind = kind_of(path)
        if not kind or (kind == "pool" and groups != after):
            return leaf
        grown = _grown(leaf if kind == "layer" else leaf[:, None], index, groups, moments)
        leaf.delete()
        return grown if kind == "layer" else grown[:, 0]

    def grow_all(tree: Any, moments: Moments = "copy") -> Any:
        return jax.tree_util.tree_map_with_path(functools.partial(grow, moments=moments), tree)

    balance = grow_all(state.balance._replace(lock=None))
    grown = TrainState(
        state.step,
        grow_all(state.params),
        grow_all(state.opt_state, config.growth.moments),
        balance._replace(lock=init_candidate(model)),
    )
    if mesh is None:
        return grown
    placed: TrainState = jax.device_put(grown, jax.tree.map(lambda leaf: leaf.sharding, state_shapes(model, mesh)))
    return placed


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _grown(leaf: jax.Array, index: Index, groups: int, moments: Moments) -> jax.Array:
    """`[G, N/G, ...]` as the layers `index`."""
    match moments:
        case "copy":
            return take_layers(leaf, index, groups)
        case "official":
            old = leaf.reshape(-1, *leaf.shape[2:])
            new = jnp.zeros((len(index) - len(old), *old.shape[1:]), leaf.dtype)
            return jnp.concatenate([old, new]).reshape(groups, -1, *old.shape[1:])
        case "zero":
            return jnp.zeros_like(take_layers(leaf, index, groups))


class Growing:
    """The growth of one run.

    Args:
      config: of the run.
      step: completed steps of the state that it starts with.
      mesh: of the run.
    """

    def __init__(self, config: Config, step: int, mesh: Mesh | None):
        self._config, self._mesh = config, mesh
        self.layers = saved_layers(config, step)
        """N, the layers that the state has now."""

    @property
    def structure(self) -> Config:
        """The configuration of the current model."""
        return with_layers(self._config, self.layers)

    @property
    def done(self) -> bool:
        """Whether all layers are there."""
        return self.layers == self._config.model.num_layers

    def due(self, completed: int) -> bool:
        """Whether the run grows before the update after `completed` steps."""
        return layers_at(self._config, completed) != self.layers

    def grow(self, state: TrainState, completed: int) -> TrainState:
        """The state of the next stage; `state` is donated."""
        before, self.layers = self.layers, layers_at(self._config, completed)
        return grown_state(self._config, state, before, self.layers, self._mesh)

    def step(self, built: Config, completed: int) -> GrowthStep:
        """The training step of the stage from `completed` steps on; `built` is `structure` as it is compiled."""
        return GrowthStep(self._config, built, self._mesh, completed)

    @property
    def at_full_depth(self) -> Unrolling | None:
        """The network of full depth of the current layers; None where they are not used so."""
        if self.done or self._config.growth.depth_law == "stage":
            return None
        return unrolling(self._config, self.layers, self._config.model.num_layers)

    def values(self, step: int) -> dict[str, Value]:
        """What a line of metrics says of the growth: N in the update to `step`, and the mean depth of its
        micro-batches."""
        drawn = depths(self._config, step - 1)
        return {"growth/layers": layers_at(self._config, step - 1), "growth/depth": float(drawn.mean())}

    def document(self) -> dict[str, dict[str, int]]:
        """What the meta document of a checkpoint holds of the growth."""
        return {"growth": {"layers": self.layers}}

    def notice(self) -> str:
        """The stages and what they cost, with every map that does not preserve the function of the model."""
        found = stages(self._config)
        lines = cost_lines(self._config)
        for old, new in itertools.pairwise(found):
            if new.layers % old.layers:
                index = layer_map(self._config.growth.map, old.layers, new.layers)
                lines.append(
                    f"{old.layers} does not divide {new.layers}: the growth at step {new.first} changes the function "
                    f"of the model; its layers are the old layers {list(index)}"
                )
        return "\n".join(lines)


def per_use(metrics: Mapping[str, Any], micro_batches: int) -> dict[str, Any]:
    """Metrics of a step whose sums over the uses of a layer are means over them: shares of tokens then stay shares."""
    if "uses_L" not in metrics:
        return dict(metrics)
    mean_L = metrics["uses_L"] / micro_batches
    by_layer = ("zero_gates_L", "switch_full_LP", "switch_disagreement_L", "switch_keys_L")
    return {
        name: (np.asarray(value).T / mean_L).T if name in by_layer else value
        for name, value in metrics.items()
        if name != "uses_L"
    }


def open_growth(config: Config, step: int, mesh: Mesh | None) -> Growing | None:
    """The growth of a run; None for one that has all layers from the start. Arguments are those of `Growing`."""
    return Growing(config, step, mesh) if grows(config) else None
