"""The expert bank: one set of SwiGLU experts per pool."""

from __future__ import annotations

import math

import jax.numpy as jnp
from flax import linen as nn

from unipool_jax.kernels.grouped_ffn import Bank


class ExpertPool(nn.Module):
    """Holds the parameters of one pool (float32) and hands them out as arrays.

    The transformer passes the arrays, never this module, into its scan over layers: a module given to a scan over the
    parameter axis is silently copied per layer, which would un-share the pool.
    """

    num_experts: int
    hidden_size: int
    ffn_size: int
    init_std: float
    num_layers: int
    """L, the depth of the whole model: the down projection starts at init_std / sqrt(2 L) (spec A.3)."""

    @nn.compact
    def __call__(self) -> Bank:
        wide = (self.num_experts, self.hidden_size, self.ffn_size)
        narrow = (self.num_experts, self.ffn_size, self.hidden_size)
        init = nn.initializers.normal(self.init_std)
        init_down = nn.initializers.normal(self.init_std / math.sqrt(2 * self.num_layers))
        return Bank(
            self.param("gate", init, wide, jnp.float32),
            self.param("up", init, wide, jnp.float32),
            self.param("down", init_down, narrow, jnp.float32),
        )
