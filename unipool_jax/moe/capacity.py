"""How many rows a device can receive in one layer, and how many were too many."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from unipool_jax.config.schema import Config
from unipool_jax.parallel.mesh import num_shards

UNMEASURED_FACTOR = 3.0
"""Capacity factor of a receive buffer before a run has measured how many rows a device receives."""


def capacity(rows: int, devices: int, capacity_factor: float | None) -> int:
    """Rows that a device can receive in one layer: the mean times the capacity factor, a multiple of 16, or all rows.

    Args:
      rows: N k, what each of the `devices` sends and what each receives on average.
      capacity_factor: None is `UNMEASURED_FACTOR`.
    """
    factor = UNMEASURED_FACTOR if capacity_factor is None else capacity_factor
    return min(math.ceil(rows * min(factor, devices) / 16) * 16, rows * devices)


def rows_per_device(config: Config, mesh: AbstractMesh | Mesh | None) -> int:
    """(token, slot) pairs of a device in one layer of a micro-batch: what it sends, and receives on average."""
    tokens = config.train.microbatch_size * config.data.sequence_length
    return tokens * config.moe.top_k // (1 if mesh is None else num_shards(mesh, "batch"))


def overflow(config: Config, mesh: Mesh | None, received: jax.Array) -> jax.Array:
    """Rows beyond the capacity of their device, int32 scalar, from the rows `received` in each place, any shape."""
    devices = 1 if mesh is None else mesh.shape["expert"]
    room = capacity(rows_per_device(config, mesh), devices, config.mesh.capacity_factor)
    return jnp.sum(jnp.maximum(received - room, 0))
