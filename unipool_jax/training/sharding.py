"""Where every array of a run lives: shardings of parameters, optimiser state and batches, and the report of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from unipool_jax.config.schema import Config
from unipool_jax.moe.bank import BANK_AXES
from unipool_jax.parallel.mesh import spec

PARAMETER_AXES: dict[str, tuple[str | None, ...]] = {
    "embedding": ("vocab", "embed"),
    "output": ("vocab", "embed"),
    "attention.query": ("embed", "heads"),
    "attention.key": ("embed", "heads"),
    "attention.value": ("embed", "heads"),
    "attention.output": ("heads", "embed"),
    "mixture.router": (None, "embed"),
    **{f"bank.{name}": axes for name, axes in BANK_AXES.items()},
}
"""Logical axes of every matrix among the parameters, by the end of its name; axes it is stacked over come before
these and are never split. Norm gains and router scales are whole on every device."""

_REPORTED_BYTES = 1 << 20


def parameter_spec(name: str, ndim: int, config: Config) -> PartitionSpec:
    """Partition of the parameter, or moment of a parameter, with this dotted name."""
    parts = name.split(".")
    axes = PARAMETER_AXES.get(".".join(parts[-2:])) or PARAMETER_AXES.get(parts[-1], ())
    if config.moe.router == "none":
        # The one block of a dense layer is not dealt out.
        axes = tuple(None if axis == "experts" else axis for axis in axes)
    return spec(*(None,) * (ndim - len(axes)), *axes)


def state_shardings(config: Config, mesh: Mesh, state: Any) -> Any:
    """A sharding for every array of a training state (or of its shapes): matrices as `PARAMETER_AXES`, others whole."""

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return NamedSharding(mesh, parameter_spec(name, leaf.ndim, config))

    return jax.tree_util.tree_map_with_path(place, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the axes that share it."""
    return NamedSharding(mesh, spec("batch"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def process_rows(mesh: Mesh, batch_size: int, devices: Iterable[jax.Device] | None = None) -> list[int]:
    """The rows of a batch that `devices` (those of this process) hold, in order.

    Rarely one run of them: a mesh follows the links of a torus, where the devices of a host are neighbours in two
    dimensions. Processes that share a tensor group hold the same rows.
    """
    places = batch_sharding(mesh).devices_indices_map((batch_size,))
    wanted = mesh.local_devices if devices is None else devices
    return sorted({row for device in wanted for row in range(*places[device][0].indices(batch_size))})


def to_devices(mesh: Mesh, local: Any, batch_size: int) -> Any:
    """A batch on its devices, from the rows that this process loaded: those of `process_rows`, in that order."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:])), local
    )


def _named(state: Any) -> list[tuple[str, Any]]:
    """Every array of a state with its dotted name."""
    flat = jax.tree_util.tree_flatten_with_path(state)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in flat]


class Placed(NamedTuple):
    """One line of the report."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    partition: str
    bytes_per_device: int


def placement(state: Any) -> list[Placed]:
    """Every array of a state (or of its shapes with shardings) with its partition and bytes per device."""
    found = []
    for name, leaf in _named(state):
        own = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        size = math.prod(own) * np.dtype(leaf.dtype).itemsize
        axes = ", ".join("-" if axis is None else str(axis) for axis in getattr(leaf.sharding, "spec", ()))
        found.append(Placed(name, leaf.shape, np.dtype(leaf.dtype).name, axes, size))
    return found


def report(state: Any) -> str:
    """The large parameters, their partition and bytes per device, and the bytes of moments and of the whole state."""
    lines = placement(state)
    large = [line for line in lines if line.name.startswith("params.") and line.bytes_per_device >= _REPORTED_BYTES]
    width = max((len(line.name) for line in large), default=0)
    text = [
        f"  {line.name:{width}}  {line.dtype}{list(line.shape)}  over ({line.partition})  "
        f"{line.bytes_per_device / 2**20:,.1f} MiB a device"
        for line in large
    ]
    total = sum(line.bytes_per_device for line in lines)
    moments = sum(line.bytes_per_device for line in lines if line.name.startswith("opt_state."))
    return "\n".join(
        [
            *text,
            f"  two optimiser moments of each parameter, where it lies: {moments / 2**20:,.1f} MiB a device",
            f"  parameters and optimiser state: {total / 2**20:,.1f} MiB a device",
        ]
    )


def memory_problem(state: Any, device: jax.Device) -> str | None:
    """Why a state (or its shapes, with shardings) does not fit a device that says what memory it has, if that is so."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    needed = sum(line.bytes_per_device for line in placement(state))
    if limit is None or needed <= limit:
        return None
    return (
        f"mesh: parameters and optimiser state take {needed / 2**30:.1f} GiB on each device, and {device.device_kind} "
        f"has {limit / 2**30:.1f} GiB; raise mesh.fsdp or mesh.expert (mode=plan shows what fits)"
    )


def misplaced_banks(config: Config, mesh: Mesh, state: Any) -> list[str]:
    """Expert weights, and moments of them, of which a device holds another part than `PARAMETER_AXES` gives it: each
    with the shape of what it holds and of what it should."""
    found = []
    for name, leaf in _named(state):
        if ".bank." in name:
            wanted = NamedSharding(mesh, parameter_spec(name, leaf.ndim, config)).shard_shape(leaf.shape)
            held = leaf.sharding.shard_shape(leaf.shape)
            if held != wanted:
                found.append(f"{name} {list(held)} instead of {list(wanted)}")
    return found
