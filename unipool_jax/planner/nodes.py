"""The expert axis of a mesh in two, where tokens are exchanged in two stages: between nodes and inside them."""

from __future__ import annotations

from jax.sharding import Mesh

from unipool_jax.config.schema import MeshConfig

BETWEEN, INSIDE = "expert between nodes", "expert inside nodes"


def split(sizes: dict[str, int], config: MeshConfig) -> dict[str, int]:
    """Axis sizes with `BETWEEN` and `INSIDE` in place of `expert`; unchanged for the flat exchange."""
    nodes = config.expert_nodes
    if nodes == 1:
        return sizes
    parts = {BETWEEN: nodes, INSIDE: sizes["expert"] // nodes}
    # Devices stay in their order, because nodes are consecutive devices of the axis.
    return dict(pair for axis in sizes for pair in (parts.items() if axis == "expert" else [(axis, sizes[axis])]))


def split_mesh(mesh: Mesh | None, sizes: dict[str, int]) -> Mesh | None:
    """The same devices with the axes that `split` returned."""
    return mesh if mesh is None else Mesh(mesh.devices.reshape(tuple(sizes.values())), tuple(sizes))


def whole(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Axes of a group of devices, with `expert` for both of its parts."""
    return tuple("expert" if axis == INSIDE else axis for axis in axes if axis != BETWEEN) if _both(axes) else axes


def parts_of(axes: tuple[str, ...], sizes: dict[str, int]) -> tuple[str, ...]:
    """`axes` as names of the axes that `split` returned."""
    if "expert" in sizes:
        return axes
    return tuple(part for axis in axes for part in ((BETWEEN, INSIDE) if axis == "expert" else (axis,)))


def _both(axes: tuple[str, ...]) -> bool:
    return BETWEEN in axes and INSIDE in axes
