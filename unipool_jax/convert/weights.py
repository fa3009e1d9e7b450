"""Weights as NumPy arrays in the structure of our parameter tree, and a hash of each expert."""

from __future__ import annotations

import functools
import hashlib
from typing import Any, NamedTuple

import jax
import numpy as np

from unipool_jax.config.schema import Config
from unipool_jax.convert.errors import ConversionError
from unipool_jax.training.state import init_state

ExpertHashes = dict[tuple[int, int], str]
"""(pool, expert) -> hash."""


class Weights(NamedTuple):
    """The weights of a model, without optimizer state."""

    params: dict[str, Any]
    """The parameter tree with float32 leaves: of layers `[G, L/G, ...]`, of the bank `[G, E, ...]`."""
    expert_bias_GNE: np.ndarray
    """Selection bias, float32; zeros unless loss.balance=expert_bias."""


def empty_weights(config: Config) -> Weights:
    """Weights of the model of `config`, zeros until something is written into them.

    What no file fills, router rows past a narrow window, stays zero.
    """
    state = jax.eval_shape(functools.partial(init_state, config), jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), state.params)
    return Weights(params, np.zeros(state.balance.expert_bias_GNE.shape, np.float32))


def unallocated_weights(config: Config) -> Weights:
    """`Weights` of the right shapes without memory: what a file must hold before memory is taken for it."""
    state = jax.eval_shape(functools.partial(init_state, config), jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), state.params)
    return Weights(params, np.broadcast_to(np.float32(0), state.balance.expert_bias_GNE.shape))


def check_count(wanted: Weights, stored: int, what: str) -> None:
    """Raises ConversionError if a model has far more weights than the `stored` numbers of a file.

    A list of all that is missing would be as long as the configuration claims.
    """
    count = sum(leaf.size for leaf in jax.tree.leaves(wanted.params))
    if count > 4 * stored + 1000:
        raise ConversionError(f"{what}: holds {stored:,} numbers, but the model of its configuration has {count:,}")


def hash_arrays(arrays: list[np.ndarray]) -> str:
    """First 16 hexadecimal digits of the SHA-256 of the float32 values in row-major order."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array, np.float32).tobytes())
    return digest.hexdigest()[:16]


def expert_hashes(weights: Weights) -> ExpertHashes:
    """The hash of the gate, up and down matrices of every expert."""
    bank = weights.params["pools"]["bank"]
    pools, experts = bank["gate"].shape[:2]
    return {
        (pool, expert): hash_arrays([bank[name][pool, expert] for name in ("gate", "up", "down")])
        for pool in range(pools)
        for expert in range(experts)
    }


def check_same_experts(wanted: ExpertHashes, found: ExpertHashes, what: str) -> None:
    """Compare experts one by one.

    Raises:
      ConversionError: if their number or any of them differs.
    """
    if len(wanted) != len(found):
        raise ConversionError(f"{what}: {len(found)} experts, expected {len(wanted)}; nothing was kept")
    different = [key for key in wanted if wanted[key] != found.get(key)]
    if different:
        names = ", ".join(f"pool {pool} expert {expert}" for pool, expert in different[:8])
        more = f" and {len(different) - 8} more" if len(different) > 8 else ""
        raise ConversionError(f"{what}: weights differ from the source in {names}{more}; nothing was kept")
