"""Log-likelihoods, in nats, of continuations given contexts.

Few programs are compiled: a sequence is padded to one of `bucket_lengths`, and batches have at most eight different
numbers of rows per length. Padding does not affect scores, because attention is causal and routing is per token.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unipool_jax.config.schema import Config
from unipool_jax.data.documents import segment_ids
from unipool_jax.data.pipeline import Batch
from unipool_jax.data.tokenizer import Tokenizer
from unipool_jax.model.transformer import forward
from unipool_jax.moe.lock import score_factors
from unipool_jax.parallel.head import cross_entropy
from unipool_jax.training.state import BalanceState

MAX_BATCH_TOKENS = 8192
"""Maximum positions per batch: 1.7 GB of float32 logits for a vocabulary of 51,200."""


class LanguageModel(NamedTuple):
    """A model with its tokenizer."""

    config: Config
    params: Any
    balance: BalanceState
    tokenizer: Tokenizer

    @property
    def max_length(self) -> int:
        """Positions that the model was trained on."""
        return self.config.data.sequence_length

    @property
    def batch_tokens(self) -> int:
        """Maximum positions per batch; `train.eval_batch_size` can lower it."""
        return min(MAX_BATCH_TOKENS, self.config.train.eval_batch_size * self.max_length)


class Window(NamedTuple):
    """Tokens to score after a context; at least one token each."""

    context: Sequence[int] | np.ndarray
    continuation: Sequence[int] | np.ndarray


class Scores(NamedTuple):
    """Scores of windows."""

    log_likelihood_W: np.ndarray | jax.Array
    """Of the full continuation given its context, nats."""
    greedy_W: np.ndarray | jax.Array
    """Whether every token of the continuation is the most probable one that may be drawn, bool."""


ScoreBatch = Callable[[np.ndarray, Batch], Scores]
"""Scores a batch, given the window number of each row, int32, -1 for rows of padding."""


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Window]:
    """Tokens of contexts and continuations.

    The two are encoded as one text, as in training, and split after the longest prefix that they share with the tokens
    of the context alone; a token that spans the boundary belongs to the continuation. As in lm-eval, white space at the
    end of a context moves to the continuation, because tokenizers merge a space with the next word. Contexts get no
    prefix token (method M8.5); an empty one is the end-of-document token, which precedes every document in
    training.

    Returns:
      One window per pair. An empty continuation has no tokens; any other has at least one.
    """
    moved = []
    for context, continuation in pairs:
        kept = context.rstrip()
        moved.append((kept, context[len(kept) :] + continuation) if continuation else (context, ""))
    whole = tokenizer.encode_batch([context + continuation for context, continuation in moved])
    alone = tokenizer.encode_batch([context for context, _ in moved])
    windows = []
    for (_, continuation), tokens, first in zip(moved, whole, alone, strict=True):
        shared = min(len(tokens), len(first))
        differs = np.flatnonzero(tokens[:shared] != first[:shared])
        cut = int(differs[0]) if len(differs) else shared
        if continuation:
            cut = min(cut, len(tokens) - 1)  # a tokenizer that drops white space may encode both texts alike
        context_tokens = tokens[:cut] if cut > 0 else np.array([tokenizer.eod], np.int32)
        windows.append(Window(context_tokens, tokens[max(cut, 0) :]))
    return windows


def bucket_lengths(longest: int) -> list[int]:
    """Padded lengths: 32, 48, 64, 96, 128, ... below `longest`, and `longest`."""
    lengths = sorted({base << shift for base in (32, 48) for shift in range(longest.bit_length())})
    return [length for length in lengths if length < longest] + [longest]


def padded_length(length: int, longest: int) -> int:
    """The smallest of `bucket_lengths(longest)` that holds a sequence of `length`."""
    return next(bucket for bucket in bucket_lengths(longest) if bucket >= length)


def row_count(items: int, most: int) -> int:
    """Rows per batch for `items` sequences of one bucket: the fewest that need no extra batch, in eighths of `most`."""
    batches = math.ceil(items / most)
    eighth = math.ceil(most / 8)
    return min(most, math.ceil(math.ceil(items / batches) / eighth) * eighth)


def window_batches(
    windows: Sequence[Window], max_length: int, batch_tokens: int, end: int | None = None
) -> Iterator[tuple[np.ndarray, Batch]]:
    """All windows in padded batches, longest bucket first, so that a lack of memory shows early.

    Args:
      windows: with at most `max_length + 1` tokens.
      max_length: longest input of the model.
      batch_tokens: maximum positions per batch, unless one row has more.
      end: the end-of-document token, of a model that keeps documents apart.

    Yields:
      The window number of each row, int32 `[B]`, -1 for rows of padding; and the batch, whose weights are 1 where a
      token of a continuation is predicted.
    """
    buckets: dict[int, list[int]] = {}
    for number, (context, continuation) in enumerate(windows):
        bucket = padded_length(len(context) + len(continuation) - 1, max_length)
        buckets.setdefault(bucket, []).append(number)
    for length, members in sorted(buckets.items(), reverse=True):
        rows = row_count(len(members), max(1, batch_tokens // length))
        for start in range(0, len(members), rows):
            numbers_B = np.full(rows, -1, np.int32)
            numbers_B[: len(members[start : start + rows])] = members[start : start + rows]
            inputs, targets = np.zeros((2, rows, length), np.int32)
            weights = np.zeros((rows, length), np.float32)
            for row, number in enumerate(numbers_B[numbers_B >= 0]):
                context, continuation = windows[number]
                tokens = np.concatenate([context, continuation])
                inputs[row, : len(tokens) - 1] = tokens[:-1]
                targets[row, : len(tokens) - 1] = tokens[1:]
                weights[row, len(context) - 1 : len(tokens) - 1] = 1.0
            yield numbers_B, Batch(inputs, targets, weights, None if end is None else segment_ids(inputs, end))


def score_windows(model: LanguageModel, windows: Sequence[Window], score_batch: ScoreBatch | None = None) -> Scores:
    """Scores of all windows, in order.

    Args:
      model: the model.
      windows: with at most `model.max_length + 1` tokens.
      score_batch: scores one batch; default `plain_scores(model)`.

    Returns:
      Log-likelihoods, float64 `[W]`, and whether greedy, bool `[W]`.
    """
    score_batch = score_batch or plain_scores(model)
    log_likelihood_W, greedy_W = np.zeros(len(windows)), np.zeros(len(windows), bool)
    end = model.tokenizer.eod if model.config.data.document_mask else None
    for numbers_B, batch in window_batches(windows, model.max_length, model.batch_tokens, end):
        scores = score_batch(numbers_B, batch)
        real_B = numbers_B >= 0
        log_likelihood_W[numbers_B[real_B]] = np.asarray(scores.log_likelihood_W)[real_B]
        greedy_W[numbers_B[real_B]] = np.asarray(scores.greedy_W)[real_B]
    return Scores(log_likelihood_W, greedy_W)


def plain_scores(model: LanguageModel) -> ScoreBatch:
    """Scores under the model without intervention."""
    step = make_score_step(model.config, model.tokenizer.vocab_size)
    return lambda _, batch: step(model.params, model.balance, jax.device_put(batch))


@functools.lru_cache(maxsize=4)
def make_score_step(config: Config, vocab_size: int) -> Callable[[Any, BalanceState, Batch], Scores]:
    """The jitted function `(params, balance, batch) -> Scores`; traced once per batch shape.

    Probabilities are those of training: a float32 softmax over the padded vocabulary (method M1.5). The most probable
    token is chosen among `0 .. vocab_size-1`, as in `model.sampling`.
    """

    @jax.jit
    def step(params: Any, balance: BalanceState, batch: Batch) -> Scores:
        factors = score_factors(config, balance.lock)
        logits_BSV, _ = forward(config, params, batch.inputs, balance.expert_bias_GNE, factors, batch.segments)
        scored_BS = jnp.asarray(batch.weights) > 0
        # `where`, not a product: the loss of a masked position may be infinite.
        losses_BS = jnp.where(scored_BS, cross_entropy(logits_BSV, batch.targets), 0.0)
        best_BS = jnp.argmax(logits_BSV[..., :vocab_size], axis=-1)
        greedy_B = jnp.all((best_BS == batch.targets) | ~scored_BS, axis=1)
        return Scores(-jnp.sum(losses_BS, axis=1), greedy_B)

    return step
