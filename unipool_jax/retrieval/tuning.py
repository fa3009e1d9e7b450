"""Contrastive fine-tuning: a model learns that the cosine of a query with its document is the highest of a batch."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unipool_jax.config.errors import UserError
from unipool_jax.config.schema import Config
from unipool_jax.data.tokenizer import Tokenizer
from unipool_jax.evaluation.scoring import LanguageModel
from unipool_jax.model.transformer import apply
from unipool_jax.retrieval.embedding import pool
from unipool_jax.retrieval.folder import Collection
from unipool_jax.retrieval.requests import Pooling, RetrievalTuneRequest
from unipool_jax.training.state import BalanceState, layer_inputs


class Rows(NamedTuple):
    """A batch: queries, then the document of each."""

    tokens_RS: np.ndarray
    """Padded with zeros, int32; R = 2 B."""
    lengths_R: np.ndarray
    """Tokens of each row, int32."""
    negative_BB: np.ndarray
    """Whether the document of column j is wrong for the query of row i, bool."""


class Example(NamedTuple):
    """A query and its relevant documents."""

    query: str
    answers: tuple[str, ...]


def examples(collection: Collection) -> list[Example]:
    """Queries with at least one relevant document, in order."""
    found = []
    for query, grades in collection.grades.items():
        answers = tuple(collection.documents[name] for name, grade in grades.items() if grade > 0)
        if answers:
            found.append(Example(collection.queries[query], answers))
    return found


def info_nce(
    queries_BD: jax.Array, documents_BD: jax.Array, negative_BB: jax.Array | np.ndarray, temperature: float
) -> jax.Array:
    """The mean over queries i of -log(exp(c_ii / t) / (exp(c_ii / t) + sum of exp(c_ij / t) over negatives j)).

    c is the cosine and t the temperature (InfoNCE: van den Oord et al., 2018, arXiv 1807.03748). Negatives are
    the other documents of a batch.

    Args:
      queries_BD: embeddings, float32.
      documents_BD: of the document of each query.
      negative_BB: bool; the diagonal is not looked at.
      temperature: t.
    """
    cosine_BB = _unit(queries_BD) @ _unit(documents_BD).T / temperature
    own_BB = jnp.eye(len(cosine_BB), dtype=bool)
    logits_BB = jnp.where(own_BB | negative_BB, cosine_BB, -jnp.inf)
    return jnp.mean(jax.nn.logsumexp(logits_BB, axis=1) - jnp.diagonal(cosine_BB))


def _unit(vectors_BD: jax.Array) -> jax.Array:
    return vectors_BD * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(vectors_BD), axis=1, keepdims=True), 1e-30))


def batches(found: Sequence[Example], tokenizer: Tokenizer, size: int, length: int, seed: int) -> Iterator[Rows]:
    """Batches without end: every query once in random order, then all again; the last ones of a pass are left out.

    A document that is relevant to a query of its batch, or has the text of one that is, is no negative for it.

    Args:
      found: what to draw from, at least `size`.
      tokenizer: of the model.
      size: queries of a batch, B.
      length: tokens of a row, S; longer texts are cut.
      seed: of the order, and of the choice among relevant documents.
    """
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(found))
        for start in range(0, len(found) - size + 1, size):
            chosen = [found[number] for number in order[start : start + size]]
            documents = [one.answers[rng.integers(len(one.answers))] for one in chosen]
            encoded = tokenizer.encode_batch([*(one.query for one in chosen), *documents])
            tokens_RS, lengths_R = np.zeros((2 * size, length), np.int32), np.ones(2 * size, np.int32)
            for row, tokens in enumerate(encoded):
                tokens = tokens[:length] if len(tokens) else np.array([tokenizer.eod], np.int32)
                tokens_RS[row, : len(tokens)], lengths_R[row] = tokens, len(tokens)
            negative_BB = np.array([[document not in one.answers for document in documents] for one in chosen])
            yield Rows(tokens_RS, lengths_R, negative_BB)


def contrastive_loss(
    config: Config, pooling: Pooling, temperature: float, params: Any, balance: BalanceState, rows: Rows
) -> jax.Array:
    """`info_nce` of a batch; a float32 scalar."""
    hidden_RSD = apply(config, params, rows.tokens_RS, layer_inputs(config, balance)).head.hidden_BSD
    vectors_RD = pool(pooling, hidden_RSD, rows.lengths_R)
    size = len(rows.negative_BB)
    return info_nce(vectors_RD[:size], vectors_RD[size:], rows.negative_BB, temperature)


def tune(model: LanguageModel, found: Sequence[Example], request: RetrievalTuneRequest) -> tuple[Any, list[float]]:
    """Fine-tune all parameters with Adam; the learning rate rises over a tenth of the steps, then falls to 0.

    Balance losses of routers are not part of it, and their statistics stay as they are.

    Args:
      model: where to begin.
      found: what to learn from.
      request: how.

    Returns:
      Parameters, and the loss of every step.

    Raises:
      UserError: a batch has more queries than there are.
    """
    if len(found) < request.batch_size:
        raise UserError(
            f"batch_size={request.batch_size}: there are {len(found)} queries with a relevant document; set fewer, or "
            "give more collections"
        )
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, request.learning_rate, max(1, request.steps // 10), max(2, request.steps)
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    loss = functools.partial(contrastive_loss, model.config, request.pooling, request.temperature)

    @jax.jit
    def step(params: Any, state: Any, rows: Rows) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(params, model.balance, rows)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    length = min(request.length, model.max_length)
    params, state, losses = model.params, optimizer.init(model.params), []
    drawn = batches(found, model.tokenizer, request.batch_size, length, request.seed)
    for number, rows in zip(range(1, request.steps + 1), drawn, strict=False):
        params, state, value = step(params, state, rows)
        losses.append(float(value))
        if number % 20 == 0 or number == request.steps:
            print(f"step {number}: loss {np.mean(losses[-20:]):.4f}", flush=True)
    return params, losses
