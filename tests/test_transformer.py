"""The model against an independent NumPy forward, and what sharing means (method M1, M2)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from tiny import METHODS, tiny_batch, tiny_config, tiny_state
from unipool_jax.config.schema import Config
from unipool_jax.model.transformer import EVERY_POSITION, LayerInputs, Positions, apply, forward
from unipool_jax.moe.mixture import Selection
from unipool_jax.moe.routing import RoutingStats


def _forward(config: Config, params: Any, tokens: np.ndarray, bias: Any = None) -> tuple[jax.Array, Any]:
    if bias is None:
        bias = jnp.zeros((config.pool.groups, config.layers_per_pool, config.experts_per_pool))
    return jax.jit(forward, static_argnums=0)(config, params, tokens, bias)


DEPTH_SCALED = ("model.norm=depth_scaled_sandwich", "model.init=tiny", "moe.top_k=2")
VARIANTS = [
    *((method, ()) for method in METHODS),
    ("unipool", ("moe.top_k=2",)),
    ("vanilla_aux_free", ("moe.top_k=2",)),
    ("unipool", ("pool.groups=2", "moe.score_constant=one")),
    ("unipool", ("pool.experts=3", "model.head_size=6")),
    ("vanilla_aux_free", ("pool.groups=2",)),
    ("unipool", ("pool.starts=ring",)),
    ("unipool", ("pool.starts=sliding", "pool.span=3", "moe.top_k=2")),
    ("shared_pool_aux", ("pool.starts=wide_runs", "pool.ends=1")),
    ("vanilla_aux_free", ("pool.groups=1", "pool.starts=[5,0,3,6]", "pool.window=[3,4,2,3]")),
    ("unipool", ("attention.kind=window", "attention.window=3")),
    ("vanilla", ("attention.kind=alternating", "attention.window=2", "attention.full_layers=[0,2]")),
    ("shared_layer_aux", ("moe.shared_experts=2",)),
    ("unipool", ("moe.shared_experts=1", "moe.shared_expert_gate=true", "pool.groups=2")),
    ("unipool", ("moe.depth_vectors=true", "moe.dense_layers=2", "moe.dense_ffn_size=20", "pool.groups=2")),
    ("vanilla_aux_free", ("pool.groups=1", "moe.dense_layers=1", "pool.starts=[5,0,3]", "pool.window=[3,4,2]")),
    (
        "unipool",
        ("moe.dense_layers=2", "attention.kind=alternating", "attention.window=2", "attention.full_layers=[0,3]"),
    ),
    ("dense", ("model.norm=sandwich",)),
    ("vanilla", (*DEPTH_SCALED, "model.post_norm_experts=post", "moe.top_k=2", "moe.shared_experts=1")),
    (
        "unipool",
        (*DEPTH_SCALED, "moe.shared_experts=1", "moe.shared_expert_gate=true", "moe.dense_layers=2", "pool.groups=2"),
    ),
    pytest.param(
        *("unipool", (*DEPTH_SCALED, "model.post_norm_experts=none", "moe.dense_layers=1", "pool.starts=ring")),
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("method", "overrides"), VARIANTS)
def test_forward_matches_numpy(method: str, overrides: tuple[str, ...]) -> None:
    config = tiny_config(method, *overrides)
    params = tiny_state(config).params
    if config.moe.depth_vectors:  # zero at first
        layers = params["pools"]["layers"]
        layers["depth"] = layers["depth"] + np.random.default_rng(2).normal(size=layers["depth"].shape)
    tokens = tiny_batch(config).inputs[:2]
    shape = (config.pool.groups, config.layers_per_pool, config.experts_per_pool)
    bias = np.random.default_rng(1).normal(size=shape, scale=0.05).astype(np.float32)
    uses_bias = config.loss.balance == "expert_bias"

    expected = oracles.Forward(config, params, tokens, bias if uses_bias else None)
    logits, stats = _forward(config, params, tokens, bias)
    np.testing.assert_allclose(logits, expected.logits, rtol=1e-3, atol=2e-4)
    if method != "dense":
        found = np.asarray(stats.counts_AE).sum(2).reshape(config.mixture_layers, -1)
        np.testing.assert_array_equal(found, expected.counts())


@pytest.mark.parametrize("method", ["dense", "unipool"])
def test_statistics_are_about_the_counted_positions(method: str) -> None:
    config = tiny_config(method)
    params, tokens = tiny_state(config).params, tiny_batch(config).inputs[:2]
    counted = np.array([[True] * 8, [True] * 3 + [False] * 5])
    inputs = LayerInputs(Selection(jnp.zeros((config.pool.groups, config.layers_per_pool, config.experts_per_pool))))

    def stats(tokens: np.ndarray, positions: Positions) -> RoutingStats:
        return apply(config, params, tokens, inputs, positions).layers.stats

    found = stats(tokens, Positions(counted_BS=jnp.asarray(counted)))
    # Attention is causal and routing is token by token, so the same two texts alone count the same.
    parts = [stats(tokens[:1], EVERY_POSITION), stats(tokens[1:, :3], EVERY_POSITION)]
    for name in ("counts_AE", "score_sum_AE", "z_square_sum_A"):
        expected = sum(np.asarray(getattr(part, name)).sum(axis=2) for part in parts)
        np.testing.assert_allclose(np.asarray(getattr(found, name)).sum(axis=2), expected, rtol=1e-5, err_msg=name)
    assert np.asarray(found.counts_AE).sum() == 11 * 4


def test_changing_an_expert_changes_every_layer_that_selects_it() -> None:
    """One pool: the output moves even when only the last user's input is held fixed; a private expert has one user."""
    config = tiny_config("unipool")
    params, tokens = tiny_state(config).params, tiny_batch(config).inputs
    _, stats = _forward(config, params, tokens)
    users_LE = np.asarray(stats.counts_AE).sum((0, 2)) > 0
    expert = int(users_LE.sum(0).argmax())
    assert users_LE[:, expert].sum() >= 2, "the test needs an expert that several layers use"

    copies = _split_bank(params, 4, lambda bank, group: bank)
    private = tiny_config("unipool", "pool.groups=4", "pool.experts=32")
    doubled = jax.tree.map(lambda x: x.at[:, expert].multiply(2.0), params["pools"]["bank"])
    shared_change, _ = _forward(config, params | {"pools": params["pools"] | {"bank": doubled}}, tokens)

    # Doubling the copies of exactly the layers that select the expert is the same change; leaving one out is not.
    def change(layers: np.ndarray) -> jax.Array:
        bank = jax.tree.map(lambda x: x.at[layers, expert].multiply(2.0), copies["pools"]["bank"])
        return _forward(private, copies | {"pools": copies["pools"] | {"bank": bank}}, tokens)[0]

    users = np.flatnonzero(users_LE[:, expert])
    np.testing.assert_allclose(shared_change, change(users), rtol=1e-5, atol=1e-5)
    for left_out in users:
        assert not np.allclose(shared_change, change(users[users != left_out]), rtol=1e-5, atol=1e-5)


def test_the_bank_exists_once_in_parameters_gradients_and_optimizer_state() -> None:
    config = tiny_config("unipool")
    state = tiny_state(config)
    shapes = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim == 4]
    wide, narrow = (1, 8, 16, 24), (1, 8, 24, 16)
    # Parameters and two moments: gate and up, and down; nothing with a layer axis.
    assert shapes.count(wide) == 6
    assert shapes.count(narrow) == 3
    assert not [leaf for leaf in jax.tree.leaves(state) if leaf.ndim > 4]


def _split_bank(params: Any, groups: int, choose: Any) -> Any:
    """The same model with the one bank of a [1, E, ...] tree handed out to `groups` pools by `choose(bank, group)`."""
    bank = params["pools"]["bank"]
    layers = jax.tree.map(lambda x: x.reshape(groups, x.shape[1] // groups, *x.shape[2:]), params["pools"]["layers"])
    banks = {name: jnp.stack([choose(x[0], g) for g in range(groups)]) for name, x in bank.items()}
    return params | {"pools": {"bank": banks, "layers": layers}}


def test_groups_of_all_layers_equal_the_global_pool_and_copies_of_it_change_nothing() -> None:
    """Four pools that each hold the full bank compute what the one pool computes."""
    shared = tiny_config("unipool")
    private = tiny_config("unipool", "pool.groups=4", "pool.experts=32")
    params = tiny_state(shared).params
    tokens = tiny_batch(shared).inputs
    copies = _split_bank(params, 4, lambda bank, group: bank)
    one, one_stats = _forward(shared, params, tokens)
    four, four_stats = _forward(private, copies, tokens)
    np.testing.assert_allclose(one, four, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(
        np.asarray(one_stats.counts_AE).reshape(4, -1), np.asarray(four_stats.counts_AE).reshape(4, -1)
    )


def test_gradient_of_a_shared_expert_is_the_sum_over_its_layers() -> None:
    shared = tiny_config("unipool")
    private = tiny_config("unipool", "pool.groups=4", "pool.experts=32")
    params, batch = tiny_state(shared).params, tiny_batch(shared)

    def loss(config: Config, params: Any) -> jax.Array:
        shape = (config.pool.groups, config.layers_per_pool, config.experts_per_pool)
        logits, _ = forward(config, params, batch.inputs, jnp.zeros(shape))
        return jnp.sum(jnp.square(logits)) / logits.size

    one = jax.grad(lambda p: loss(shared, p))(params)["pools"]["bank"]
    copies = _split_bank(params, 4, lambda bank, group: bank)
    four = jax.grad(lambda p: loss(private, p))(copies)["pools"]["bank"]
    for name in one:
        assert one[name].any()
        np.testing.assert_allclose(one[name][0], four[name].sum(0), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("method", "policies"),
    [("unipool", ("router", "experts", "attention", "moe", "full")), ("vanilla", ("moe", "full"))],
)
def test_rematerialization_changes_no_value(method: str, policies: tuple[str, ...]) -> None:
    config = tiny_config(method)
    params, batch = tiny_state(config).params, tiny_batch(config)
    shape = (config.pool.groups, config.layers_per_pool, config.experts_per_pool)

    def gradient(remat: str) -> Any:
        changed = tiny_config(method, f"model.remat={remat}")

        def loss(params: Any) -> jax.Array:
            logits, stats = forward(changed, params, batch.inputs, jnp.zeros(shape))
            return jnp.mean(jnp.square(logits)) + jnp.sum(stats.score_sum_AE) * 1e-3

        return jax.jit(jax.grad(loss))(params)

    plain = gradient("none")
    for remat in policies:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), plain, gradient(remat))


def test_bfloat16_compute_stays_close_to_float32_with_float32_router_and_parameters() -> None:
    config = tiny_config("vanilla", "model.init_std=0.1")
    half = dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype="bfloat16"))
    params, tokens = tiny_state(config).params, tiny_batch(config).inputs
    assert {leaf.dtype for leaf in jax.tree.leaves(tiny_state(half).params)} == {jnp.dtype("float32")}
    wide, _ = _forward(config, params, tokens)
    narrow, stats = _forward(half, params, tokens)
    assert narrow.dtype == jnp.float32
    assert stats.score_sum_AE.dtype == jnp.float32
    assert float(jnp.mean(jnp.abs(wide - narrow))) < 0.05 * float(jnp.std(wide))


def test_initial_standard_deviations() -> None:
    config = tiny_config("unipool", "model.hidden_size=64", "model.ffn_size=64", "model.init_std=0.01")
    params = tiny_state(config).params
    small = 0.01 / np.sqrt(2 * 4)
    layers, bank = params["pools"]["layers"], params["pools"]["bank"]
    for value, expected in [
        (params["embedding"], 0.01),
        (params["output"], 0.01),
        (layers["attention"]["query"], 0.01),
        (layers["attention"]["key"], 0.01),
        (layers["attention"]["value"], 0.01),
        (layers["attention"]["output"], small),
        (layers["mixture"]["router"], 0.01),
        (bank["gate"], 0.01),
        (bank["up"], 0.01),
        (bank["down"], small),
    ]:
        assert float(jnp.std(value)) == pytest.approx(expected, rel=0.1)
    assert (layers["attention_norm"] == 1).all()
    assert (layers["mixture"]["scale"] == 1).all()
    # Layers and experts start different from each other.
    assert not np.allclose(layers["attention"]["query"][0, 0], layers["attention"]["query"][0, 1])
    assert not np.allclose(bank["gate"][0, 0], bank["gate"][0, 1])
