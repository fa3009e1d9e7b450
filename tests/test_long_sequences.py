"""Sequences of thousands of tokens: a tile of scores in memory at a time, and a step at 4096."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from test_attention import documents, heads
from tiny import tiny_batch, tiny_config, tiny_state
from unipool_jax.config.chips import parse_topology
from unipool_jax.config.compose import compose_config
from unipool_jax.kernels import tiled
from unipool_jax.kernels.causal import causal_attention, causal_attention_of_both
from unipool_jax.kernels.tiled import Mask, computed_tiles
from unipool_jax.planner import work
from unipool_jax.planner.attention import attention_cost
from unipool_jax.training.step import make_train_step


@pytest.mark.parametrize(
    ("kind", "dtype"), [("full", "float32"), ("window", "float32"), ("both", "float32"), ("both", "bfloat16")]
)
def test_tiles_give_what_whole_blocks_give(kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With segments, and a length that tiles do not divide; neither padding nor a query that sees nothing gives NaN."""
    operands, segments = heads(270, 4, 2, dtype), jnp.asarray(documents(270))

    def found() -> Any:
        def product(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
            if kind == "both":
                return causal_attention_of_both(query, key, value, segments, 200)
            return causal_attention(query, key, value, segments, 200 if kind == "window" else None)

        value, pullback = jax.vjp(product, *operands)
        return value, pullback(jax.tree.map(jnp.cos, value))

    whole = jax.jit(lambda: found())()
    monkeypatch.setattr(tiled, "LEAST", 270)
    monkeypatch.setattr(tiled, "TILE", 16)
    rtol, atol = (1e-4, 1e-5) if dtype == "float32" else (0.05, 0.05)
    for mine, theirs in zip(jax.tree.leaves(jax.jit(lambda: found())()), jax.tree.leaves(whole), strict=True):
        assert mine.dtype == theirs.dtype == dtype
        np.testing.assert_allclose(mine.astype(np.float32), theirs.astype(np.float32), rtol=rtol, atol=atol)


@pytest.mark.parametrize("mask", [Mask(), Mask(700), Mask(256), Mask(1), Mask(700, rest=True), Mask(1, rest=True)])
def test_tiles_are_those_that_a_query_sees_any_of(mask: Mask) -> None:
    place = jnp.arange(1024)
    visible = np.asarray(jnp.any(mask.visible(place[:, None], place).reshape(4, 256, 4, 256), axis=(1, 3)))
    assert computed_tiles(1000, mask) == np.sum(visible)
    for block, row in enumerate(visible):
        first, end = mask.tiles(block, max)
        np.testing.assert_array_equal(np.flatnonzero(row), np.arange(first, end))


def test_memory_of_attention_grows_with_the_sequence_not_with_its_square() -> None:
    def temporary(length: int) -> int:
        shapes = [jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)] * 3
        gradient = jax.grad(lambda q, k, v: jnp.sum(causal_attention(q, k, v)), argnums=(0, 1, 2))
        analysis: Any = jax.jit(gradient).lower(*shapes).compile().memory_analysis()
        return int(analysis.temp_size_in_bytes)

    short, long = temporary(8192), temporary(32768)
    assert long < 4.5 * short
    # 24 bytes a score in whole blocks.
    assert long < 24 * 5 / 8 * 32768**2 / 20


def test_the_planner_knows_both() -> None:
    def cost(length: int) -> Any:
        config = compose_config(["scale=182m", f"data.sequence_length={length}", "kernels.attention=blocks"])
        return attention_cost(config, parse_topology("h100:8"), 12, 1)

    assert cost(4096).kept_bytes == 16 * cost(1024).kept_bytes > 0
    assert cost(32768).kept_bytes == 12 * 4 * 32768
    assert cost(32768).working_bytes == pytest.approx(4 * cost(8192).working_bytes, rel=0.2)
    assert cost(32768).flops == pytest.approx(16 * cost(8192).flops, rel=0.05)


def test_one_device_is_planned_without_the_logits_of_all_positions() -> None:
    def temporaries(topology: str, rows: int) -> float:
        same = (f"{name}={rows}" for name in ("train.batch_size", "train.microbatch_size", "mesh.data"))
        length = ("data.sequence_length=32768", f"loss.switch_group_sequences={rows}")
        config = compose_config(["scale=demo", "model.remat=full", *length, *same])
        sizes = {"data": rows, "fsdp": 1, "expert": 1, "tensor": 1}
        return work.count(config, sizes, parse_topology(topology)).temporary_bytes

    logits = 32768 * 8192 * 6
    assert temporaries("h100:1", 1) < logits / 2 < logits < temporaries("h100:2", 2)


def test_a_step_at_4096_tokens() -> None:
    """Logits are made in chunks: those of all positions would be larger than everything else together."""
    config = tiny_config(
        *("dense", "model.num_layers=1", "model.num_heads=1", "model.num_kv_heads=1", "model.vocab_size=8192"),
        *("data.sequence_length=4096", "data.document_mask=true", "train.batch_size=1", "train.microbatch_size=1"),
        *("loss.switch_group_sequences=1", "model.remat=full"),
    )
    step: Any = make_train_step(config)
    state, batch = tiny_state(config), tiny_batch(config)
    compiled = step.lower(state, batch).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    scores, logits = 5 / 8 * 4 * 4096**2, 4 * 4096 * 8192
    assert temporary < 3.6 * scores + logits / 2
    state, metrics = compiled(state, batch)
    assert bool(metrics["finite"])
    assert float(metrics["loss/lm"]) == pytest.approx(np.log(8192), rel=0.2)
