"""Upcycled models compute what their source computes."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from test_convert import random_weights
from tiny import tiny_batch, tiny_config
from unipool_jax.config import Config
from unipool_jax.convert.errors import ConversionError
from unipool_jax.convert.upcycle import upcycle
from unipool_jax.convert.weights import Weights
from unipool_jax.model.transformer import forward

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
    ],
    ids=" ".join,
)
def test_dense_to_mixture_is_exact(overrides: tuple[str, ...]) -> None:
    """All factors are powers of two, so only the order of sums may differ."""
    config, new = tiny_config("dense"), tiny_config(*overrides)
    weights = scaled(config)
    np.testing.assert_allclose(
        logits(new, upcycle(config, weights, new)), logits(config, weights), rtol=1e-5, atol=1e-5
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


def test_what_cannot_be_exact_is_refused() -> None:
    dense, vanilla = tiny_config("dense"), tiny_config("vanilla")
    with pytest.raises(ConversionError, match="no weights compute what the dense model does"):
        upcycle(dense, scaled(dense), tiny_config("unipool"))
    with pytest.raises(ConversionError, match="only by a selection bias"):
        upcycle(dense, scaled(dense), tiny_config("shared_pool_aux"))
    with pytest.raises(ConversionError, match="every expert takes part"):
        upcycle(vanilla, scaled(vanilla), tiny_config("vanilla", "pool.groups=1"))
    pool, split = tiny_config("unipool"), tiny_config("unipool", "pool.groups=2")
    with pytest.raises(ConversionError, match="layer 0 may choose experts outside its share"):
        upcycle(pool, scaled(pool), split)
    with pytest.raises(ConversionError, match="the number of experts must stay"):
        upcycle(pool, scaled(pool), tiny_config("unipool", "pool.experts=4"))
    private = tiny_config("vanilla_normrouter")
    weights = scaled(private)
    weights.params["pools"]["layers"]["mixture"]["scale"][2] *= -1
    with pytest.raises(ConversionError, match="layer 2: a negative router scale"):
        upcycle(private, weights, tiny_config("vanilla_normrouter", "pool.groups=1"))
    with pytest.raises(ConversionError, match="backbones differ"):
        upcycle(dense, scaled(dense), tiny_config("vanilla", "model.num_kv_heads=4"))
