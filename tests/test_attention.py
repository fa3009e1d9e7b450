"""Causal attention in blocks against the library's masked product."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

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


@pytest.mark.parametrize(
    ("length", "num_heads", "num_kv_heads"), [(1, 4, 4), (5, 6, 1), (65, 4, 2), (130, 4, 4), (300, 4, 2)]
)
def test_values_and_gradients(length: int, num_heads: int, num_kv_heads: int) -> None:
    """One block, two, three that do not divide the length, and four."""
    operands = heads(length, num_heads, num_kv_heads)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=operands[0].shape), jnp.float32)

    def library(*operands: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(*operands, is_causal=True)

    @functools.partial(jax.jit, static_argnums=0)
    def both(attention: Callable[..., jax.Array], *operands: jax.Array) -> Any:
        found, pullback = jax.vjp(attention, *operands)
        return found, pullback(cotangent)

    for mine, theirs in zip(
        jax.tree.leaves(both(causal_attention, *operands)), jax.tree.leaves(both(library, *operands)), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_bfloat16_stays_bfloat16_and_close_to_float32() -> None:
    operands = heads(200, 4, 2, "bfloat16")
    found = jax.jit(causal_attention)(*operands)
    assert found.dtype == jnp.bfloat16
    wide = jax.jit(causal_attention)(*(x.astype(jnp.float32) for x in operands))
    np.testing.assert_allclose(found.astype(jnp.float32), wide, rtol=0.02, atol=0.02)
