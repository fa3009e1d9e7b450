"""The tokens that an expert gets from each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from unipool_jax.analysis.observe import make_observed_step, text_positions
from unipool_jax.analysis.usage import pool_offsets
from unipool_jax.config.schema import Config
from unipool_jax.data.pipeline import Batch
from unipool_jax.training.state import BalanceState


def expert_tokens(
    config: Config, params: Any, balance: BalanceState, batches: Callable[[], Iterable[Batch]], expert: int
) -> np.ndarray:
    """How often each layer sent each token of the vocabulary to one expert, int64 `[L, V]`.

    Args:
      config: a model with routers.
      params: its parameters.
      balance: its balance state.
      batches: gives the text, all batches of one shape.
      expert: number among the experts of all pools, pool after pool.
    """
    layers, vocabulary = config.mixture_layers, config.model.vocab_size
    within_L = expert - pool_offsets(layers, config.pool.groups, config.experts_per_pool)
    step = make_observed_step(config)
    counts_LV = np.zeros((layers, vocabulary), np.int64)
    for batch in batches():
        text_N = text_positions(batch)
        chosen_LNK = np.asarray(step(params, balance, jax.device_put(batch), None).experts_LNK)
        there_LN = (chosen_LNK == within_L[:, None, None]).any(axis=2) & text_N
        tokens_N = np.asarray(batch.inputs).reshape(-1)
        for layer in range(layers):
            counts_LV[layer] += np.bincount(tokens_N[there_LN[layer]], minlength=vocabulary)
    return counts_LV
