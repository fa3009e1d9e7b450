"""Receive buffers follow the loads that were measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tiny import tiny_config
from unipool_jax.config.schema import MeshConfig
from unipool_jax.moe.capacity import overflow, rows_per_device
from unipool_jax.parallel.mesh import make_mesh
from unipool_jax.training.receive_buffers import FILE, OverflowedError, ReceiveBuffers, fitted_factor

MESH = MeshConfig(data=2, expert=4)


def buffers(folder: Path, *more: str, mesh: MeshConfig = MESH, meta: dict[str, Any] | None = None) -> ReceiveBuffers:
    return ReceiveBuffers(tiny_config("unipool", *more), make_mesh(mesh, jax.devices()[:8]), folder, meta)


def measured(busiest: float, lost: int = 0) -> dict[str, jax.Array]:
    """Metrics of a step whose busiest device got this many times the mean in its second layer."""
    mean = rows_per_device(tiny_config("unipool"), make_mesh(MESH, jax.devices()[:8]))
    return {"received_L": jnp.array([mean, round(busiest * mean)]), "overflow": jnp.array(lost)}


@pytest.mark.parametrize(
    ("busiest", "factor"), [(0.5, 1.25), (1.0, 1.25), (1.01, 1.5), (2.0, 2.5), (2.4, 3.0), (3.9, 4.0)]
)
def test_a_quarter_more_than_measured_and_never_more_than_all(busiest: float, factor: float) -> None:
    assert fitted_factor(busiest, 4) == factor


def test_what_is_beyond_the_capacity_overflows() -> None:
    mesh = make_mesh(MESH, jax.devices()[:8])
    config = tiny_config("unipool", "mesh.capacity_factor=1.5")
    mean = rows_per_device(config, mesh)
    assert mean == config.train.microbatch_size * config.data.sequence_length * config.moe.top_k // 8
    room = math.ceil(1.5 * mean / 16) * 16
    assert overflow(config, mesh, jnp.array([[room, room + 3], [room + 5, 0]])) == 8
    assert overflow(config, None, jnp.array([[mean * 8]])) == 0


def test_buffers_start_at_three_and_follow_the_loads_between_checkpoints(tmp_path: Path) -> None:
    found = buffers(tmp_path)
    assert found.factor == 3
    for step, busiest in enumerate((1.1, 1.5, 1.2), 1):
        found.add(step, measured(busiest))
    assert found.loads(measured(1.5)).tolist() == [1.0, 1.5]
    assert found.resize()
    assert found.factor == 2.0
    # Smaller again only where that frees a quarter; larger at once.
    found.add(4, measured(1.3))
    assert not found.resize()
    found.add(5, measured(1.9))
    assert found.resize()
    assert found.factor == 2.5
    # Nothing measured, nothing changed.
    assert not found.resize()
    assert found.configured(tiny_config("unipool")).mesh.capacity_factor == 2.5


def test_a_run_that_goes_on_does_so_with_its_buffers_on_a_mesh_like_the_first(tmp_path: Path) -> None:
    found = buffers(tmp_path)
    found.add(1, measured(1.5))
    found.resize()
    assert buffers(tmp_path).factor == 2.0
    assert buffers(tmp_path, mesh=MeshConfig(data=1, expert=8)).factor == 3.0
    assert buffers(tmp_path, "mesh.capacity_factor=1.75").factor == 1.75


def test_a_size_that_was_set_stays(tmp_path: Path) -> None:
    found = buffers(tmp_path, "mesh.capacity_factor=2")
    found.add(1, measured(1.0))
    assert not found.resize()
    assert found.factor == 2
    assert not (tmp_path / FILE).exists()


def test_after_an_overflow_the_same_command_has_room(tmp_path: Path) -> None:
    found = buffers(tmp_path)
    with pytest.raises(
        OverflowedError, match=r"step 7: 12 rows .* 3\.12 times the mean, its buffer holds 3 times"
    ) as error:
        found.add(7, measured(3.125, lost=12))
    assert "The same command resumes from the last checkpoint with buffers of 4 times the mean" in str(error.value)
    assert buffers(tmp_path).factor == 4
    assert json.loads((tmp_path / FILE).read_text()) == {"expert_devices": 4, "receive_factor": 4.0}


def test_where_the_size_was_set_the_message_says_what_to_set(tmp_path: Path) -> None:
    found = buffers(tmp_path, "mesh.capacity_factor=1")
    with pytest.raises(OverflowedError, match=r"mesh\.capacity_factor=2\.5, or null to fit it to loads"):
        found.add(7, measured(2.0, lost=12))


def test_dropped_rows_are_counted_over_an_interruption(tmp_path: Path) -> None:
    found = buffers(tmp_path, "mesh.overflow=drop")
    found.add(1, measured(3.125, lost=12))
    after = buffers(tmp_path, "mesh.overflow=drop", meta=found.document())
    after.add(2, measured(3.1, lost=3))
    assert (after.total, after.take_overflow(), after.take_overflow()) == (15, 15, 0)
