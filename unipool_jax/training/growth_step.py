"""The training step of a run that grows: every micro-batch sees the layers unrolled to a depth of its own.

    unroll parameters to D layers -> gradients of an ordinary model of that depth -> fold them back -> ordinary update

A layer that stands at several places gets the sum of its gradients there, which is what differentiating through the
unrolling would give. Depth is a constant of a program, so there is one program for each depth that is drawn, compiled
when it is first drawn. With several micro-batches they are called one by one, as each has its own depth.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unipool_jax.config.growth_schedule import at_depth, depths, layer_map
from unipool_jax.config.schema import Config
from unipool_jax.data.pipeline import Batch
from unipool_jax.model.transformer import Positions, apply
from unipool_jax.moe.bank import Experts
from unipool_jax.parallel.mesh import compiler_options, on_mesh
from unipool_jax.training.layer_trees import Index, folded, sum_layers, sum_places, unrolled, uses
from unipool_jax.training.sharding import replicated, state_shardings
from unipool_jax.training.state import TrainState, layer_inputs, state_shapes
from unipool_jax.training.step import (
    Gradients,
    Metrics,
    MicroBatch,
    added,
    averaged,
    batch_gradients,
    counts_before_gradient,
    load_before,
    load_shares,
    micro_batch_gradients,
    micro_batches,
    no_gradients,
    updated_state,
)


class Unrolling(NamedTuple):
    """N layers as a network of depth D."""

    config: Config
    """Of the model of D layers."""
    sources: Index
    """Which of the N layers stands at each of the D places."""

    @property
    def groups(self) -> int:
        """Pools of the model of D layers."""
        return self.config.pool.groups

    def unroll(self, state: TrainState) -> TrainState:
        """`state` with parameters and balance state of D layers, and without moments."""
        params, balance = unrolled((state.params, state.balance), self.sources, self.groups)
        return TrainState(state.step, params, (), balance)

    def fold(self, found: Gradients) -> Gradients:
        """What a step found for D layers as that of N: gradients, counts and metrics are sums over a layer's places.

        `received_L` is a maximum, and the load of a pool that is used several times a mean.
        """
        load_GE, metrics = found.load_GE, {"uses_L": jnp.asarray(uses(self.sources))}
        if self.groups == len(self.sources):
            load_GE = sum_places(load_GE, self.sources) / uses(self.sources)[:, None]
        for name, value in found.metrics.items():
            add = jnp.maximum if name == "received_L" else jnp.add
            metrics[name] = sum_places(value, self.sources, add) if name.endswith(("_L", "_LP")) else value
        params = folded(found.params, self.sources, self.groups)
        return Gradients(params, None, metrics, sum_layers(found.counts_GNE, self.sources), load_GE)


def unrolling(config: Config, layers: int, depth: int) -> Unrolling:
    """The network of `depth` that a run of `config` makes of `layers` layers."""
    return Unrolling(at_depth(config, depth), layer_map(config.growth.map, layers, depth))


def whole_step(
    stage: Config, mesh: Mesh | None, deep: Unrolling, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
    """One optimizer step of one micro-batch; `stage` is the model of N layers."""
    found = deep.fold(batch_gradients(deep.config, mesh, deep.unroll(state), batch))
    return updated_state(stage, state, state.balance, found)


def micro_step(
    stage: Config,
    mesh: Mesh | None,
    deep: Unrolling,
    state: TrainState,
    total: Gradients,
    batch: Batch,
    total_weight: jax.Array,
) -> Gradients:
    """`total` with the gradients of one micro-batch of several."""

    def gradients(
        config: Config, mesh: Mesh | None, state: TrainState, batch: Batch, params: Any, experts: Experts | None
    ) -> Gradients:
        zeros = None if experts is None else jax.tree.map(jnp.zeros_like, experts.accumulator)
        load_GE = total.load_GE if counts_before_gradient(stage) else load_before(stage, total.load_GE)
        if load_GE is not None and deep.groups == len(deep.sources):
            load_GE = load_GE[np.array(deep.sources)]
        micro = MicroBatch(batch, state.balance, state.step, load_GE, total_weight)
        return micro_batch_gradients(config, mesh, params, experts, zeros, micro)

    found = deep.fold(batch_gradients(deep.config, mesh, deep.unroll(state), batch, accumulated=gradients))
    return added(stage, total, found)


def counted(deep: Unrolling, state: TrainState, counts_GNE: jax.Array, batch: Batch) -> jax.Array:
    """`counts_GNE` with the choices of one micro-batch, for the exact pool loss over several."""
    seen = deep.unroll(state)
    inputs = layer_inputs(deep.config, seen.balance, seen.step)
    output = apply(deep.config, seen.params, batch.inputs, inputs, Positions(segments=batch.segments))
    return counts_GNE + sum_layers(jnp.sum(output.layers.stats.counts_AE, axis=2), deep.sources)


def begin(stage: Config, state: TrainState, counts_GNE: jax.Array | None) -> Gradients:
    """What a step has accumulated before its first micro-batch; `counts_GNE` are those of the whole batch, if known."""
    load_GE = state.balance.previous_load_GE
    if counts_GNE is not None:
        load_GE = load_shares(stage, counts_GNE[:, :, None])
    total = no_gradients(stage, state.params, state.balance, load_GE)
    return total._replace(metrics=total.metrics | {"uses_L": jnp.zeros(stage.mixture_layers, jnp.int32)})


class DepthPrograms(NamedTuple):
    """What is compiled for one depth."""

    whole: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    micro: Callable[[TrainState, Gradients, Batch, jax.Array], Gradients]
    counted: Callable[[TrainState, jax.Array, Batch], jax.Array]


def depth_programs(stage: Config, mesh: Mesh | None, deep: Unrolling) -> DepthPrograms:
    """The functions of a depth; each is compiled when it is first called."""

    def whole(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return whole_step(stage, mesh, deep, state, batch)

    def micro(state: TrainState, total: Gradients, batch: Batch, total_weight: jax.Array) -> Gradients:
        return micro_step(stage, mesh, deep, state, total, batch, total_weight)

    def count(state: TrainState, counts_GNE: jax.Array, batch: Batch) -> jax.Array:
        return counted(deep, state, counts_GNE, batch)

    if mesh is None:
        return DepthPrograms(jax.jit(whole, donate_argnums=0), jax.jit(micro, donate_argnums=1), jax.jit(count))
    jit = functools.partial(jax.jit, compiler_options=compiler_options(stage.mesh) or None)
    return DepthPrograms(
        jit(whole, donate_argnums=0, out_shardings=_step_places(stage, mesh)),
        jit(micro, donate_argnums=1, out_shardings=_gradient_places(stage, mesh)),
        jit(count, out_shardings=replicated(mesh)),
    )


class StagePrograms(NamedTuple):
    """What is compiled for a stage with several micro-batches, whatever their depths."""

    split: Callable[[Batch], tuple[list[Batch], jax.Array, jax.Array]]
    """The micro-batches, the sum of their weights, and counts of no token."""
    begin: Callable[[TrainState, jax.Array | None], Gradients]
    finish: Callable[[TrainState, Gradients], tuple[TrainState, Metrics]]


def stage_programs(stage: Config, mesh: Mesh | None) -> StagePrograms:
    """The functions of a stage; each is compiled when it is first called."""

    def split(batch: Batch) -> tuple[list[Batch], jax.Array, jax.Array]:
        micros = micro_batches(stage, batch)
        parts = [jax.tree.map(lambda rows, i=i: rows[i], micros) for i in range(stage.num_microbatches)]
        shape = stage.pool.groups, stage.layers_per_pool, stage.experts_per_pool
        return parts, jnp.sum(batch.weights), jnp.zeros(shape, jnp.int32)

    def start(state: TrainState, counts_GNE: jax.Array | None) -> Gradients:
        return begin(stage, state, counts_GNE)

    def finish(state: TrainState, total: Gradients) -> tuple[TrainState, Metrics]:
        return updated_state(stage, state, state.balance, averaged(stage, total))

    if mesh is None:
        return StagePrograms(jax.jit(split), jax.jit(start), jax.jit(finish, donate_argnums=0))
    return StagePrograms(
        jax.jit(split),
        jax.jit(start, out_shardings=_gradient_places(stage, mesh)),
        jax.jit(finish, donate_argnums=0, out_shardings=_step_places(stage, mesh)),
    )


def _step_places(stage: Config, mesh: Mesh) -> tuple[Any, Any]:
    return state_shardings(stage, mesh, state_shapes(stage)), replicated(mesh)


def _gradient_places(stage: Config, mesh: Mesh) -> Any:
    shapes = jax.eval_shape(lambda state: begin(stage, state, None), state_shapes(stage))
    return state_shardings(stage, mesh, shapes)


class GrowthStep:
    """The training step of one stage of a run; a call is one step, and donates the state.

    Args:
      config: of the run.
      stage: of the model of the stage, with the capacity of its receive buffers.
      mesh: of the run; with one, call the step under `jax.set_mesh(mesh)`.
      completed: steps before the first call.
    """

    def __init__(self, config: Config, stage: Config, mesh: Mesh | None, completed: int):
        self._stage, self._mesh = on_mesh(stage, mesh), mesh
        self._config = dataclasses.replace(config, mesh=self._stage.mesh)
        self._completed = completed
        self._by_depth: dict[int, DepthPrograms] = {}
        self._programs = stage_programs(self._stage, mesh)

    @property
    def next_depths(self) -> list[int]:
        """The depth of each micro-batch of the next step."""
        found: list[int] = depths(self._config, self._completed)[0].tolist()
        return found

    @property
    def compiles(self) -> bool:
        """Whether the next step has a depth that no step before it had."""
        return not self._by_depth.keys() >= set(self.next_depths)

    def _at(self, depth: int) -> DepthPrograms:
        if depth not in self._by_depth:
            deep = unrolling(self._config, self._stage.model.num_layers, depth)
            self._by_depth[depth] = depth_programs(self._stage, self._mesh, deep)
        return self._by_depth[depth]

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One step: see `step.make_train_step`. `uses_L`, int32, is besides how often each layer was used."""
        drawn = self.next_depths
        self._completed += 1
        if len(drawn) == 1:
            return self._at(drawn[0]).whole(state, batch)
        micros, total_weight, counts_GNE = self._programs.split(batch)
        counts_first = counts_before_gradient(self._stage)
        if counts_first:
            for depth, micro in zip(drawn, micros, strict=True):
                counts_GNE = self._at(depth).counted(state, counts_GNE, micro)
        total = self._programs.begin(state, counts_GNE if counts_first else None)
        for depth, micro in zip(drawn, micros, strict=True):
            total = self._at(depth).micro(state, total, micro, total_weight)
        return self._programs.finish(state, total)
