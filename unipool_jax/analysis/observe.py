"""Forward passes that return the choices of every token, and take other choices in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unipool_jax.config.schema import Config
from unipool_jax.data.pipeline import Batch
from unipool_jax.model.transformer import Positions, apply
from unipool_jax.moe.routing import Forced
from unipool_jax.training.state import BalanceState, layer_inputs


class ForcedLayers(NamedTuple):
    """Choices that replace a model's own: `Forced` for every layer."""

    experts_LNK: jax.Array
    """Experts of the layer's pool, int32; -1 keeps the choice of that layer, token and slot."""
    own_gates: jax.Array
    """Bool scalar: see `Forced`."""


class Observed(NamedTuple):
    """What a pass saw."""

    loss_BS: jax.Array
    """Cross-entropy of each position in nats, float32; zero for padding."""
    experts_LNK: jax.Array
    """Experts that tokens visited, indices within the layer's pool, int32."""
    zero_gates_L: jax.Array
    """Tokens of the text whose gates are all zero by the layer's own choice, int32."""


ObservedStep = Callable[[Any, BalanceState, Batch, ForcedLayers | None], Observed]


@functools.lru_cache(maxsize=4)
def make_observed_step(config: Config) -> ObservedStep:
    """The jitted pass `(params, balance, batch, forced) -> Observed` of a model with routers; changes no state.

    Cached by configuration, so that its programs are compiled once.
    """
    return jax.jit(functools.partial(_observed, config))


def _observed(
    config: Config, params: Any, balance: BalanceState, batch: Batch, forced: ForcedLayers | None
) -> Observed:
    inputs = layer_inputs(config, balance)
    if forced is not None:
        layers = (config.pool.groups, config.layers_per_pool)
        experts_GNNK = forced.experts_LNK.reshape(*layers, *forced.experts_LNK.shape[1:])
        by_layer = Forced(experts_GNNK, jnp.broadcast_to(forced.own_gates, layers))
        inputs = inputs._replace(selection=inputs.selection._replace(forced=by_layer))
    text = Positions(counted_BS=jnp.asarray(batch.weights) > 0, segments=batch.segments)
    output = apply(config, params, batch.inputs, inputs, text, keep_routing=True)
    assert output.layers.visits is not None
    experts = output.layers.visits.experts_NK
    losses_BS = output.head.token_losses(batch.targets) * batch.weights
    zero_gates_L = jnp.sum(output.layers.stats.zero_gates_A, axis=-1).reshape(-1)
    return Observed(losses_BS, experts.reshape(config.mixture_layers, *experts.shape[2:]), zero_gates_L)


def text_positions(batch: Batch) -> np.ndarray:
    """Which of the `B S` positions hold text, bool `[N]`: padding is routed too, and counts nowhere."""
    return np.asarray(batch.weights).reshape(-1) > 0
