"""Scaled rotary positions: frequencies against transformers and the paper, rotation against NumPy, and longer texts."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiny import tiny_config, tiny_state
from unipool_jax.config.rules import problems
from unipool_jax.config.schema import Config, ConfigError, ModelConfig
from unipool_jax.data.tokenizer import load_tokenizer
from unipool_jax.evaluation.generate import encode_prompts
from unipool_jax.model.rope import attention_factor, rotate, slowdown
from unipool_jax.model.sampling import Sampling, generate
from unipool_jax.model.transformer import forward

pytestmark = pytest.mark.filterwarnings("ignore:NormRouter over")


def yarn(base: float, length: int, factor: float, **more: Any) -> ModelConfig:
    return ModelConfig(rope_scaling="yarn", rope_base=base, rope_original_length=length, rope_factor=factor, **more)


def plain(model: ModelConfig, channels: int) -> np.ndarray:
    return np.array([model.rope_base ** (-2 * i / channels) for i in range(channels // 2)])


LIBRARY = [
    (
        *(yarn(1e6, 1024, 4.0), 64, 1.138629436111989),
        [
            1.0,
            0.6493816,
            0.4216965,
            0.273842,
            0.1630089,
            0.09623184,
            0.05624206,
            0.0324645,
            0.01844662,
            0.01026762,
            0.005556339,
            0.002886548,
            0.001405853,
            0.0009129354,
            0.0005928435,
            0.0003849816,
            0.00025,
            0.0001623454,
        ],
    ),
    (
        *(yarn(1e4, 256, 8.0, rope_beta_fast=16.0, rope_beta_slow=2.0), 16, 1.2079441541679836),
        [1.0, 0.2239947, 0.04166666, 0.003952847, 0.00125, 0.0003952847, 0.000125, 3.952847e-05],
    ),
    (yarn(1e4, 64, 2.0, rope_attention_factor=1.5), 8, 1.5, [1.0, 0.075, 0.005, 0.0005]),
]
"""Frequencies, the first of 32 in the first case, and attention factors of `ROPE_INIT_FUNCTIONS["yarn"]` of
transformers 4.57.6 for a `LlamaConfig` of these values."""


@pytest.mark.parametrize(("model", "channels", "factor", "wanted"), LIBRARY)
def test_yarn_is_that_of_transformers(model: ModelConfig, channels: int, factor: float, wanted: list[float]) -> None:
    found = plain(model, channels) * slowdown(model, channels)
    np.testing.assert_allclose(found[: len(wanted)], wanted, rtol=1e-6)
    assert attention_factor(model) == pytest.approx(factor)


@pytest.mark.parametrize("channels", [64, 128])
def test_yarn_and_the_formula_of_the_paper_differ_only_between_its_bounds(channels: int) -> None:
    """gamma(r) of section 3.2, r turns in the original length: 0 below beta_slow, 1 above beta_fast, linear between."""
    model = yarn(1e6, 2048, 16.0)
    theta = plain(model, channels)
    turns = 2048 * theta / (2 * math.pi)
    gamma = np.clip((turns - 1) / (32 - 1), 0, 1)
    paper = (1 - gamma) * theta / 16 + gamma * theta
    found = theta * slowdown(model, channels)
    outside = (turns > 32) | (turns < 1)
    assert 0 < outside.sum() < len(theta) - 3
    np.testing.assert_allclose(found[outside], paper[outside], rtol=1e-6)
    assert ((theta / 16 < found) & (found < theta))[~outside].all()


def test_linear_divides_positions() -> None:
    heads = jnp.asarray(np.random.default_rng(0).normal(size=(1, 7, 2, 8)), jnp.float32)
    base = ModelConfig()
    scaled = dataclasses.replace(base, rope_scaling="linear", rope_factor=4.0, rope_original_length=8)
    spread = rotate(heads, 4 * jnp.arange(7), scaled)
    np.testing.assert_allclose(spread, rotate(heads, jnp.arange(7), base), rtol=1e-5, atol=1e-6)


def test_rotation_against_complex_numbers() -> None:
    model, channels = LIBRARY[1][0], 16
    heads = np.random.default_rng(0).normal(size=(2, 300, 3, channels)).astype(np.float32)
    turned = heads[..., :8] + 1j * heads[..., 8:]
    angles = np.arange(300)[:, None] * np.array(LIBRARY[1][3])
    wanted = 1.2079441541679836 * turned * np.exp(1j * angles)[:, None]
    found = rotate(jnp.asarray(heads), jnp.arange(300), model)
    np.testing.assert_allclose(found[..., :8], wanted.real, rtol=1e-3, atol=2e-4)
    np.testing.assert_allclose(found[..., 8:], wanted.imag, rtol=1e-3, atol=2e-4)


LONGER = ("model.rope_scaling=yarn", "model.rope_factor=4", "model.rope_original_length=8", "model.rope_base=100")


def test_sampling_goes_on_beyond_the_training_length() -> None:
    config = tiny_config("unipool", *LONGER)
    assert (config.data.sequence_length, config.positions) == (8, 32)
    state = tiny_state(config)
    prompts_BS, lengths_B, wanted = encode_prompts(["ab", "cdefghijkl"], load_tokenizer("bytes"), config, 22)
    options = Sampling(64, -1, wanted, temperature=0.0)
    bias = state.balance.expert_bias_GNE
    prompts_BS = np.minimum(prompts_BS, 63)
    found = generate(config, state.params, bias, prompts_BS, lengths_B, jax.random.key(0), options)
    logits = np.asarray(jax.jit(forward, static_argnums=0)(config, state.params, found.tokens_BT, bias)[0])
    for tokens, scores, start, end in zip(found.tokens_BT, logits, lengths_B, found.lengths_B, strict=True):
        assert end == start + 22
        np.testing.assert_array_equal(tokens[start:end], scores[start - 1 : end - 1].argmax(-1))
    with pytest.raises(ConfigError, match=r"max_tokens=23 a prompt can have 1 to 9, as the model reads 32 positions"):
        encode_prompts(["cdefghijkl"], load_tokenizer("bytes"), config, 23)
    with pytest.raises(ConfigError, match="the model reads 8 positions"):
        encode_prompts(["cdefghijkl"], load_tokenizer("bytes"), tiny_config("unipool"), 4)


def changed(**settings: Any) -> Config:
    config = tiny_config("unipool", *LONGER)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **settings))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(rope_scaling="none"), "model.rope_factor=4.0: unused with model.rope_scaling=none"),
        (
            changed(rope_scaling="linear", rope_beta_fast=8.0),
            "model.rope_beta_fast=8.0: unused with model.rope_scaling=l",
        ),
        (changed(rope_original_length=None), "model.rope_scaling=yarn: needs model.rope_original_length"),
        (changed(rope_original_length=2, rope_factor=2.0), "data.sequence_length=8: longer than .* = 4 positions"),
        (changed(rope_beta_slow=40.0), "model.rope_beta_slow=40: must be less than model.rope_beta_fast=32"),
        (changed(rope_factor=0.5), "model.rope_factor=0.5: must be at least 1"),
    ],
)
def test_bad_scalings_are_named(config: Config, message: str) -> None:
    found = problems(config)
    assert any(re.search(message, line) for line in found), found
