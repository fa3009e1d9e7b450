"""Over which layers the pool loss averages, and how much of the load each expert should carry there.

For a set S of layers, with f_l and P_l the share of choices and the mean score of each expert in layer l:

    loss(S) = coefficient * sum_e fbar_e Pbar_e / t_e,    fbar, Pbar: means over the layers of S

The target share t_e = (1/|S|) sum_l V[l, e] / W_l counts how many layers of S see expert e, and how many experts those
layers see: uniform routing in every layer gives `coefficient` for every S and every map. Of one pool that all layers of
S see whole, t_e = 1/E, and this is the published pool loss.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unipool_jax.config.schema import Config
from unipool_jax.moe.routing import RoutingStats
from unipool_jax.moe.visibility import expert_order


class Scope(NamedTuple):
    """The sets of layers of a pool loss, over M experts of all pools."""

    mean_SL: np.ndarray
    """1/|S| for the layers of a set, 0 for others, float32."""
    weight_SM: np.ndarray
    """Pressure on a set over the target share of each expert, float32; 0 for experts that it does not see."""


def visible_experts(config: Config) -> np.ndarray:
    """Whether a layer sees an expert, bool `[L, M]`; experts of all pools are counted through."""
    if (windows_LM := config.visible) is not None:
        return windows_LM
    pool_L = np.arange(config.mixture_layers) // config.layers_per_pool
    pool_M = np.arange(config.total_experts) // config.experts_per_pool
    return pool_L[:, None] == pool_M


def pool_scope(config: Config) -> Scope | None:
    """The sets of the pool loss; None for the published loss over uniform pools, which needs no table."""
    loss = config.loss
    if config.windows is None and loss.scope == "component" and loss.pressure == "scope":
        return None
    visible_LM = visible_experts(config)
    layers = len(visible_LM)
    match loss.scope:
        case "layer":
            set_L = np.arange(layers)
        case "component":
            from scipy.sparse import csr_array
            from scipy.sparse.csgraph import connected_components

            _, set_L = connected_components(csr_array(visible_LM @ visible_LM.T), directed=False)
        case "bank":
            set_L = np.zeros(layers, np.int64)
    member_SL = set_L == np.unique(set_L)[:, None]
    mean_SL = member_SL / member_SL.sum(axis=1, keepdims=True)
    target_SM = mean_SL @ (visible_LM / visible_LM.sum(axis=1, keepdims=True))
    pressure_S1 = member_SL.sum(axis=1, keepdims=True) / layers if loss.pressure == "layer" else 1.0
    weight_SM = np.divide(pressure_S1, target_SM, out=np.zeros_like(target_SM), where=target_SM > 0)
    if config.pool.groups == 1:
        weight_SM = weight_SM[:, expert_order(config)]
    return Scope(mean_SL.astype(np.float32), weight_SM.astype(np.float32))


def layer_pressure(config: Config) -> float:
    """Share of loss.pool_coefficient that weighs on a layer, mean over layers: more sets push each layer harder."""
    layers, scope = len(visible_experts(config)), pool_scope(config)
    sets = config.pool.groups if scope is None else len(scope.mean_SL)
    return (1 if config.loss.pressure == "layer" else sets) / layers


def scoped_load(scope: Scope, counts_GNAE: jax.Array) -> jax.Array:
    """fbar: share of the choices of a set's layers that went to each expert, float32 `[S, M]`; rows sum to 1."""
    counts_LM = _by_bank(jnp.sum(counts_GNAE, axis=2).astype(jnp.float32))
    return jnp.asarray(scope.mean_SL) @ (counts_LM / jnp.sum(counts_LM, axis=-1, keepdims=True))


def scoped_pool_loss(
    scope: Scope, stats: RoutingStats, load_SM: jax.Array, tokens: int, coefficient: float | jax.Array
) -> jax.Array:
    """The loss above, summed over sets; float32 scalar. Arguments as of `balance.pool_loss`."""
    score_LM = _by_bank(jnp.sum(stats.score_sum_AE, axis=2)) / tokens
    mean_score_SM = jnp.asarray(scope.mean_SL) @ score_LM
    return coefficient * jnp.sum(jax.lax.stop_gradient(load_SM) * mean_score_SM * scope.weight_SM)


def _by_bank(values_GNE: jax.Array) -> jax.Array:
    """Values per layer and expert of its pool as values per layer and expert of all pools, `[L, M]`."""
    groups, layers, experts = values_GNE.shape
    if groups == 1:
        return values_GNE[0]
    placed = jnp.eye(groups, dtype=values_GNE.dtype)[:, None, :, None] * values_GNE[:, :, None, :]
    return placed.reshape(groups * layers, groups * experts)
