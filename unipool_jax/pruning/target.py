"""What a pruned model is: the settings of its source, with smaller sizes."""

from __future__ import annotations

import dataclasses

from unipool_jax.config.compose import Choices, differences
from unipool_jax.config.schema import Config, settings
from unipool_jax.convert.errors import ConversionError

_SIZES = (
    *("model.num_layers", "model.hidden_size", "model.num_heads", "model.num_kv_heads", "model.ffn_size"),
    "moe.dense_ffn_size",
)
_FREE = {*_SIZES, "model.head_size", "model.remat", "pool.experts", "pool.groups", "moe.experts_per_layer"}


def pruned_config(source: Config, choices: Choices) -> Config:
    """The configuration of a model pruned of one of `source`: its settings, with those of `choices`.

    Heads go in whole groups and keep their channels. Where `choices` do not say how many experts there are, a pool has
    as many as before; a pool that loses all of its layers goes with them.

    Raises:
      ConversionError: it is no smaller, or differs in what pruning cannot change.
    """
    named = {word.partition("=")[0].lstrip("+~") for word in choices.words}
    target = choices.onto(source)
    model, pool = target.model, target.pool
    if "model.num_heads" not in named:
        per_group = source.model.num_heads // source.model.num_kv_heads
        model = dataclasses.replace(model, num_heads=model.num_kv_heads * per_group)
    plain = model.hidden_size == model.num_heads * source.head_size
    model = dataclasses.replace(model, head_size=None if plain else source.head_size)
    target = dataclasses.replace(target, model=model)
    if "pool.groups" not in named:
        pool = dataclasses.replace(pool, groups=_groups(source, target))
    if source.moe.router != "none" and "pool.experts" not in named and source.windows is None:
        pool = dataclasses.replace(pool, experts=source.experts_per_pool * pool.groups, fraction=1.0)
    target = dataclasses.replace(target, pool=pool)
    _check(source, target)
    return target


def _groups(source: Config, target: Config) -> int:
    """Pools of the target: as many, if each can lose as many layers, or else as few as have their layers left."""
    groups, layers = source.pool.groups, target.mixture_layers
    as_many = source.layers_per_pool > 1 and layers % groups == 0
    return groups if as_many or layers % source.layers_per_pool else layers // source.layers_per_pool


def _check(source: Config, target: Config) -> None:
    before, now = settings(source), settings(target)
    changed = [
        name for name in differences(source, target) if name.startswith(("model.", "moe.", "pool.", "attention."))
    ]
    other = [name for name in changed if name not in _FREE and name != "pool.fraction"]
    if (source.loss.balance == "expert_bias") != (target.loss.balance == "expert_bias"):
        other.append("loss.balance")
    if other:
        listed = "\n".join(f"  - {name}={now[name]}: the source has {before[name]}" for name in other)
        raise ConversionError(f"a pruned model is its source with smaller sizes; leave these settings out:\n{listed}")
    sizes = {name: (before[name], now[name]) for name in _SIZES if before[name] is not None}
    sizes["pool.experts"] = source.total_experts, target.total_experts
    if larger := [f"{name}={new}: the source has {old}" for name, (old, new) in sizes.items() if new > old]:
        raise ConversionError("\n  - ".join(["a pruned model is no larger than its source:", *larger]))
    if all(new == old for old, new in sizes.values()):
        raise ConversionError(
            "the target is as large as the source; give what shall be smaller: model.num_layers, model.hidden_size, "
            "model.num_kv_heads, model.ffn_size or pool.experts"
        )
    _check_heads(source, target)
    _check_experts(source, target)


def _check_heads(source: Config, target: Config) -> None:
    before, now = source.model, target.model
    per_group = before.num_heads // before.num_kv_heads
    if now.num_heads != now.num_kv_heads * per_group:
        raise ConversionError(
            f"model.num_heads={now.num_heads}: heads go in groups of {per_group}, with the keys and values that they "
            f"read; leave it out, and set model.num_kv_heads"
        )


def _check_experts(source: Config, target: Config) -> None:
    layers = source.model.num_layers != target.model.num_layers
    if source.windows is not None and (layers or source.total_experts != target.total_experts):
        raise ConversionError(
            "the layers of the source see windows of a bank (pool.starts), which layers and experts cannot be taken "
            "out of; prune model.hidden_size, model.num_kv_heads or model.ffn_size"
        )
    if source.moe.router == "none" or target.mixture_layers < 1:
        return
    groups = target.pool.groups
    if target.total_experts % groups:
        raise ConversionError(f"pool.experts={target.total_experts}: must be a multiple of pool.groups={groups}")
    if target.experts_per_pool > source.experts_per_pool:
        raise ConversionError(
            f"pool.experts={target.total_experts}: {target.experts_per_pool} experts in each of {groups} pools, and "
            f"{source.experts_per_pool} in the source; set at most {groups * source.experts_per_pool}"
        )
