"""What Switch Attention adds to a training step: its penalty, and what is reported of its gates."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unipool_jax.config.schema import Config
from unipool_jax.data.pipeline import Batch
from unipool_jax.model.documents import document_positions
from unipool_jax.model.switch import Switched, penalty, penalty_weight
from unipool_jax.parallel.head import Head
from unipool_jax.training.metrics import Value

PARTS = 16
"""Parts of a sequence, by position, for which shares are reported apart."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Of the weights of the penalty."""


def switch_penalty(
    config: Config, switched: Switched, head: Head, batch: Batch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The penalty summed over the tokens of a micro-batch and averaged over layers, and its part of the metrics.

    The loss of each token enters the weight without a gradient, or the model could pay less by predicting worse.
    """
    without_gradient = Head(*jax.lax.stop_gradient(tuple(head)))
    loss_BS = without_gradient.token_losses(batch.targets)
    total = penalty(config.attention, switched, loss_BS, jnp.asarray(batch.weights))
    return total, gate_metrics(config, switched, loss_BS, batch)


def gate_metrics(config: Config, switched: Switched, loss_BS: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """Sums over the counted tokens of a micro-batch, by name:

    `switch_full_LP`, int32: tokens that attend to all positions, by layer and part of the sequence. `switch_free_P`,
    int32: tokens that had a choice, being at least a window behind the beginning of their document.
    `switch_disagreement_L`, float32: over those. `switch_keys_L`, float32: keys that tokens see. `switch_weight_Q`,
    float32: quantiles of the weights of the penalty.
    """
    attention, length = config.attention, config.data.sequence_length
    full_LBS, apart_LBS = (
        array.reshape(config.model.num_layers, *loss_BS.shape) for array in (switched.full_BS, switched.disagreement_BS)
    )
    position_BS = jnp.broadcast_to(jnp.arange(length), loss_BS.shape)
    if batch.segments is not None:
        position_BS = document_positions(jnp.asarray(batch.segments))
    counted_BS = jnp.asarray(batch.weights) > 0
    free_BS = counted_BS & (position_BS >= attention.window)
    parts = min(PARTS, length)
    part_SP = jax.nn.one_hot(jnp.arange(length) * parts // length, parts, dtype=jnp.int32)
    seen_BS = jnp.minimum(position_BS + 1, attention.window)
    keys_LBS = jnp.where(full_LBS, position_BS + 1, seen_BS) * counted_BS
    weights_LBS = penalty_weight(attention, loss_BS, apart_LBS)
    return {
        "switch_full_LP": jnp.einsum("lbs,sp->lp", (full_LBS & free_BS).astype(jnp.int32), part_SP),
        "switch_free_P": jnp.einsum("bs,sp->p", free_BS.astype(jnp.int32), part_SP),
        "switch_disagreement_L": jnp.sum(apart_LBS * free_BS, axis=(1, 2)),
        "switch_keys_L": jnp.sum(keys_LBS.astype(jnp.float32), axis=(1, 2)),
        "switch_weight_Q": jnp.quantile(weights_LBS.reshape(-1), jnp.array(QUANTILES)),
    }


def zero_gate_metrics(config: Config) -> dict[str, jax.Array]:
    """`gate_metrics` of no token; empty for other kinds of attention."""
    if config.attention.kind != "switch":
        return {}
    layers, parts = config.model.num_layers, min(PARTS, config.data.sequence_length)
    return {
        "switch_full_LP": jnp.zeros((layers, parts), jnp.int32),
        "switch_free_P": jnp.zeros(parts, jnp.int32),
        "switch_disagreement_L": jnp.zeros(layers, jnp.float32),
        "switch_keys_L": jnp.zeros(layers, jnp.float32),
        "switch_weight_Q": jnp.zeros(len(QUANTILES), jnp.float32),
    }


def switch_values(config: Config, metrics: dict[str, Any]) -> dict[str, Value]:
    """What a line of metrics says of the gates of one step; empty for other kinds of attention.

    `switch/full`: share of full attention by layer; `switch/full_by_position`: by part of the sequence, and
    `switch/full_map` by both; tokens without a choice are left out, and a part without others is null.
    `switch/keys_read`: keys that a token reads, by layer; `switch/disagreement` by layer; `switch/weight`: quantiles of
    the weights of the penalty.
    """
    if config.attention.kind != "switch":
        return {}
    full_LP, free_P = np.asarray(metrics["switch_full_LP"]), np.asarray(metrics["switch_free_P"])
    free = max(int(free_P.sum()), 1)
    layers = config.model.num_layers

    def shares(full_P: np.ndarray, times: int = 1) -> list[float | None]:
        pairs = zip(full_P.tolist(), free_P.tolist(), strict=True)
        return [full / (times * there) if there else None for full, there in pairs]

    return {
        "switch/full": (full_LP.sum(axis=1) / free).tolist(),
        "switch/full_by_position": shares(full_LP.sum(axis=0), layers),
        "switch/full_map": [shares(full_P) for full_P in full_LP],
        "switch/keys_read": (np.asarray(metrics["switch_keys_L"]) / config.tokens_per_step).tolist(),
        "switch/disagreement": (np.asarray(metrics["switch_disagreement_L"]) / free).tolist(),
        "switch/weight": (np.asarray(metrics["switch_weight_Q"]) / config.num_microbatches).tolist(),
    }
