"""The TPU compiler's own schedule of a kernel, on a machine that has no TPU.

`libtpu` contains the TPU compiler. It compiles ahead of time for a named topology and writes the final schedule of
every kernel: one line per instruction bundle (a bundle issues in one cycle) with the slots of each unit that it uses.
Import this module before anything initializes JAX: the compiler reads its settings once.
"""

import os
import tempfile

_DUMP = tempfile.TemporaryDirectory()
os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={_DUMP.name} --xla_jf_dump_llo_text=true"
# Look for no TPU, and let other processes compile at the same time.
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import re  # noqa: E402 - the settings above must come before jax
from collections.abc import Callable, Sequence  # noqa: E402
from functools import cache  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from unipool_jax.config.chips import parse_topology  # noqa: E402


class Chip(NamedTuple):
    """One JAX device of a TPU generation."""

    name: str
    topology: str
    device_kind: str
    cores: int
    """TensorCores of the device; those of a v5p chip form one device, those of a 7x chip two."""
    matrix_unit: int
    """Rows and columns of a matrix unit; each core has the arithmetic of four."""
    flops: float
    """Peak of the device in bfloat16, FLOP/s."""
    bandwidth: float
    """Of its high-bandwidth memory, bytes/s."""

    @property
    def clock(self) -> float:
        """Cycles per second at which the matrix units reach the published peak."""
        return self.flops / (self.cores * 4 * 2 * self.matrix_unit**2)


CHIPS = {
    name: Chip(name, topology, chip.device_kind, chip.cores, chip.matrix_unit, chip.flops, chip.hbm_bandwidth)
    for name, topology in {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}.items()
    for chip in [parse_topology(topology).chip]
}


class Schedule(NamedTuple):
    """One kernel's schedule. Bundles of a loop body count once."""

    bundles: int
    fill: float
    """Share of the matrix units' slots that issue a product."""
    spills: int
    """Register spills to memory."""
    paths: tuple[int, ...] = ()
    """Bundles of the paths of which a visit takes one, by the rows that they compute."""


@cache
def mesh(topology: str) -> jax.sharding.Mesh:
    """A mesh of one device of the topology."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return jax.sharding.Mesh(np.array(devices[:1]), ("device",))


def compile_for(
    chip: Chip, function: Callable[..., Any], arguments: Sequence[Any], donate: Sequence[int] = ()
) -> tuple[Any, dict[str, Schedule]]:
    """Compile for one device of the chip: the compiled program, and the schedule of each kernel with matrix products.

    Kernels are named as in the program, without the number that keeps equal names apart; of equal names the longest
    schedule is kept.
    """
    for path in Path(_DUMP.name).iterdir():
        path.unlink()
    on_chip = jax.sharding.NamedSharding(mesh(chip.topology), jax.sharding.PartitionSpec())
    with jax.set_mesh(mesh(chip.topology)):
        shapes = [jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=on_chip) for shape in arguments]
        # A new function, so that nothing traced for another chip is found in a cache.
        program = jax.jit(lambda *operands: function(*operands), donate_argnums=donate).lower(*shapes).compile()
    schedules: dict[str, Schedule] = {}
    for path in Path(_DUMP.name).glob("*final_hlo-static-per-bundle-utilization.txt"):
        name = _kernel(path)
        schedule = _read(path)
        if schedule.fill > 0.02 and schedule.bundles > schedules.get(name, Schedule(0, 0, 0)).bundles:
            schedules[name] = schedule
    return program, schedules


def paths(kernel: str) -> tuple[int, list[int]]:
    """Of a kernel of the last program compiled: bundles of the loop around its matrix products, without those of the
    paths that hold such products, and bundles of each of these, in the order of the listing."""
    (path,) = (path for path in Path(_DUMP.name).glob("*-final_bundles.txt") if _kernel(path) == kernel)
    return read_paths(path.read_text())


def read_paths(listing: str) -> tuple[int, list[int]]:
    """`paths`, from the compiler's listing: a line per bundle, `address label : { instructions }`.

    A path is a piece of the program without a jump in or out: LB marks the first bundle of a loop's body, PF one that
    is jumped to, and `sbr` is a jump.
    """
    bundles = re.findall(r"^ *(?:0x)?[0-9a-f]+ +([A-Z]{2}|) *:[ >]*(\{.*)$", listing, flags=re.MULTILINE)
    products = [index for index, (_, text) in enumerate(bundles) if "vmatmul" in text]
    begin = max(index for index, (label, _) in enumerate(bundles[: products[0]]) if label == "LB")
    back = next(index for index in range(products[-1], len(bundles)) if "sbr.rel" in bundles[index][1])
    # Behind a jump stand bundles that are executed on the way: the loop ends with the next label.
    end = next((index for index in range(back, len(bundles)) if bundles[index][0]), len(bundles))
    pieces: list[list[str]] = []
    for index in range(begin, end):
        label, text = bundles[index]
        if index == begin or label or "sbr.rel" in bundles[index - 1][1]:
            pieces.append([])
        pieces[-1].append(text)
    found = [len(piece) for piece in pieces if any("vmatmul" in text for text in piece)]
    return end - begin - sum(found), found


def _kernel(path: Path) -> str:
    """Name of the kernel that a file is about, without the number that keeps equal names apart."""
    return re.sub(r"^\d+-|(\.\d+)?-\d+(-.*)?$", "", path.name)


def _read(path: Path) -> Schedule:
    """Line 2 names the units, line 3 their slots per bundle, then follows a line per bundle."""
    lines = path.read_text().splitlines()
    names = [name.strip() for name in lines[1].split(",")]
    slots = dict(zip(names, map(int, lines[2].split()), strict=False))
    rows = [list(map(int, line.split())) for line in lines[4:] if line.strip() and line.split()[0].isdigit()]
    used = {name: sum(row[index] for row in rows) for index, name in enumerate(names)}
    fill = used["MATMUL"] / max(1, slots["MATMUL"] * len(rows))
    return Schedule(len(rows), fill, used.get("VSTORE:SPILL", 0))
