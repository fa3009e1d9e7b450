"""How long collectives take on the links of a torus, or of a switch."""

from __future__ import annotations

from typing import NamedTuple

from jax.sharding import Mesh

from unipool_jax.config.chips import Chip, Topology

EFFICIENCY = 0.9
"""Fraction of a link's published bandwidth that messages reach. Assumed."""
HOP_SECONDS = 1e-6
"""Latency of a hop, seconds. Assumed."""


class Span(NamedTuple):
    """The extent of a group of devices on a torus: chips along each dimension, and whether they form a ring."""

    devices: int
    extents: tuple[tuple[int, bool], ...]


def span(mesh: Mesh | None, topology: Topology, axes: tuple[str, ...], sizes: dict[str, int]) -> Span:
    """The extent of one group of these mesh axes; without a mesh, devices are behind a switch."""
    devices = 1
    for axis in axes:
        devices *= sizes[axis]
    if mesh is None or topology.chip.torus_axes == 0:
        return Span(devices, ())
    index = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
    coordinates = [device.coords for device in mesh.devices[index].reshape(-1)]
    extents = []
    for dimension, length in enumerate(topology.shape):
        covered = len({place[dimension] for place in coordinates})
        if covered > 1:
            extents.append((covered, covered == length and length % topology.chip.ring == 0))
    return Span(devices, tuple(extents))


def seconds(kind: str, sent_bytes: float, place: Span, chip: Chip) -> float:
    """Seconds of one collective in which every device sends this many bytes (see `collectives.Collective`).

    Gathers and reductions use all links of the group at once, two for a dimension that is a ring and one for a line.
    In an all-to-all a message crosses a quarter of a ring, so a dimension of e chips passes `bytes x e / 4` over two
    links (one for a line); dimensions work side by side and the slowest decides. A switch passes everything at once.
    """
    link = chip.link_bandwidth * EFFICIENCY
    if place.devices == 1:
        return 0.0
    if not place.extents:
        return sent_bytes / link + HOP_SECONDS
    latency = HOP_SECONDS * sum(length / (2 if ring else 1) for length, ring in place.extents)
    if kind in ("all-to-all", "ragged-all-to-all"):
        everything = sent_bytes * place.devices / (place.devices - 1)
        return max(everything * length / 4 / ((2 if ring else 1) * link) for length, ring in place.extents) + latency
    return sent_bytes / (sum(2 if ring else 1 for _, ring in place.extents) * link) + latency
