"""Causal attention in blocks against the library's masked product."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unipool_jax.model.attention import causal_attention


def heads(length: int, num_heads: int, num_kv_heads: int, dtype: str = "float32") -> list[jax.Array]:
    random = np.random.default_rng(length)
    return [
        jnp.asarray(random.normal(size=(2, length, count, 8)), dtype)
        for count in (num_heads, num_kv_heads, num_kv_heads)
    ]


@pytest.mark.parametrize("length", [1, 5, 65, 130, 300])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_values_and_gradients(length: int, num_heads: int, num_kv_heads: int) -> None:
    """One block, two, three that do not divide the length, and four."""
    operands = heads(length, num_heads, num_kv_heads)

    def library(*operands: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(*operands, is_causal=True)

    found, pullback = jax.vjp(causal_attention, *operands)
    wanted, wanted_pullback = jax.vjp(library, *operands)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=found.shape), jnp.float32)
    for gradient, wanted_gradient in zip(pullback(cotangent), wanted_pullback(cotangent), strict=True):
        np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-4, atol=1e-5)


def test_bfloat16_stays_bfloat16_and_close_to_float32() -> None:
    operands = heads(200, 4, 2, "bfloat16")
    found = causal_attention(*operands)
    assert found.dtype == jnp.bfloat16
    wide = causal_attention(*(x.astype(jnp.float32) for x in operands))
    np.testing.assert_allclose(found.astype(jnp.float32), wide, rtol=0.02, atol=0.02)
