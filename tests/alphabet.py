"""Models for tests of zero-shot tasks, on bytes: one with random weights, and one that knows the alphabet."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import oracles
from tiny import tiny_config, tiny_state
from unipool_jax.config.schema import Config
from unipool_jax.data.tokenizer import load_tokenizer
from unipool_jax.evaluation.scoring import LanguageModel

SIZE = (
    *("model.vocab_size=272", "data.sequence_length=48", "model.compute_dtype=float32", "moe.score_constant=one"),
    "train.eval_batch_size=2",
)
"""Fifteen rows of the embedding are padding. Batches are up to 3 x 32 or 2 x 48, the two buckets: few
programs to compile."""


def config_of(*overrides: str) -> Config:
    """A pool of 16 experts for four layers."""
    return tiny_config("unipool", *SIZE, "moe.experts_per_layer=4", "model.hidden_size=64", *overrides)


@functools.cache
def random_model() -> LanguageModel:
    """Weights large enough that every token and choice matters."""
    config = config_of()
    state = tiny_state(config)
    return LanguageModel(config, state.params, state.balance, load_tokenizer("bytes"))


@functools.cache
def alphabet_model(scale: float = 1.0) -> LanguageModel:
    """After each byte this model expects the byte one higher; what it read before does not matter.

    Args:
      scale: of its certainty.
    """
    model = random_model()
    codes_VD = jax.random.normal(jax.random.key(0), model.params["embedding"].shape)
    layers = model.params["pools"]["layers"]
    silent = layers["attention"] | {"output": jnp.zeros_like(layers["attention"]["output"])}
    params: Any = model.params | {
        "embedding": codes_VD,
        "output": scale * jnp.roll(codes_VD, 1, axis=0),
        "pools": {
            "bank": jax.tree.map(jnp.zeros_like, model.params["pools"]["bank"]),
            "layers": layers | {"attention": silent},
        },
    }
    return model._replace(params=params)


def log_likelihood(model: LanguageModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The same in NumPy and float64, one sequence without padding; and whether greedy."""
    tokens = np.array([*context, *continuation])
    logits_SV = oracles.Forward(model.config, model.params, tokens[None, :-1]).logits[0]
    rows = logits_SV[len(context) - 1 :]
    log_probability = np.log(oracles.softmax(rows))[np.arange(len(rows)), continuation]
    best = rows[:, : model.tokenizer.vocab_size].argmax(axis=-1)
    return float(log_probability.sum()), bool(np.array_equal(best, continuation))
