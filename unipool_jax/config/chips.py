"""What a device of each kind can do, by the maker's published figures, and names of groups of them.

Imports nothing: it is read before JAX is set up. TPU figures: cloud.google.com/tpu/docs (v5e, v5p, v6e, tpu7x pages);
H100 SXM: NVIDIA's data sheet. A TPU chip's figures are divided by the JAX devices it has.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple


class Chip(NamedTuple):
    """One JAX device."""

    name: str
    """First part of a topology's name."""
    device_kind: str
    """As JAX names it."""
    devices_per_chip: int
    """JAX devices of a chip: the two cores of a 7x chip are two, those of a v5p chip one."""
    cores: int
    """TensorCores of the device."""
    matrix_unit: int
    """Rows and columns of a matrix unit; what is contracted is padded to a multiple."""
    flops: float
    """Peak in bfloat16, FLOP/s."""
    hbm_bytes: float
    hbm_bandwidth: float
    """Bytes/s."""
    link_bandwidth: float
    """Of one link in one direction, bytes/s; with a switch, of the device."""
    torus_axes: int
    """Dimensions of the torus, two links each; 0 is a switch."""
    ring: int
    """A dimension of the torus closes into a ring where its length is a multiple of this."""
    ragged_devices: float = math.inf
    """Devices of a slice at most for which the TPU's compiler has ragged all-to-alls."""


_GB, _GBIT = 1e9, 1e9 / 8

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "TPU v5 lite", 1, 1, 128, 197e12, 16 * _GB, 819 * _GB, 1600 * _GBIT / 4, 2, 16, 16),
        Chip("v5p", "TPU v5", 1, 2, 128, 459e12, 95 * _GB, 2765 * _GB, 4800 * _GBIT / 6, 3, 4),
        Chip("v6e", "TPU v6 lite", 1, 1, 256, 918e12, 32 * _GB, 1640 * _GB, 3584 * _GBIT / 4, 2, 16),
        Chip("tpu7x", "TPU7x", 2, 1, 256, 2307e12 / 2, 192 * _GB / 2, 7380 * _GB / 2, 9600 * _GBIT / 6 / 2, 3, 4),
        Chip("gpu", "NVIDIA H100 80GB HBM3", 1, 1, 16, 989e12, 80 * _GB, 3350 * _GB, 450 * _GB, 0, 1),
    )
}
"""By the name that begins a topology: `v5p:4x4x4`, or `gpu:8` for H100s behind one switch."""


def has_ragged(device_kind: str, devices: int) -> bool:
    """Whether ragged all-to-alls can be had on this many devices of a kind, as JAX names it."""
    return all(devices <= chip.ragged_devices for chip in CHIPS.values() if chip.device_kind == device_kind)


class Topology(NamedTuple):
    """A group of devices by name."""

    chip: Chip
    shape: tuple[int, ...]
    """Chips along each dimension."""

    @property
    def num_devices(self) -> int:
        """JAX devices."""
        return math.prod(self.shape) * self.chip.devices_per_chip


def parse_topology(name: str) -> Topology:
    """The topology of this name.

    Raises:
      ValueError: with what is wrong with the name and what would be right.
    """
    kind, _, sizes = name.partition(":")
    if kind not in CHIPS:
        raise ValueError(f"no such kind of device as {kind!r}; begin with one of {', '.join(CHIPS)}")
    chip = CHIPS[kind]
    axes = chip.torus_axes or 1
    example = f"{kind}:{'x'.join(['4'] * axes)}"
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})*", sizes):
        raise ValueError(f"sizes must be whole numbers joined by 'x'; for example {example}")
    shape = tuple(map(int, sizes.split("x")))
    if len(shape) != axes:
        raise ValueError(f"{kind} devices have {axes} dimension{'s' * (axes > 1)}, not {len(shape)}; write {example}")
    return Topology(chip, shape)
