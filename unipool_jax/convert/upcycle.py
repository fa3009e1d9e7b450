"""From one architecture to another without changing what the model computes.

An expert of a pool that many layers share must be out of reach of the layers that did not have it. A router has no bias
on its logits, so whether that is possible depends on how it turns logits into scores:

- NormRouter: a row of zeros gives a logit of 0, which leaves the norm alone and scores 0, so it never comes before a
  positive score. The constant c depends on the number of experts; the learnable scale takes up the difference. Two rows
  w and -w make a constant gate: one of their logits is positive, and that over the norm is 1/sqrt(2) for every token.
- Sigmoid with a selection bias: a low bias keeps an expert from being chosen, and gates do not contain the bias.
- Softmax: every expert takes part in the denominator, and no finite row takes it out. It cannot be exact.

NormRouter's rows of zeros stay zeros in training: neither a gate nor the pool loss has a gradient to them, so layers
would never come to share. `noise` makes such rows small random ones: every expert can be reached, and equality is lost.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from unipool_jax.config.schema import Config
from unipool_jax.convert.errors import ConversionError
from unipool_jax.convert.weights import Weights, empty_weights
from unipool_jax.moe.routing import norm_constant


def upcycle(config: Config, weights: Weights, target: Config, noise: float = 0.0) -> Weights:
    """Weights of the model `target` that computes what `weights` compute.

    Args:
      config: of the source.
      weights: of the source.
      target: of the new model, with the same backbone.
      noise: standard deviation, from a fixed seed, of NormRouter's rows that would be zeros. With 0 the new model
        computes the same function; above it nearly the same, and training can reach every expert of a shared pool.

    Three conversions, told apart by the configurations:

    - dense to mixture: every expert of a layer starts as a copy of its feed-forward block (sparse upcycling, arXiv
      2212.05055). Into pools that layers share with NormRouter and two or more experts per layer, or with a selection
      bias and one: each layer chooses copies of its own block;
    - mixture to fewer pools (`target.pool.groups` divides `config.pool.groups`): adjacent pools become one;
    - mixture to more pools: the reverse, for routers that reach only their own share of the pool.

    Logits agree to float32 rounding; where all factors are powers of two, bit for bit.

    Raises:
      ConversionError: if the backbones differ, or no weights of `target` compute the same function.
    """
    if config.model != target.model:
        raise ConversionError("model: the backbones differ; repeat the model settings of the source")
    new = empty_weights(target)
    backbone = ("embedding", "output", "final_norm")
    for name in backbone:
        new.params[name][...] = weights.params[name]
    for name in ("attention", "attention_norm", "ffn_norm"):
        old_tree, new_tree = weights.params["pools"]["layers"][name], new.params["pools"]["layers"][name]
        jax.tree.map(lambda to, own: np.copyto(to, own.reshape(to.shape)), new_tree, old_tree)
    if config.moe.router == "none":
        _from_dense(weights, target, new)
    else:
        _regroup(config, weights, target, new)
    if noise:
        if target.moe.router != "norm":
            raise ConversionError(f"noise={noise}: only NormRouter (moe.router=norm) has rows of zeros that need it")
        rows = _mixture(new)["router"]
        random = np.random.default_rng(0).normal(0, noise, rows.shape).astype(np.float32)
        np.copyto(rows, random, where=~rows.any(axis=-1, keepdims=True))
    return new


def _mixture(weights: Weights) -> dict[str, Any]:
    """Router arrays by layer: `[L, E, D]` and `[L]`."""
    mixture = weights.params["pools"]["layers"]["mixture"]
    return {name: array.reshape(-1, *array.shape[2:]) for name, array in mixture.items()}


def _bias_by_layer(weights: Weights) -> np.ndarray:
    return weights.expert_bias_GNE.reshape(-1, weights.expert_bias_GNE.shape[-1])


def _from_dense(weights: Weights, target: Config, new: Weights) -> None:
    """Copies of each layer's block, behind a router whose gates add up to 1 / the factor on the outputs."""
    layers, groups, experts = target.model.num_layers, target.pool.groups, target.experts_per_pool
    router, top_k = target.moe.router, target.moe.top_k
    old, bank = weights.params["pools"]["bank"], new.params["pools"]["bank"]
    if router == "none":
        raise ConversionError("moe.router=none: the target is dense like the source; nothing to convert")
    _mixture(new)["router"][...] = 0
    if router == "norm":
        _norm_from_dense(old, target, new)
        return
    if groups == layers:
        for name in bank:
            bank[name][...] = old[name]
        chosen_score = 1 / experts if router == "softmax" else 0.5
        # Sigmoid gates of several experts are normalised; all others are the scores as they are.
        gates = 1.0 if router == "sigmoid" and top_k > 1 else top_k * chosen_score
    elif router == "sigmoid" and target.loss.balance == "expert_bias" and top_k == 1 and groups * experts == layers:
        for name in bank:
            bank[name][...] = old[name].reshape(bank[name].shape)
        own = np.arange(layers) % experts
        _bias_by_layer(new)[np.arange(layers), own] = 1
        gates = 0.5
    else:
        raise ConversionError(
            f"pool.groups={groups}: a layer can be held to its own block of a shared pool only by a selection bias; "
            "use NormRouter (method=unipool), or method=vanilla_aux_free (router sigmoid, loss.balance=expert_bias) "
            "with moe.top_k=1 and moe.experts_per_layer=1, or keep pool.groups=model.num_layers"
        )
    bank["down"] *= np.float32(1 / gates)


def _norm_from_dense(old: dict[str, Any], target: Config, new: Weights) -> None:
    """Each layer owns an equal run of its pool, copies of its block, and chooses between two of them with gate 1."""
    layers, experts, sharing = target.model.num_layers, target.experts_per_pool, target.layers_per_pool
    own = experts // sharing
    if own < 2:
        raise ConversionError(
            f"{experts} experts for {sharing} layers of a pool: a constant gate of NormRouter takes two experts a "
            "layer; use moe.experts_per_layer=2 or more"
        )
    # Experts beyond the last run are copies of the blocks of the first layers.
    layer_of_GE = np.arange(target.pool.groups)[:, None] * sharing + np.arange(experts) // own % sharing
    for name, array in new.params["pools"]["bank"].items():
        array[...] = old[name].reshape(layers, *array.shape[2:])[layer_of_GE]
    mixture = _mixture(new)
    directions_LD = np.random.default_rng(0).normal(0, target.model.init_std, (layers, target.model.hidden_size))
    first_L = np.arange(layers) % sharing * own
    mixture["router"][np.arange(layers), first_L] = directions_LD
    mixture["router"][np.arange(layers), first_L + 1] = -mixture["router"][np.arange(layers), first_L]
    mixture["scale"][...] = math.sqrt(2) / _constant(target)


def _regroup(config: Config, weights: Weights, target: Config, new: Weights) -> None:
    """Merge adjacent pools, or split pools among the layers that use them."""
    old_groups, new_groups = config.pool.groups, target.pool.groups
    # Losses do not change what a model computes; a selection bias does.
    biased = target.loss.balance == "expert_bias"
    same = (
        config.moe.router == target.moe.router
        and config.moe.top_k == target.moe.top_k
        and config.total_experts == target.total_experts
        and (config.loss.balance == "expert_bias") == biased
    )
    if not same or max(old_groups, new_groups) % min(old_groups, new_groups):
        raise ConversionError(
            f"{config.total_experts} experts in {old_groups} pools to {target.total_experts} in {new_groups}: router, "
            "moe.top_k, loss.balance=expert_bias and the number of experts must stay, and one number of pools divide "
            "the other"
        )
    if old_groups != new_groups and config.moe.router != "norm" and not biased:
        raise ConversionError(
            f"moe.router={config.moe.router}: every expert takes part in the scores of every other, so pools cannot be "
            "merged or split without changing the model; this works with NormRouter and with loss.balance=expert_bias"
        )
    for name, array in new.params["pools"]["bank"].items():
        array[...] = weights.params["pools"]["bank"][name].reshape(array.shape)
    ours, theirs = _mixture(new), _mixture(weights)
    few, many = config.experts_per_pool, target.experts_per_pool
    for layer in range(config.model.num_layers):
        # Experts are numbered through all pools; each layer sees one run of them before, and one after.
        old_start = layer // config.layers_per_pool * few
        new_start = layer // target.layers_per_pool * many
        start, stop = max(old_start, new_start), min(old_start + few, new_start + many)
        seen, to = slice(start - old_start, stop - old_start), slice(start - new_start, stop - new_start)
        outside = np.delete(theirs["router"][layer], seen, axis=0)
        bias_E = _bias_by_layer(weights)[layer]
        unreached = not biased or bool((np.delete(bias_E, seen) + 0.5 < bias_E[seen].min()).all())
        if outside.any() or not unreached:
            raise ConversionError(
                f"layer {layer} may choose experts outside its share of the pool; only pools that were merged from "
                "such shares and not trained since can be split without changing the model"
            )
        ours["router"][layer] = 0
        ours["router"][layer, to] = theirs["router"][layer, seen]
        if biased:
            _bias_by_layer(new)[layer] = bias_E[seen].min() - 1
            _bias_by_layer(new)[layer, to] = bias_E[seen]
        if "scale" in ours:
            if theirs["scale"][layer] < 0:
                raise ConversionError(f"layer {layer}: a negative router scale puts experts without a score first")
            ours["scale"][layer] = theirs["scale"][layer] * _constant(config) / _constant(target)


def _constant(config: Config) -> float:
    return norm_constant(config.experts_per_pool, config.moe.top_k) if config.moe.score_constant != "one" else 1.0
