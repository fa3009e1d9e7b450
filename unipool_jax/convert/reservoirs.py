"""What a model gives its experts: a bounded, uniform sample of the inputs of every expert of every bank."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unipool_jax.config.schema import Config
from unipool_jax.convert.joining import Banks
from unipool_jax.convert.weights import Weights
from unipool_jax.data.pipeline import Batch
from unipool_jax.model.transformer import Positions, apply
from unipool_jax.moe.mixture import Visits
from unipool_jax.training.state import init_balance, layer_inputs

FIT = 0.8
"""Share of the sequences whose inputs experts are matched and fitted on; the others are held out."""


class Reservoir:
    """A uniform sample of the rows that it was shown, in random order: those with the smallest of random keys."""

    def __init__(self, rows: int, width: int, random: np.random.Generator):
        self._capacity, self._random = rows, random
        self._keys_R = np.zeros(0)
        self._rows_RD, self._weights_R = np.zeros((0, width), np.float32), np.zeros(0, np.float32)
        self.shown = 0
        """Rows that it was shown."""

    def show(self, rows_RD: np.ndarray, weights_R: np.ndarray) -> None:
        """Rows, `[R, D]`, and their weights."""
        self.shown += len(rows_RD)
        keys_R = self._random.random(len(rows_RD))
        if len(self._keys_R) == self._capacity:
            near = keys_R < self._keys_R[-1]
            keys_R, rows_RD, weights_R = keys_R[near], rows_RD[near], weights_R[near]
        keys_R = np.concatenate([self._keys_R, keys_R])
        order = np.argsort(keys_R, kind="stable")[: self._capacity]
        self._keys_R = keys_R[order]
        self._rows_RD = np.concatenate([self._rows_RD, rows_RD.astype(np.float32)])[order]
        self._weights_R = np.concatenate([self._weights_R, weights_R.astype(np.float32)])[order]

    def padded(self) -> tuple[np.ndarray, np.ndarray]:
        """The sample, `[capacity, D]` and `[capacity]`, with rows of weight 0 at the end where there are fewer."""
        missing = self._capacity - len(self._keys_R)
        return np.pad(self._rows_RD, ((0, missing), (0, 0))), np.pad(self._weights_R, (0, missing))


class Sample(NamedTuple):
    """Inputs of the E experts of a bank."""

    inputs_ERD: np.ndarray
    """Float32."""
    weights_ER: np.ndarray
    """Squared gates, float32; 0 for rows that are padding."""
    shown_E: np.ndarray
    """How many inputs they are a sample of, int64."""


class Samples(NamedTuple):
    """Inputs of the experts of a bank, of different sequences."""

    fit: Sample
    held_out: Sample


def sample_inputs(
    config: Config,
    weights: Weights,
    banks: Banks,
    wanted: Iterable[int],
    batches: Iterable[Batch],
    rows: int,
    seed: int,
) -> dict[int, Samples]:
    """Samples of what experts are given, by bank.

    Args:
      config: of the model, on one device.
      weights: of the model.
      banks: of the model.
      wanted: the banks to sample.
      batches: text, of one shape.
      rows: inputs kept of each expert, `FIT` of them to fit.
      seed: of the samples.
    """
    random, width = np.random.default_rng(seed), config.model.hidden_size
    sizes = {True: max(round(FIT * rows), 1), False: max(rows - round(FIT * rows), 1)}
    kept = {
        bank: {fit: [Reservoir(size, width, random) for _ in banks.experts[bank]] for fit, size in sizes.items()}
        for bank in wanted
    }
    layers = [layer for layer, bank in enumerate(banks.of_layer) if bank in kept]
    local = {bank: _local(config, banks, bank) for bank in kept}
    look = _looker(config, weights, tuple(layers))
    for batch in batches:
        length = batch.inputs.shape[1]
        fit_N = np.repeat(random.random(len(batch.inputs)) < FIT, length)
        for layer, visits in zip(layers, look(batch), strict=True):
            bank, (choices_NK, gates_NK, hidden_ND) = banks.of_layer[layer], map(np.asarray, visits)
            token_R, slot_R = np.nonzero(gates_NK * (batch.weights.reshape(-1, 1) > 0))
            gates_R, choices_R, fit_R = gates_NK[token_R, slot_R], choices_NK[token_R, slot_R], fit_N[token_R]
            for fit, reservoirs in kept[bank].items():
                for expert, reservoir in zip(local[bank], reservoirs, strict=True):
                    chosen = (choices_R == expert) & (fit_R == fit)
                    reservoir.show(hidden_ND[token_R[chosen]], gates_R[chosen] ** 2)
    return {bank: Samples(_stacked(found[True]), _stacked(found[False])) for bank, found in kept.items()}


def _local(config: Config, banks: Banks, bank: int) -> list[int]:
    """Indices of a bank's experts in its pool, which are what layers speak of."""
    return [expert % config.experts_per_pool for expert in banks.experts[bank]]


def _stacked(reservoirs: list[Reservoir]) -> Sample:
    inputs, weights = zip(*(reservoir.padded() for reservoir in reservoirs), strict=True)
    return Sample(np.stack(inputs), np.stack(weights), np.array([reservoir.shown for reservoir in reservoirs]))


def _looker(config: Config, weights: Weights, layers: tuple[int, ...]) -> Callable[[Batch], list[Visits]]:
    """From text to the visits of `layers`."""
    bias_GNE = jnp.asarray(weights.expert_bias_GNE)

    @jax.jit
    def look(params: Any, batch: Batch) -> list[Visits]:
        inputs = layer_inputs(config, init_balance(config)._replace(expert_bias_GNE=bias_GNE))
        text = Positions(segments=batch.segments)
        found = apply(config, params, batch.inputs, inputs, text, keep_routing=True).layers.visits
        by_layer = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found)
        return [jax.tree.map(operator.itemgetter(layer), by_layer) for layer in layers]

    return functools.partial(look, jax.device_put(weights.params))
