"""Sequences of thousands of tokens: scores of a few queries in memory at a time, and a step at 4096."""

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
from unipool_jax.kernels import causal
from unipool_jax.kernels.causal import causal_attention, causal_attention_of_both
from unipool_jax.planner.attention import attention_cost
from unipool_jax.training.step import make_train_step


@pytest.mark.parametrize("both", [False, True])
def test_pieces_give_what_whole_blocks_give(both: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With segments, and a length that pieces do not divide; the padding of the last piece gives no NaN."""
    operands, segments = heads(270, 4, 2), jnp.asarray(documents(270))

    def found() -> Any:
        def product(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
            if both:
                return causal_attention_of_both(query, key, value, segments, 200)
            return causal_attention(query, key, value, segments)

        value, pullback = jax.vjp(product, *operands)
        return value, pullback(jax.tree.map(jnp.cos, value))

    whole = jax.jit(lambda: found())()
    monkeypatch.setattr(causal, "PIECE", 16)
    assert causal.in_pieces(270)
    for mine, theirs in zip(jax.tree.leaves(jax.jit(lambda: found())()), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


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
        return attention_cost(config, parse_topology("gpu:8"), 12, 1)

    assert cost(4096).kept_bytes == 16 * cost(1024).kept_bytes > 0
    assert cost(32768).kept_bytes == 0
    assert cost(32768).working_bytes == pytest.approx(4 * cost(8192).working_bytes)
    assert cost(32768).flops == pytest.approx(16 * cost(8192).flops)


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
