"""What the stages of a run that grows cost, known before it begins."""

from __future__ import annotations

from typing import NamedTuple

from unipool_jax.config.growth_schedule import depth_shares, depths, stages
from unipool_jax.config.schema import Config
from unipool_jax.training.flops import flops_spent, share_spent


class StageCost(NamedTuple):
    """One stage of a run."""

    layers: int
    steps: int
    programs: int
    """Depths that can be drawn, each compiled when it first is."""
    expected_depth: float
    """Mean of the depth law."""
    mean_depth: float
    """Of the depths that this run draws: they are a function of its seed."""
    flops: float
    share: float
    """Of what a model with all layers would spend in as many steps."""


def stage_costs(config: Config) -> list[StageCost]:
    """The cost of each stage."""
    found = []
    for stage in stages(config):
        shares, steps = depth_shares(config, stage.layers), stage.end - stage.first
        found.append(
            StageCost(
                stage.layers,
                steps,
                len(shares),
                sum(depth * share for depth, share in shares.items()),
                float(depths(config, stage.first, steps).mean()),
                flops_spent(config, stage.end, stage.first),
                share_spent(config, stage.end, stage.first),
            )
        )
    return found


def cost_lines(config: Config) -> list[str]:
    """The stages as a table of text, and what the whole run spends."""
    costs = stage_costs(config)
    lines = [f"growth: depth law {config.growth.depth_law}, map {config.growth.map}, moments {config.growth.moments}"]
    for number, cost in enumerate(costs, 1):
        lines.append(
            f"  stage {number}: {cost.layers} layers for {cost.steps} steps, mean depth {cost.mean_depth:.2f} "
            f"(expected {cost.expected_depth:.2f}), {cost.programs} programs, {cost.share:.1%} of the FLOPs of L"
        )
    whole = share_spent(config, config.train.steps)
    lines.append(f"  in all {sum(cost.flops for cost in costs):.4g} FLOPs, {whole:.1%} of a run with all layers")
    return lines
