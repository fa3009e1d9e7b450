"""Balance losses against NumPy (method M4)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from unipool_jax.moe.balance import load_fractions, pool_loss, switch_loss, updated_expert_bias, z_loss
from unipool_jax.moe.routing import RoutingStats, route

LAYERS, TOKENS, EXPERTS, TOP_K, ALPHA = 6, 24, 5, 2, 0.02


def _routed(groups: int, stat_groups: int = 1) -> tuple[RoutingStats, list[np.ndarray], list[np.ndarray]]:
    """Random scores of six layers in `groups` pools: stacked statistics, and scores and experts per layer."""
    scores = np.random.default_rng(5).gamma(0.5, size=(LAYERS, TOKENS, EXPERTS)).astype(np.float32)
    routings = [
        route(jnp.asarray(s), jnp.asarray(s), router="norm", top_k=TOP_K, num_stat_groups=stat_groups) for s in scores
    ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(r.stats for r in routings))
    stacked = jax.tree.map(lambda x: x.reshape(groups, LAYERS // groups, *x.shape[1:]), stacked)
    return stacked, list(scores.astype(np.float64)), [np.asarray(r.experts_NK) for r in routings]


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_pool_loss_is_equation_five_summed_over_pools(groups: int) -> None:
    stats, scores, experts = _routed(groups)
    shared = LAYERS // groups
    expected = sum(
        oracles.pool_loss(scores[p * shared : (p + 1) * shared], experts[p * shared : (p + 1) * shared], ALPHA)
        for p in range(groups)
    )
    found = pool_loss(stats, load_fractions(stats.counts_AE), TOKENS, ALPHA)
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_one_micro_batch_behind_with_current_counts_is_the_ideal_form() -> None:
    """The published per-layer sum (method M4.4) with n_prev := current counts."""
    stats, scores, experts = _routed(1)
    counts = np.stack([np.bincount(e.reshape(-1), minlength=EXPERTS) for e in experts])
    n_prev = counts.mean(0)
    per_layer = [
        ALPHA * EXPERTS / (TOP_K * TOKENS**2 * LAYERS) * (n_prev * scores[layer].sum(0)).sum()
        for layer in range(LAYERS)
    ]
    found = pool_loss(stats, load_fractions(stats.counts_AE), TOKENS, ALPHA)
    assert float(found) == pytest.approx(sum(per_layer), rel=1e-6)
    # What the published code logs is this over alpha and L.
    logged = sum(per_layer) / LAYERS / ALPHA
    assert logged * LAYERS == pytest.approx(float(found) / ALPHA, rel=1e-6)


def test_no_earlier_micro_batch_means_no_pool_loss() -> None:
    stats, _, _ = _routed(1)
    assert float(pool_loss(stats, jnp.zeros((1, EXPERTS)), TOKENS, ALPHA)) == 0


def test_pool_loss_gradient_flows_through_scores_only() -> None:
    stats, _, _ = _routed(2)

    def loss(score_sum: jax.Array, load: jax.Array) -> jax.Array:
        return pool_loss(stats._replace(score_sum_AE=score_sum), load, TOKENS, ALPHA)

    load = load_fractions(stats.counts_AE)
    score_grad, load_grad = jax.grad(loss, argnums=(0, 1))(stats.score_sum_AE, load)
    expected = ALPHA * EXPERTS * np.asarray(load) / (TOKENS * LAYERS / 2)
    np.testing.assert_allclose(score_grad, np.broadcast_to(expected[:, None, None], score_grad.shape), rtol=1e-6)
    assert not load_grad.any()


@pytest.mark.parametrize("stat_groups", [1, 4])
def test_switch_loss_is_summed_over_layers_and_averaged_over_token_groups(stat_groups: int) -> None:
    stats, scores, experts = _routed(6, stat_groups)
    size = TOKENS // stat_groups
    expected = sum(
        np.mean(
            [
                oracles.switch_loss(s[g * size : (g + 1) * size], e[g * size : (g + 1) * size], ALPHA)
                for g in range(stat_groups)
            ]
        )
        for s, e in zip(scores, experts, strict=True)
    )
    assert float(switch_loss(stats, size, TOP_K, ALPHA)) == pytest.approx(expected, rel=1e-6)


def test_pools_of_one_layer_make_the_pool_loss_a_switch_loss() -> None:
    stats, _, _ = _routed(6)
    pool = pool_loss(stats, load_fractions(stats.counts_AE), TOKENS, ALPHA)
    assert float(pool) == pytest.approx(float(switch_loss(stats, TOKENS, TOP_K, ALPHA)), rel=1e-6)


def test_z_loss_is_the_mean_square_per_layer_summed() -> None:
    stats, scores, _ = _routed(2)
    expected = 0.3 * sum((np.log(np.exp(s).sum(1)) ** 2).mean() for s in scores)
    assert float(z_loss(stats, TOKENS, 0.3)) == pytest.approx(expected, rel=1e-5)


def test_expert_bias_moves_by_the_rate_towards_the_mean() -> None:
    counts = jnp.array([[[4, 4, 4], [0, 4, 8]]])
    found = updated_expert_bias(jnp.full((1, 2, 3), 0.5), counts, 1e-3)
    np.testing.assert_allclose(found, [[[0.5, 0.5, 0.5], [0.501, 0.5, 0.499]]], rtol=1e-6)


def test_pool_loss_of_layers_that_own_their_experts_is_a_switch_loss() -> None:
    """Every expert used by one layer only: Switch over the layer's K experts at alpha / L (method M6.7)."""
    own = 4
    scores = np.random.default_rng(8).gamma(0.5, size=(LAYERS, TOKENS, own)).astype(np.float32)
    wide = np.zeros((LAYERS, TOKENS, LAYERS * own), np.float32)
    for layer in range(LAYERS):
        wide[layer, :, layer * own : (layer + 1) * own] = scores[layer]

    def stats(scores: np.ndarray, groups: int) -> RoutingStats:
        layers = [route(jnp.asarray(s), jnp.asarray(s), router="norm", top_k=TOP_K).stats for s in scores]
        return jax.tree.map(lambda *x: jnp.stack(x).reshape(groups, LAYERS // groups, *x[0].shape), *layers)

    shared = stats(wide, 1)
    found = pool_loss(shared, load_fractions(shared.counts_AE), TOKENS, ALPHA)
    expected = switch_loss(stats(scores, LAYERS), TOKENS, TOP_K, ALPHA / LAYERS)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
