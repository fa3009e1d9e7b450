"""Whether this process is one of several, and where the others are. Imports JAX only to ask it."""

from __future__ import annotations

import os
from typing import NamedTuple

from unipool_jax.config.schema import ConfigError, DistributedConfig


class Place(NamedTuple):
    """This process among several."""

    coordinator: str
    """HOST:PORT of process 0."""
    number: int
    processes: int


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


def one_of_several(config: DistributedConfig) -> bool:
    """Whether there are other processes to connect to."""
    if config.coordinator is not None or config.launch == "cluster":
        return True
    return config.launch == "auto" and announced_processes() > 1


def find_place(config: DistributedConfig) -> Place:
    """The place of this process, from its settings or from what JAX finds in its environment.

    Raises:
      ConfigError: JAX finds no launcher.
    """
    if config.coordinator is not None:
        assert config.num_processes is not None
        assert config.process_id is not None
        return Place(config.coordinator, config.process_id, config.num_processes)
    # What `jax.distributed.initialize` calls; the lines between processes need the answer before JAX connects them.
    from jax._src.clusters import ClusterEnv

    try:
        address, count, number, _ = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, config.start_timeout_seconds
        )
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise _not_found(config, str(error) or type(error).__name__) from error
    if address is None or count is None or number is None:
        raise _not_found(config, "JAX finds no launcher")
    return Place(address, number, count)


def _not_found(config: DistributedConfig, reason: str) -> ConfigError:
    return ConfigError(
        [
            f"distributed.launch={config.launch}: cannot find the other processes ({reason}); name process 0 with "
            "distributed.coordinator=HOST:PORT, or set distributed.launch=single"
        ]
    )
