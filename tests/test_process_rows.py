"""Which rows of a batch each process loads, and that each device gets its own, however a mesh interleaves processes."""

from __future__ import annotations

import importlib.util
from collections import defaultdict

import jax
import numpy as np
import pytest

from processes import join, run_two
from unipool_jax.config.chips import parse_topology
from unipool_jax.config.compose import CONFIG_DIR, compose_config
from unipool_jax.config.schema import MeshConfig
from unipool_jax.parallel.mesh import make_mesh
from unipool_jax.planner import compilation
from unipool_jax.training.sharding import batch_sharding, process_rows, to_devices

BATCH = 16
# Sizes of the mesh, and the order of eight devices in it, of which four belong to each of two processes: alternating;
# in blocks of a torus; processes that share some rows; processes that share all.
LAYOUTS = {
    "alternating": (MeshConfig(data=8), [0, 4, 1, 5, 2, 6, 3, 7]),
    "blocks": (MeshConfig(data=2, expert=4), [0, 1, 4, 5, 2, 3, 6, 7]),
    "sharing some": (MeshConfig(data=4, tensor=2), [0, 1, 2, 4, 3, 5, 6, 7]),
    "sharing all": (MeshConfig(data=2, fsdp=2, tensor=2), [0, 4, 1, 5, 2, 6, 3, 7]),
}
PRESETS = sorted(path.stem for path in (CONFIG_DIR / "mesh").glob("*_*.yaml"))


def interleaved(layout: str) -> jax.sharding.Mesh:
    sizes, order = LAYOUTS[layout]
    return make_mesh(sizes, [jax.devices()[place] for place in order])


def assert_rows_are_where_they_belong(mesh: jax.sharding.Mesh, of_process: dict[int, list[jax.Device]]) -> None:
    """Each process gets the rows of its devices, once and in order, and together they get all."""
    for batch_size in (BATCH * mesh.size, mesh.size):
        held: defaultdict[jax.Device, set[int]] = defaultdict(set)
        for device, (index, *_) in batch_sharding(mesh).devices_indices_map((batch_size, 8)).items():
            held[device] |= set(np.arange(batch_size)[index].tolist())
        found = {process: process_rows(mesh, batch_size, devices) for process, devices in of_process.items()}
        for process, devices in of_process.items():
            assert found[process] == sorted(set.union(*(held[device] for device in devices)))
        assert set.union(*(set(rows) for rows in found.values())) == set(range(batch_size))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_interleaved_processes(layout: str) -> None:
    mesh, devices = interleaved(layout), jax.devices()
    assert_rows_are_where_they_belong(mesh, {0: devices[:4], 1: devices[4:8]})


def test_rows_in_numbers() -> None:
    first, second = jax.devices()[:4], jax.devices()[4:8]
    assert process_rows(interleaved("alternating"), 8, first) == [0, 2, 4, 6]
    assert process_rows(interleaved("blocks"), 8, second) == [2, 3, 6, 7]
    assert process_rows(interleaved("sharing some"), 8, first) == [0, 1, 2, 3, 4, 5]
    assert process_rows(interleaved("sharing all"), 8, first) == list(range(8))


def test_a_process_alone_loads_everything() -> None:
    for layout in LAYOUTS:
        assert process_rows(interleaved(layout), BATCH) == list(range(BATCH))


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is built for Linux on x86 only"
)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_rows_of_every_preset_with_a_compiler(preset: str, shared: bool) -> None:
    """Real layouts: the chips of a host are neighbors in two dimensions of a torus, so its rows are several runs.

    `shared`: with the expert axis as a tensor axis, whose devices hold the same rows.
    """
    config = compose_config([f"mesh={preset}"])
    assert config.mesh.topology is not None
    if not parse_topology(config.mesh.topology).chip.torus_axes:
        pytest.skip("planned without a compiler")
    swapped = [f"mesh.tensor={config.mesh.expert}", "mesh.expert=1"] if shared else []
    mesh = compilation.topology_mesh(compose_config([f"mesh={preset}", *swapped]))
    of_process = defaultdict(list)
    for device in mesh.devices.flat:
        of_process[device.process_index].append(device)
    assert len(of_process) > 1
    assert_rows_are_where_they_belong(mesh, of_process)
    # These devices are seen as by process 0.
    assert process_rows(mesh, mesh.size) == process_rows(mesh, mesh.size, of_process[0])


def test_devices_get_their_rows_from_two_real_processes() -> None:
    run_two(__file__, 4)


def check_content() -> None:
    """Load this process's rows, put them on devices, and look at what each device got."""
    everything = np.arange(BATCH * 3, dtype=np.int32).reshape(BATCH, 3)
    for layout in LAYOUTS:
        mesh = interleaved(layout)
        placed = to_devices(mesh, everything[process_rows(mesh, BATCH)], BATCH)
        assert placed.shape == everything.shape
        assert len(placed.addressable_shards) == 4
        for shard in placed.addressable_shards:
            np.testing.assert_array_equal(shard.data, everything[shard.index], err_msg=f"{layout} {shard.device}")


if __name__ == "__main__":
    join()
    check_content()
