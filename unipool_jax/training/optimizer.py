"""AdamW with global-norm clipping, linear warm-up and cosine decay.

The clipping formula, the schedule and the choice of decayed tensors are those of the published recipe
(arXiv 2605.06665); AdamW itself is Optax's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unipool_jax.config.schema import Config, OptimizerConfig
from unipool_jax.moe.visibility import exposure

GAIN_NAMES = frozenset(
    {
        *("attention_norm", "ffn_norm", "final_norm", "attention_post_norm", "ffn_post_norm"),
        *("scale", "switch", "depth"),
    }
)
"""Parameter names of RMSNorm gains, router scales, gates of Switch Attention and depth vectors: they do not decay."""


def warmup_steps(config: OptimizerConfig, steps: int) -> int:
    """Steps of linear warm-up in a run of `steps` steps: at least one, unless warmup_fraction is 0."""
    if config.warmup_fraction == 0:
        return 0
    return max(1, round(config.warmup_fraction * steps))


def make_schedule(config: OptimizerConfig, steps: int | Sequence[int]) -> optax.Schedule:
    """The learning rate as a function of the updates made so far.

    Linear from 0 to the peak during warm-up, then half a cosine down to the minimum at `steps`, constant afterwards.
    With warm-up, the first update therefore has learning rate 0 (the moments still update).

    A run that was extended keeps the rates of its past. Its further steps have the minimum, or, with
    `extension=rewarm`, warm-up and cosine anew, from the minimum to the peak and back (re-warming and re-decaying,
    arXiv 2403.08763).

    Args:
      config: peak, minimum, warm-up, and what an extension does.
      steps: length of the run, or its lengths as it began and after each extension, ascending.

    Returns:
      A function from t (int, or int32 scalar array) to the learning rate (float32 scalar).

    Example:
      >>> schedule = make_schedule(OptimizerConfig(), steps=60_000)
      >>> float(schedule(600))  # the peak
      0.0005000000237487257
    """
    first, *later = [steps] if isinstance(steps, int) else steps
    peak, lowest = config.learning_rate, config.min_learning_rate

    def cycle(t: jax.Array, steps: int, start: float) -> jax.Array:
        warmup = warmup_steps(config, steps)
        rising = start + (peak - start) * t / max(warmup, 1)
        progress = jnp.clip((t - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        falling = lowest + (peak - lowest) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return jnp.where(t < warmup, rising, falling)

    def schedule(count: Any) -> jax.Array:
        t = jnp.asarray(count, jnp.float32)
        rate = cycle(t, first, 0.0)
        if config.extension == "rewarm":
            for begin, end in itertools.pairwise([first, *later]):
                rate = jnp.where(t < begin, rate, cycle(t - begin, end - begin, lowest))
        return rate

    return schedule


def extension_notice(config: OptimizerConfig, steps: Sequence[int]) -> str:
    """What the learning rate does in the steps by which a run was last extended, as a sentence; see `make_schedule`."""
    begin, end = steps[-2:]
    low, peak = f"{config.min_learning_rate:g}", f"{config.learning_rate:g}"
    rate = f"stays at optimizer.min_learning_rate={low}"
    if config.extension == "rewarm":
        warmup = warmup_steps(config, end - begin)
        rate = f"rises from {low} to {peak} over {warmup} steps and falls to {low} by another cosine"
    return f"extended from step {begin} to {end} (optimizer.extension={config.extension}): the learning rate {rate}"


def next_learning_rate(config: OptimizerConfig, steps: int | Sequence[int], opt_state: Any) -> jax.Array:
    """The learning rate of the update that follows `opt_state`, float32.

    The schedule counts updates, which after a skipped step are fewer than steps.
    """
    count = optax.tree.get(opt_state, "ScaleByScheduleState").count
    return jnp.asarray(make_schedule(config, steps)(count), jnp.float32)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scale gradients by `min(1, max_norm / (norm + 1e-6))`, with the global norm computed in float32.

    The published recipe has the 1e-6, which `optax.clip_by_global_norm` lacks. A shared bank is one tensor and enters
    the norm once.
    """

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        del params
        norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), updates))
        factor = jnp.minimum(1.0, max_norm / (norm + 1e-6))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def decay_mask(params: Any) -> Any:
    """True for parameters with weight decay, False for norm gains, router scales and depth vectors.

    Decided by name, because layers are stacked along leading axes and a stacked gain has as many axes as a matrix.
    """

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        key = path[-1]
        return str(getattr(key, "key", getattr(key, "name", key))) not in GAIN_NAMES

    return jax.tree_util.tree_map_with_path(decays, params)


def reuse_divisors(config: Config) -> np.ndarray | None:
    """u^p of each expert, float32 `[G, E]`: u layers see it, p is that of `optimizer.reuse_divisor`. None if p is 0.

    The argument for p = 1/2 (arXiv 2606.16825): a step of Adam is as long whether one layer or u layers had a part in
    the gradient, but it changes u layers at once.
    """
    power = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[config.optimizer.reuse_divisor]
    return np.power(exposure(config), power).astype(np.float32) if power else None


def divide_experts(divisors_GE: np.ndarray) -> optax.GradientTransformation:
    """Divide the update of each expert, three matrices of `params["pools"]["bank"]`, by its divisor."""

    def update(updates: Any, params: Any = None) -> Any:
        del params
        bank = {name: rows / divisors_GE[..., None, None] for name, rows in updates["pools"]["bank"].items()}
        return updates | {"pools": updates["pools"] | {"bank": bank}}

    return optax.stateless(update)


def make_optimizer(
    config: OptimizerConfig, steps: int | Sequence[int], divisors_GE: np.ndarray | None = None
) -> optax.GradientTransformation:
    """Clipping, then AdamW: `p <- p - lr (m_hat / (sqrt(v_hat) + eps) + weight_decay p)`.

    `update` needs the parameters as its third argument. Moments are float32. With divisors the expert e of a bank has

        p <- p - lr / d_e (m_hat / (sqrt(v_hat) + eps) + weight_decay p)       reuse_decay=scaled
        p <- p - lr (m_hat / (sqrt(v_hat) + eps) / d_e + weight_decay p)       reuse_decay=compensated

    Args:
      config: of the optimizer.
      steps: lengths of the run; see `make_schedule`.
      divisors_GE: d, of `reuse_divisors`; None divides nothing.
    """
    divide = [] if divisors_GE is None else [divide_experts(divisors_GE)]
    compensated = config.reuse_decay == "compensated"
    adamw = optax.chain(
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon, mu_dtype=jnp.float32),
        *(divide if compensated else []),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        *([] if compensated else divide),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    )
    return optax.chain(clip_by_global_norm(config.clip_norm), adamw)


def run_optimizer(config: Config) -> optax.GradientTransformation:
    """The optimizer of a run; where experts change places (`training.placement`), `config` says so."""
    return make_optimizer(config.optimizer, config.train.lengths, reuse_divisors(config))
