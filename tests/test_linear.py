"""Products with weights that a mesh may split."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unipool_jax.config.schema import MeshConfig
from unipool_jax.parallel.linear import linear, lookup
from unipool_jax.parallel.mesh import make_mesh


def operands(transposed: bool, dtype: str) -> tuple[jax.Array, jax.Array]:
    random = np.random.default_rng(0)
    shape = (12, 8) if transposed else (8, 12)
    return jnp.asarray(random.normal(size=(16, 4, 8)), dtype), jnp.asarray(random.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("transposed", [False, True])
def test_values_and_gradients(transposed: bool) -> None:
    inputs, weights = operands(transposed, "float32")

    def loss(product: Any, inputs: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(product(inputs, weights)))

    plain = jax.value_and_grad(lambda x, w: loss(lambda x, w: x @ (w.T if transposed else w), x, w), (0, 1))
    ours = jax.value_and_grad(lambda x, w: loss(lambda x, w: linear(x, w, (None, None), transposed), x, w), (0, 1))
    for mine, theirs in zip(
        jax.tree.leaves(ours(inputs, weights)), jax.tree.leaves(plain(inputs, weights)), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [None, (8, 1, 1, 1), (2, 2, 1, 2)])
def test_gradients_of_narrow_products_are_summed_in_float32(sizes: tuple[int, int, int, int] | None) -> None:
    """The sum of 72 products close to 1 needs more bits than bfloat16 has."""
    inputs = jnp.ones((72, 8), jnp.bfloat16) * 1.0078125
    weights = jnp.ones((8, 4), jnp.float32)

    def total(weights: jax.Array) -> jax.Array:
        output = linear(inputs, weights, ("embed", "heads"))
        assert output.dtype == jnp.bfloat16
        return jnp.sum(output.astype(jnp.float32))

    if sizes is None:
        gradient = jax.jit(jax.grad(total))(weights)
    else:
        with jax.set_mesh(make_mesh(MeshConfig(*sizes), jax.devices()[:8])):
            gradient = jax.jit(jax.grad(total))(weights)
    np.testing.assert_array_equal(gradient, np.full((8, 4), 72 * 1.0078125, np.float32))


def test_logits_are_float32() -> None:
    inputs, weights = operands(True, "bfloat16")
    output = linear(inputs, weights, (None, None), True, True)
    assert output.dtype == jnp.float32
    exact = np.asarray(inputs, np.float64) @ np.asarray(weights.astype(jnp.bfloat16), np.float64).T
    np.testing.assert_allclose(output, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [None, (2, 2, 1, 2)])
def test_gradients_of_lookups_add_up_in_float32(sizes: tuple[int, int, int, int] | None) -> None:
    tokens = jnp.array([3] * 72 + [1] * 8)
    table = jnp.arange(8 * 4, dtype=jnp.float32).reshape(8, 4)

    def total(table: jax.Array) -> jax.Array:
        rows = lookup(table, tokens, ("vocab", "embed"), jnp.bfloat16)
        assert rows.dtype == jnp.bfloat16
        return jnp.sum(rows.astype(jnp.float32)) * 1.0078125

    np.testing.assert_array_equal(lookup(table, tokens, ("vocab", "embed"), jnp.bfloat16)[0], table[3])
    if sizes is None:
        gradient = jax.jit(jax.grad(total))(table)
    else:
        with jax.set_mesh(make_mesh(MeshConfig(*sizes), jax.devices()[:8])):
            gradient = jax.jit(jax.grad(total))(table)
    expected = np.zeros((8, 4), np.float32)
    expected[3], expected[1] = 72 * 1.0078125, 8 * 1.0078125
    np.testing.assert_array_equal(gradient, expected)
