"""UniPool-lock inside a training step: the partition under way, its fade, and the re-indexing that ends it (method M6).

Before the lock the state holds a `Candidate`, and every score of a layer for an expert outside its part is multiplied
by 1 - alpha. After the lock nothing of this is left: experts, routers and their optimizer moments are re-indexed so
that pool g = layer l holds the K experts of that layer, and the first K rows of its router are theirs. The run goes on
as the model of G = L pools; rows of experts of other layers remain behind the first K, as they remain in the norm.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unipool_jax.config.lock_schedule import make_schedule
from unipool_jax.config.schema import Config


class Candidate(NamedTuple):
    """A partition under way, as the training step sees it."""

    owner_M: jax.Array
    """The layer that will own each expert, int32 `[M]`; -1 everywhere before the freeze."""
    fade: jax.Array
    """alpha of the last update, float32 scalar: what an evaluation of this state fades by."""


def init_candidate(config: Config) -> Candidate | None:
    """State before the freeze; None without a lock, and for the structure after it."""
    if config.lock.ownership == "none" or config.locked:
        return None
    return Candidate(jnp.full((config.total_experts,), -1, jnp.int32), jnp.zeros((), jnp.float32))


def faded(config: Config, candidate: Candidate | None, step: jax.Array) -> Candidate | None:
    """`candidate` with the alpha of the update after `step` completed steps: see `LockSchedule.fade`."""
    if candidate is None:
        return None
    schedule = make_schedule(config)
    done = (step - schedule.freeze).astype(jnp.float32) / (schedule.lock - schedule.freeze)
    fade = 0.5 * (1.0 - jnp.cos(jnp.pi * done))
    # cos(pi) is not exactly -1 in every float32 implementation.
    fade = jnp.where(step >= schedule.lock, 1.0, fade)
    active = (step >= schedule.freeze) & (step <= schedule.lock)
    return candidate._replace(fade=jnp.where(active, fade, 0.0).astype(jnp.float32))


def score_factors(config: Config, candidate: Candidate | None) -> jax.Array | None:
    """Factor on each score, float32 `[1, L, M]`: 1 - alpha for experts outside a layer's part, 1 for all others.

    Exactly 1 everywhere while there is no partition or alpha is 0. None for a state without a candidate.
    """
    if candidate is None:
        return None
    own_LM = candidate.owner_M == jnp.arange(config.mixture_layers)[:, None]
    return jnp.where(own_LM | (candidate.owner_M < 0), 1.0, 1.0 - candidate.fade)[None]


def entropy_coefficient(config: Config, step: jax.Array) -> jax.Array:
    """Weight of the entropy loss in the update after `step` steps: linear from 0, then constant to the end."""
    risen = step.astype(jnp.float32) / make_schedule(config).warmup
    return config.lock.entropy_coefficient * jnp.minimum(risen, 1.0)


def locked_tree(tree: Any, expert_ids_LK: np.ndarray, places: Any = None) -> Any:
    """A training state, parameters or moments of one pool of M experts as those of L pools of K experts.

    Bank: `[1, M, ...]` to `[L, K, ...]`, layer l holding the experts `expert_ids_LK[l]`. Per-layer arrays: from
    `[1, L, ...]` to `[L, 1, ...]`; router rows come in the order of its own experts, then the others by id. All else
    stays. One array at a time, each freed as it is replaced, so that the largest is all the memory it takes.

    Args:
      tree: holds arrays of a model's parameters under their names, at any depth; those that move are deleted.
      expert_ids_LK: the experts of each layer in ascending order.
      places: a sharding for every array of `tree`; None leaves them on the default device.
    """
    orders_LM = router_order(expert_ids_LK)

    def move(path: tuple[Any, ...], leaf: jax.Array, place: Any = None) -> jax.Array:
        keys = [str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path]
        if "bank" in keys:
            moved = _taken(leaf, jnp.asarray(expert_ids_LK))
        elif "layers" not in keys:
            return leaf
        elif keys[-1] == "router":
            moved = _ordered(leaf, jnp.asarray(orders_LM))
        else:
            moved = _stacked(leaf)
        leaf.delete()
        return moved if place is None else jax.device_put(moved, place)

    return jax.tree_util.tree_map_with_path(move, tree, *([] if places is None else [places]))


def router_order(expert_ids_LK: np.ndarray) -> np.ndarray:
    """Order of the router rows of each layer after the lock: its own experts, then the others by id; `[L, M]`."""
    every = np.arange(expert_ids_LK.size)
    return np.stack([np.concatenate([ids, np.setdiff1d(every, ids)]) for ids in np.asarray(expert_ids_LK)])


@jax.jit
def _taken(bank: jax.Array, expert_ids_LK: jax.Array) -> jax.Array:
    return bank[0][expert_ids_LK]


@jax.jit
def _ordered(routers: jax.Array, orders_LM: jax.Array) -> jax.Array:
    return jnp.take_along_axis(routers[0], orders_LM[:, :, None], axis=1)[:, None]


@jax.jit
def _stacked(leaf: jax.Array) -> jax.Array:
    return jnp.swapaxes(leaf, 0, 1)


def locked_load(load_1M: jax.Array, expert_ids_LK: np.ndarray) -> jax.Array:
    """The share of a pool's choices per expert, `[1, M]`, as the share of each layer's choices, `[L, K]`.

    With each expert used by one layer, a share of the choices of all L layers is L times as large among those of its
    own: the pool loss stays what it was.
    """
    return load_1M[0][jnp.asarray(expert_ids_LK)] * expert_ids_LK.shape[0]


def pool_counts(counts_LK: np.ndarray, expert_ids_LK: np.ndarray) -> np.ndarray:
    """Counts over each layer's own experts, in the order of the pool: `[L, M]`, zero outside a layer's part."""
    counts_LM = np.zeros((counts_LK.shape[0], expert_ids_LK.size), counts_LK.dtype)
    np.put_along_axis(counts_LM, np.asarray(expert_ids_LK), counts_LK, axis=1)
    return counts_LM
