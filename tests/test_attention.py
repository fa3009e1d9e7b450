"""Causal attention in blocks, with windows and segments, against NumPy; what a window costs; the kinds of layers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from tiny import tiny_batch, tiny_config, tiny_state
from unipool_jax.kernels.causal import block_of_window, cached_attention, causal_attention
from unipool_jax.training.step import make_train_step


def heads(length: int, num_heads: int, num_kv_heads: int, dtype: str = "float32") -> list[jax.Array]:
    random = np.random.default_rng(length)
    return [
        jnp.asarray(random.normal(size=(2, length, count, 8)), dtype)
        for count in (num_heads, num_kv_heads, num_kv_heads)
    ]


def documents(length: int) -> np.ndarray:
    """Segments of two rows: borders at a third and at two thirds, and one border near the beginning."""
    rows = np.zeros((2, length), np.int32)
    rows[0, length // 3 :] += 1
    rows[0, 2 * length // 3 :] += 1
    rows[1, 2:] = 7
    return rows


@pytest.mark.parametrize(
    ("length", "num_heads", "num_kv_heads", "window", "apart"),
    [
        (1, 4, 4, None, False),
        (5, 6, 1, None, True),
        (65, 4, 2, None, False),
        (130, 4, 4, None, False),
        (300, 4, 2, None, True),
        (5, 6, 1, 3, False),
        (65, 4, 2, 1, False),
        (130, 4, 4, 3, True),
        (130, 4, 2, 64, False),
        (300, 4, 2, 65, True),
        (300, 4, 2, 200, True),
        (517, 2, 1, 1, False),
        (517, 2, 1, 258, True),
        (65, 4, 2, 999, False),
    ],
)
def test_values_and_gradients(length: int, num_heads: int, num_kv_heads: int, window: int | None, apart: bool) -> None:
    """One block of queries, two, four, many at once; lengths that they do not divide; windows of every width."""
    operands, segments = heads(length, num_heads, num_kv_heads), documents(length) if apart else None
    numbers = None if segments is None else jnp.asarray(segments)
    upstream = np.random.default_rng(1).normal(size=operands[0].shape).astype(np.float32)

    @jax.jit
    def both(*operands: jax.Array) -> Any:
        product = functools.partial(causal_attention, segments_BS=numbers, window=window)
        found, pullback = jax.vjp(product, *operands)
        return found, pullback(jnp.asarray(upstream))

    found, gradients = jax.device_get(both(*operands))
    wide = [np.asarray(operand, np.float64) for operand in operands]
    for row in range(2):
        seen = oracles.visible(length, window, None if segments is None else segments[row])
        query, key, value = (operand[row] for operand in wide)
        np.testing.assert_allclose(found[row], oracles.product(query, key, value, seen), rtol=1e-4, atol=1e-5)
        expected = oracles.product_gradients(query, key, value, seen, upstream[row])
        for mine, theirs in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(mine[row], theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("window", [None, 50, 120])
def test_bfloat16_stays_bfloat16_and_close_to_float32(window: int | None) -> None:
    operands = heads(200, 4, 2, "bfloat16")
    product = jax.jit(functools.partial(causal_attention, window=window))
    found = product(*operands)
    assert found.dtype == jnp.bfloat16
    wide = product(*(x.astype(jnp.float32) for x in operands))
    np.testing.assert_allclose(found.astype(jnp.float32), wide, rtol=0.02, atol=0.02)


def flops(function: Any, *operands: Any) -> float:
    """Floating-point operations of a traced program; nothing is compiled."""
    analysis = jax.jit(function).lower(*operands).cost_analysis()
    assert analysis is not None
    return float(analysis["flops"])


def test_the_work_of_a_window_grows_with_the_sequence_alone() -> None:
    """Forward and backward: four times the tokens is four times the work, and sixteen times that of a full layer."""

    def work(length: int, window: int | None) -> float:
        shapes = [jax.ShapeDtypeStruct((1, length, count, 64), jnp.float32) for count in (4, 2, 2)]

        def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return jnp.sum(causal_attention(query, key, value, window=window))

        return flops(jax.grad(loss, argnums=(0, 1, 2)), *shapes)

    assert work(3840, 240) == pytest.approx(4 * work(960, 240), rel=0.02)
    assert work(960, None) == pytest.approx(9 * work(320, None), rel=0.02)
    # 240 of 960 positions in blocks of 64: a query is compared with five blocks, in a full layer with 5/8 of 960.
    assert work(960, 240) / work(960, None) == pytest.approx(320 / 600, rel=0.02)


@pytest.mark.parametrize(("length", "window"), [(64, 33), (1024, 512), (1000, 999)])
def test_wide_windows_cost_no_more_than_a_full_layer(length: int, window: int) -> None:
    assert block_of_window(window, length) is None


SLOTS = 240
"""Positions of a cache."""


@pytest.mark.parametrize(
    ("length", "starts", "window", "apart"),
    [
        (1, [239, 3], None, True),
        (1, [0, 200], 7, False),
        (1, [239, 3], 1, True),
        (5, [0, 90], 7, True),
        (5, [0, 235], 500, False),
        (150, [0, 85], 7, True),
        (150, [0, 90], 70, False),
    ],
)
def test_a_cache_is_attended_to_like_a_sequence(
    length: int, starts: list[int], window: int | None, apart: bool
) -> None:
    """Each row from its own position on: one token, a few, and more than one block of queries."""
    operands, segments = heads(SLOTS, 4, 2), documents(SLOTS) if apart else None
    queries = jnp.stack([row[start : start + length] for row, start in zip(operands[0], starts, strict=True)])
    product = jax.jit(functools.partial(cached_attention, window=window))
    other = [jnp.stack([jnp.full_like(operand, jnp.nan), operand]) for operand in operands[1:]]
    found = np.asarray(product(queries, *other, 1, jnp.asarray(starts), segments))
    for row, start in enumerate(starts):
        seen = oracles.visible(SLOTS, window, None if segments is None else segments[row])
        query, key, value = (np.asarray(operand[row], np.float64) for operand in operands)
        whole = oracles.product(query, key, value, seen)
        np.testing.assert_allclose(found[row], whole[start : start + length], rtol=1e-4, atol=1e-5)


def test_a_token_reads_the_window_however_long_the_text_is() -> None:
    def work(slots: int, window: int | None) -> float:
        query = jax.ShapeDtypeStruct((2, 1, 4, 64), jnp.float32)
        cache = jax.ShapeDtypeStruct((3, 2, slots, 2, 64), jnp.float32)
        start = jax.ShapeDtypeStruct((2,), jnp.int32)
        return flops(functools.partial(cached_attention, window=window), query, cache, cache, 1, start)

    assert work(4096, 64) == pytest.approx(work(1024, 64), rel=0.01)
    assert work(4096, None) == pytest.approx(4 * work(1024, None), rel=0.01)
    assert work(4096, 64) < work(4096, None) / 32


KINDS = {
    "full": (),
    "window": ("attention.kind=window", "attention.window=3"),
    "alternating": ("attention.kind=alternating", "attention.window=3", "attention.full_layers=[0,3]"),
    "switch": ("attention.kind=switch", "attention.window=3", "attention.switch_weight=0.1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_recomputed_changes_no_gradient(kind: str, apart: bool) -> None:
    found = {}
    for remat in ("none", "moe", "full"):
        words = [f"data.document_mask={str(apart).lower()}", "model.compute_dtype=float32", f"model.remat={remat}"]
        config = tiny_config("unipool", *KINDS[kind], *words)
        _, metrics = make_train_step(config)(tiny_state(config), tiny_batch(config))
        found[remat] = [float(metrics[name]) for name in ("loss/lm", "loss/total", "grad_norm")]
    assert found["moe"] == pytest.approx(found["none"], rel=1e-6)
    assert found["full"] == pytest.approx(found["none"], rel=1e-6)
