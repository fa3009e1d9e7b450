"""Fits the experts that several banks were merged into to what each of those banks computed, before any training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unipool_jax.config.schema import OptimizerConfig
from unipool_jax.convert.matching import expert_output
from unipool_jax.convert.reservoirs import Sample
from unipool_jax.kernels.grouped_ffn import Bank

ROWS = 64
"""Inputs of each expert in a step, of each bank."""


class Lesson(NamedTuple):
    """What merged experts are to compute for the layers of one of the banks."""

    bank: Bank
    """The bank, as it was."""
    sample: Sample
    """What its experts are given."""
    place_E: np.ndarray
    """Which of the merged experts takes the place of each."""


class _Data(NamedTuple):
    """Inputs and outputs by bank and merged expert, `[B, E, R, ...]`; weights add up to 1 / |mean output|^2."""

    inputs: jax.Array
    wanted: jax.Array
    weights: jax.Array


def prefit(
    merged: Bank, lessons: Sequence[Lesson], optimizer: OptimizerConfig, rate: float, steps: int, seed: int
) -> Bank:
    """Experts with a smaller mean cost (see `matching`) over all of `lessons`, by AdamW.

    Args:
      merged: where to begin.
      lessons: for each bank that was merged.
      optimizer: betas, epsilon and weight decay of AdamW.
      rate: learning rate.
      steps: of `ROWS` inputs for each expert and bank.
      seed: of which inputs.
    """
    data = _Data(*map(jnp.stack, zip(*map(_data, lessons), strict=True)))
    rows = min(ROWS, data.inputs.shape[2])
    adamw = optax.adamw(rate, optimizer.beta1, optimizer.beta2, optimizer.epsilon, weight_decay=optimizer.weight_decay)

    def loss(bank: Bank, part: _Data) -> jax.Array:
        def of_expert(expert: Bank, inputs_RD: jax.Array, wanted_RD: jax.Array, weights_R: jax.Array) -> jax.Array:
            return weights_R @ jnp.sum(jnp.square(expert_output(expert, inputs_RD) - wanted_RD), axis=-1)

        by_expert = jax.vmap(of_expert)
        return jnp.mean(jax.vmap(by_expert, in_axes=(None, 0, 0, 0))(bank, *part))

    @jax.jit
    def run(bank: Bank, data: _Data, key: jax.Array) -> Bank:
        def step(carry: tuple[Bank, optax.OptState], key: jax.Array) -> tuple[tuple[Bank, optax.OptState], None]:
            bank, state = carry
            chosen = jax.random.randint(key, (rows,), 0, data.inputs.shape[2])
            gradient = jax.grad(loss)(bank, _Data(*(array[:, :, chosen] for array in data)))
            updates, state = adamw.update(gradient, state, bank)
            updated: Bank = optax.apply_updates(bank, updates)
            return (updated, state), None

        (bank, _), _ = jax.lax.scan(step, (bank, adamw.init(bank)), jax.random.split(key, steps))
        return bank

    return run(merged, data, jax.random.key(seed))


def _data(lesson: Lesson) -> _Data:
    """The lesson of one bank in the order of the merged experts."""
    order_E = np.argsort(lesson.place_E)
    inputs, weights = (jnp.asarray(array[order_E]) for array in lesson.sample[:2])
    bank = Bank(*(array[order_E] for array in lesson.bank))
    wanted = jax.lax.map(lambda pair: expert_output(*pair), (bank, inputs))
    energy_E1 = jnp.sum(weights * jnp.sum(jnp.square(wanted), axis=-1), axis=-1, keepdims=True)
    return _Data(inputs, wanted, jnp.where(energy_E1 > 0, weights / jnp.where(energy_E1 > 0, energy_E1, 1.0), 0.0))
