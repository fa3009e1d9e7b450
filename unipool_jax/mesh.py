"""The device mesh, and the one table that says which mesh axis shards which axis of the model.

A mesh has four axes, any of them of size 1. Sequences are dealt out over the first three; the model reads the mesh in
use (`jax.set_mesh`) and places its activations with `constrain`. Without a mesh, or with one of a single device,
nothing here does anything.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from unipool_jax.chips import has_ragged
from unipool_jax.config import Config, ConfigError, MeshConfig

AXES = ("data", "fsdp", "expert", "tensor")
"""Mesh axes, slowest first: neighbouring devices share a tensor group."""

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


def resolve_sizes(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Sizes of `AXES` on this many devices, with -1 replaced by what the other axes leave.

    Raises:
      ConfigError: if there are too few devices, or an axis of size -1 does not come out whole.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    shown = " ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    known = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if known > num_devices or (free and num_devices % known):
        raise ConfigError([f"{shown}: does not fit the {num_devices} devices there are; choose other sizes"])
    if free:
        sizes[free[0]] = num_devices // known
    return tuple(sizes.values())


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


def problems(config: Config) -> Iterator[str]:
    """What does not divide over the mesh, one message for each; an axis of size -1 is not looked at."""
    sizes = {axis: max(getattr(config.mesh, axis), 1) for axis in AXES}
    shown = {axis: f"mesh.{axis}={size}" for axis, size in sizes.items()}
    free = [axis for axis in AXES if getattr(config.mesh, axis) == -1]
    for axis in AXES:
        if getattr(config.mesh, axis) == 0:
            yield f"mesh.{axis}=0: must be at least 1, or -1 for the rest of the devices"
    if len(free) > 1:
        yield f"{' and '.join(f'mesh.{axis}=-1' for axis in free)}: only one axis can take the rest of the devices"
    model, ways = config.model, sizes["data"] * sizes["fsdp"] * sizes["expert"]
    over = " x ".join(shown[axis] for axis in ("data", "fsdp", "expert") if sizes[axis] > 1)
    for name in ("microbatch_size", "eval_batch_size"):
        rows = getattr(config.train, name)
        if rows % ways:
            nearest, total = -(-rows // ways) * ways, f" = {ways}" if " x " in over else ""
            yield f"train.{name}={rows}: must be a multiple of {over}{total}; the next one is {nearest}"
    split = {
        "fsdp": {"model.hidden_size": model.hidden_size},
        "tensor": {
            "model.num_kv_heads": model.num_kv_heads,
            "model.ffn_size": model.ffn_size,
            "model.vocab_size": model.vocab_size,
        },
    }
    for axis, settings in split.items():
        for name, size in settings.items():
            if size % sizes[axis]:
                yield f"{shown[axis]}: must divide {name}={size}; choose another size"
    if config.moe.router != "none" and config.experts_per_pool % sizes["expert"]:
        yield (
            f"{shown['expert']}: must divide the {config.experts_per_pool} experts of a pool; choose another size, or "
            "another pool.experts"
        )


def usable_mesh(config: Config) -> Mesh | None:
    """The mesh of `config` over the devices there are; None for a single device.

    Raises:
      ConfigError: if the sizes do not fit the devices, the model, batch or pool does not divide over them, or they have
        no such transport.
    """
    mesh = make_mesh(config.mesh)
    sizes = dataclasses.replace(config.mesh, **dict(zip(AXES, mesh.devices.shape, strict=True)))
    found = list(problems(dataclasses.replace(config, mesh=sizes)))
    device = mesh.devices.flat[0]
    there = device.platform != "cpu" and has_ragged(device.device_kind, mesh.size)
    if config.mesh.transport == "ragged" and sizes.expert > 1 and not there:
        kind = "CPU" if device.platform == "cpu" else f"{mesh.size} {device.device_kind}"
        found.append(
            f"mesh.transport=ragged: {kind} devices have no ragged all-to-all; choose all_gather, or leave it to auto"
        )
    if found:
        raise ConfigError(found)
    return None if mesh.size == 1 else mesh
