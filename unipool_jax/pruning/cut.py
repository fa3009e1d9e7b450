"""The weights of a pruned model.

CLAP, cross-layer attention pruning, and SLNP, stabilized LayerNorm pruning, are the ideas of Pangu Light (arXiv
2505.20155). Their equations are not public in full: those here are reconstructed.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from unipool_jax.config.schema import Config
from unipool_jax.convert.layered import Layered, Tree
from unipool_jax.pruning.choice import Choice, Group
from unipool_jax.pruning.requests import Gains
from unipool_jax.pruning.scores import channel_axis

_SMALLEST_GAIN = 1e-3
"""Of a norm, over their mean: a smaller one is taken for this in a ratio of gains."""

_PRE_NORMS = ("attention_norm", "ffn_norm", "final_norm")


def cut(model: Layered, config: Config, choice: Choice, gains: Gains) -> Layered:
    """The weights that stay.

    Args:
      model: the source; nothing in it is changed.
      config: of the source.
      choice: what stays.
      gains: how gains of pre-norms make up for channels that go, see `gain_factor`.
    """
    dense, kept = config.moe.dense_layers, choice.layers
    layers = [dict(model.layers[layer]) for layer in kept]
    biases = [model.biases[layer - dense] for layer in kept if layer >= dense]
    for layer, groups, block in zip(layers, choice.groups, choice.blocks, strict=True):
        layer["attention"] = merged_attention(config, model, groups, layer)
        if block is not None:
            _cut_block(layer, block)
    per_pool = (len(kept) - dense) // len(choice.pools)
    for row, layer in enumerate(layers[dense:]):
        biases[row] = biases[row][choice.experts[row // per_pool]]
        if "mixture" in layer:
            layer["mixture"] = layer["mixture"] | {"router": layer["mixture"]["router"][choice.rows[row]]}
    banks = []
    for pool, experts_E, neurons_EF in zip(choice.pools, choice.experts, choice.neurons, strict=True):
        bank = {name: array[experts_E] for name, array in model.banks[pool].items()}
        banks.append(_neurons_of(bank, neurons_EF))

    def narrower(path: tuple[Any, ...], leaf: np.ndarray) -> np.ndarray:
        return _channels(path, leaf, choice.channels_D, gains)

    narrow = jax.tree_util.tree_map_with_path(narrower, (model.ends, layers, banks))
    return Layered(narrow[0], narrow[1], biases, narrow[2])


def gain_factor(gain_D: np.ndarray, channels_D: np.ndarray, gains: Gains) -> float:
    """What the gains of a norm are multiplied with when only `channels_D` of its channels stay.

    A norm's output has an expected squared length of about the sum of its squared gains, and what reads it was trained
    with that. `slnp` keeps the length of the gains, `|gain| / |gain of those that stay|`; `dimension` does so as if
    they were equal, `sqrt(d / d')`, which is what zeros in the place of channels would do; `kept` is 1.
    """
    if gains == "kept":
        return 1.0
    if gains == "dimension":
        return float(np.sqrt(len(gain_D) / len(channels_D)))
    left = float(np.linalg.norm(gain_D[channels_D].astype(np.float64)))
    return float(np.linalg.norm(gain_D.astype(np.float64))) / left if left else 1.0


def _channels(path: tuple[Any, ...], leaf: np.ndarray, channels_D: np.ndarray, gains: Gains) -> np.ndarray:
    axis = channel_axis(path)
    if axis is None:
        return leaf
    kept = np.take(leaf, channels_D, axis=axis)
    if path[-1].key not in _PRE_NORMS:
        return kept
    return (kept * gain_factor(leaf, channels_D, gains)).astype(np.float32)


def merged_attention(config: Config, model: Layered, groups: list[Group], own: Tree) -> Tree:
    """Attention of these groups behind the norm of the layer `own`.

    Attention is a sum over heads, so it is the sum of what the groups add where they come from, on the same input: a
    group of another layer reads that layer's gains, which are multiplied into its queries, keys and values.
    """
    count, size = config.model.num_kv_heads, config.head_size
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("query", "key", "value", "output")}
    for group in groups:
        layer = model.layers[group.layer]
        ratio_D1 = gain_ratio(layer["attention_norm"], own["attention_norm"])[:, None]
        for name, arrays in found.items():
            matrix = layer["attention"][name]
            heads = (matrix if name == "output" else matrix.T).reshape(count, -1, size, config.model.hidden_size)
            part = heads[group.place].reshape(-1, config.model.hidden_size)
            arrays.append(part if name == "output" else part.T * ratio_D1)
    merged = {name: np.concatenate(arrays, axis=0 if name == "output" else 1) for name, arrays in found.items()}
    return own["attention"] | {name: array.astype(np.float32) for name, array in merged.items()}


def gain_ratio(theirs_D: np.ndarray, ours_D: np.ndarray) -> np.ndarray:
    """`theirs / ours`, what rows that read a norm with gains `theirs` are multiplied with to read one with `ours`.

    A gain of ours near zero is taken for a small one: its channel cannot be read with ours.
    """
    if theirs_D is ours_D:
        return np.ones_like(ours_D)
    least = _SMALLEST_GAIN * np.mean(np.abs(ours_D)) + np.finfo(np.float32).tiny
    safe_D = np.where(np.abs(ours_D) < least, np.where(ours_D < 0, -least, least), ours_D)
    return np.asarray(theirs_D / safe_D)


def _neurons_of(weights: Tree, neurons: np.ndarray) -> Tree:
    """A bank with only these neurons of each expert, `[E, F]`."""
    columns = neurons[:, None, :]
    return {
        "gate": np.take_along_axis(weights["gate"], columns, axis=2),
        "up": np.take_along_axis(weights["up"], columns, axis=2),
        "down": np.take_along_axis(weights["down"], neurons[:, :, None], axis=1),
    }


def _cut_block(layer: Tree, neurons_F: np.ndarray) -> None:
    """Narrow the block that every token visits."""
    where = layer if "block" in layer else layer["shared"]
    one = {name: array[None] for name, array in where["block"].items()}
    narrow = {name: array[0] for name, array in _neurons_of(one, neurons_F[None]).items()}
    if "block" in layer:
        layer["block"] = narrow
    else:
        layer["shared"] = layer["shared"] | {"block": narrow}
