"""Switch Attention (arXiv 2603.26380): each token of each layer attends to all positions before it, or to a window.

A router of one row decides on the normed input of the layer, over the same queries, keys and values. Its gate is hard,
its gradient that of the sigmoid (straight-through). A penalty pushes toward the window, less where the prediction is
bad or where the two disagree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from unipool_jax.config.schema import AttentionConfig
from unipool_jax.kernels.causal import cached_attention, causal_attention, causal_attention_of_both


class Switched(NamedTuple):
    """What a layer decided; arrays of all layers are stacked to `[G, L/G, B, S]`."""

    logit_BS: jax.Array
    """Of the router, float32; above 0 is full attention."""
    full_BS: jax.Array
    """Which tokens attended to all positions, bool."""
    disagreement_BS: jax.Array
    """Between the two, float32, without gradient; see `disagreement`. Zero where only one was computed."""


def router_logits(hidden_BSD: jax.Array, switch_D: jax.Array) -> jax.Array:
    """Logits of the gate, float32 `[B, S]`, of the normed input of a layer."""
    return jnp.einsum("bsd,d->bs", hidden_BSD, switch_D, preferred_element_type=jnp.float32)


def takes_full(attention: AttentionConfig, logit_BS: jax.Array, position_BS: jax.Array) -> jax.Array:
    """Which tokens attend to all positions, bool `[B, S]`.

    Where the window holds all positions of the document, both are the same and the window is taken.
    """
    if attention.gate != "learned":
        return jnp.full(logit_BS.shape, attention.gate == "full")
    return (logit_BS > 0) & (position_BS >= attention.window)


def switched(
    attention: AttentionConfig,
    product: Callable[..., jax.Array],
    logit_BS: jax.Array,
    position_BS: jax.Array,
    operands: tuple[jax.Array | None, ...],
) -> tuple[jax.Array, Switched]:
    """Attention of every token as its gate says, `[B, S, H, C]`.

    Args:
      attention: settings.
      product: `causal_attention`, by the platform's implementation.
      logit_BS: `router_logits`.
      position_BS: of each token in its document.
      operands: of `product`, without the window.
    """
    full_BS = takes_full(attention, logit_BS, position_BS)
    if attention.gate != "learned":
        window = attention.window if attention.gate == "window" else None
        return product(*operands, window=window), Switched(logit_BS, full_BS, jnp.zeros(logit_BS.shape, jnp.float32))
    if product is causal_attention:
        to_all, to_window = causal_attention_of_both(*operands, attention.window)  # type: ignore[arg-type, call-arg]
    else:
        to_all, to_window = product(*operands), product(*operands, window=attention.window)
    soft_BS11 = jax.nn.sigmoid(logit_BS)[..., None, None]
    # Exactly one of the two; the second term is zero, and has the gradient of a soft gate.
    passed = (soft_BS11 - jax.lax.stop_gradient(soft_BS11)).astype(to_all.dtype) * (to_all - to_window)
    mixed = jnp.where(full_BS[..., None, None], to_all, to_window) + passed
    return mixed, Switched(logit_BS, full_BS, disagreement(attention, to_all, to_window))


def switched_cached(
    attention: AttentionConfig,
    logit_BS: jax.Array,
    position_BS: jax.Array,
    operands: tuple[jax.Array | None, ...],
) -> tuple[jax.Array, Switched]:
    """`switched` for `cached_attention`: all slots are read only if a token of the batch wants them."""
    full_BS = takes_full(attention, logit_BS, position_BS)

    def narrow(*operands: jax.Array | None) -> jax.Array:
        return cached_attention(*operands, window=attention.window)  # type: ignore[misc, arg-type]

    def wide(*operands: jax.Array | None) -> jax.Array:
        to_all = cached_attention(*operands)  # type: ignore[arg-type]
        return jnp.where(full_BS[..., None, None], to_all, narrow(*operands))

    mixed = jax.lax.cond(jnp.any(full_BS), wide, narrow, *operands)
    return mixed, Switched(logit_BS, full_BS, jnp.zeros(logit_BS.shape, jnp.float32))


def disagreement(attention: AttentionConfig, to_all_BSHC: jax.Array, to_window_BSHC: jax.Array) -> jax.Array:
    """How far the two results of a token are apart, before the output projection: float32 `[B, S]`, no gradient.

    `sum` is the squared norm of the difference, `mean` that over the width, `relative` over the squared norms of both.
    """
    all_BSHC, window_BSHC = (
        jax.lax.stop_gradient(array).astype(jnp.float32) for array in (to_all_BSHC, to_window_BSHC)
    )

    def norm(array_BSHC: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(array_BSHC), axis=(2, 3))

    apart_BS = norm(all_BSHC - window_BSHC)
    if attention.disagreement == "sum":
        return apart_BS
    if attention.disagreement == "mean":
        return apart_BS / (all_BSHC.shape[2] * all_BSHC.shape[3])
    return apart_BS / jnp.maximum(norm(all_BSHC) + norm(window_BSHC), 1e-30)


def penalty_weight(attention: AttentionConfig, loss_BS: jax.Array, disagreement: jax.Array) -> jax.Array:
    """Weight of a token's penalty, float32 like `disagreement`, `[..., B, S]`: at most switch_weight / switch_epsilon.

    Args:
      attention: settings.
      loss_BS: of the prediction made at each token, in nats.
      disagreement: of each layer and token.
    """
    if attention.switch_weighting == "fixed":
        return jnp.full(disagreement.shape, attention.switch_weight)
    scale = attention.switch_epsilon + loss_BS + attention.switch_alpha * disagreement
    return jax.lax.stop_gradient(attention.switch_weight / scale)


def penalty(attention: AttentionConfig, switched: Switched, loss_BS: jax.Array, weights_BS: jax.Array) -> jax.Array:
    """Sum over tokens of weight times softplus(logit), averaged over layers; float32 scalar.

    Args:
      attention: settings.
      switched: of all layers, stacked over any leading axes.
      loss_BS: as in `penalty_weight`.
      weights_BS: 1 where a token counts.
    """
    if attention.gate != "learned":
        return jnp.zeros((), jnp.float32)
    of_token = penalty_weight(attention, loss_BS, switched.disagreement_BS) * jax.nn.softplus(switched.logit_BS)
    layers = switched.logit_BS.size // loss_BS.size
    return jnp.sum(of_token * weights_BS) / layers
