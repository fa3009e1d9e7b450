"""Norms behind blocks, replaced by constants in the weights of the blocks.

    gain * x / RMS(x)  becomes  gain * s x,  with s the mean over text of 1 / RMS(x)

and `gain * s` goes into the columns of the output projection (Pangu Light, arXiv 2505.20155; the mean is ours). It is
an approximation, exact where RMS(x) is constant: two norms of every layer less, at a price in loss that has to be
looked at. A norm of each expert's output has a mean for each expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from unipool_jax.config.schema import Config, ModelConfig
from unipool_jax.convert.errors import ConversionError
from unipool_jax.convert.layered import Layered, Tree, layered, stacked
from unipool_jax.convert.walk import Inverses, Walk
from unipool_jax.convert.weights import Weights
from unipool_jax.data.pipeline import Batch

_POST_NORMS = ("attention_post_norm", "ffn_post_norm")


def absorbed_config(config: Config) -> Config:
    """The configuration of a model of `config` without the norms behind its blocks.

    Raises:
      ConversionError: it has none, or layers that share experts each have a gain of their own for them.
    """
    model = config.model
    if model.norm == "pre":
        raise ConversionError("model.norm=pre: the run has no norms behind its blocks to absorb")
    routed = config.moe.router != "none" and model.post_norm_experts != "none"
    if routed and config.layers_per_pool > 1:
        raise ConversionError(
            f"model.post_norm_experts={model.post_norm_experts}: {config.layers_per_pool} layers share each expert, "
            "and each has its own gain for the output, which cannot all be in the expert; set absorb_postnorm=false"
        )
    usual = ModelConfig()
    plain = dataclasses.replace(
        model,
        norm="pre",
        post_norm_experts=usual.post_norm_experts,
        post_norm_epsilon=usual.post_norm_epsilon,
        post_norm_attention=usual.post_norm_attention,
        post_norm_ffn=usual.post_norm_ffn,
    )
    return dataclasses.replace(config, model=plain)


def absorb(config: Config, weights: Weights, batches: Iterable[Batch]) -> Weights:
    """Weights of the model of `absorbed_config`.

    Args:
      config: of the model, on one device, with norms behind its blocks.
      weights: of the model.
      batches: text to take the means over, of one shape.
    """
    model = layered(config, weights)
    walk = Walk(config, model)
    found: dict[int, Inverses] = {}
    for batch in batches:
        hidden = walk.embed(batch)
        for layer in range(config.model.num_layers):
            hidden, seen = walk.inverses(layer, hidden, batch)
            wide = jax.tree.map(np.float64, jax.device_get(seen))
            found[layer] = jax.tree.map(np.add, found[layer], wide) if layer in found else wide
    return stacked(absorbed_config(config), _folded(config, model, found))


def _folded(config: Config, model: Layered, found: dict[int, Inverses]) -> Layered:
    dense, banks, layers = config.moe.dense_layers, list(model.banks), []
    for index, layer in enumerate(model.layers):
        seen = found[index]
        tokens = max(float(seen.tokens), 1.0)
        new = {name: leaf for name, leaf in layer.items() if name not in _POST_NORMS}
        attention_D = layer["attention_post_norm"] * (float(seen.attention) / tokens)
        new["attention"] = _scaled(layer["attention"], "output", attention_D)
        gain_D = layer.get("ffn_post_norm")
        if gain_D is not None and seen.block is not None:
            block_D = gain_D * (float(seen.block) / tokens)
            if index < dense:
                new["block"] = _scaled(layer["block"], "down", block_D)
            else:
                block = _scaled(layer["shared"]["block"], "down", block_D)
                new["shared"] = layer["shared"] | {"block": block}
        if gain_D is not None and index >= dense:
            banks[index - dense] = _scaled(banks[index - dense], "down", gain_D * _by_expert(seen)[:, None, None])
        layers.append(new)
    return model._replace(layers=layers, banks=banks)


def _by_expert(found: Inverses) -> np.ndarray:
    """The mean of each expert; of an expert without tokens that of all."""
    total_E, counts_E = np.asarray(found.experts_E), np.asarray(found.counts_E)
    every = total_E.sum() / max(counts_E.sum(), 1)
    return np.where(counts_E > 0, total_E / np.maximum(counts_E, 1), every)


def _scaled(tree: Tree, name: str, factor: Any) -> Tree:
    return tree | {name: (tree[name] * factor).astype(np.float32)}
