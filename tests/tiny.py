"""A model small enough that every test may compile it."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from unipool_jax.config.compose import compose_config
from unipool_jax.config.schema import Config
from unipool_jax.data.documents import segment_ids
from unipool_jax.data.pipeline import Batch
from unipool_jax.training.sharding import batch_sharding
from unipool_jax.training.state import TrainState, init_state

END = 0
"""The token that ends a document, with data.document_mask."""

METHODS = (
    "dense",
    "vanilla",
    "vanilla_normrouter",
    "vanilla_aux_free",
    "shared_layer_aux",
    "shared_pool_aux",
    "unipool",
)
AROUND_METHODS = ("cs_moe", "more")
"""Methods that put something around the routed experts."""

WINDOWS: dict[str, tuple[str, ...]] = {
    "ring": (),
    "sliding": (),
    "rexmoe": ("pool.span=2",),
    "tied_inner": ("pool.span=2", "pool.ends=1"),
    "bank_runs": ("pool.span=2", "pool.ends=1"),
    "cyclic": ("pool.span=2", "pool.ends=0"),
}
"""Methods with windows, and what gives them ends and a middle in four layers."""


def batch_shapes(config: Config, mesh: Mesh) -> Batch:
    """Shapes of `tiny_batch`, sharded over `mesh`."""
    rows = batch_sharding(mesh)
    shapes: Batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), tiny_batch(config))
    return shapes


def slow_among(values: Iterable[Any], slow: Collection[Any]) -> list[Any]:
    """Values of one parameter; the slow ones take the way of another value and are for `make test-slow`."""
    return [pytest.param(value, marks=pytest.mark.slow if value in slow else ()) for value in values]


_TINY = [
    "model.num_layers=4",
    "model.hidden_size=16",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.ffn_size=24",
    "model.vocab_size=64",
    "model.init_std=0.2",
    "data.sequence_length=8",
    "data.tokenizer=bytes",
    "train.batch_size=8",
    "train.microbatch_size=8",
    "train.steps=50",
    "loss.switch_group_sequences=4",
    # Recorded losses must not move when the demo is tuned.
    "loss.pool_coefficient=1e-2",
    "optimizer.learning_rate=2e-3",
    "optimizer.min_learning_rate=2e-4",
    "optimizer.warmup_fraction=0.05",
    "optimizer.beta2=0.999",
]


@functools.cache
def tiny_config(method: str = "unipool", *overrides: str) -> Config:
    """Four layers of width 16, two experts per layer unless overridden; weights large enough to matter."""
    experts = [] if method == "dense" else ["moe.experts_per_layer=2"]
    return compose_config([f"method={method}", *_TINY, *experts, *overrides])


def tiny_state(config: Config, seed: int = 0) -> TrainState:
    """A fresh training state."""
    return jax.jit(init_state, static_argnums=0)(config, jax.random.key(seed))


def tiny_batch(config: Config, seed: int = 0) -> Batch:
    """Random tokens of the configured batch shape; with data.document_mask about a fifth of them end a document."""
    shape = (config.train.batch_size, config.data.sequence_length + 1)
    tokens = np.random.default_rng(seed).integers(0, config.model.vocab_size, shape, dtype=np.int32)
    segments = None
    if config.data.document_mask:
        tokens[tokens < config.model.vocab_size // 5] = END
        segments = segment_ids(tokens[:, :-1], END)
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones(tokens[:, 1:].shape, np.float32), segments)
