"""How many processes a launcher announces."""

from __future__ import annotations

import pytest

from unipool_jax.parallel.launch import announced_processes

NAMES = (
    "TPU_PROCESS_ADDRESSES",
    "TPU_WORKER_HOSTNAMES",
    "MEGASCALE_NUM_SLICES",
    "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE",
)


@pytest.mark.parametrize(
    ("announced", "count"),
    [
        ({}, 1),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, 4),
        ({"TPU_PROCESS_ADDRESSES": "localhost:8476,localhost:8477"}, 2),
        # JAX takes the first of these two, too.
        ({"TPU_PROCESS_ADDRESSES": "a:1,a:2,b:1,b:2", "TPU_WORKER_HOSTNAMES": "a,b"}, 4),
        # Two slices of one host each, and of two.
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, 2),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2"}, 4),
        ({"SLURM_STEP_NUM_TASKS": "8"}, 8),
        ({"OMPI_COMM_WORLD_SIZE": "3", "SLURM_STEP_NUM_TASKS": "1"}, 3),
        ({"SLURM_STEP_NUM_TASKS": ""}, 1),
    ],
)
def test_announced_processes(monkeypatch: pytest.MonkeyPatch, announced: dict[str, str], count: int) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in announced.items():
        monkeypatch.setenv(name, value)
    assert announced_processes() == count
