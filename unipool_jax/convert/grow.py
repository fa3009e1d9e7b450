"""`unipool convert grow`: a deeper model whose layers are copies of those of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np

from unipool_jax.config.compose import Choices, differences
from unipool_jax.config.growth_schedule import at_depth, layer_map
from unipool_jax.config.rules import validate
from unipool_jax.config.schema import Config, ConfigError, GrowthMap, settings
from unipool_jax.convert.errors import ConversionError
from unipool_jax.convert.inheritance import Origin, origin_of, same_text
from unipool_jax.convert.requests import GrowRequest
from unipool_jax.convert.runs import read_run, write_run
from unipool_jax.convert.weights import Weights
from unipool_jax.training.layer_trees import Index, unrolled

_ARCHITECTURE = ("model.", "attention.", "moe.", "pool.")
_FREE = ("model.remat", "model.compute_dtype")


def grow_command(request: GrowRequest) -> int:
    """Make a deeper run of a run.

    Raises:
      ConfigError, RunError, CheckpointError, ConversionError: with what to do about it.
    """
    config, weights = read_run(request.run, request.step)
    target = grown_config(config, request.config or Choices(()))
    validate(dataclasses.replace(target, mode="describe"))
    before, after = config.model.num_layers, target.model.num_layers
    index = grown_index(config, target, request.map)
    origin = origin_of(request.run, request.step)
    kept = Origin(text=origin.text if same_text(config.data, target.data) else None, parent=origin.parent)
    count = write_run(Path(request.out), target, grow(weights, index, target.pool.groups), kept)
    print(
        f"{request.out}: {target.scale_name} {target.method_name} of {after} layers from {before}, {count} experts, at "
        f"step 0; its layers are the layers {list(index)} of {request.run}"
    )
    return 0


def grown_config(parent: Config, choices: Choices) -> Config:
    """The configuration of the deeper model: the parent's with these choices, which change nothing of a layer.

    A shared pool keeps its size. Layers with pools of their own bring them along.

    Raises:
      ConfigError: model.num_layers is no larger than the parent's.
      ConversionError: another setting of the architecture is changed, or a layer cannot stand at another place.
    """
    before, after = parent.model.num_layers, choices.onto(parent).model.num_layers
    if after <= before:
        raise ConfigError([f"model.num_layers={after}: the run has {before} layers; set more, such as {2 * before}"])
    deeper = at_depth(parent, after)
    target = choices.onto(deeper)
    changed = [name for name in differences(deeper, target) if name.startswith(_ARCHITECTURE) and name not in _FREE]
    if changed:
        ours, theirs = settings(target), settings(deeper)
        listed = "\n".join(f"  - {name}={ours[name]}: it is {theirs[name]}" for name in changed)
        raise ConversionError(f"a grown model differs from its source in depth; leave these settings out:\n{listed}")
    for name, bound in (
        ("pool.starts", parent.pool.starts is not None),
        ("moe.dense_layers", parent.moe.dense_layers > 0),
        ("attention.kind", parent.attention.kind == "alternating"),
    ):
        if bound:
            raise ConversionError(
                f"{name}={settings(parent)[name]}: its layers are made for the places at which they stand, so copies "
                "cannot stand at others; grow a run without it"
            )
    return target


def grown_index(config: Config, target: Config, kind: GrowthMap) -> Index:
    """Which layer of `config` each layer of `target` is a copy of.

    Raises:
      ConversionError: a copy would stand in another pool than its original.
    """
    before, after, groups = config.model.num_layers, target.model.num_layers, config.pool.groups
    index = layer_map(kind, before, after)
    pools = [(source * groups // before, place * groups // after) for place, source in enumerate(index)]
    if groups != before and any(old != new for old, new in pools):
        raise ConversionError(
            f"pool.groups={groups}: with map={kind} {after} layers would be copies of layers of other pools; set "
            f"map=extend and a multiple of {groups} as model.num_layers"
        )
    return index


def grow(weights: Weights, index: Index, groups: int) -> Weights:
    """The weights of the layers `index`, over `groups` pools."""
    grown: Weights = jax.tree.map(np.asarray, unrolled(weights, index, groups))
    return grown
