"""One SwiGLU block that every token visits."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from unipool_jax.config.schema import ModelConfig
from unipool_jax.parallel.linear import linear

SWIGLU_AXES = {"gate": ("embed", "ffn"), "up": ("embed", "ffn"), "down": ("ffn_rows", None)}
"""Logical axes (see `mesh.RULES`) of the parameters of a block, in the order of the fields of `SwiGLUWeights`."""


class SwiGLUWeights(NamedTuple):
    """Parameters of one block, float32."""

    gate_DF: jax.Array
    up_DF: jax.Array
    down_FD: jax.Array


class SwiGLU(nn.Module):
    """Creates `SwiGLUWeights`, with the standard deviations of an expert (method M1.6)."""

    config: ModelConfig
    width: int
    """F, hidden width of the block."""

    @nn.compact
    def __call__(self) -> SwiGLUWeights:
        model = self.config
        init, init_down = nn.initializers.normal(model.matrix_std), nn.initializers.normal(model.output_std)
        return SwiGLUWeights(
            self.param("gate", init, (model.hidden_size, self.width), jnp.float32),
            self.param("up", init, (model.hidden_size, self.width), jnp.float32),
            self.param("down", init_down, (self.width, model.hidden_size), jnp.float32),
        )


def swiglu(hidden_ND: jax.Array, weights: SwiGLUWeights) -> jax.Array:
    """`(silu(h gate) * (h up)) down`, `[N, D]` in the dtype of `hidden_ND`; the sigmoid is taken in float32."""
    gate_axes, up_axes, down_axes = SWIGLU_AXES.values()
    gated_NF = jax.nn.silu(linear(hidden_ND, weights.gate_DF, gate_axes).astype(jnp.float32)).astype(hidden_ND.dtype)
    return linear(gated_NF * linear(hidden_ND, weights.up_DF, up_axes), weights.down_FD, down_axes)
