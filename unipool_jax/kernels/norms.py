"""Normalization by the root mean square."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from unipool_jax.kernels.recompute import recompute


def rms_norm(hidden: jax.Array, gain_D: jax.Array, epsilon: float) -> jax.Array:
    """`x / sqrt(mean(x^2) + epsilon) * gain` over the last axis, in float32, returned in the dtype of x.

    Inside a scan the backward pass keeps x alone: autodiff would keep three float32 arrays of its size.
    """

    def normed(hidden: jax.Array, gain_D: jax.Array) -> jax.Array:
        wide = hidden.astype(jnp.float32)
        unit = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
        return (unit * gain_D).astype(hidden.dtype)

    return recompute(normed)(hidden, gain_D)


def post_norm(output: jax.Array, gain_D: jax.Array | None, epsilon: float) -> jax.Array:
    """`rms_norm` of what a block computed; without a gain the block has no such norm, and the output stays as it is."""
    return output if gain_D is None else rms_norm(output, gain_D, epsilon)
