"""Embeddings of texts: pooled hidden states of a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unipool_jax.config.errors import UserError
from unipool_jax.config.schema import Config
from unipool_jax.convert.layered import layered
from unipool_jax.convert.runs import as_numpy
from unipool_jax.convert.walk import Walk
from unipool_jax.data.pipeline import Batch
from unipool_jax.evaluation.scoring import LanguageModel, padded_length, row_count
from unipool_jax.model.transformer import apply
from unipool_jax.moe.lock import score_factors
from unipool_jax.retrieval.requests import Pooling
from unipool_jax.training.state import BalanceState, layer_inputs

States = Callable[[np.ndarray], jax.Array]
"""Hidden states `[B, S, D]` of tokens `[B, S]`."""


class Embeddings(NamedTuple):
    """Embeddings of texts."""

    vectors_ND: np.ndarray
    """Float32."""
    cut: int
    """Texts that are longer than the model reads; their ends are not in the embedding."""


def hidden_states(model: LanguageModel, layer: int | None) -> States:
    """The pass that embeds.

    Args:
      model: the model.
      layer: how many layers; None is all of them and the final norm.

    Raises:
      UserError: the model has fewer layers, or is half locked.
    """
    config = model.config
    if layer is None:
        return lambda tokens_BS: _final_states(config, model.params, model.balance, tokens_BS)
    if layer > config.model.num_layers:
        raise UserError(f"layer={layer}: the model has {config.model.num_layers}; set at most that, or null")
    factors = score_factors(config, model.balance.lock)
    if factors is not None and bool(jnp.any(factors != 1)):
        raise UserError(
            f"layer={layer}: at this step UniPool-lock is fading experts out, which only the whole model knows of; set "
            "layer=null or another step"
        )
    walk = Walk(config, layered(config, as_numpy(model.params, model.balance.expert_bias_GNE)))
    return lambda tokens_BS: walk.after(layer, _batch(tokens_BS))


def embed(model: LanguageModel, states: States, texts: Sequence[str], pooling: Pooling) -> Embeddings:
    """Embeddings of texts, in order.

    Tokens of padding behind a text change nothing: attention is causal and routing is per token. A text without tokens
    is the end-of-document token.

    Args:
      model: the model.
      states: of the model, see `hidden_states`.
      texts: to embed.
      pooling: over the tokens of a text.
    """
    longest, end = model.max_length, np.array([model.tokenizer.eod], np.int32)
    encoded = [tokens if len(tokens) else end for tokens in model.tokenizer.encode_batch(texts)]
    buckets: dict[int, list[int]] = {}
    for number, tokens in enumerate(encoded):
        buckets.setdefault(padded_length(min(len(tokens), longest), longest), []).append(number)
    vectors_ND = np.zeros((len(texts), model.config.model.hidden_size), np.float32)
    for width, members in sorted(buckets.items(), reverse=True):
        rows = row_count(len(members), max(1, model.batch_tokens // width))
        for start in range(0, len(members), rows):
            numbers = members[start : start + rows]
            tokens_BS, lengths_B = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
            for row, number in enumerate(numbers):
                tokens = encoded[number][:longest]
                tokens_BS[row, : len(tokens)], lengths_B[row] = tokens, len(tokens)
            pooled_BD = pool(pooling, states(tokens_BS), lengths_B)
            vectors_ND[numbers] = np.asarray(pooled_BD)[: len(numbers)]
    return Embeddings(vectors_ND, sum(len(tokens) > longest for tokens in encoded))


@functools.partial(jax.jit, static_argnums=0)
def pool(pooling: Pooling, hidden_BSD: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Hidden states of each row's first tokens, float32 `[B, D]`: their mean, or that of the last.

    Args:
      pooling: which.
      hidden_BSD: of all positions.
      lengths_B: tokens of each row, at least 1.
    """
    wide_BSD = hidden_BSD.astype(jnp.float32)
    if pooling == "last":
        return jnp.take_along_axis(wide_BSD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    text_BS = jnp.arange(hidden_BSD.shape[1]) < lengths_B[:, None]
    return jnp.sum(jnp.where(text_BS[..., None], wide_BSD, 0.0), axis=1) / lengths_B[:, None]


def _batch(tokens_BS: np.ndarray) -> Batch:
    return Batch(tokens_BS, tokens_BS, np.ones(tokens_BS.shape, np.float32))


@functools.partial(jax.jit, static_argnums=0)
def _final_states(config: Config, params: Any, balance: BalanceState, tokens_BS: jax.Array) -> jax.Array:
    return apply(config, params, tokens_BS, layer_inputs(config, balance)).head.hidden_BSD
