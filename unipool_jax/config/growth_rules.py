"""Which runs can grow in depth."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from unipool_jax.config import lock_schedule
from unipool_jax.config.growth_schedule import stages
from unipool_jax.config.parsing import as_written
from unipool_jax.config.schema import Config, GrowthConfig


def problems(config: Config) -> Iterator[str]:
    """One message for each reason why a run cannot grow as configured; of one that does not, settings without use."""
    growth = config.growth
    if not growth.layers:
        usual = GrowthConfig()
        for name in ("ends", "depth_law", "depth_step", "map", "moments"):
            if (value := getattr(growth, name)) != getattr(usual, name):
                yield f"growth.{name}={as_written(value)}: needs growth.layers; set it or remove this"
        return
    found = list(_stage_problems(config))
    yield from found
    yield from _model_problems(config)
    yield from _pool_problems(config)
    if not found:
        yield from _lock_problems(config)


def _stage_problems(config: Config) -> Iterator[str]:
    growth, last, steps = config.growth, config.model.num_layers, config.train.lengths[0]
    shown, ends = f"growth.layers={as_written(growth.layers)}", f"growth.ends={as_written(growth.ends)}"
    if len(growth.layers) < 2 or any(a >= b for a, b in itertools.pairwise(growth.layers)) or growth.layers[-1] != last:
        yield f"{shown}: must be two or more numbers that ascend to model.num_layers={last}; change one of the two"
    if len(growth.ends) != len(growth.layers):
        yield f"{ends}: has {len(growth.ends)} entries for {shown}; give the end of each stage, the last one 1"
        return
    if growth.ends[-1] != 1 or any(a >= b for a, b in itertools.pairwise(growth.ends)):
        yield f"{ends}: must be fractions of train.steps that ascend to 1, for example [.05,.1,.25,1]"
    elif any(stage.end <= stage.first for stage in stages(config)):
        spans = ", ".join(f"{stage.first} to {stage.end}" for stage in stages(config))
        yield f"{ends}: with train.steps={steps} a stage has no step ({spans}); move an end, or train longer"


def _model_problems(config: Config) -> Iterator[str]:
    why = f"growth.layers={as_written(config.growth.layers)}"
    if config.moe.dense_layers:
        yield f"moe.dense_layers={config.moe.dense_layers}: {why} needs layers of one kind; set moe.dense_layers=0"
    if config.attention.kind == "alternating":
        yield (
            f"attention.kind=alternating: with {why} a layer stands at places that see all positions and at others; "
            "set attention.kind=full or window"
        )
    if config.run.init_from is not None:
        yield (
            f"run.init_from={config.run.init_from}: {why} begins with layers of its own; remove one of them, or deepen "
            "that run by unipool convert grow"
        )


def _pool_problems(config: Config) -> Iterator[str]:
    pool, growth, layers = config.pool, config.growth, config.mixture_layers
    why = f"growth.layers={as_written(growth.layers)}"
    if pool.starts is not None:
        yield (
            f"pool.starts={as_written(pool.starts)}: with {why} a layer has no place of its own to see a window from; "
            "remove one of them"
        )
    if config.optimizer.reuse_divisor != "none":
        yield (
            f"optimizer.reuse_divisor={config.optimizer.reuse_divisor}: with {why} the number of layers that see an "
            "expert changes with each micro-batch; set optimizer.reuse_divisor=none"
        )
    for name, usual in (("scope", "component"), ("pressure", "scope")):
        if (value := getattr(config.loss, name)) != usual:
            yield f"loss.{name}={value}: with {why} sets of layers change all the time; set loss.{name}={usual}"
    if pool.groups > 1 and config.mesh.expert_placement not in ("auto", "contiguous"):
        yield (
            f"mesh.expert_placement={config.mesh.expert_placement}: with {why} and pool.groups={pool.groups} experts "
            "move at growth; set mesh.expert_placement=contiguous"
        )
    if not 1 < pool.groups < layers:
        return
    # Layer i of D is in pool floor(i G / D). With G | N and G | D, floor(i N / D) is in that pool of the N layers too.
    if growth.map != "extend":
        yield (
            f"growth.map={growth.map}: takes layers to other pools of pool.groups={pool.groups}; set "
            f"growth.map=extend, or pool.groups=1 or {layers}"
        )
    if uneven := [number for number in (*growth.layers, growth.depth_step) if number % pool.groups]:
        yield (
            f"pool.groups={pool.groups}: with {why} and growth.depth_step={growth.depth_step} layers would change "
            f"their pool, as it does not divide {uneven[0]}; set growth.depth_step={pool.groups} and layers that it "
            f"divides, or pool.groups=1 or {layers}"
        )


def _lock_problems(config: Config) -> Iterator[str]:
    """A lock may neither watch, nor fade, nor bind layers that are not all there."""
    if config.lock.ownership == "none":
        return
    shown, last = f"lock.ownership={config.lock.ownership}", stages(config)[-1].first
    if config.lock.ownership == "random_from_start":
        yield f"{shown}: divides the pool among all layers before the last growth, at step {last}; choose learned"
        return
    schedule, lookback, every = lock_schedule.make_schedule(config), config.lock.count_lookback, config.train.eval_every
    # The evaluation at the step of a growth comes before it.
    watched = schedule.freeze - (lookback - 1) * every
    if watched <= last:
        yield (
            f"{shown}: watches the routing of the {lookback} evaluations (lock.count_lookback) from step {watched} to "
            f"the freeze at step {schedule.freeze}, but the last growth is at step {last}; let growth.ends come "
            "earlier, or the lock later (lock.lock_fraction)"
        )
