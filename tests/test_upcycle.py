"""Upcycled models compute what their source computes."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from test_convert import random_weights
from tiny import tiny_batch, tiny_config
from unipool_jax.config.schema import Config
from unipool_jax.convert.errors import ConversionError
from unipool_jax.convert.upcycle import upcycle
from unipool_jax.convert.weights import Weights
from unipool_jax.model.transformer import forward
from unipool_jax.moe.balance import load_fractions, pool_loss
from unipool_jax.parallel.head import cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore:NormRouter over")


def scaled(config: Config) -> Weights:
    """Random weights of a size at which a model is well conditioned."""
    weights = random_weights(config)
    params = jax.tree.map(lambda leaf: 0.3 * leaf, weights.params)
    mixture = params["pools"]["layers"].get("mixture", {})
    if "scale" in mixture:
        mixture["scale"] = np.abs(mixture["scale"]) + np.float32(0.5)
    return Weights(params, weights.expert_bias_GNE)


def logits(config: Config, weights: Weights) -> np.ndarray:
    tokens = tiny_batch(config).inputs
    return np.asarray(jax.jit(lambda w: forward(config, w.params, tokens, w.expert_bias_GNE)[0])(weights))


@pytest.mark.parametrize(
    "overrides",
    [
        ("vanilla", "moe.experts_per_layer=4"),
        ("vanilla", "moe.experts_per_layer=8", "moe.top_k=2"),
        ("vanilla_aux_free", "moe.experts_per_layer=4"),
        ("vanilla_aux_free", "moe.experts_per_layer=4", "moe.top_k=2"),
        ("vanilla_aux_free", "moe.experts_per_layer=1", "pool.groups=1"),
        ("vanilla_aux_free", "moe.experts_per_layer=1", "pool.groups=2"),
        ("vanilla_normrouter", "moe.experts_per_layer=4"),
        ("unipool", "moe.experts_per_layer=2"),
        ("unipool", "moe.experts_per_layer=4", "pool.groups=2", "moe.top_k=2"),
        ("unipool", "pool.experts=11"),
    ],
    ids=" ".join,
)
def test_dense_to_mixture_is_exact(overrides: tuple[str, ...]) -> None:
    """Gates add up to one, so only rounding may differ; 11 experts are two for each layer and three to spare."""
    config, new = tiny_config("dense"), tiny_config(*overrides)
    weights = scaled(config)
    np.testing.assert_allclose(
        logits(new, upcycle(config, weights, new)), logits(config, weights), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ("vanilla", "moe.experts_per_layer=4"),
        ("unipool", "moe.experts_per_layer=2", "moe.top_k=2", "model.post_norm_experts=post"),
    ],
    ids=" ".join,
)
def test_norms_behind_blocks_stay_exact(overrides: tuple[str, ...]) -> None:
    """Gates of less than one are made up for by the gain where the norm comes before them."""
    config, new = tiny_config("dense", "model.norm=sandwich"), tiny_config(*overrides, "model.norm=sandwich")
    weights = scaled(config)
    np.testing.assert_allclose(
        logits(new, upcycle(config, weights, new)), logits(config, weights), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("method", ["vanilla_normrouter", "vanilla_aux_free"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_mixture_to_pool_and_back_is_exact(method: str, groups: int, top_k: int) -> None:
    setting = (method, "moe.experts_per_layer=4", f"moe.top_k={top_k}")
    config, new = tiny_config(*setting), tiny_config(*setting, f"pool.groups={groups}")
    weights = scaled(config)
    pooled = upcycle(config, weights, new)
    np.testing.assert_allclose(logits(new, pooled), logits(config, weights), rtol=1e-4, atol=1e-5)
    back = upcycle(new, pooled, config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), back, weights)


@pytest.mark.parametrize("method", ["dense", "vanilla_normrouter"])
def test_noise_lets_training_reach_every_expert(method: str) -> None:
    """Rows of zeros have no gradient; with noise the function changes a little and every row has one."""
    config = tiny_config(method, *(["moe.experts_per_layer=4"] if method != "dense" else []))
    new = tiny_config("unipool", "moe.experts_per_layer=4")
    weights, batch = scaled(config), tiny_batch(new)

    def router_gradient(pooled: Weights) -> np.ndarray:
        bias = jax.numpy.asarray(pooled.expert_bias_GNE)
        params = jax.tree.map(jax.numpy.asarray, pooled.params)

        def loss(params: Any) -> jax.Array:
            logits_BSV, stats = forward(new, params, batch.inputs, bias)
            balance = pool_loss(stats, load_fractions(stats.counts_AE), batch.inputs.size, 0.01)
            return cross_entropy(logits_BSV, batch.targets).mean() + balance

        grads = jax.jit(jax.grad(loss))(params)["pools"]["layers"]["mixture"]["router"]
        return np.abs(np.asarray(grads)).sum(axis=-1)

    exact, noisy = upcycle(config, weights, new), upcycle(config, weights, new, noise=1e-3)
    zero = ~exact.params["pools"]["layers"]["mixture"]["router"].any(axis=-1)
    assert zero.any()
    assert not router_gradient(exact)[zero].any()
    assert (router_gradient(noisy) > 0).all()
    source = logits(config, weights)
    assert np.abs(logits(new, noisy) - source).mean() < 0.05 * np.abs(source).mean()


def test_what_cannot_be_exact_is_refused() -> None:
    dense, vanilla = tiny_config("dense"), tiny_config("vanilla")
    with pytest.raises(ConversionError, match="needs two experts per layer"):
        upcycle(dense, scaled(dense), tiny_config("unipool", "moe.experts_per_layer=1"))
    with pytest.raises(ConversionError, match=r"needs moe\.router=norm"):
        upcycle(dense, scaled(dense), vanilla, noise=0.01)
    with pytest.raises(ConversionError, match="would route to the blocks of other layers"):
        upcycle(dense, scaled(dense), tiny_config("shared_pool_aux"))
    with pytest.raises(ConversionError, match="depends on all experts"):
        upcycle(vanilla, scaled(vanilla), tiny_config("vanilla", "pool.groups=1"))
    pool, split = tiny_config("unipool"), tiny_config("unipool", "pool.groups=2")
    with pytest.raises(ConversionError, match="layer 0 can route to experts outside its part"):
        upcycle(pool, scaled(pool), split)
    with pytest.raises(ConversionError, match="the number of experts must be equal"):
        upcycle(pool, scaled(pool), tiny_config("unipool", "pool.experts=4"))
    private = tiny_config("vanilla_normrouter")
    weights = scaled(private)
    weights.params["pools"]["layers"]["mixture"]["scale"][2] *= -1
    with pytest.raises(ConversionError, match="layer 2: a negative router scale"):
        upcycle(private, weights, tiny_config("vanilla_normrouter", "pool.groups=1"))
    with pytest.raises(ConversionError, match=r"model\.num_kv_heads=4: the source has 2"):
        upcycle(dense, scaled(dense), tiny_config("vanilla", "model.num_kv_heads=4"))
    bare = tiny_config("vanilla", "model.norm=sandwich", "model.post_norm_experts=none")
    normed = tiny_config("dense", "model.norm=sandwich")
    with pytest.raises(ConversionError, match=r"model\.post_norm_experts=none: .*norm_then_gate"):
        upcycle(normed, scaled(normed), bare)
    with pytest.raises(ConversionError, match=r"attention\.kind=window: the source has full"):
        upcycle(dense, scaled(dense), tiny_config("vanilla", "attention.kind=window", "attention.window=3"))
