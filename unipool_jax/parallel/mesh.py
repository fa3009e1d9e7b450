"""The device mesh, and the one table that says which mesh axis shards which axis of the model.

A mesh has four axes, any of them of size 1. Sequences are dealt out over the first three; the model reads the mesh in
use (`jax.set_mesh`) and places its activations with `constrain`. Without a mesh, or with one of a single device,
nothing here does anything.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from unipool_jax.config.chips import has_ragged
from unipool_jax.config.mesh_rules import AXES, problems, resolve_sizes
from unipool_jax.config.schema import Config, ConfigError, MeshConfig

RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "copies": ("data", "fsdp"),
    "experts": "expert",
    "embed": "fsdp",
    "ffn": "tensor",
    "heads": "tensor",
    "vocab": "tensor",
}
"""Logical axis -> mesh axes. `copies` is the leading axis of a value that each of these devices has its own of."""


GATHERED = "gathered weights"
"""Name of gathered weights, for rematerialisation: gathering again costs less than keeping every layer's."""


def spec(*logical: str | None) -> PartitionSpec:
    """The partition of an array whose axes have these logical names; None is an axis that is not split."""
    return PartitionSpec(*(None if name is None else RULES[name] for name in logical))


def active() -> AbstractMesh | None:
    """The mesh in use, if it is one of ours and has more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.axis_names == AXES and mesh.size > 1 else None


def shards(mesh: AbstractMesh | Mesh, logical: str) -> int:
    """Into how many parts `mesh` splits a logical axis."""
    axes = RULES[logical]
    return math.prod(mesh.shape[axis] for axis in ([axes] if isinstance(axes, str) else axes))


def constrain(array: jax.Array, *logical: str | None) -> jax.Array:
    """`array`, laid out over the mesh in use as its logical axes say; unchanged without a mesh."""
    mesh = active()
    return array if mesh is None else jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec(*logical)))


def whole(logical: Sequence[str | None]) -> tuple[str | None, ...]:
    """The axes of a weight once it is gathered: no longer split along model width."""
    return tuple(None if name == "embed" else name for name in logical)


def gathered(weights: jax.Array, *logical: str | None) -> jax.Array:
    """A weight as it is used: whole along the fsdp axis, and named `GATHERED` for rematerialisation."""
    return checkpoint_name(constrain(weights, *whole(logical)), GATHERED)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over the first of `devices` (all there are), neighbours close to each other where the platform can.

    Raises:
      ConfigError: if there are too few devices, if several processes would not use all of theirs, or if the sizes do
        not fit the devices' torus.
    """
    devices = jax.devices() if devices is None else devices
    sizes = resolve_sizes(config, len(devices))
    shown = " ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    used = devices[: math.prod(sizes)]
    if len({device.process_index for device in devices}) > 1 and len(used) < len(devices):
        raise ConfigError(
            [f"{shown}: must multiply to the {len(devices)} devices of all processes; set one size to -1"]
        )
    types = (AxisType.Auto,) * len(AXES)
    if devices[0].platform != "tpu":
        # In the order of the processes, so that each loads consecutive rows of a batch.
        return Mesh(np.array(used).reshape(sizes), AXES, axis_types=types)
    try:
        return jax.make_mesh(sizes, AXES, axis_types=types, devices=used)
    except (ValueError, NotImplementedError) as error:
        kind = devices[0].device_kind
        raise ConfigError(
            [f"{shown}: the links of {kind} cannot be laid out like this ({error}); choose others"]
        ) from error


def on_mesh(config: Config, mesh: Mesh | None) -> Config:
    """`config` with the sizes of this mesh in place of those asked for, so that the model need not read the mesh."""
    sizes = (1,) * len(AXES) if mesh is None else mesh.devices.shape
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **dict(zip(AXES, sizes, strict=True))))


def usable_mesh(config: Config) -> Mesh | None:
    """The mesh of `config` over the devices there are; None for a single device.

    Raises:
      ConfigError: if the sizes do not fit the devices, the model, batch or pool does not divide over them, or they have
        no such transport.
    """
    mesh = make_mesh(config.mesh)
    sized = on_mesh(config, mesh)
    found = list(problems(sized))
    device = mesh.devices.flat[0]
    there = device.platform != "cpu" and has_ragged(device.device_kind, mesh.size)
    if config.mesh.transport == "ragged" and sized.mesh.expert > 1 and not there:
        kind = "CPU" if device.platform == "cpu" else f"{mesh.size} {device.device_kind}"
        found.append(
            f"mesh.transport=ragged: {kind} devices have no ragged all-to-all; choose all_gather, or leave it to auto"
        )
    if found:
        raise ConfigError(found)
    return None if mesh.size == 1 else mesh
