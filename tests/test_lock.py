"""Fade, entropy loss and re-indexing of UniPool-lock against NumPy (method M6.1 - M6.7)."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from tiny import tiny_batch, tiny_config, tiny_state
from unipool_jax.config.compose import compose_config
from unipool_jax.config.lock_schedule import make_schedule
from unipool_jax.config.schema import Config
from unipool_jax.model.transformer import forward
from unipool_jax.moe.assignment import expert_ids, random_assignment
from unipool_jax.moe.balance import entropy_loss
from unipool_jax.moe.lock import (
    Candidate,
    entropy_coefficient,
    faded,
    locked_tree,
    pool_counts,
    router_order,
    score_factors,
)
from unipool_jax.moe.routing import RoutingStats, norm_constant
from unipool_jax.training.locking import locked_state
from unipool_jax.training.state import TrainState
from unipool_jax.training.step import make_eval_step, make_train_step

LAYERS, EXPERTS, PRIVATE = 4, 8, 2
OWNER = random_assignment(np.ones((LAYERS, EXPERTS)), 5).owner_M
IDS = expert_ids(OWNER, LAYERS)
OWN = np.arange(LAYERS)[:, None] == OWNER

LOCK = ("lock.entropy_target=2", "lock.lock_step=8", "lock.anneal_steps=4", "lock.entropy_warmup_steps=4")


def lock_config(*overrides: str) -> Config:
    """Four layers over eight experts, frozen at step 4 and locked at step 8."""
    return tiny_config("unipool_lock", *LOCK, *overrides)


def state_at(config: Config, step: int, owner: np.ndarray | None = OWNER) -> TrainState:
    """A fresh state that claims to have made `step` steps, with a candidate, and moments that are not zero."""
    state = tiny_state(config)
    random = np.random.default_rng(1)
    moved = jax.tree.map(lambda x: x + jnp.asarray(random.uniform(0, 1e-3, x.shape), x.dtype), state.opt_state)
    state = state._replace(step=jnp.int32(step), opt_state=moved)
    if owner is None:
        return state
    candidate = Candidate(jnp.asarray(owner, jnp.int32), jnp.zeros(()))
    return state._replace(balance=state.balance._replace(lock=candidate))


def copy(state: TrainState) -> TrainState:
    """Steps and locks use their state up."""
    return jax.tree.map(jnp.copy, state)


class FadedForward(oracles.Forward):
    """The NumPy model with factors on scores `[L, M]`; an expert with factor 0 cannot be chosen.

    With `out_of_norm`, experts with factor 0 leave the norm too: the plain visibility mask that a lock is not.
    """

    def __init__(self, config: Config, params: Any, tokens: np.ndarray, factors: np.ndarray, out_of_norm: bool = False):
        self.factors, self.out_of_norm = iter(factors), out_of_norm
        self.unfaded: list[np.ndarray] = []
        super().__init__(config, params, tokens)

    def _mixture(
        self, x: np.ndarray, own: Any, bank: Any, bias: np.ndarray | None, seen: np.ndarray | None
    ) -> np.ndarray:
        moe, factor = self.config.moe, next(self.factors)
        logits = x @ own["router"].T
        if self.out_of_norm:
            logits = np.where(factor > 0, logits, 0.0)
        constant = norm_constant(logits.shape[1], moe.top_k)  # its value has its own oracle
        scores = oracles.norm_router_scores(logits, float(own["scale"]), constant)
        self.unfaded.append(oracles.top_k(scores, moe.top_k))
        scores = scores * factor
        experts = oracles.top_k(np.where(factor > 0, scores, -np.inf), moe.top_k)
        self.scores.append(scores)
        self.experts.append(experts)
        out = np.zeros_like(x)
        for token in range(len(x)):
            for index in experts[token]:
                out[token] += scores[token, index] * oracles.expert(x[token], bank, index)
        return out

    def unfaded_counts(self, counted: np.ndarray | None = None) -> np.ndarray:
        return oracles.choice_counts(self.unfaded, EXPERTS, counted)


def oracle_entropy(scores: list[np.ndarray], target: float) -> float:
    """Mean over layers of (H - ln target)^2, one expert at a time."""
    total = 0.0
    for layer in scores:
        q = [float(layer[:, i].mean()) for i in range(layer.shape[1])]
        p = [value / (sum(q) + 1e-8) for value in q]
        total += (-sum(x * math.log(x + 1e-8) for x in p) - math.log(target)) ** 2
    return total / len(scores)


def test_the_published_schedule() -> None:
    schedule = make_schedule(compose_config(["scale=182m", "method=unipool_lock", "mode=describe"]))
    assert schedule == (1000, 2000, 1000)
    table = {1100: 0.02447, 1250: 0.14645, 1500: 0.5, 1750: 0.85355, 1900: 0.97553, 1999: 0.9999975}
    assert {step: schedule.fade(step) for step in table} == pytest.approx(table, abs=5e-6)
    assert [schedule.fade(step) for step in (0, 999, 1000, 2000, 2001, 60_000)] == [0, 0, 0, 1, 0, 0]


def test_boundaries_are_rounded_half_to_even_and_can_be_given() -> None:
    config = tiny_config("unipool_lock", "train.steps=50", "lock.lock_fraction=0.25", "lock.anneal_fraction=0.07")
    assert make_schedule(config)[:2] == (12 - 4, 12)  # 12.5 and 3.5
    assert make_schedule(lock_config()) == (4, 8, 4)


def test_the_step_computes_what_the_schedule_says() -> None:
    config = lock_config()
    schedule, candidate = make_schedule(config), Candidate(jnp.asarray(OWNER), jnp.zeros(()))
    controls = jax.jit(lambda step: (faded(config, candidate, step).fade, entropy_coefficient(config, step)))  # type: ignore[union-attr]
    for step in range(12):
        fade, coefficient = controls(jnp.int32(step))
        assert float(fade) == pytest.approx(schedule.fade(step), abs=1e-7)
        assert float(coefficient) == pytest.approx(5e-3 * min(step / 4, 1), rel=1e-6)
    assert [float(controls(jnp.int32(step))[0]) for step in (4, 8)] == [0.0, 1.0]


@pytest.fixture(scope="module")
def model() -> tuple[Config, TrainState, np.ndarray]:
    config = lock_config("moe.top_k=2")
    return config, state_at(config, 6), tiny_batch(config).inputs


def faded_forward(
    model: tuple[Config, TrainState, np.ndarray], fade: float, owner: np.ndarray = OWNER
) -> tuple[np.ndarray, RoutingStats]:
    config, state, tokens = model
    factors = score_factors(config, Candidate(jnp.asarray(owner), jnp.float32(fade)))
    return _FORWARD(config, state.params, tokens, state.balance.expert_bias_GNE, factors)


_FORWARD = jax.jit(forward, static_argnums=0)


def test_no_fade_is_an_exact_no_op(model: tuple[Config, TrainState, np.ndarray]) -> None:
    config, state, tokens = model
    plain, plain_stats = _FORWARD(config, state.params, tokens, state.balance.expert_bias_GNE)
    for fade, owner in ((0.0, OWNER), (0.7, np.full(EXPERTS, -1))):
        logits, stats = faded_forward(model, fade, owner)
        np.testing.assert_array_equal(logits, plain)
        np.testing.assert_array_equal(stats.counts_AE, plain_stats.counts_AE)
        np.testing.assert_array_equal(stats.score_sum_AE, plain_stats.score_sum_AE)
        np.testing.assert_array_equal(stats.unfaded_counts_AE, stats.counts_AE)
    assert plain_stats.unfaded_counts_AE is None


@pytest.mark.parametrize("fade", [0.3, 0.9, 1.0])
def test_a_faded_forward_is_that_of_numpy(model: tuple[Config, TrainState, np.ndarray], fade: float) -> None:
    config, state, tokens = model
    logits, stats = faded_forward(model, fade)
    expected = FadedForward(config, state.params, tokens, np.where(OWN, 1.0, 1 - fade))
    np.testing.assert_allclose(logits, expected.logits, rtol=2e-4, atol=2e-5)
    np.testing.assert_array_equal(np.sum(stats.counts_AE, axis=(0, 2)), expected.counts())
    assert stats.unfaded_counts_AE is not None
    np.testing.assert_array_equal(np.sum(stats.unfaded_counts_AE, axis=(0, 2)), expected.unfaded_counts())
    assert (expected.counts() != expected.unfaded_counts()).any()
    found = float(entropy_loss(stats, tokens.size, 2.0))
    assert found == pytest.approx(oracle_entropy(expected.scores, 2.0), rel=1e-4)


def test_the_locked_model_is_the_limit_of_the_fade(model: tuple[Config, TrainState, np.ndarray]) -> None:
    config, state, tokens = model
    after = config.after_lock()
    locked = locked_state(config, copy(state), IDS)
    logits, stats = _FORWARD(after, locked.params, tokens, locked.balance.expert_bias_GNE)
    expected = FadedForward(config, state.params, tokens, OWN.astype(float))
    np.testing.assert_allclose(logits, expected.logits, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(logits, faded_forward(model, 1.0)[0], rtol=2e-5, atol=2e-6)
    counts = np.sum(stats.counts_AE, axis=(1, 2))
    assert counts.shape == (LAYERS, PRIVATE)
    np.testing.assert_array_equal(pool_counts(counts, IDS), expected.counts())
    assert float(entropy_loss(stats, tokens.size, 2.0)) == pytest.approx(oracle_entropy(expected.scores, 2.0), rel=1e-4)
    # Almost there before the lock, and not what a mask on the logits computes.
    near, _ = faded_forward(model, 0.9999975)
    assert np.abs(near - logits).max() < 1e-3
    masked = FadedForward(config, state.params, tokens, OWN.astype(float), out_of_norm=True)
    assert np.abs(masked.logits - expected.logits).max() > 0.05


@pytest.mark.parametrize(
    "overrides",
    [("moe.top_k=2",), ("loss.pool_statistics=previous", "train.microbatch_size=4")],
    ids=["exact pool loss", "one micro-batch behind"],
)
def test_a_step_of_the_locked_model_is_that_of_a_wholly_faded_pool(overrides: tuple[str, ...]) -> None:
    """Parameters, moments and losses: the lock changes where things are stored, not what is computed."""
    config = lock_config("loss.pool_coefficient=1", "lock.entropy_coefficient=1", *overrides)
    batch, state = tiny_batch(config), state_at(config, 8)
    load = jnp.asarray(np.random.default_rng(2).dirichlet(np.ones(EXPERTS)), jnp.float32)[None]
    state = state._replace(balance=state.balance._replace(previous_load_GE=load))
    locked = locked_state(config, copy(state), IDS)
    before = [np.asarray(m) for m in _router_moments(locked)]
    pool_state, pool = make_train_step(config)(copy(state), batch)
    locked_after, own = make_train_step(config.after_lock())(locked, batch)
    assert float(pool["loss/balance"]) > 0 < float(pool["loss/entropy"])
    for name in ("loss/lm", "loss/balance", "loss/entropy", "loss/total", "grad_norm"):
        assert float(own[name]) == pytest.approx(float(pool[name]), rel=2e-5), name
    np.testing.assert_array_equal(pool_counts(np.asarray(own["counts_LE"]), IDS), pool["counts_LE"])
    expected = locked_state(config, pool_state, IDS)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-6),
        (locked_after.params, locked_after.opt_state, locked_after.balance),
        (expected.params, expected.opt_state, expected.balance),
    )
    # Rows of experts that a layer can no longer reach still have a gradient, through the norm.
    for old, new in zip(before, _router_moments(locked_after), strict=True):
        assert (np.abs(np.asarray(new) - 0.9 * old).max(axis=-1) > 1e-7).all()

    if overrides == ("moe.top_k=2",):
        # It is a Switch loss with E = K and the coefficient alpha / L (method M6.7).
        numpy = FadedForward(config, state.params, batch.inputs, OWN.astype(float))
        total = sum(
            oracles.switch_loss(numpy.scores[layer][:, ids], np.searchsorted(ids, numpy.experts[layer]), 1 / LAYERS)
            for layer, ids in enumerate(IDS)
        )
        assert float(own["loss/balance"]) == pytest.approx(total, rel=1e-4)


def _router_moments(state: TrainState) -> list[jax.Array]:
    """First moments of the routers, `[L, 1, M, D]`."""
    found = jax.tree_util.tree_leaves_with_path(state.opt_state)
    return [leaf for path, leaf in found if "mu" in str(path) and "router" in str(path)]


def test_an_evaluation_fades_as_the_last_step_did() -> None:
    config = lock_config()
    state, batch = state_at(config, 6), tiny_batch(config)
    state, _ = make_train_step(config)(state, batch)
    assert state.balance.lock is not None
    assert float(state.balance.lock.fade) == pytest.approx(0.5)
    sums = make_eval_step(config)(state.params, state.balance, batch, jnp.zeros(64, jnp.int32))
    expected = FadedForward(config, state.params, batch.inputs, np.where(OWN, 1.0, 0.5))
    np.testing.assert_array_equal(sums.counts_LE, expected.counts())
    np.testing.assert_array_equal(sums.unfaded_counts_LE, expected.unfaded_counts())
    assert float(np.sum(sums.loss_B)) / batch.inputs.size == pytest.approx(expected.lm_loss(batch.targets), rel=1e-4)

    # Padding is routed, and counts neither with nor without the fade: a partition is learned from both.
    weights = np.ones_like(batch.weights)
    weights[-2, 5:] = weights[-1] = 0
    sums = make_eval_step(config)(
        state.params, state.balance, batch._replace(weights=weights), jnp.zeros(64, jnp.int32)
    )
    np.testing.assert_array_equal(sums.counts_LE, expected.counts(weights))
    np.testing.assert_array_equal(sums.unfaded_counts_LE, expected.unfaded_counts(weights))


def test_entropy_of_even_and_single_use() -> None:
    def stats(scores: np.ndarray) -> RoutingStats:
        sums = jnp.asarray(scores, jnp.float32)[None, None, None]
        none = jnp.zeros(())
        return RoutingStats(jnp.zeros((1, 1, 1, EXPERTS), jnp.int32), sums, none, none, jnp.zeros((1,), jnp.int32))

    even, single = np.ones(EXPERTS), np.eye(EXPERTS)[3]
    assert float(entropy_loss(stats(even), 10, 8.0)) == pytest.approx(0, abs=1e-9)
    assert float(entropy_loss(stats(even), 10, 2.0)) == pytest.approx(math.log(4) ** 2, rel=1e-5)
    assert float(entropy_loss(stats(single), 10, 8.0)) == pytest.approx(math.log(8) ** 2, rel=1e-5)
    # A layer without scores is finite, and so is its gradient.
    slope = jax.grad(lambda x: entropy_loss(stats(np.zeros(EXPERTS))._replace(score_sum_AE=x), 10, 8.0))
    assert np.isfinite(slope(jnp.zeros((1, 1, 1, EXPERTS)))).all()


def test_reindexing_moves_every_array_to_its_owner() -> None:
    random = np.random.default_rng(0)
    bank, router, gain = random.normal(size=(1, 8, 3, 5)), random.normal(size=(1, 4, 8, 3)), random.normal(size=(1, 4))
    tree = {"mu": {"pools": {"bank": {"gate": bank}, "layers": {"mixture": {"router": router, "scale": gain}}}}, "n": 7}
    moved = locked_tree(jax.tree.map(jnp.asarray, tree), IDS)["mu"]["pools"]
    order = router_order(IDS)
    for layer in range(LAYERS):
        np.testing.assert_allclose(moved["bank"]["gate"][layer], bank[0, IDS[layer]], rtol=1e-6)
        np.testing.assert_array_equal(order[layer, :PRIVATE], IDS[layer])
        assert sorted(order[layer].tolist()) == list(range(EXPERTS))
        np.testing.assert_allclose(moved["layers"]["mixture"]["router"][layer, 0], router[0, layer, order[layer]], 1e-6)
    np.testing.assert_allclose(moved["layers"]["mixture"]["scale"][:, 0], gain[0], rtol=1e-6)


def test_other_methods_have_no_trace_of_a_lock() -> None:
    config = tiny_config("unipool")
    state = tiny_state(config)
    assert state.balance.lock is None
    assert score_factors(config, None) is None
    assert config.router_width == config.experts_per_pool == EXPERTS
    after = lock_config().after_lock()
    assert (after.router_width, after.experts_per_pool, after.layers_per_pool, after.locked) == (8, 2, 1, True)
    assert not dataclasses.replace(after, lock=config.lock).locked
    shapes = jax.eval_shape(functools.partial(tiny_state, after))
    assert shapes.params["pools"]["layers"]["mixture"]["router"].shape == (4, 1, 8, 16)
    assert shapes.params["pools"]["bank"]["gate"].shape == (4, 2, 16, 24)
