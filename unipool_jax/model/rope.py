"""Rotary positions (arXiv 2104.09864), and their scaling to sequences longer than a model was first trained on."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from unipool_jax.config.schema import ModelConfig


def rotate(heads_BSHC: jax.Array, positions_BS: jax.Array, model: ModelConfig) -> jax.Array:
    """Rotary position embedding over the whole head.

    Half-rotation layout: channel i is paired with channel i + C/2. Angles and products are float32.

    Args:
      heads_BSHC: queries or keys, `[B, S, H, C]` with even C.
      positions_BS: int32 `[B, S]`, or `[S]` where all rows have the same.
      model: base of the frequencies `base^(-2 i / C)`, and how they are scaled.
    """
    channels = heads_BSHC.shape[3]
    frequencies = model.rope_base ** (-jnp.arange(0, channels, 2, dtype=jnp.float32) / channels)
    if model.rope_scaling != "none":
        frequencies = frequencies * slowdown(model, channels)
    angles_BS1C = positions_BS.astype(jnp.float32)[..., None, None] * frequencies
    cos, sin = jnp.cos(angles_BS1C), jnp.sin(angles_BS1C)
    # Halves are converted one by one, and not before they are there in their own dtype. Otherwise XLA writes whole
    # heads in float32, twice the bytes, and on a TPU lays those out for attention.
    first, second = (
        half.astype(jnp.float32) for half in jnp.split(jax.lax.optimization_barrier(heads_BSHC), 2, axis=-1)
    )
    rotated = (first * cos - second * sin, second * cos + first * sin)
    if (factor := attention_factor(model)) != 1:
        rotated = (rotated[0] * factor, rotated[1] * factor)
    return jnp.concatenate([half.astype(heads_BSHC.dtype) for half in rotated], axis=-1)


def slowdown(model: ModelConfig, channels: int) -> np.ndarray:
    """What each frequency is multiplied by, float32 `[C/2]`: from 1, kept, down to 1 / rope_factor, interpolated.

    `linear` interpolates all (arXiv 2306.15595). `yarn` (arXiv 2309.00071, section 3.2) keeps those that turn more than
    rope_beta_fast times in rope_original_length positions and interpolates those that turn less than rope_beta_slow
    times. Between them the share falls linearly with the index of the channel, from the last one that is kept to the
    first one that is interpolated: so do the authors' code and every library, and the paper's formula, which is linear
    in the number of turns, differs from it there.
    """
    interpolated = 1 / model.rope_factor
    if model.rope_scaling == "linear":
        return np.full(channels // 2, interpolated, np.float32)
    assert model.rope_original_length is not None
    turns_once = model.rope_original_length / (2 * math.pi)

    def channel(turns: float) -> float:
        """The (fractional) pair of channels that turns so often in the original length."""
        return channels * math.log(turns_once / turns) / (2 * math.log(model.rope_base))

    first = max(math.floor(channel(model.rope_beta_fast)), 0)
    last = min(math.ceil(channel(model.rope_beta_slow)), channels - 1)
    # As there: without a channel between them, a step.
    share = np.clip((np.arange(channels // 2) - first) / max(last - first, 1e-3), 0, 1)
    return (share * interpolated + (1 - share)).astype(np.float32)


def attention_factor(model: ModelConfig) -> float:
    """Factor on rotated queries and keys; of `yarn` by default `0.1 ln(rope_factor) + 1`. Scores grow by its square."""
    if model.rope_scaling != "yarn":
        return 1.0
    wanted = model.rope_attention_factor
    return 0.1 * math.log(model.rope_factor) + 1 if wanted is None else wanted
