"""Causal grouped-query attention with rotary positions (spec A.2)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from unipool_jax.config import ModelConfig


def rotate(heads_BSHC: jax.Array, base: float) -> jax.Array:
    """Rotary position embedding over the whole head, positions 0..S-1 (arXiv 2104.09864).

    Half-rotation layout: channel i is paired with channel i + C/2. Angles and products are float32.

    Args:
      heads_BSHC: queries or keys, `[B, S, H, C]` with even C.
      base: base of the frequencies `base^(-2 i / C)`.
    """
    length, channels = heads_BSHC.shape[1], heads_BSHC.shape[3]
    frequencies = base ** (-jnp.arange(0, channels, 2, dtype=jnp.float32) / channels)
    angles_S1C = jnp.arange(length, dtype=jnp.float32)[:, None, None] * frequencies
    cos, sin = jnp.cos(angles_S1C), jnp.sin(angles_S1C)
    first, second = jnp.split(heads_BSHC.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(heads_BSHC.dtype)


class Attention(nn.Module):
    """Attention block without its norm and residual: `[B, S, D] -> [B, S, D]`."""

    config: ModelConfig

    @nn.compact
    def __call__(self, hidden_BSD: jax.Array) -> jax.Array:
        config = self.config
        width = config.hidden_size
        head_size = width // config.num_heads
        dtype = hidden_BSD.dtype
        init = nn.initializers.normal(config.init_std)
        init_output = nn.initializers.normal(config.init_std / math.sqrt(2 * config.num_layers))

        def project(name: str, num_heads: int) -> jax.Array:
            weights_DC = self.param(name, init, (width, num_heads * head_size), jnp.float32).astype(dtype)
            return (hidden_BSD @ weights_DC).reshape(*hidden_BSD.shape[:2], num_heads, head_size)

        query = rotate(project("query", config.num_heads), config.rope_base)
        key = rotate(project("key", config.num_kv_heads), config.rope_base)
        value = project("value", config.num_kv_heads)
        # Scores and softmax are float32 inside; the default scale is 1 / sqrt(head_size).
        mixed_BSHC = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        output_DD = self.param("output", init_output, (width, width), jnp.float32).astype(dtype)
        return mixed_BSHC.reshape(hidden_BSD.shape) @ output_DD
