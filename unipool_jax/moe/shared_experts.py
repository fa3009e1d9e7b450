"""Always-on experts: what every token of a layer visits beside the experts that it is routed to.

`y = sum_i g_i E_i(h) + S(h)` in DeepSeek-V3 (arXiv 2412.19437), and `y = sum_i g_i E_i(h) + sigmoid(w . h) S(h)` in
Qwen2-MoE (arXiv 2407.10671). S is private to the layer: one block of the width of all its always-on experts.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from unipool_jax.config.schema import Config
from unipool_jax.kernels.norms import post_norm
from unipool_jax.moe.swiglu import SwiGLU, SwiGLUWeights, swiglu
from unipool_jax.parallel.linear import linear

GATE_AXES = (None, "embed")
"""Logical axes of the sigmoid gate."""


class SharedWeights(NamedTuple):
    """Parameters of the always-on experts of one layer, float32."""

    block: SwiGLUWeights
    gate_1D: jax.Array | None
    """The one row of the sigmoid gate; None: the output is added as it is."""


class SharedExperts(nn.Module):
    """Creates `SharedWeights`."""

    config: Config

    @nn.compact
    def __call__(self) -> SharedWeights:
        config, model = self.config, self.config.model
        block = SwiGLU(model, config.shared_width, name="block")()
        if not config.moe.shared_expert_gate:
            return SharedWeights(block, None)
        init = nn.initializers.normal(model.init_std)
        return SharedWeights(block, self.param("sigmoid_gate", init, (1, model.hidden_size), jnp.float32))


def always_on(
    hidden_ND: jax.Array, weights: SharedWeights, post_norm_D: jax.Array | None = None, epsilon: float = 1e-8
) -> jax.Array:
    """What the always-on experts add to a layer's output, `[N, D]` in the dtype of `hidden_ND`.

    They are one expert to a norm of each expert's output, whose gain is `post_norm_D`; the sigmoid comes behind it.
    """
    output_ND = post_norm(swiglu(hidden_ND, weights.block), post_norm_D, epsilon)
    if weights.gate_1D is None:
        return output_ND
    share_N1 = jax.nn.sigmoid(linear(hidden_ND, weights.gate_1D, GATE_AXES, transposed=True, wide=True))
    return (output_ND.astype(jnp.float32) * share_N1).astype(hidden_ND.dtype)
