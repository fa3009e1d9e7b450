"""Training in several processes: connecting them, and decisions that all of them must share.

JAX's distributed runtime connects the processes and detects when one dies. All run the same program; only process 0
writes files and prints.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from unipool_jax.config.errors import UserError
from unipool_jax.config.schema import ConfigError, DistributedConfig

Found = TypeVar("Found")


class PeerError(UserError, RuntimeError):
    """Another process failed, so this one stops too; the message says which and why."""


def announced_processes() -> int:
    """Number of processes according to the launcher (Slurm step, Open MPI, Cloud TPU hosts); 1 without one.

    The hosts of a TPU slice are read from the variables that JAX reads, in the same order.
    """
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES", "")).split(",")
    slices, *counts = (
        int(value) if (value := os.environ.get(name, "")).isdigit() else 1
        for name in ("MEGASCALE_NUM_SLICES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    )
    return max(len(hosts) * slices, *counts, 1)


def start(config: DistributedConfig) -> None:
    """Connect to the other processes, if any. Must run before JAX initializes its devices.

    Raises:
      ConfigError: the other processes cannot be found or reached.
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
                f"{given}: cannot connect to the other processes ({reason}); start all of them within "
                f"distributed.start_timeout_seconds={config.start_timeout_seconds}, name process 0 with "
                "distributed.coordinator=HOST:PORT, or set distributed.launch=single"
            ]
        ) from error


def is_process_0() -> bool:
    """Whether this is process 0, which writes files and prints."""
    return jax.process_index() == 0


def broadcast_from_process_0(text: str) -> str:
    """The `text` of process 0, in every process. A collective: all processes must call it."""
    if jax.process_count() == 1:
        return text
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.zeros(size, np.uint8)
    if is_process_0():
        padded[:] = data
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))).decode()


def all_agree(mine: bool) -> bool:
    """Whether `mine` is True in every process. A collective: all processes must call it."""
    return mine if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.int32(mine)).min())


def process_0_first(action: Callable[[], Found], expected: tuple[type[Exception], ...]) -> Found:
    """Run `action` in process 0 and, when it has finished, in the others, which may read the files it wrote.

    Args:
      action: called once in every process.
      expected: exceptions it may raise in process 0, which re-raises them.

    Returns:
      The result of this process's call.

    Raises:
      PeerError: in the other processes, if `action` raised one of `expected` in process 0.
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


def lost_peer(error: BaseException) -> PeerError | None:
    """What to report instead of `error` if it looks as if another process was lost, else None.

    JAX has no exception type for this: the text of its backends' errors is all there is. From within a save it comes as
    a ValueError that begins with the status ("UNKNOWN: Gloo AllGather failed").
    """
    signs = ("gloo", "nccl", "connection", "peer", "coordination", "heartbeat", "unavailable", "deadline")
    text = str(error).strip()
    status = isinstance(error, ValueError) and re.match(r"[A-Z_]+: ", text)
    if jax.process_count() == 1 or not (status or isinstance(error, jax.errors.JaxRuntimeError)):
        return None
    if not any(sign in text.lower() for sign in signs):
        return None
    return PeerError(
        f"process {jax.process_index()} stopped because it lost another one, whose output may say why: "
        f"{text.splitlines()[0]}\n"
        "Start all processes again with the same command; they resume from the newest complete checkpoint."
    )


class Vote:
    """The maximum of a number over all processes, one step late so that no step waits for it."""

    def __init__(self) -> None:
        self._pending: jax.Array | None = None
        mesh = jax.sharding.Mesh(np.array(jax.devices()), ("processes",))
        self._place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("processes"))
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self._largest = jax.jit(jax.numpy.max, out_shardings=everywhere)

    def cast(self, number: int) -> int:
        """Submit `number` for this step; return the largest submitted for the previous step, 0 at first."""
        decided = 0 if self._pending is None else int(jax.device_get(self._pending))
        mine = np.full(jax.local_device_count(), number, np.int32)
        self._pending = self._largest(jax.make_array_from_process_local_data(self._place, mine))
        return decided
