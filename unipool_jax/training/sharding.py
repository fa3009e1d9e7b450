"""Shardings of parameters, optimizer state and batches, and a report of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from unipool_jax.config.schema import Config
from unipool_jax.moe.bank import BANK_AXES
from unipool_jax.moe.shared_experts import GATE_AXES
from unipool_jax.moe.swiglu import SWIGLU_AXES
from unipool_jax.parallel.mesh import spec

PARAMETER_AXES: dict[str, tuple[str | None, ...]] = {
    "embedding": ("vocab", "embed"),
    "output": ("vocab", "embed"),
    "attention.query": ("embed", "heads"),
    "attention.key": ("embed", "heads"),
    "attention.value": ("embed", "heads"),
    "attention.output": ("heads", "embed"),
    "mixture.router": (None, "embed"),
    "shared.sigmoid_gate": GATE_AXES,
    **{f"block.{name}": axes for name, axes in SWIGLU_AXES.items()},
    **{f"bank.{name}": axes for name, axes in BANK_AXES.items()},
}
"""Logical axes of every matrix, by the end of its name; leading axes that it is stacked over are not sharded. Norm
gains and router scales are replicated."""

_REPORTED_BYTES = 1 << 20


def parameter_spec(name: str, ndim: int, config: Config) -> PartitionSpec:
    """`PartitionSpec` of the parameter, or moment of a parameter, with this dotted name."""
    parts = name.split(".")
    axes = PARAMETER_AXES.get(".".join(parts[-2:])) or PARAMETER_AXES.get(parts[-1], ())
    if config.moe.router == "none":
        # A dense layer has one block, which cannot be sharded over the expert axis.
        axes = tuple(None if axis == "experts" else axis for axis in axes)
    return spec(*(None,) * (ndim - len(axes)), *axes)


def state_shardings(config: Config, mesh: Mesh, state: Any) -> Any:
    """A sharding for every array of a training state, or of its shapes: by `PARAMETER_AXES`, else replicated."""

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return NamedSharding(mesh, parameter_spec(name, leaf.ndim, config))

    return jax.tree_util.tree_map_with_path(place, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch along its rows."""
    return NamedSharding(mesh, spec("batch"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that is replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def process_rows(mesh: Mesh, batch_size: int, devices: Iterable[jax.Device] | None = None) -> list[int]:
    """The rows of a batch that `devices` (default: those of this process) hold, ascending.

    They need not be consecutive: a mesh follows the links of a torus, in which the devices of a host are adjacent in
    two dimensions. Processes that share a tensor group hold the same rows.
    """
    places = batch_sharding(mesh).devices_indices_map((batch_size,))
    wanted = mesh.local_devices if devices is None else devices
    return sorted({row for device in wanted for row in range(*places[device][0].indices(batch_size))})


def to_devices(mesh: Mesh, local: Any, batch_size: int) -> Any:
    """The global batch, from the rows `process_rows` that this process loaded, in that order."""
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
    """The sharding and bytes per device of every array of a state, or of its shapes with shardings."""
    found = []
    for name, leaf in _named(state):
        own = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        size = math.prod(own) * np.dtype(leaf.dtype).itemsize
        axes = ", ".join("-" if axis is None else str(axis) for axis in getattr(leaf.sharding, "spec", ()))
        found.append(Placed(name, leaf.shape, np.dtype(leaf.dtype).name, axes, size))
    return found


def report(state: Any) -> str:
    """A text: sharding and bytes per device of the large parameters, bytes of the moments and of the full state."""
    lines = placement(state)
    large = [line for line in lines if line.name.startswith("params.") and line.bytes_per_device >= _REPORTED_BYTES]
    width = max((len(line.name) for line in large), default=0)
    text = [
        f"  {line.name:{width}}  {line.dtype}{list(line.shape)}  over ({line.partition})  "
        f"{line.bytes_per_device / 2**20:,.1f} MiB per device"
        for line in large
    ]
    total = sum(line.bytes_per_device for line in lines)
    moments = sum(line.bytes_per_device for line in lines if line.name.startswith("opt_state."))
    return "\n".join(
        [
            *text,
            f"  optimizer moments, sharded like their parameters: {moments / 2**20:,.1f} MiB per device",
            f"  parameters and optimizer state: {total / 2**20:,.1f} MiB per device",
        ]
    )


def memory_problem(state: Any, device: jax.Device) -> str | None:
    """A message if a state, or its shapes with shardings, exceeds the memory that `device` reports, else None."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    needed = sum(line.bytes_per_device for line in placement(state))
    if limit is None or needed <= limit:
        return None
    return (
        f"mesh: parameters and optimizer state take {needed / 2**30:.1f} GiB per device, but {device.device_kind} "
        f"has {limit / 2**30:.1f} GiB; raise mesh.fsdp or mesh.expert (mode=plan shows what fits)"
    )


def misplaced_banks(config: Config, mesh: Mesh, state: Any) -> list[str]:
    """Expert weights and moments that are not sharded by `PARAMETER_AXES`, with actual and expected shard shapes."""
    found = []
    for name, leaf in _named(state):
        if ".bank." in name:
            wanted = NamedSharding(mesh, parameter_spec(name, leaf.ndim, config)).shard_shape(leaf.shape)
            held = leaf.sharding.shard_shape(leaf.shape)
            if held != wanted:
                found.append(f"{name} {list(held)} instead of {list(wanted)}")
    return found
