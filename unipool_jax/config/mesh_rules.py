"""Whether a configuration divides over a device mesh. Needs no devices and no arrays."""

from __future__ import annotations

import math
from collections.abc import Iterator

from unipool_jax.config.chips import Topology
from unipool_jax.config.schema import Config, ConfigError, MeshConfig

AXES = ("data", "fsdp", "expert", "tensor")
"""Mesh axes, outermost first: devices of a tensor group are adjacent."""


def resolve_sizes(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Sizes of `AXES` on this many devices; -1 is replaced by the devices that the other axes leave.

    Raises:
      ConfigError: too few devices, or the other axes do not divide them.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    shown = " ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    known = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if known > num_devices or (free and num_devices % known):
        raise ConfigError([f"{shown}: does not fit {num_devices} available devices; choose other sizes"])
    if free:
        sizes[free[0]] = num_devices // known
    return tuple(sizes.values())


def nodes_of_experts(expert: int, tensor: int, node: int) -> int:
    """Nodes that an expert group is in, if as many of its devices, at least two, are in each; otherwise 1.

    Args:
      expert, tensor: sizes of these axes, the innermost two of the mesh.
      node: devices of a node, in which the mesh is laid out one after another.
    """
    inside, rest = divmod(node, tensor)
    return 1 if rest or inside < 2 or expert % inside else expert // inside


def node_problems(config: MeshConfig, topology: Topology) -> Iterator[str]:
    """Whether the devices of an expert group are in as many nodes of a topology as `config` says; more is for GPUs."""
    sizes = dict(zip(AXES, resolve_sizes(config, topology.num_devices), strict=True))
    nodes = nodes_of_experts(sizes["expert"], sizes["tensor"], topology.chip.node)
    if config.expert_nodes not in (1, nodes) and not any(_nodes(config)):
        remedy = "1" if nodes == 1 else f"{nodes}, or to 1 for the flat exchange"
        yield (
            f"mesh.expert_nodes={config.expert_nodes}: with mesh.expert={sizes['expert']} and mesh.tensor="
            f"{sizes['tensor']} the devices that share experts are not in so many nodes of mesh.topology="
            f"{config.topology}; set it to {remedy}"
        )


def problems(config: Config) -> Iterator[str]:
    """One message for each size that does not divide over the mesh; axes of size -1 are not checked."""
    sizes = {axis: max(getattr(config.mesh, axis), 1) for axis in AXES}
    shown = {axis: f"mesh.{axis}={size}" for axis, size in sizes.items()}
    free = [axis for axis in AXES if getattr(config.mesh, axis) == -1]
    for axis in AXES:
        if getattr(config.mesh, axis) == 0:
            yield f"mesh.{axis}=0: must be at least 1, or -1 for the remaining devices"
    if len(free) > 1:
        yield f"{' and '.join(f'mesh.{axis}=-1' for axis in free)}: only one axis can take the remaining devices"
    if config.kernels.implementation == "mosaic_gpu" and (several := [shown[axis] for axis in AXES if sizes[axis] > 1]):
        # Its gradient is updated through a Ref, and `shard_map` of JAX 0.12 passes none that varies over a mesh.
        yield f"kernels.implementation=mosaic_gpu: runs on one device, not with {' '.join(several)}; set it to auto"
    model, ways = config.model, sizes["data"] * sizes["fsdp"] * sizes["expert"]
    over = " x ".join(shown[axis] for axis in ("data", "fsdp", "expert") if sizes[axis] > 1)
    for name in ("microbatch_size", "eval_batch_size"):
        rows = getattr(config.train, name)
        if rows % ways:
            nearest, total = -(-rows // ways) * ways, f" = {ways}" if " x " in over else ""
            yield f"train.{name}={rows}: must be a multiple of {over}{total}; the next one is {nearest}"
    widths = {"model.ffn_size": model.ffn_size}
    if config.moe.dense_ffn_size is not None:
        widths["moe.dense_ffn_size"] = config.moe.dense_ffn_size
    split: dict[tuple[str, ...], dict[str, int]] = {
        ("fsdp",): {"model.hidden_size": model.hidden_size},
        ("tensor",): {"model.num_kv_heads": model.num_kv_heads, "model.vocab_size": model.vocab_size},
        ("fsdp", "tensor"): widths,
    }
    for axes, settings in split.items():
        parts, by = math.prod(sizes[axis] for axis in axes), " x ".join(shown[axis] for axis in axes if sizes[axis] > 1)
        for name, size in settings.items():
            if size % parts:
                yield f"{by}: must divide {name}={size}; choose another size"
    if config.moe.router != "none" and config.experts_per_pool % sizes["expert"]:
        yield (
            f"{shown['expert']}: must divide the {config.experts_per_pool} experts of a pool; choose another size, or "
            "another pool.experts"
        )
    yield from _nodes(config.mesh)


def _nodes(mesh: MeshConfig) -> Iterator[str]:
    """Whether the devices of an expert group can be in so many nodes."""
    if mesh.expert_nodes == 1 or mesh.expert == -1:
        return
    shown = f"mesh.expert_nodes={mesh.expert_nodes}"
    if mesh.expert == 1:
        yield f"{shown}: with mesh.expert=1 no token leaves its device; set it to 1"
    elif mesh.expert % mesh.expert_nodes or mesh.expert == mesh.expert_nodes:
        yield (
            f"{shown}: must divide mesh.expert={mesh.expert} into nodes of at least two devices; choose another "
            "number, or 1"
        )
