"""Routers against NumPy, and every edge case of NormRouter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from unipool_jax.config.schema import Router
from unipool_jax.moe.routing import RoutingStats, norm_constant, norm_scores, route, scores


@pytest.mark.parametrize(
    ("num_experts", "top_k", "published"),
    [
        (16, 1, 2.411163),
        (16, 2, 1.918122),
        (24, 1, 2.619268),
        (32, 4, 1.770994),
        (48, 1, 3.190055),
        (96, 1, 4.016194),
        (192, 2, 3.848425),
        (384, 4, 3.760824),
    ],
)
def test_constant_is_the_published_one(num_experts: int, top_k: int, published: float) -> None:
    assert norm_constant(num_experts, top_k) == pytest.approx(published, abs=1e-6)


def test_constant_equals_the_literal_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unipool_jax.moe.routing._DRAWS", 2000)
    monkeypatch.setattr("unipool_jax.moe.routing._DRAW_CHUNK", 500)
    assert norm_constant.__wrapped__(40, 3) == pytest.approx(oracles.literal_constant(40, 3, 2000), rel=1e-12)


def test_infinite_constant_falls_back_with_a_warning() -> None:
    norm_constant.cache_clear()
    with pytest.warns(UserWarning, match="8 experts, top-1: the published constant is infinite"):
        assert norm_constant(8, 1) == pytest.approx(1.82585, abs=5e-5)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), scale=st.floats(-2, 3), size=st.floats(1e-3, 1e3))
def test_norm_scores_match_numpy_and_ignore_the_size_of_logits(seed: int, scale: float, size: float) -> None:
    logits = np.random.default_rng(seed).normal(size=(16, 12)).astype(np.float32)
    found = norm_scores(jnp.asarray(logits), jnp.float32(scale), 2.5)
    np.testing.assert_allclose(found, oracles.norm_router_scores(logits, scale, 2.5), rtol=1e-5, atol=1e-6)
    scaled = norm_scores(jnp.asarray(logits * np.float32(size)), jnp.float32(scale), 2.5)
    np.testing.assert_allclose(found, scaled, rtol=1e-4, atol=1e-6)


def test_about_half_of_the_scores_are_zero() -> None:
    logits = jax.random.normal(jax.random.key(0), (500, 96))
    share = float(jnp.mean(norm_scores(logits, jnp.float32(1), 1.0) == 0))
    assert 0.45 < share < 0.55


def _gate_sum(logits: jax.Array, scale: jax.Array) -> jax.Array:
    found = norm_scores(logits, scale, 2.0)
    return jnp.sum(route(found, logits, router="norm", top_k=1).gates_NK)


def test_zero_logits_give_zero_scores_and_finite_gradients() -> None:
    logits = jnp.zeros((3, 8)).at[1].set(jnp.arange(8.0))
    value, (grad, scale_grad) = jax.value_and_grad(_gate_sum, argnums=(0, 1))(logits, jnp.float32(1))
    assert np.isfinite(value)
    assert np.isfinite(grad).all()
    assert np.isfinite(scale_grad)
    assert not grad[0].any()
    assert grad[1].any()


def test_all_negative_logits_switch_the_layer_off_without_gradient() -> None:
    logits = -jnp.arange(1.0, 9.0)[None]
    value, grad = jax.value_and_grad(_gate_sum)(logits, jnp.float32(1))
    assert value == 0
    assert not grad.any()


def test_fewer_positive_logits_than_k_fill_up_with_zero_gates_that_are_counted() -> None:
    logits = jnp.array([[-1.0, 5.0, -2.0, -3.0]])
    found = route(norm_scores(logits, jnp.float32(1), 1.0), logits, router="norm", top_k=3)
    assert found.experts_NK[0, 0] == 1
    assert found.gates_NK[0, 0] > 0
    assert not found.gates_NK[0, 1:].any()
    # Ties among the zero scores go to the lowest indices.
    assert found.experts_NK[0].tolist() == [1, 0, 2]
    assert found.stats.counts_AE.tolist() == [[1, 1, 1, 0]]


def test_gradient_reaches_every_router_row_through_the_norm() -> None:
    hidden = jax.random.normal(jax.random.key(0), (5, 6))
    router = jax.random.normal(jax.random.key(1), (9, 6))
    grad = jax.grad(lambda w: _gate_sum(hidden @ w.T, jnp.float32(1)))(router)
    assert (jnp.abs(grad).sum(axis=1) > 0).all()


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "norm"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_route_matches_numpy(router: Router, top_k: int) -> None:
    logits = np.random.default_rng(3).normal(size=(12, 7)).astype(np.float32)
    expected = {
        "softmax": oracles.softmax(logits.astype(np.float64)),
        "sigmoid": 1 / (1 + np.exp(-logits.astype(np.float64))),
        "norm": oracles.norm_router_scores(logits, 1.5, 2.0),
    }[router]
    bias = np.linspace(-0.4, 0.4, 7).astype(np.float32) if router == "sigmoid" else None
    experts = oracles.top_k(expected if bias is None else expected + bias, top_k)
    gates = np.take_along_axis(expected, experts, 1)
    if router == "sigmoid" and top_k > 1:
        gates = gates / gates.sum(1, keepdims=True)

    found_scores = scores(jnp.asarray(logits), router, jnp.float32(1.5), 2.0, 1e-8)
    found = route(
        found_scores,
        jnp.asarray(logits),
        router=router,
        top_k=top_k,
        num_stat_groups=3,
        expert_bias_E=None if bias is None else jnp.asarray(bias),
    )
    np.testing.assert_array_equal(found.experts_NK, experts)
    np.testing.assert_allclose(found.gates_NK, gates, rtol=1e-5)
    for group in range(3):
        part = slice(4 * group, 4 * group + 4)
        np.testing.assert_array_equal(found.stats.counts_AE[group], np.bincount(experts[part].reshape(-1), minlength=7))
        np.testing.assert_allclose(found.stats.score_sum_AE[group], expected[part].sum(0), rtol=1e-5)
    z_square = np.log(np.exp(logits.astype(np.float64)).sum(1)) ** 2
    np.testing.assert_allclose(found.stats.z_square_sum_A.sum(), z_square.sum(), rtol=1e-5)


def test_ties_go_to_the_lowest_index() -> None:
    tied = jnp.array([[0.5, 0.7, 0.7, 0.1], [0.2, 0.2, 0.2, 0.2]])
    assert route(tied, tied, router="softmax", top_k=1).experts_NK.tolist() == [[1], [0]]
    assert route(tied, tied, router="softmax", top_k=2).experts_NK.tolist() == [[1, 2], [0, 1]]


def test_bfloat16_router_keeps_bfloat16_scores_and_float32_statistics() -> None:
    logits = jax.random.normal(jax.random.key(0), (64, 96)).astype(jnp.bfloat16)
    found_scores = norm_scores(logits, jnp.float32(1), 4.016194)
    assert found_scores.dtype == jnp.bfloat16
    found = route(found_scores, logits, router="norm", top_k=1)
    assert found.gates_NK.dtype == jnp.float32
    assert found.stats.score_sum_AE.dtype == jnp.float32
    expected = oracles.norm_router_scores(np.asarray(logits, np.float64), 1.0, 4.016194)
    np.testing.assert_allclose(found.gates_NK[:, 0], expected.max(1), rtol=2e-2)


@pytest.mark.parametrize("unfaded", [False, True])
def test_statistics_of_neighboring_groups_are_added(unfaded: bool) -> None:
    """Two layers, six groups, three experts: groups 0-2 and 3-5 become one each, layers and experts stay apart."""
    counts = np.arange(2 * 6 * 3).reshape(2, 6, 3)
    squares = np.arange(2 * 6.0).reshape(2, 6)
    more = jnp.asarray(counts + 7) if unfaded else None
    stats = RoutingStats(
        jnp.asarray(counts),
        jnp.asarray(counts * 0.5),
        jnp.asarray(squares),
        jnp.asarray(counts[..., 0]),
        jnp.ones((2, 1)),
        more,
    )
    found = stats.grouped(2)
    expected = np.stack([counts[:, :3].sum(axis=1), counts[:, 3:].sum(axis=1)], axis=1)
    np.testing.assert_array_equal(found.counts_AE, expected)
    np.testing.assert_array_equal(found.score_sum_AE, expected * 0.5)
    np.testing.assert_array_equal(found.z_square_sum_A, [[0 + 1 + 2, 3 + 4 + 5], [6 + 7 + 8, 9 + 10 + 11]])
    np.testing.assert_array_equal(found.zero_gates_A, expected[..., 0])
    np.testing.assert_array_equal(found.received_X, stats.received_X)
    assert (found.unfaded_counts_AE is not None) == unfaded
    if found.unfaded_counts_AE is not None:
        np.testing.assert_array_equal(found.unfaded_counts_AE, expected + 3 * 7)


def test_centered_logits_leave_no_token_without_a_score() -> None:
    logits = np.array([[-3.0, -1.0, -2.0], [-1.0, -1.0, -1.0], [2.0, -4.0, 5.0]], np.float32)
    scale = jnp.array(1.5)
    raw, centered = (
        scores(jnp.asarray(logits), "norm", scale, 2.0, 1e-8, centered=centered) for centered in (False, True)
    )
    np.testing.assert_array_equal(np.asarray(raw).max(axis=1) > 0, [False, False, True])
    moved = logits - logits.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(centered, oracles.norm_router_scores(moved, 1.5, 2.0), rtol=1e-5)
    # All equal: nothing to choose by.
    np.testing.assert_array_equal(np.asarray(centered).max(axis=1) > 0, [True, False, True])

    visible = np.array([True, False, True])
    seen = scores(jnp.asarray(logits), "norm", scale, 2.0, 1e-8, visible_E=visible, centered=True)
    narrow = logits[:, visible] - logits[:, visible].mean(axis=1, keepdims=True)
    np.testing.assert_allclose(np.asarray(seen)[:, visible], oracles.norm_router_scores(narrow, 1.5, 2.0), rtol=1e-5)
    assert not np.asarray(seen)[:, 1].any()


def test_tokens_whose_gates_are_all_zero_are_counted() -> None:
    found = np.array([[0.0, 0.0, 0.0], [0.0, 2.0, 0.0], [1.0, 3.0, 0.0], [0.0, 0.0, 0.0]], np.float32)
    for top_k in (1, 2):
        stats = route(jnp.asarray(found), jnp.asarray(found), router="norm", top_k=top_k, num_stat_groups=2).stats
        assert stats.zero_gates_A.tolist() == [1, 1]
    counted = jnp.array([False, True, True, True])
    stats = route(jnp.asarray(found), jnp.asarray(found), router="norm", top_k=1, counted_N=counted).stats
    assert stats.zero_gates_A.tolist() == [1]


def test_normalized_scores_sum_to_one_for_every_token_that_has_any() -> None:
    found = np.random.default_rng(4).gamma(0.5, size=(6, 5)).astype(np.float32)
    found[2] = 0

    def sums(values: jax.Array) -> jax.Array:
        return route(values, values, router="norm", top_k=1, normalized=True).stats.score_sum_AE

    alive = np.delete(found, 2, axis=0).astype(np.float64)
    np.testing.assert_allclose(
        sums(jnp.asarray(found))[0], (alive / alive.sum(axis=1, keepdims=True)).sum(axis=0), rtol=1e-5
    )
    # Scaling all scores of a token changes nothing, so the loss cannot fall by switching them off.
    gradient = jax.grad(lambda x: jnp.sum(sums(x) * jnp.arange(5.0)))(jnp.asarray(found))
    np.testing.assert_allclose(np.sum(gradient * found, axis=1), 0, atol=1e-6)
    assert np.isfinite(gradient).all()
