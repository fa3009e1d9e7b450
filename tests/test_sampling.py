"""Decoding with a cache against the forward pass without one, and drawing against NumPy."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiny import METHODS, slow_among, tiny_config, tiny_state
from unipool_jax.config.schema import Config
from unipool_jax.model import sampling
from unipool_jax.model.sampling import Generated, Sampling, draw, generate, nucleus
from unipool_jax.model.transformer import empty_cache, forward, forward_cached
from unipool_jax.training.state import TrainState

pytestmark = pytest.mark.filterwarnings("ignore:NormRouter over")

VARIANTS = {
    **{method: (method,) for method in METHODS},
    "unipool top-2": ("unipool", "moe.top_k=2"),
    "vanilla top-2": ("vanilla", "moe.top_k=2"),
    "unipool in 2 pools": ("unipool", "pool.groups=2"),
    "one key-value head": ("unipool", "model.num_kv_heads=1"),
    "as many key-value heads as heads": ("vanilla", "model.num_kv_heads=4"),
    "rematerialized": ("unipool", "model.remat=full"),
    "dense layers first": ("unipool", "moe.dense_layers=2", "moe.shared_experts=1", "moe.depth_vectors=true"),
    "switch": ("unipool", "attention.kind=switch", "attention.window=3"),
    "norms behind blocks": ("unipool", "model.norm=depth_scaled_sandwich", "moe.dense_layers=1"),
    "window": ("unipool", "attention.kind=window", "attention.window=3"),
    "every second layer full": (
        *("unipool", "pool.groups=2", "attention.kind=alternating", "attention.window=3", "attention.full_layers=2"),
    ),
}
SLOW = {"shared_layer_aux", "shared_pool_aux", "vanilla_normrouter", "vanilla top-2", "rematerialized", "window"}
LENGTHS = np.array([1, 7, 4], np.int32)
MAX_TOKENS = 9
NO_END = -1


def model(*variant: str) -> tuple[Config, TrainState]:
    """A model with a selection bias that matters, where there is one."""
    config = tiny_config(*variant, "data.sequence_length=16", "model.compute_dtype=float32")
    state = tiny_state(config)
    bias = 0.3 * jax.random.normal(jax.random.key(5), state.balance.expert_bias_GNE.shape)
    return config, state._replace(balance=state.balance._replace(expert_bias_GNE=bias))


def prompts(config: Config, padding: int = 0) -> np.ndarray:
    tokens_BS = np.random.default_rng(1).integers(0, config.model.vocab_size, (3, 7), dtype=np.int32)
    return np.where(np.arange(7) < LENGTHS[:, None], tokens_BS, padding).astype(np.int32)


def run(config: Config, state: TrainState, tokens_BS: np.ndarray, seed: int = 0, **settings: Any) -> Generated:
    wanted = {"vocab_size": config.model.vocab_size, "end_token": NO_END, "max_tokens": MAX_TOKENS, "temperature": 0.0}
    options = Sampling(**wanted | settings)
    bias_GNE, key = state.balance.expert_bias_GNE, jax.random.key(seed)
    return jax.device_get(generate(config, state.params, bias_GNE, tokens_BS, LENGTHS, key, options))


@pytest.mark.parametrize("variant", slow_among(VARIANTS, SLOW))
def test_cached_logits_are_those_of_the_whole_forward_pass(variant: str) -> None:
    """Rows start together as a padded block, and continue at their own positions, one token, then three."""
    config, state = model(*VARIANTS[variant])
    bias_GNE = state.balance.expert_bias_GNE
    random = np.random.default_rng(0)
    tokens_BS = random.integers(0, config.model.vocab_size, (3, 16), dtype=np.int32)
    whole_BSV = np.asarray(forward(config, state.params, tokens_BS, bias_GNE)[0])
    advance = jax.jit(lambda tokens, cache, start: forward_cached(config, state.params, tokens, bias_GNE, cache, start))

    # Padding, and what is in the cache before, must not matter.
    padded_BS = np.where(np.arange(7) < LENGTHS[:, None], tokens_BS[:, :7], 3)
    cache = jax.tree.map(lambda x: x + 7.0, empty_cache(config, 3, 16))
    logits_BSV, cache = advance(padded_BS, cache, np.zeros(3, np.int32))
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(logits_BSV[row, :length], whole_BSV[row, :length], rtol=1e-4, atol=1e-5)
    at = LENGTHS.copy()
    for size in (1, 1, 3, 1, 3):
        ahead_BS = at[:, None] + np.arange(size)
        logits_BSV, cache = advance(np.take_along_axis(tokens_BS, ahead_BS, axis=1), cache, at)
        wanted_BSV = np.take_along_axis(whole_BSV, ahead_BS[:, :, None], axis=1)
        np.testing.assert_allclose(logits_BSV, wanted_BSV, rtol=1e-4, atol=1e-5)
        at += size
    assert at.max() == 16


def test_a_token_touches_no_more_of_the_cache_than_it_reads() -> None:
    """With a window no copy of a layer's slots is made: not for the scan over layers, nor to write one of them."""
    slots = 65536
    config = tiny_config("dense", "attention.kind=window", "attention.window=3", "model.compute_dtype=float32")
    state = jax.eval_shape(lambda: tiny_state(config))
    cache = jax.eval_shape(lambda: empty_cache(config, 1, slots))
    token, start = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    step: Any = jax.jit(functools.partial(forward_cached, config), donate_argnums=3)
    compiled = step.lower(state.params, token, state.balance.expert_bias_GNE, cache, start).compile()
    of_layer = 4 * slots * config.model.num_kv_heads * config.head_size
    assert compiled.memory_analysis().temp_size_in_bytes < of_layer / 4


@pytest.mark.parametrize("method", ["dense", "vanilla", "unipool"])
def test_greedy_text_is_the_argmax_of_the_uncached_forward_pass(method: str) -> None:
    config, state = model(method)
    found = run(config, state, prompts(config))
    np.testing.assert_array_equal(found.lengths_B, LENGTHS + MAX_TOKENS)
    logits_BSV = np.asarray(forward(config, state.params, found.tokens_BT, state.balance.expert_bias_GNE)[0])
    for tokens, logits, start, end in zip(found.tokens_BT, logits_BSV, LENGTHS, found.lengths_B, strict=True):
        np.testing.assert_array_equal(tokens[start:end], logits[start - 1 : end - 1].argmax(-1))


def test_the_prompt_stays_and_its_padding_does_not_matter() -> None:
    config, state = model("unipool")
    first, second = (run(config, state, prompts(config, padding), temperature=1.0) for padding in (0, 9))
    for row, (start, end) in enumerate(zip(LENGTHS, first.lengths_B, strict=True)):
        np.testing.assert_array_equal(first.tokens_BT[row, :start], prompts(config)[row, :start])
        np.testing.assert_array_equal(first.tokens_BT[row, :end], second.tokens_BT[row, :end])


def test_a_row_ends_at_the_end_token_and_the_others_go_on() -> None:
    config, state = model("vanilla")
    free = run(config, state, prompts(config))
    drawn = [tokens[start:].tolist() for tokens, start in zip(free.tokens_BT, LENGTHS, strict=True)]
    drawn = [row[:MAX_TOKENS] for row in drawn]
    end_token = drawn[1][2]
    found = run(config, state, prompts(config), end_token=end_token)
    for row, start in enumerate(LENGTHS):
        wanted = drawn[row][: drawn[row].index(end_token) + 1] if end_token in drawn[row] else drawn[row]
        assert found.lengths_B[row] == start + len(wanted)
        assert found.tokens_BT[row, start : found.lengths_B[row]].tolist() == wanted
    assert found.lengths_B[1] < LENGTHS[1] + MAX_TOKENS


def test_a_seed_fixes_the_text() -> None:
    config, state = model("unipool")
    texts = [run(config, state, prompts(config), seed, temperature=1.5, top_p=0.9).tokens_BT for seed in (0, 0, 1)]
    np.testing.assert_array_equal(texts[0], texts[1])
    assert (texts[0] != texts[2]).any()


def test_one_trace_for_all_tokens_and_all_calls_of_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = []

    def counted(*arguments: Any) -> Any:
        traces.append(1)
        return forward_cached(*arguments)

    monkeypatch.setattr(sampling, "forward_cached", counted)
    config, state = model("shared_pool_aux")
    # Lengths that no other test compiles.
    run(config, state, prompts(config), max_tokens=8)
    first = len(traces)
    assert first <= 3  # the prompt, and the body of the loop, which JAX may trace twice
    run(config, state, prompts(config, padding=5), seed=3, max_tokens=8)
    assert len(traces) == first


def nucleus_oracle(logits_V: np.ndarray, top_p: float) -> set[int]:
    """Token by token in float64."""
    weights = np.exp(logits_V.astype(np.float64) - logits_V.max())
    probabilities = weights / weights.sum()
    chosen: set[int] = set()
    for token in sorted(range(len(logits_V)), key=lambda token: (-logits_V[token], token)):
        if sum(probabilities[list(chosen)]) >= top_p:
            break
        chosen.add(token)
    return chosen


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.7, 0.9, 0.99])
def test_nucleus_against_numpy(top_p: float) -> None:
    logits_BV = np.random.default_rng(0).normal(0, 2, (8, 47)).astype(np.float32)
    logits_BV[0] = 1.0  # all equal; 47 of them, so that no share is one of the tested probabilities
    logits_BV[1, 7] = 30.0  # one certain token
    found_BV = np.asarray(nucleus(jnp.asarray(logits_BV), top_p))
    for found_V, logits_V in zip(found_BV, logits_BV, strict=True):
        kept = np.flatnonzero(np.isfinite(found_V))
        assert set(kept.tolist()) == nucleus_oracle(logits_V, top_p)
        np.testing.assert_array_equal(found_V[kept], logits_V[kept])


def test_a_nucleus_that_reaches_the_probability_exactly_is_complete() -> None:
    found = np.asarray(nucleus(jnp.zeros((1, 4)), 0.5))
    np.testing.assert_array_equal(np.isfinite(found), [[True, True, False, False]])


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8), (0.7, 0.6)])
def test_drawn_frequencies_are_the_probabilities(temperature: float, top_p: float) -> None:
    """20,000 draws; the standard error of a frequency is at most 0.0036. The pad ids 6 and 7 are never drawn."""
    logits_V = np.array([0.0, 2.0, 1.0, -1.0, 0.5, 1.5, 9.0, 9.0], np.float32)
    options = Sampling(6, NO_END, 1, temperature, top_p)
    tokens = np.asarray(draw(jnp.tile(logits_V, (20_000, 1)), jax.random.key(0), options))
    scaled = logits_V[:6] / np.float32(temperature)
    allowed = nucleus_oracle(scaled, top_p) if top_p < 1 else set(range(6))
    weights = np.array([np.exp(scaled[token]) if token in allowed else 0.0 for token in range(6)])
    found = np.bincount(tokens, minlength=6) / len(tokens)
    np.testing.assert_allclose(found, weights / weights.sum(), atol=0.016)
    assert set(np.flatnonzero(found).tolist()) <= allowed
