"""AdamW with global-norm clipping, linear warm-up and cosine decay.

The clipping formula, the shape of the schedule and the tensors that decay are those of the published recipe
(arXiv 2605.06665); Optax supplies the moments.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from unipool_jax.config.schema import OptimizerConfig

GAIN_NAMES = frozenset({"attention_norm", "ffn_norm", "final_norm", "scale"})
"""Parameter names of RMSNorm gains and router scales: vectors and scalars per layer, whatever they are stacked over."""


def warmup_steps(config: OptimizerConfig, steps: int) -> int:
    """Steps of linear warm-up in a run of `steps` steps: at least one, unless warm-up is switched off."""
    if config.warmup_fraction == 0:
        return 0
    return max(1, round(config.warmup_fraction * steps))


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate as a function of the number of completed steps.

    Linear from 0 to the peak over the warm-up, then half a cosine down to the minimum at `steps`, and the minimum
    after that. The first update of a run with warm-up therefore has learning rate 0 (its moments still update).

    Returns:
      A function from t (int, or int32 scalar array) to the learning rate (float32 scalar).

    Example:
      >>> schedule = make_schedule(OptimizerConfig(), steps=60_000)
      >>> float(schedule(600))  # the peak
      0.0005000000237487257
    """
    warmup = warmup_steps(config, steps)
    decay = max(steps - warmup, 1)
    peak, lowest = config.learning_rate, config.min_learning_rate

    def schedule(count: Any) -> jax.Array:
        t = jnp.asarray(count, jnp.float32)
        rising = peak * t / max(warmup, 1)
        progress = jnp.clip((t - warmup) / decay, 0.0, 1.0)
        falling = lowest + (peak - lowest) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return jnp.where(t < warmup, rising, falling)

    return schedule


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scale all gradients by max_norm / (norm + 1e-6) where that is below 1, computed in float32.

    Unlike `optax.clip_by_global_norm` it has the small constant of the published recipe. A shared expert bank is one
    tensor and enters the norm once.
    """

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        del params
        norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), updates))
        factor = jnp.minimum(1.0, max_norm / (norm + 1e-6))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def decay_mask(params: Any) -> Any:
    """True for every parameter that decays, False for norm gains and router scales.

    Layers are stacked along leading axes, so the number of dimensions cannot tell a matrix from a gain; names can.
    """

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        key = path[-1]
        return str(getattr(key, "key", getattr(key, "name", key))) not in GAIN_NAMES

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping, then AdamW: `p <- p - lr (m_hat / (sqrt(v_hat) + eps) + weight_decay p)`.

    `update` needs the parameters as its third argument. State and moments are float32.
    """
    return optax.chain(
        clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decay_mask,
            mu_dtype=jnp.float32,
        ),
    )
