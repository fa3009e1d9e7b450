"""Windows that open during training (arXiv 2510.17483, progressive scaling routing).

Early in a run a layer routes to only as many of the experts it sees as it would have of its own, drawn at random anew
in every step; their number then rises linearly until all are open. The scores of the others are zero in that step.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from unipool_jax.config.schema import Config
from unipool_jax.moe.visibility import expert_order


def num_open(config: Config, step: jax.Array) -> jax.Array:
    """Open experts per layer in the update after `step` steps, int32 `[L]`.

    With W experts in the window and N = moe.experts_per_layer: N up to step t_s, then
    `floor(N + (W - N) (t - t_s) / (t_e - t_s))`, W from t_e on; of a window narrower than N, all.
    """
    assert config.widths is not None
    assert config.pool.opening is not None
    first, last = (fraction * config.train.lengths[0] for fraction in config.pool.opening)
    wide_L, narrow = jnp.array(config.widths, jnp.float32), float(config.moe.experts_per_layer)
    risen = jnp.clip((step.astype(jnp.float32) - first) / (last - first), 0.0, 1.0)
    return jnp.floor(jnp.minimum(narrow, wide_L) + jnp.maximum(wide_L - narrow, 0.0) * risen).astype(jnp.int32)


def open_experts(config: Config, step: jax.Array) -> jax.Array | None:
    """Factor on the scores of each layer in that update, float32 `[1, L, M]`: 1 for open experts, 0 for others.

    A function of train.seed and the step, so that resumed runs and all processes draw the same. None where windows
    are open from the start.
    """
    if config.pool.opening is None:
        return None
    visible_LM = config.visible
    assert visible_LM is not None
    key = jax.random.fold_in(jax.random.key(config.train.seed), step)
    drawn_LM = jnp.where(visible_LM, jax.random.uniform(key, visible_LM.shape), jnp.inf)
    rank_LM = jnp.argsort(jnp.argsort(drawn_LM, axis=1), axis=1)
    open_LM = rank_LM < num_open(config, step)[:, None]
    return open_LM[:, expert_order(config)].astype(jnp.float32)[None]
