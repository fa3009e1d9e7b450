"""Losses that balance the use of experts: functions of routing statistics alone.

Statistics of all layers arrive stacked as `[G, N, A, E]`: G pools, N = L/G layers of one pool, A token groups,
E experts per pool. G = 1 is UniPool, N = 1 the per-layer mixture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from unipool_jax.moe.routing import RoutingStats

_ENTROPY_EPSILON = 1e-8


def load_fractions(counts_GNAE: jax.Array) -> jax.Array:
    """Share of all choices of a pool that went to each of its experts, float32 `[G, E]`; rows sum to 1."""
    counts_GE = jnp.sum(counts_GNAE, axis=(1, 2)).astype(jnp.float32)
    return counts_GE / jnp.sum(counts_GE, axis=-1, keepdims=True)


def switch_loss(
    stats: RoutingStats, tokens_per_group: int, top_k: int, coefficient: float, widths: Sequence[int] | None = None
) -> jax.Array:
    """Switch load-balancing loss, summed over layers and averaged over token groups; float32 scalar.

    Per layer and group of T tokens: `coefficient * E * sum_i f_i P_i` with `f_i` the share of the k T choices that went
    to expert i (constant) and `P_i` its mean score (Fedus et al., arXiv 2101.03961, equations 4-6).

    Args:
      stats: statistics of one micro-batch.
      tokens_per_group: T.
      top_k: k.
      coefficient: weight.
      widths: with windows, how many experts each layer sees, which takes the place of E.
    """
    num_experts = stats.counts_AE.shape[-1] if widths is None else jnp.array(widths, jnp.float32)[None, :, None]
    fraction = jax.lax.stop_gradient(stats.counts_AE.astype(jnp.float32)) / (top_k * tokens_per_group)
    mean_score = stats.score_sum_AE / tokens_per_group
    per_group_GNA = coefficient * num_experts * jnp.sum(fraction * mean_score, axis=-1)
    return jnp.sum(jnp.mean(per_group_GNA, axis=-1))


def pool_loss(stats: RoutingStats, load_GE: jax.Array, tokens: int, coefficient: float | jax.Array) -> jax.Array:
    """Pool-level balance loss (arXiv 2605.06665, equations 4-6), summed over pools; float32 scalar.

    Per pool: `coefficient * E * sum_i fbar_i Pbar_i`, with both factors averaged over the layers that share the pool.
    Only Pbar carries gradient. NormRouter scores enter as they are: they do not sum to 1.

    Args:
      stats: statistics of one micro-batch.
      load_GE: fbar, the share of choices per expert: of the whole batch, or of an earlier one. All zeros (no earlier
        micro-batch yet) make the loss zero.
      tokens: T, tokens of the micro-batch.
      coefficient: alpha_pool.
    """
    layers_per_pool, num_experts = stats.score_sum_AE.shape[1], stats.score_sum_AE.shape[-1]
    mean_score_GE = jnp.sum(stats.score_sum_AE, axis=(1, 2)) / (tokens * layers_per_pool)
    return coefficient * num_experts * jnp.sum(jax.lax.stop_gradient(load_GE) * mean_score_GE)


def entropy_loss(stats: RoutingStats, tokens: int, target: float) -> jax.Array:
    """Squared distance of each layer's score entropy from ln(target), averaged over all layers (method M6.3); float32.

    Per layer: `p_i = q_i / (sum_j q_j + 1e-8)` with q_i the mean score of expert i, `H = -sum_i p_i ln(p_i + 1e-8)` in
    nats, and `(H - ln(target))^2`. Scores are those after fading; a locked layer has only those of its own experts.

    Args:
      stats: statistics of one micro-batch, over which the scores are averaged.
      tokens: of the micro-batch.
      target: number of experts that a layer would use evenly.
    """
    mean_GNE = jnp.sum(stats.score_sum_AE, axis=2) / tokens
    share_GNE = mean_GNE / (jnp.sum(mean_GNE, axis=-1, keepdims=True) + _ENTROPY_EPSILON)
    entropy_GN = -jnp.sum(share_GNE * jnp.log(share_GNE + _ENTROPY_EPSILON), axis=-1)
    return jnp.mean(jnp.square(entropy_GN - math.log(target)))


def z_loss(stats: RoutingStats, tokens: int, coefficient: float) -> jax.Array:
    """`coefficient` x mean over tokens of the squared logsumexp of the router logits, summed over layers."""
    return coefficient * jnp.sum(stats.z_square_sum_A) / tokens


def updated_expert_bias(
    bias_GNE: jax.Array, counts_GNE: jax.Array, rate: float, widths: Sequence[int] | None = None
) -> jax.Array:
    """Selection bias after one optimizer step: `b + rate * sign(mean count - count)` (arXiv 2408.15664).

    Args:
      bias_GNE: bias per layer and expert, float32.
      counts_GNE: choices per layer and expert over the whole batch of the step.
      rate: step size.
      widths: with windows, how many experts each layer sees, over which the mean is.
    """
    counts = counts_GNE.astype(jnp.float32)
    if widths is None:
        mean = jnp.mean(counts, axis=-1, keepdims=True)
    else:
        mean = jnp.sum(counts, axis=-1, keepdims=True) / jnp.array(widths, jnp.float32)[None, :, None]
    return bias_GNE + rate * jnp.sign(mean - counts)
