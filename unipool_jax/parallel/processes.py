"""Several processes that train one model: starting them, and what they must agree on.

JAX's own runtime connects them, passes data between their devices, and notices when one dies. Every process runs the
same program; only process 0 writes files and prints.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from unipool_jax.config.schema import ConfigError, DistributedConfig

Found = TypeVar("Found")


class PeerError(RuntimeError):
    """Another process has failed, so this one stops too; the message says which and why."""


def announced_processes() -> int:
    """How many processes the launcher says there are (Slurm step, Open MPI, Cloud TPU hosts); 1 if it says nothing.

    The hosts of a TPU slice are read from the variables, and in the order, that JAX looks for them.
    """
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES", "")).split(",")
    slices, *counts = (
        int(value) if (value := os.environ.get(name, "")).isdigit() else 1
        for name in ("MEGASCALE_NUM_SLICES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    )
    return max(len(hosts) * slices, *counts, 1)


def start(config: DistributedConfig) -> None:
    """Connect to the other processes, if there are any; must come before anything asks JAX for devices.

    Raises:
      ConfigError: if they cannot be found or reached.
    """
    explicit = config.coordinator is not None
    if not explicit and (config.launch == "single" or (config.launch == "auto" and announced_processes() == 1)):
        return
    if "cpu" in os.environ.get("JAX_PLATFORMS", ""):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator_address=config.coordinator,
            num_processes=config.num_processes,
            process_id=config.process_id,
            initialization_timeout=config.start_timeout_seconds,
            heartbeat_timeout_seconds=config.timeout_seconds,
        )
    except (RuntimeError, ValueError) as error:
        given = f"distributed.coordinator={config.coordinator}" if explicit else f"distributed.launch={config.launch}"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            [
                f"{given}: the other processes were not found: {reason}; start all of them within "
                f"distributed.start_timeout_seconds={config.start_timeout_seconds}, name process 0 with "
                "distributed.coordinator=HOST:PORT, or set distributed.launch=single"
            ]
        ) from error


def is_process_0() -> bool:
    """Whether this is process 0, the one that writes."""
    return jax.process_index() == 0


def broadcast_from_process_0(text: str) -> str:
    """What process 0 passed, in every process."""
    if jax.process_count() == 1:
        return text
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.zeros(size, np.uint8)
    if is_process_0():
        padded[:] = data
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))).decode()


def all_agree(mine: bool) -> bool:
    """Whether every process passed True; each must call this at the same point."""
    return mine if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.int32(mine)).min())


def process_0_first(action: Callable[[], Found], expected: tuple[type[Exception], ...]) -> Found:
    """`action()` in process 0, and once it is through also in the others; they share its files.

    Args:
      action: what to do.
      expected: what it may raise. In process 0 such an error goes on its way; the others then raise `PeerError`.
    """
    if jax.process_count() == 1:
        return action()
    if not is_process_0():
        if problem := broadcast_from_process_0(""):
            raise PeerError(problem)
        return action()
    try:
        result = action()
    except expected as error:
        broadcast_from_process_0(f"process 0 stopped: {error}")
        raise
    broadcast_from_process_0("")
    return result


def lost_peer(error: BaseException) -> str | None:
    """The first line of an error that a collective or the runtime raises when another process has gone; else None."""
    signs = ("gloo", "nccl", "connection", "peer", "coordination", "heartbeat", "unavailable", "deadline")
    text = str(error).strip()
    if not isinstance(error, jax.errors.JaxRuntimeError) or not any(sign in text.lower() for sign in signs):
        return None
    return text.splitlines()[0]


class Vote:
    """A number each process casts once a step; the largest is known to all one step later, without waiting."""

    def __init__(self) -> None:
        self._pending: jax.Array | None = None
        mesh = jax.sharding.Mesh(np.array(jax.devices()), ("processes",))
        self._place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("processes"))
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self._largest = jax.jit(jax.numpy.max, out_shardings=everywhere)

    def cast(self, number: int) -> int:
        """Cast `number` for this step; the largest number cast for the step before, 0 at first."""
        decided = 0 if self._pending is None else int(jax.device_get(self._pending))
        mine = np.full(jax.local_device_count(), number, np.int32)
        self._pending = self._largest(jax.make_array_from_process_local_data(self._place, mine))
        return decided
