"""Text goes on: tokens drawn one after the other from the model, each from the logits of the one before."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unipool_jax.config.schema import Config
from unipool_jax.model.attention import KeyValueCache
from unipool_jax.model.documents import segment_ids
from unipool_jax.model.transformer import empty_cache, forward_cached


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits, and where a text ends."""

    vocab_size: int
    """Tokens that may be drawn are `0 .. vocab_size-1`: the pad rows of the embedding mean nothing."""
    end_token: int
    """The token after which a text is complete."""
    max_tokens: int
    """Tokens drawn at most."""
    temperature: float = 1.0
    """Logits are divided by it; 0 always takes the most probable token."""
    top_p: float = 1.0
    """Only the most probable tokens that together reach this probability may be drawn; 1 allows all."""


class Generated(NamedTuple):
    """Prompts and what followed them."""

    tokens_BT: jax.Array
    """Each row's prompt, then its drawn tokens, int32; what lies beyond the row's length means nothing."""
    lengths_B: jax.Array
    """Tokens of each row, the end token included where it was drawn; int32."""


class _Progress(NamedTuple):
    """Carry of the loop over tokens."""

    drawn: jax.Array
    tokens_BT: jax.Array
    lengths_B: jax.Array
    ended_B: jax.Array
    cache: KeyValueCache


def nucleus(logits_BV: jax.Array, top_p: float) -> jax.Array:
    """The logits with -inf outside of each row's nucleus (Holtzman et al., arXiv 1904.09751).

    The nucleus is the smallest set of most probable tokens whose probabilities add up to `top_p` or more; among equals
    the lowest index comes first.
    """
    order_BV = jnp.argsort(logits_BV, axis=-1, descending=True, stable=True)
    sorted_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1)
    # The probability of all that come before, so that the first is always in.
    before_BV = jnp.pad(jnp.cumsum(sorted_BV, axis=-1)[:, :-1], ((0, 0), (1, 0)))
    rank_BV = jnp.argsort(order_BV, axis=-1)
    return jnp.where(jnp.take_along_axis(before_BV < top_p, rank_BV, axis=-1), logits_BV, -jnp.inf)


def draw(logits_BV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """One token per row, int32 `[B]`."""
    logits_BV = logits_BV[:, : sampling.vocab_size]
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_p < 1:
        logits_BV = nucleus(logits_BV, sampling.top_p)
    return jax.random.categorical(key, logits_BV).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("config", "sampling"))
def generate(
    config: Config,
    params: Any,
    expert_bias_GNE: jax.Array,
    prompts_BS: jax.Array,
    lengths_B: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    score_factor_GNE: jax.Array | None = None,
) -> Generated:
    """Go on with prompts of different lengths; one compiled program per shape and `sampling`, one trace per program.

    A prompt is one document, unless it has an end token in it and the model keeps documents apart.

    Args:
      config: of the model.
      params: its parameters.
      expert_bias_GNE: selection bias, float32; used when loss.balance is `expert_bias`.
      prompts_BS: token ids, int32; behind each row's length padding of any value.
      lengths_B: tokens of each prompt, 1 to S; int32.
      key: of the random draws.
      sampling: how tokens are drawn.
      score_factor_GNE: factor on the router scores of a model whose lock is under way, float32; see `moe.lock`.

    Returns:
      Prompts and drawn tokens, T = S + max_tokens.
    """
    batch_size, width = prompts_BS.shape
    row_B = jnp.arange(batch_size)
    total = width + sampling.max_tokens
    # Logits of the prompt are not used (and not computed): the loop begins with each row's last prompt token, which
    # writes the same keys once more. So rows of different lengths need no case of their own.
    cache = empty_cache(config, batch_size, total)
    start_B = jnp.zeros_like(lengths_B)
    tokens_BT = jnp.pad(prompts_BS, ((0, 0), (0, sampling.max_tokens)))

    def documents(tokens_BT: jax.Array) -> jax.Array | None:
        return segment_ids(tokens_BT, sampling.end_token) if config.data.document_mask else None

    _, cache = forward_cached(
        config, params, prompts_BS, expert_bias_GNE, cache, start_B, score_factor_GNE, documents(tokens_BT)
    )

    def going(state: _Progress) -> jax.Array:
        return (state.drawn < sampling.max_tokens) & ~jnp.all(state.ended_B)

    def next_token(state: _Progress) -> _Progress:
        position_B = state.lengths_B - 1
        last_B1 = state.tokens_BT[row_B, position_B][:, None]
        logits_B1V, cache = forward_cached(
            config,
            params,
            last_B1,
            expert_bias_GNE,
            state.cache,
            position_B,
            score_factor_GNE,
            documents(state.tokens_BT),
        )
        token_B = draw(logits_B1V[:, 0], jax.random.fold_in(key, state.drawn), sampling)
        return _Progress(
            state.drawn + 1,
            # An ended row writes behind its end.
            state.tokens_BT.at[row_B, state.lengths_B].set(token_B),
            state.lengths_B + ~state.ended_B,
            state.ended_B | (token_B == sampling.end_token),
            cache,
        )

    start = _Progress(jnp.zeros((), jnp.int32), tokens_BT, lengths_B, jnp.zeros(batch_size, bool), cache)
    end = jax.lax.while_loop(going, next_token, start)
    return Generated(end.tokens_BT, end.lengths_B)
