"""The device mesh, and the table that maps logical axes of arrays to mesh axes.

A mesh has four axes, each possibly of size 1; the batch is sharded over the first three. Functions here read the mesh
in use (`jax.set_mesh`) and have no effect without one, or with one of a single device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from unipool_jax.config.chips import has_ragged, has_sparse_cores
from unipool_jax.config.mesh_rules import AXES, problems, resolve_sizes
from unipool_jax.config.schema import Config, ConfigError, MeshConfig

RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "replica": ("data", "fsdp"),
    "device": AXES,
    "experts": "expert",
    "embed": "fsdp",
    "ffn": "tensor",
    "ffn_rows": ("tensor", "fsdp"),
    "heads": "tensor",
    "vocab": "tensor",
}
"""Logical axis -> mesh axes. `replica` is a leading axis with one entry for each data-parallel replica, such as the
gradient accumulators of a bank before they are summed, `device` one with an entry for each device. `ffn_rows` are the
rows of a matrix from expert width to model width: of its columns fsdp could leave a device less than the 128 of a
register, and then the TPU compiler all-reduces the gradient instead of scattering it."""

_GATHERED = {"embed": None, "ffn_rows": "ffn"}
"""Logical axes that are split over fsdp, and what they are once gathered."""

Axes = Sequence[str | None]
"""Logical axes of an array; None is an axis that is not sharded."""


def spec(*logical: str | None) -> PartitionSpec:
    """The `PartitionSpec` of an array with these logical axes; None is an axis that is not sharded."""
    return PartitionSpec(*(None if name is None else RULES[name] for name in logical))


def active_mesh() -> AbstractMesh | None:
    """The mesh in use; None without one, for one with other axes, or for a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.axis_names == AXES and mesh.size > 1 else None


def num_shards(mesh: AbstractMesh | Mesh, logical: str) -> int:
    """Number of shards of a logical axis over `mesh`."""
    axes = RULES[logical]
    return math.prod(mesh.shape[axis] for axis in ([axes] if isinstance(axes, str) else axes))


def constrain(array: jax.Array, *logical: str | None) -> jax.Array:
    """`array`, constrained to the sharding of its logical axes over the mesh in use; unchanged without a mesh."""
    mesh = active_mesh()
    return array if mesh is None else jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec(*logical)))


def gathered_axes(logical: Sequence[str | None]) -> tuple[str | None, ...]:
    """The logical axes of a weight after it is gathered over fsdp."""
    return tuple(name if name is None else _GATHERED.get(name, name) for name in logical)


def scattered_dimension(logical: Sequence[str | None]) -> int:
    """The dimension along which a weight with these logical axes is split over fsdp."""
    (dimension,) = (index for index, name in enumerate(logical) if name in _GATHERED)
    return dimension


def gathered(weights: jax.Array, *logical: str | None) -> jax.Array:
    """A weight as it is used: all-gathered over the fsdp axis."""
    return constrain(weights, *gathered_axes(logical))


def on_each_device(
    function: Callable[..., jax.Array], operands: Sequence[jax.Array], axes: Sequence[Axes], result: Axes
) -> jax.Array:
    """`function(*operands)` of each device's own part of the operands: for kernels that the compiler cannot divide.

    Args:
      function: of arrays; not differentiated across devices.
      operands: sharded, or to be sharded, by `axes`.
      axes: logical axes of each operand.
      result: logical axes of the result.
    """
    mesh = active_mesh()
    if mesh is None:
        return function(*operands)
    specs = tuple(spec(*names) for names in axes)
    # Kernels of Pallas do not say over which axes their results vary.
    on_device = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=spec(*result), check_vma=False)
    return on_device(*operands)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over the first of `devices` (default: all), laid out along physical links on TPU.

    Raises:
      ConfigError: too few devices, devices of several processes left unused, or sizes that do not fit the TPU's torus.
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
        # In process order, so that each process loads consecutive rows of the batch.
        return Mesh(np.array(used).reshape(sizes), AXES, axis_types=types)
    try:
        return jax.make_mesh(sizes, AXES, axis_types=types, devices=used)
    except (ValueError, NotImplementedError) as error:
        kind = devices[0].device_kind
        raise ConfigError(
            [f"{shown}: does not fit the topology of these {kind} devices ({error}); choose other sizes"]
        ) from error


def compiler_options(config: MeshConfig) -> dict[str, bool]:
    """Options of the TPU compiler for the training step; `usable_mesh` refuses them for devices without SparseCores.

    The flags stand in MaxText's recipes for v6e and 7x. The last two let a gather over several dimensions of the torus
    run there too.
    """
    if not config.sparse_core_collectives:
        return {}
    kinds = ("all_gather", "reduce_scatter", "all_reduce", "2d_all_gather", "3d_all_gather")
    return {f"xla_tpu_enable_sparse_core_collective_offload_{kind}": True for kind in kinds}


def on_mesh(config: Config, mesh: Mesh | None) -> Config:
    """`config` with the sizes of `mesh` instead of the requested ones, so that the model need not read the mesh."""
    sizes = (1,) * len(AXES) if mesh is None else mesh.devices.shape
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **dict(zip(AXES, sizes, strict=True))))


def usable_mesh(config: Config) -> Mesh | None:
    """The mesh of `config` over the available devices; None for a single device.

    Raises:
      ConfigError: sizes that do not fit the devices; a model, batch or pool that does not divide over them; or a
        transport, or SparseCores, that they do not have.
    """
    mesh = make_mesh(config.mesh)
    sized = on_mesh(config, mesh)
    found = list(problems(sized))
    device = mesh.devices.flat[0]
    there = device.platform != "cpu" and has_ragged(device.device_kind, mesh.size)
    if config.mesh.transport == "ragged" and sized.mesh.expert > 1 and not there:
        kind = "CPU" if device.platform == "cpu" else f"{mesh.size} {device.device_kind}"
        found.append(
            f"mesh.transport=ragged: {kind} devices do not support ragged all-to-all; choose auto or all_gather"
        )
    if config.mesh.sparse_core_collectives and not has_sparse_cores(device.device_kind):
        kind = "CPU" if device.platform == "cpu" else device.device_kind
        found.append(f"mesh.sparse_core_collectives=true: {kind} devices have no SparseCores; set it to false")
    if found:
        raise ConfigError(found)
    return None if mesh.size == 1 else mesh
