"""Converts one architecture to another that computes the same function.

In a shared pool, a layer must not route to experts that it did not have before. Router logits have no bias, so whether
that is possible depends on the score function:

- NormRouter: a row of zeros gives logit 0, which does not change the norm, and score 0, which ranks below any positive
  score. The learnable scale compensates for the constant c, which depends on the number of experts. Two rows w and -w
  give a constant gate: one of their logits is positive, and divided by the norm it is 1/sqrt(2) for every token.
- Sigmoid with a selection bias: a low bias keeps an expert from being selected, and gates do not include the bias.
- Softmax: every expert is in the denominator, and no finite row removes it. An exact conversion is impossible.

NormRouter's rows of zeros stay zero in training, because neither gates nor the pool loss have a gradient to them, so
layers would never share experts. `noise` replaces them by small random rows: layers can reach every expert, but the
function changes.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from unipool_jax.config.compose import differences
from unipool_jax.config.schema import Config, settings
from unipool_jax.convert.errors import ConversionError
from unipool_jax.convert.weights import Weights, empty_weights
from unipool_jax.moe.routing import norm_constant

_AROUND = frozenset(
    (
        *("moe.shared_experts", "moe.shared_expert_gate", "moe.depth_vectors"),
        *("moe.dense_layers", "moe.dense_ffn_size"),
    )
)
"""Settings of what a layer has around its routed experts; their weights are copied."""


def upcycle(config: Config, weights: Weights, target: Config, noise: float = 0.0) -> Weights:
    """Weights of the model `target` that compute the same function as `weights`.

    Three conversions, selected by the configurations:

    - dense to mixture: the experts of a layer are copies of its feed-forward block (sparse upcycling, arXiv
      2212.05055). Into shared pools, with NormRouter and two or more experts per layer, or with a selection bias and
      one: each layer routes to copies of its own block;
    - mixture to fewer pools (`target.pool.groups` divides `config.pool.groups`): adjacent pools are merged;
    - mixture to more pools: the reverse, for routers that reach only their own part of the pool.

    Logits agree to float32 rounding, and bit for bit where all factors are powers of two.

    Args:
      config: of the source.
      weights: of the source.
      target: of the new model, with the same settings of `model` and `attention`, and the same around routed experts.
      noise: standard deviation, from a fixed seed, of NormRouter's rows that would be zero. With 0 the function is the
        same; otherwise it is nearly the same, and training can reach every expert of a shared pool.

    Raises:
      ConversionError: those settings differ, or no weights of `target` compute the same function.
    """
    ours, theirs = settings(target), settings(config)
    same = ("model.", "attention.")
    other = [name for name in differences(config, target) if name in _AROUND or name.startswith(same)]
    # A dense model has no mixtures that the setting could be about.
    free = {"model.remat", *(("model.post_norm_experts",) if config.moe.router == "none" else ())}
    if other := [name for name in other if name not in free]:
        listed = "\n".join(f"  - {name}={ours[name]}: the source has {theirs[name]}" for name in other)
        raise ConversionError(f"an upcycled model has the backbone of its source; leave these settings out:\n{listed}")
    new = empty_weights(target)
    backbone = ("embedding", "output", "final_norm")
    for name in backbone:
        new.params[name][...] = weights.params[name]
    if config.moe.dense_layers:
        jax.tree.map(np.copyto, new.params["dense"], weights.params["dense"])
    if config.model.norm != "pre" and config.moe.router == "none" and target.model.post_norm_experts == "none":
        raise ConversionError(
            f"model.post_norm_experts=none: the source has a norm behind each block (model.norm={config.model.norm}); "
            "set model.post_norm_experts=norm_then_gate"
        )
    old_layers, new_layers = weights.params["pools"]["layers"], new.params["pools"]["layers"]
    for name in old_layers.keys() - {"mixture"}:
        old_tree, new_tree = old_layers[name], new_layers[name]
        jax.tree.map(lambda to, own: np.copyto(to, own.reshape(to.shape)), new_tree, old_tree)
    if config.moe.router == "none":
        _from_dense(weights, target, new)
    else:
        _regroup(config, weights, target, new)
    if noise:
        if target.moe.router != "norm":
            raise ConversionError(f"noise={noise}: needs moe.router=norm; set noise=0 for other routers")
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
    """Copies of each layer's block, with outputs scaled by 1 / the sum of a token's gates."""
    layers, groups, experts = target.mixture_layers, target.pool.groups, target.experts_per_pool
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
        # Logits are zero: what each router makes of that.
        chosen_score = {"softmax": 1 / experts, "sigmoid": 0.5}[router]
        # Sigmoid gates of several experts are normalized to sum to 1; all other gates are the scores.
        gates = 1.0 if router == "sigmoid" and top_k > 1 else top_k * chosen_score
    elif router == "sigmoid" and target.loss.balance == "expert_bias" and top_k == 1 and groups * experts == layers:
        for name in bank:
            bank[name][...] = old[name].reshape(bank[name].shape)
        own = np.arange(layers) % experts
        _bias_by_layer(new)[np.arange(layers), own] = 1
        gates = 0.5
    else:
        raise ConversionError(
            f"pool.groups={groups}: with this router a layer would route to the blocks of other layers; "
            "use NormRouter (method=unipool), or method=vanilla_aux_free (router sigmoid, loss.balance=expert_bias) "
            "with moe.top_k=1 and moe.experts_per_layer=1, or set pool.groups=model.num_layers"
        )
    # A norm of each expert's output takes their size away: what makes up for the gates comes behind it.
    if target.model.norm != "pre" and target.model.post_norm_experts == "norm_then_gate":
        new.params["pools"]["layers"]["ffn_post_norm"] *= np.float32(1 / gates)
    else:
        bank["down"] *= np.float32(1 / gates)


def _norm_from_dense(old: dict[str, Any], target: Config, new: Weights) -> None:
    """Each layer gets an equal range of its pool, all copies of its block, and routes to two of them with gate 1."""
    layers, experts, sharing = target.mixture_layers, target.experts_per_pool, target.layers_per_pool
    own = experts // sharing
    if own < 2:
        raise ConversionError(
            f"{experts} experts for {sharing} layers of a pool: a constant gate of NormRouter needs two experts per "
            "layer; set moe.experts_per_layer=2 or more"
        )
    # Experts past the last range are copies of the blocks of the first layers.
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
    # Losses do not change the function of a model; a selection bias does.
    biased = target.loss.balance == "expert_bias"
    same = (
        config.moe.router == target.moe.router
        and config.moe.top_k == target.moe.top_k
        and config.total_experts == target.total_experts
        and (config.loss.balance == "expert_bias") == biased
    )
    if not same or max(old_groups, new_groups) % min(old_groups, new_groups):
        raise ConversionError(
            f"{config.total_experts} experts in {old_groups} pools to {target.total_experts} in {new_groups}: "
            "moe.router, moe.top_k, loss.balance=expert_bias and the number of experts must be equal, and one number "
            "of pools must divide the other"
        )
    if old_groups != new_groups and config.moe.router != "norm" and not biased:
        raise ConversionError(
            f"moe.router={config.moe.router}: the score of an expert depends on all experts, so pools cannot be merged "
            "or split without changing the model; use NormRouter or loss.balance=expert_bias"
        )
    for name, array in new.params["pools"]["bank"].items():
        array[...] = weights.params["pools"]["bank"][name].reshape(array.shape)
    ours, theirs = _mixture(new), _mixture(weights)
    few, many, first = config.experts_per_pool, target.experts_per_pool, config.moe.dense_layers
    for layer in range(config.mixture_layers):
        # Experts are numbered across all pools; each layer sees one range of them before and one after.
        old_start = layer // config.layers_per_pool * few
        new_start = layer // target.layers_per_pool * many
        start, stop = max(old_start, new_start), min(old_start + few, new_start + many)
        seen, to = slice(start - old_start, stop - old_start), slice(start - new_start, stop - new_start)
        outside = np.delete(theirs["router"][layer], seen, axis=0)
        bias_E = _bias_by_layer(weights)[layer]
        unreached = not biased or bool((np.delete(bias_E, seen) + 0.5 < bias_E[seen].min()).all())
        if outside.any() or not unreached:
            raise ConversionError(
                f"layer {first + layer} can route to experts outside its part of the pool; only pools that were merged "
                "from such parts, and not trained since, can be split without changing the model"
            )
        ours["router"][layer] = 0
        ours["router"][layer, to] = theirs["router"][layer, seen]
        if biased:
            _bias_by_layer(new)[layer] = bias_E[seen].min() - 1
            _bias_by_layer(new)[layer, to] = bias_E[seen]
        if "scale" in ours:
            if theirs["scale"][layer] < 0:
                raise ConversionError(f"layer {first + layer}: a negative router scale ranks experts of score 0 first")
            ours["scale"][layer] = theirs["scale"][layer] * _constant(config) / _constant(target)


def _constant(config: Config) -> float:
    return norm_constant(config.experts_per_pool, config.moe.top_k) if config.moe.score_constant != "one" else 1.0
