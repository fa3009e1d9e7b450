"""How long collectives take on the links of a torus, or on switches of nodes and the network between them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from unipool_jax.config.chips import Chip, Topology

EFFICIENCY = 0.9
"""Fraction of a link's published bandwidth that messages reach. Assumed."""
HOP_SECONDS = 1e-6
"""Latency of a hop, seconds. Assumed."""
NETWORK_SECONDS = 5e-6
"""Latency of a message between nodes, seconds. Assumed."""

_ALL_TO_ALL = ("all-to-all", "ragged-all-to-all")


class Span(NamedTuple):
    """The extent of a group of devices on a torus, or over nodes."""

    devices: int
    extents: tuple[tuple[int, bool], ...]
    """Chips along each dimension of a torus, and whether they form a ring."""
    nodes: int = 1
    """Nodes that the devices are in, as many in each."""


def span(mesh: Mesh | None, topology: Topology, axes: tuple[str, ...], sizes: dict[str, int]) -> Span:
    """The extent of one group of these mesh axes.

    On GPUs the mesh is laid out node by node with its last axis fastest. On TPUs without a mesh, as if behind a switch.
    """
    devices = 1
    for axis in axes:
        devices *= sizes[axis]
    if not topology.is_tpu:
        places = np.arange(topology.num_devices).reshape(tuple(sizes.values()))
        group = places[tuple(slice(None) if axis in axes else 0 for axis in sizes)]
        return Span(devices, (), len(np.unique(group // topology.chip.node)))
    if mesh is None:
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
    if place.nodes > 1:
        return _between_nodes(kind, sent_bytes, place, chip)
    if not place.extents:
        return sent_bytes / link + HOP_SECONDS
    latency = HOP_SECONDS * sum(length / (2 if ring else 1) for length, ring in place.extents)
    if kind in _ALL_TO_ALL:
        everything = sent_bytes * place.devices / (place.devices - 1)
        return max(everything * length / 4 / ((2 if ring else 1) * link) for length, ring in place.extents) + latency
    return sent_bytes / (sum(2 if ring else 1 for _, ring in place.extents) * link) + latency


def _between_nodes(kind: str, sent_bytes: float, place: Span, chip: Chip) -> float:
    """Seconds of a collective over several nodes, each with a switch inside, and one network card for each device.

    Gathers and reductions run on rings over all devices of the group. What a device sends, its node passes on once,
    divided over the cards of the group's devices there: rings cross to the next node at different devices. In an
    all-to-all every device sends an equal part to each other one, to those of its node through the switch, to the rest
    through its own card. Switch and network work side by side.
    """
    switch, network = chip.link_bandwidth * EFFICIENCY, chip.network_bandwidth * EFFICIENCY
    inside = place.devices / place.nodes
    if kind in _ALL_TO_ALL:
        each = sent_bytes / (place.devices - 1)
        return max(each * (inside - 1) / switch, each * (place.devices - inside) / network) + NETWORK_SECONDS
    if kind == "collective-permute":
        return sent_bytes / network + NETWORK_SECONDS
    return max(sent_bytes / switch, sent_bytes / (inside * network)) + NETWORK_SECONDS * (place.nodes - 1)
