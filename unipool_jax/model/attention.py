"""Causal grouped-query attention with rotary positions (method M1.3)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike

from unipool_jax.config.schema import Config, ModelConfig
from unipool_jax.kernels.attention import PRODUCTS
from unipool_jax.kernels.causal import cached_attention
from unipool_jax.kernels.implementations import resolve_attention
from unipool_jax.kernels.recompute import recompute
from unipool_jax.model.documents import document_positions
from unipool_jax.model.rope import rotate
from unipool_jax.model.switch import Switched, router_logits, switched, switched_cached
from unipool_jax.parallel.linear import linear
from unipool_jax.parallel.mesh import constrain, on_each_device


class KeyValueCache(NamedTuple):
    """Keys (after rotation) and values of earlier positions, of all layers, in T slots a row; position p is in slot p.

    A query sees the slots up to its own position, so what later slots hold does not matter: rows of a batch may be at
    different positions, and padding behind a row is overwritten before it is seen. The layers' scan carries it, and
    each layer writes its slots in place: as an input and an output of the scan it would be copied for every token.
    """

    key_LBTHC: jax.Array
    value_LBTHC: jax.Array

    def write(
        self, layer: ArrayLike, key_BSHC: jax.Array, value_BSHC: jax.Array, positions_BS: jax.Array
    ) -> KeyValueCache:
        """The cache with a layer's keys and values of these positions put in."""
        row_B1 = jnp.arange(positions_BS.shape[0])[:, None]
        return KeyValueCache(
            self.key_LBTHC.at[layer, row_B1, positions_BS].set(key_BSHC),
            self.value_LBTHC.at[layer, row_B1, positions_BS].set(value_BSHC),
        )


class AttentionWeights(NamedTuple):
    """Parameters of one attention block, float32; head channels are the last axis but for `output`."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    output: jax.Array
    switch_D: jax.Array | None = None
    """Row of the router of attention.kind=switch."""


_SWITCH_STD = 0.02
"""Of the first weights of that router. With zeros every token would take the window, and go on with it."""


class Attention(nn.Module):
    """Creates `AttentionWeights`."""

    config: ModelConfig
    head_size: int
    switches: bool = False

    @nn.compact
    def __call__(self) -> AttentionWeights:
        config, width = self.config, self.config.hidden_size
        switch = nn.initializers.normal(_SWITCH_STD)
        queries, keys = config.num_heads * self.head_size, config.num_kv_heads * self.head_size
        init, init_output = nn.initializers.normal(config.matrix_std), nn.initializers.normal(config.output_std)
        return AttentionWeights(
            query=self.param("query", init, (width, queries), jnp.float32),
            key=self.param("key", init, (width, keys), jnp.float32),
            value=self.param("value", init, (width, keys), jnp.float32),
            output=self.param("output", init_output, (queries, width), jnp.float32),
            switch_D=self.param("switch", switch, (width,), jnp.float32) if self.switches else None,
        )


def attention(
    config: Config,
    hidden_BSD: jax.Array,
    weights: AttentionWeights,
    cache: KeyValueCache | None = None,
    start_B: jax.Array | None = None,
    segments: ArrayLike | None = None,
    sees_all: ArrayLike | None = None,
    layer: ArrayLike | None = None,
) -> tuple[jax.Array, KeyValueCache | None, Switched | None]:
    """Attention block without its norm and residual: `[B, S, D] -> [B, S, D]`, and the cache with these positions.

    Arguments and other results are those of `attention_heads`.
    """
    mixed_BSHC, cache, gate = attention_heads(config, hidden_BSD, weights, cache, start_B, segments, sees_all, layer)
    return linear(mixed_BSHC.reshape(*hidden_BSD.shape[:2], -1), weights.output, ("heads", "embed")), cache, gate


def attention_heads(
    config: Config,
    hidden_BSD: jax.Array,
    weights: AttentionWeights,
    cache: KeyValueCache | None = None,
    start_B: jax.Array | None = None,
    segments: ArrayLike | None = None,
    sees_all: ArrayLike | None = None,
    layer: ArrayLike | None = None,
) -> tuple[jax.Array, KeyValueCache | None, Switched | None]:
    """Outputs of the heads before the output projection, `[B, S, H, C]`, and the cache with these positions.

    Without a cache the S positions are 0..S-1 and see each other; with one they begin at `start_B` and see the slots of
    the cache that are `layer`'s.
    `segments` are the ids of documents, int32 `[B, S]`, with a cache those of its slots, `[B, T]`; rotary positions
    then count from the beginning of each document. With attention.kind=alternating `sees_all` says whether this layer
    is one of attention.full_layers, bool. With attention.kind=switch what the layer's router decided is returned too.
    """
    model, positions = config.model, jnp.arange(hidden_BSD.shape[1])
    if start_B is not None:
        positions = start_B[:, None] + positions
    turned = positions
    if segments is not None:
        segments = jnp.asarray(segments)
        turned = document_positions(segments)
        turned = turned if start_B is None else jnp.take_along_axis(turned, positions, axis=1)
    query = rotate(_heads(config, hidden_BSD, weights.query), turned, model)
    key = rotate(_heads(config, hidden_BSD, weights.key), turned, model)
    value = _heads(config, hidden_BSD, weights.value)
    product, gate = sequence_product(config), None
    operands: tuple[jax.Array | None, ...] = (query, key, value, segments)
    if cache is not None:
        assert start_B is not None
        assert layer is not None
        cache = cache.write(layer, key, value, positions)
        product, operands = cached_attention, (query, *cache, jnp.asarray(layer), start_B, segments)
    if config.attention.kind == "switch":
        assert weights.switch_D is not None
        logit_BS = router_logits(hidden_BSD, weights.switch_D)
        position_BS = jnp.broadcast_to(turned, logit_BS.shape)
        if cache is None:
            mixed_BSHC, gate = switched(config.attention, product, logit_BS, position_BS, operands)
        else:
            mixed_BSHC, gate = switched_cached(config.attention, logit_BS, position_BS, operands)
    else:
        mixed_BSHC = _by_kind(config, product, sees_all, *operands)
    return mixed_BSHC, cache, gate


def sequence_product(config: Config) -> Callable[..., jax.Array]:
    """`kernels.causal.causal_attention`, by the implementation that the configuration names for this platform."""
    name = resolve_attention(config.kernels.attention, config.model.compute_dtype, config.head_size)
    if name == "blocks":
        return PRODUCTS[name]

    def product(
        query_BSHC: jax.Array,
        key_BSHC: jax.Array,
        value_BSHC: jax.Array,
        segments_BS: jax.Array | None = None,
        window: int | None = None,
    ) -> jax.Array:
        operands, heads = [query_BSHC, key_BSHC, value_BSHC], ("batch", None, "heads", None)
        axes: list[tuple[str | None, ...]] = [heads] * 3
        if segments_BS is not None:
            operands, axes = [*operands, segments_BS], [*axes, ("batch", None)]
        return on_each_device(functools.partial(PRODUCTS[name], window=window), operands, axes, heads)

    return product


def _by_kind(
    config: Config, product: Callable[..., jax.Array], sees_all: ArrayLike | None, *operands: jax.Array | None
) -> jax.Array:
    """`product(*operands)` over all positions before, or those of the window, as the layer's kind says."""
    if config.attention.kind == "full":
        return product(*operands)
    of_window = functools.partial(product, window=config.attention.window)
    if config.attention.kind == "window":
        return of_window(*operands)

    # The kind is a value, not part of the program: layers are scanned, whatever their pattern and however pools divide
    # them. One of the branches runs.
    def either(sees_all: ArrayLike, *operands: jax.Array | None) -> jax.Array:
        return jax.lax.cond(sees_all, product, of_window, *operands)

    # A differentiated conditional keeps the residuals of both branches, so a layer of the window would keep as much as
    # a full one: of a layer that is not recomputed itself, keep the operands.
    function = either if config.recomputes_attention else recompute(either)
    assert sees_all is not None
    return function(sees_all, *operands)


def _heads(config: Config, hidden_BSD: jax.Array, weights: jax.Array) -> jax.Array:
    """One projection, split into heads: `[B, S, H, C]`."""
    batch, length, _ = hidden_BSD.shape
    heads_BSHC = linear(hidden_BSD, weights, ("embed", "heads")).reshape(batch, length, -1, config.head_size)
    return constrain(heads_BSHC, "batch", None, "heads", None)
