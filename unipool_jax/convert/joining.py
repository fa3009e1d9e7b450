"""Which banks of experts a merge joins, and the weights of the model that it makes.

A bank is a set of experts that some layers see and no other layer does. A merge keeps one of the banks that it joins,
that of the first layer, as it is; layers of the others route to the kept experts that do most nearly the same, by a
permutation of their router's rows. A layer sees as many experts as before, so NormRouter's constant, which depends on
their number, does not change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unipool_jax.config.compose import Choices, differences
from unipool_jax.config.schema import Config, PoolConfig, settings
from unipool_jax.convert.errors import ConversionError
from unipool_jax.convert.inheritance import upcycled_config
from unipool_jax.convert.weights import Weights, empty_weights
from unipool_jax.kernels.grouped_ffn import Bank
from unipool_jax.moe.bank import BANK_AXES

Permutations = Mapping[int, np.ndarray]
"""By bank of the source: for each of its experts, the place in the kept bank of the one that takes over, `[W]`."""


class Banks(NamedTuple):
    """The banks of a model, in the order of the first layers that see them."""

    of_layer: tuple[int, ...]
    """The bank of each layer that has experts."""
    experts: tuple[tuple[int, ...], ...]
    """Experts of each bank, counted over all pools, in the order of the router rows of its layers."""

    def layers(self, bank: int) -> list[int]:
        """Layers that see `bank`."""
        return [layer for layer, own in enumerate(self.of_layer) if own == bank]


class Join(NamedTuple):
    """Banks of the source that become one bank of the target."""

    kept: int
    dropped: tuple[int, ...]
    """Other banks, which may be none."""


def banks_of(config: Config, what: str) -> Banks:
    """The banks of a model.

    Args:
      config: of the model.
      what: the model, for messages.

    Raises:
      ConversionError: the model is dense, or its layers see windows that overlap in part.
    """
    if config.moe.router == "none":
        raise ConversionError(f"moe.router=none: {what} is dense and has no experts to merge")
    windows = config.windows
    if windows is None:
        size, layers = config.experts_per_pool, config.layers_per_pool
        seen = [tuple(range(p * size, (p + 1) * size)) for p in range(config.pool.groups) for _ in range(layers)]
    else:
        ranges = zip(windows.starts, windows.widths, strict=True)
        seen = [tuple((start + place) % windows.experts for place in range(width)) for start, width in ranges]
    found = list(dict.fromkeys(seen))
    owners: dict[int, int] = {}
    for bank, experts in enumerate(found):
        for expert in experts:
            if (other := owners.setdefault(expert, bank)) != bank:
                first = config.moe.dense_layers
                a, b = first + seen.index(found[other]), first + seen.index(experts)
                raise ConversionError(
                    f"layers {a} and {b} of {what} see windows that overlap in part; only banks that layers share "
                    "as a whole can be merged (pool.groups, or pool.starts=runs, cyclic or a list of such starts)"
                )
    return Banks(tuple(found.index(experts) for experts in seen), tuple(found))


def merged_config(parent: Config, choices: Choices) -> Config:
    """The configuration of a model merged of one of `parent`: one pool, unless `choices` say otherwise.

    Where they do not say how many experts there are, layers see as many as before.
    """
    target = upcycled_config(dataclasses.replace(parent, pool=PoolConfig()), choices)
    pool, width = target.pool, _width(parent)
    if pool.experts is not None or pool.fraction != 1 or isinstance(pool.starts, str):
        return target
    experts, window = pool.groups * width, pool.window
    if pool.starts is not None:
        experts, window = max(pool.starts) + width, width if window is None else window
    return dataclasses.replace(target, pool=dataclasses.replace(pool, experts=experts, window=window))


def _width(config: Config) -> int:
    return config.experts_per_pool if config.widths is None else max(config.widths)


def joins(config: Config, target: Config) -> list[Join]:
    """What has to be joined to come from the model of `config` to that of `target`, by bank of the target.

    Raises:
      ConversionError: `target` differs in more than in what is shared, or cannot be had by joining banks.
    """
    _check_rest(config, target)
    if config.norms_experts:
        raise ConversionError(
            f"model.norm={config.model.norm}: experts are matched by the size of their outputs, which a norm of each "
            "takes away (model.post_norm_experts=norm_then_gate); such models cannot be merged"
        )
    old, new = banks_of(config, "the source"), banks_of(target, "the target")
    found, first = [], config.moe.dense_layers
    for bank, experts in enumerate(new.experts):
        joined = list(dict.fromkeys(old.of_layer[layer] for layer in new.layers(bank)))
        for own in joined:
            if lost := [layer for layer in old.layers(own) if new.of_layer[layer] != bank]:
                raise ConversionError(
                    f"layers {first + new.layers(bank)[0]} and {first + lost[0]} share experts in the source and not "
                    "in the target; a merge only joins what is apart"
                )
            if len(old.experts[own]) != len(experts):
                raise ConversionError(
                    f"layer {first + old.layers(own)[0]} sees {len(old.experts[own])} experts, and {len(experts)} in "
                    "the target; a merge leaves each layer as many as it has: leave out pool.experts, pool.fraction "
                    "and pool.window, and set moe.experts_per_layer to that number for a rule of pool.starts"
                )
        found.append(Join(joined[0], tuple(joined[1:])))
    if not any(join.dropped for join in found):
        if len(old.experts) == 1:
            raise ConversionError("all layers of the source share one bank of experts; nothing to merge")
        raise ConversionError(
            f"no two of the {len(old.experts)} banks of the source are one in the target; nothing to merge. Set "
            "pool.groups to fewer, or choose other pool.starts"
        )
    return found


def _check_rest(config: Config, target: Config) -> None:
    """Raises ConversionError for a target whose layers are other functions of the experts that they see."""
    ours, theirs = settings(target), settings(config)
    free = {"model.remat", "moe.experts_per_layer"}
    other = [
        name
        for name in differences(config, target)
        if name.startswith(("model.", "moe.", "attention.")) and name not in free
    ]
    if (config.loss.balance == "expert_bias") != (target.loss.balance == "expert_bias"):
        other.append("loss.balance")
    if other:
        listed = "\n".join(f"  - {name}={ours[name]}: the source has {theirs[name]}" for name in other)
        raise ConversionError(
            "a merged model has layers and routers of its source; leave these settings out, or the method that brings "
            f"them (the target can be given as pool.groups or pool.starts):\n{listed}"
        )


def joined_weights(
    config: Config, weights: Weights, target: Config, permutations: Permutations, kept: list[Join]
) -> Weights:
    """Weights of `target` with the kept banks as they are.

    Args:
      config: of the source.
      weights: of the source.
      target: of the new model.
      permutations: of the router rows of each dropped bank.
      kept: the joins, by bank of the target.
    """
    old, new = banks_of(config, "the source"), banks_of(target, "the target")
    found = empty_weights(target)
    for name in found.params:
        if name != "pools":
            jax.tree.map(_copy, found.params[name], weights.params[name])
    for name, tree in found.params["pools"].items():
        if name != "bank":
            jax.tree.map(_copy, tree, weights.params["pools"][name])
    for experts, join in zip(new.experts, kept, strict=True):
        write_experts(found, experts, read_experts(weights, old.experts[join.kept]))
    rows, biases = _routers(found), _biases(found)
    # Rows that belong to no expert, where another layer sees more, stay zero.
    rows[...] = 0
    for layer, bank in enumerate(old.of_layer):
        width = len(old.experts[bank])
        place = permutations.get(bank, np.arange(width))
        rows[layer, place] = _routers(weights)[layer, :width]
        biases[layer, _columns(target, new, layer)[place]] = _biases(weights)[layer, _columns(config, old, layer)]
    return found


def _copy(to: np.ndarray, own: np.ndarray) -> None:
    """Arrays of layers are stacked by pool, and so of another shape; routers, which may have other rows, come later."""
    if to.size == own.size:
        np.copyto(to, own.reshape(to.shape))


def read_experts(weights: Weights, experts: tuple[int, ...]) -> Bank:
    """These experts, `[W, ...]`."""
    bank = weights.params["pools"]["bank"]
    return Bank(*(jnp.asarray(_rows(bank[name])[list(experts)]) for name in BANK_AXES))


def write_experts(weights: Weights, experts: tuple[int, ...], values: Bank) -> None:
    """Put `values` in the place of these experts."""
    bank = weights.params["pools"]["bank"]
    for name, array in zip(BANK_AXES, values, strict=True):
        _rows(bank[name])[list(experts)] = array


def _rows(array: np.ndarray) -> np.ndarray:
    """An array of experts by pool as one of all experts, `[M, ...]`, a view; or of layers by pool, `[L, ...]`."""
    return array.reshape(-1, *array.shape[2:])


def _routers(weights: Weights) -> np.ndarray:
    """Router rows by layer, `[L, W, D]`, a view."""
    return _rows(weights.params["pools"]["layers"]["mixture"]["router"])


def _biases(weights: Weights) -> np.ndarray:
    """Selection biases by layer, a view."""
    return _rows(weights.expert_bias_GNE)


def _columns(config: Config, banks: Banks, layer: int) -> np.ndarray:
    """Where the biases of the experts that a layer sees lie: those of windows are by expert of the bank."""
    experts = np.array(banks.experts[banks.of_layer[layer]])
    return experts if config.windows is not None else experts - experts[0]
