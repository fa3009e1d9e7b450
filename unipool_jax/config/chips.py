"""Published figures of each kind of device, and topologies by name.

Does not import JAX, because it is read before JAX is configured. TPU figures: cloud.google.com/tpu/docs (v5e, v5p, v6e
and tpu7x pages); a TPU chip's figures are divided by its number of JAX devices. GPU figures are of one GPU of NVIDIA's
servers of eight. H100 SXM, its data sheet: 1979 TFLOP/s in bfloat16 with sparsity, of which dense products reach half,
80 GB, 3.35 TB/s, NVLink 900 GB/s in both directions together. B200, data sheet of DGX B200 and its user guide
(docs.nvidia.com/dgx/dgxb200-user-guide): 1440 GB and 64 TB/s for eight, NVLink 14.4 TB/s for eight in both directions;
4.5 PFLOP/s in bfloat16 with sparsity, HGX page. Both servers have one ConnectX-7 card of 400 Gb/s per GPU.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple


class Chip(NamedTuple):
    """One JAX device."""

    name: str
    """First part of a topology's name, such as `v5p`."""
    device_kind: str
    """`jax.Device.device_kind`."""
    devices_per_chip: int
    """JAX devices per chip: each core of a 7x chip is a device, the two cores of a v5p chip are one."""
    cores: int
    """TensorCores per device."""
    matrix_unit: int
    """Rows and columns of a matrix unit; contracted dimensions are padded to a multiple."""
    flops: float
    """Peak in bfloat16, FLOP/s."""
    hbm_bytes: float
    """Capacity, bytes."""
    hbm_bandwidth: float
    """Bytes/s."""
    link_bandwidth: float
    """One link in one direction, bytes/s; behind a switch, one device in one direction."""
    torus_axes: int
    """Dimensions of the torus, with two links each; 0 for devices behind a switch."""
    ring: int
    """A dimension of the torus wraps around where its length is a multiple of this."""
    ragged_devices: float = math.inf
    """Largest slice, in devices, for which the TPU compiler supports ragged all-to-alls."""
    sparse_cores: bool = True
    """Whether it has SparseCores, which can run collectives beside the TensorCores."""
    node: int = 1
    """Devices behind one switch; more of them are in several nodes, joined by a network."""
    network_bandwidth: float = 0.0
    """Of the network between nodes, one device in one direction, bytes/s."""


_GB, _GBIT = 1e9, 1e9 / 8


def _gpu(name: str, kind: str, flops: float, memory: float, memory_bandwidth: float, switch_bandwidth: float) -> Chip:
    """A GPU of a server of eight, with a network card of its own."""
    return Chip(
        name, kind, 1, 1, 16, flops, memory, memory_bandwidth, switch_bandwidth, 0, 1, sparse_cores=False,
        node=8, network_bandwidth=400 * _GBIT,
    )  # fmt: skip


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "TPU v5 lite", 1, 1, 128, 197e12, 16 * _GB, 819 * _GB, 1600 * _GBIT / 4, 2, 16, 16, False),
        Chip("v5p", "TPU v5", 1, 2, 128, 459e12, 95 * _GB, 2765 * _GB, 4800 * _GBIT / 6, 3, 4),
        Chip("v6e", "TPU v6 lite", 1, 1, 256, 918e12, 32 * _GB, 1640 * _GB, 3584 * _GBIT / 4, 2, 16),
        Chip("tpu7x", "TPU7x", 2, 1, 256, 2307e12 / 2, 192 * _GB / 2, 7380 * _GB / 2, 9600 * _GBIT / 6 / 2, 3, 4),
        _gpu("h100", "NVIDIA H100 80GB HBM3", 989e12, 80 * _GB, 3350 * _GB, 450 * _GB),
        _gpu("b200", "NVIDIA B200", 2250e12, 180 * _GB, 8000 * _GB, 900 * _GB),
    )
}
"""By the first part of a topology's name: `v5p:4x4x4`, or `h100:16` for two nodes of eight."""
_OTHER_NAMES = {"gpu": "h100"}
"""Names in configurations of earlier versions."""


def has_ragged(device_kind: str, devices: int) -> bool:
    """Whether this many devices of a kind (`jax.Device.device_kind`) support ragged all-to-alls."""
    return all(devices <= chip.ragged_devices for chip in CHIPS.values() if chip.device_kind == device_kind)


def has_sparse_cores(device_kind: str) -> bool:
    """Whether devices of a kind (`jax.Device.device_kind`) have SparseCores, as far as is known."""
    return any(chip.sparse_cores for chip in CHIPS.values() if chip.device_kind == device_kind)


class Topology(NamedTuple):
    """A slice of TPU chips, or GPUs in nodes."""

    chip: Chip
    shape: tuple[int, ...]
    """Chips along each dimension; the number of GPUs."""

    @property
    def num_devices(self) -> int:
        """Number of JAX devices."""
        return math.prod(self.shape) * self.chip.devices_per_chip

    @property
    def is_tpu(self) -> bool:
        """Whether the chips form a torus, as those of TPUs do."""
        return self.chip.torus_axes > 0


def parse_topology(name: str) -> Topology:
    """The topology called `name`, such as `v5p:4x4x4`.

    Raises:
      ValueError: unknown kind of device, malformed sizes, the wrong number of dimensions, or GPUs that fill no node.
    """
    kind, _, sizes = name.partition(":")
    kind = _OTHER_NAMES.get(kind, kind)
    if kind not in CHIPS:
        raise ValueError(f"unknown kind of device {kind!r}; choose one of {', '.join(CHIPS)}")
    chip = CHIPS[kind]
    axes = chip.torus_axes or 1
    example = f"{kind}:{'x'.join(['4'] * axes)}"
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})*", sizes):
        raise ValueError(f"sizes must be whole numbers joined by 'x'; for example {example}")
    shape = tuple(map(int, sizes.split("x")))
    if len(shape) != axes:
        raise ValueError(f"{kind} devices have {axes} dimension{'s' * (axes > 1)}, not {len(shape)}; write {example}")
    if not chip.torus_axes and shape[0] > chip.node and shape[0] % chip.node:
        raise ValueError(
            f"{kind} devices are in nodes of {chip.node}; write {kind}:{-(-shape[0] // chip.node) * chip.node}"
        )
    return Topology(chip, shape)
