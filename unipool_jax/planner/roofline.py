"""Roofline model of a step: the time of each operation on its slower resource, plus that of every collective.

A kernel overlaps compute with its own memory traffic, so an operation takes the longer of the two. Operations run one
after another. Collectives are added in full, as if none overlapped with compute; what the schedule of a compiled step
hides of them stands beside it. `docs/planner.md` has the formulas and their limits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import Mesh

from unipool_jax.config.chips import Topology
from unipool_jax.config.schema import Config
from unipool_jax.planner import links
from unipool_jax.planner.collectives import Collective, Module, collectives
from unipool_jax.planner.instructions import Clock, Traffic
from unipool_jax.planner.messages import Message, balanced
from unipool_jax.planner.nodes import parts_of, split, split_mesh
from unipool_jax.planner.schedule import Overlap, overlap
from unipool_jax.planner.work import Counts, count, kernel_work
from unipool_jax.training.flops import flops_per_token

MATRIX_EFFICIENCY = 0.9
"""Fraction of the matrix units' peak that a product reaches. Assumed; schedules of our kernels fill 0.64 to 0.94."""
HBM_EFFICIENCY = 0.9
"""Fraction of the published memory bandwidth. Assumed."""


class Part(NamedTuple):
    """The time of one kind of work, and the resource that bounds it."""

    name: str
    seconds: float
    bound: str
    """`matrix unit`, `memory` or `links`."""


class Estimate(NamedTuple):
    """The modelled step of one device."""

    parts: tuple[Part, ...]
    counts: Counts
    model_flops: float
    """Of one device, without recomputation."""
    peak_flops: float
    tokens_per_step: int
    hidden_seconds: float = 0.0
    """Of collectives, beside other work in the schedule of the compiled step; 0 if nothing was compiled."""

    @property
    def seconds(self) -> float:
        """Time of a step, every collective in full."""
        return sum(part.seconds for part in self.parts)

    @property
    def compiled_seconds(self) -> float:
        """Time of a step without what its schedule hides."""
        return self.seconds - self.hidden_seconds

    @property
    def utilisation(self) -> float:
        """Model FLOPs utilization (MFU)."""
        return self.model_flops / (self.seconds * self.peak_flops)

    @property
    def utilisation_as_compiled(self) -> float:
        """MFU without what the schedule hides."""
        return self.model_flops / (self.compiled_seconds * self.peak_flops)

    @property
    def tokens_per_second(self) -> float:
        """Of all devices, every collective in full."""
        return self.tokens_per_step / self.seconds

    @property
    def utilisation_with_hidden_links(self) -> float:
        """MFU if every collective overlapped with compute."""
        computing = sum(part.seconds for part in self.parts if part.bound != "links")
        return self.model_flops / (max(computing, self.seconds - computing) * self.peak_flops)

    def seconds_by_bound(self) -> dict[str, float]:
        """Time by the resource that bounds it."""
        return {
            bound: sum(part.seconds for part in self.parts if part.bound == bound)
            for bound in ("matrix unit", "memory", "links")
        }


def estimate(
    config: Config, sizes: dict[str, int], topology: Topology, mesh: Mesh | None, module: Module | None = None
) -> Estimate:
    """Model the time of a step.

    Args:
      config: of the run.
      sizes: of the mesh axes.
      topology: the devices.
      mesh: of these devices, which determines where an axis lies on the torus; None for devices behind a switch.
      module: the compiled step, whose collectives, copies and schedule are taken; None uses the collectives that
        `work.count` expects.
    """
    counts, chip = count(config, sizes, topology), topology.chip
    axes = split(sizes, config.mesh)
    links_of = functools.partial(_taken, counts=counts, axes=axes, topology=topology, mesh=split_mesh(mesh, axes))
    parts = []
    for work in counts.work:
        compute = work.flops / (chip.flops * MATRIX_EFFICIENCY)
        memory = work.bytes / (chip.hbm_bandwidth * HBM_EFFICIENCY)
        parts.append(Part(work.name, max(compute, memory), "matrix unit" if compute >= memory else "memory"))
    messages: Sequence[Collective | Message] = counts.messages
    hidden = 0.0
    if module is not None:
        found = schedule(config, sizes, topology, mesh, module)
        messages, hidden = collectives(module, tuple(axes), tuple(axes.values())), found.hidden_seconds
        parts.append(Part("copies and changes of layout", found.copy_seconds, "memory"))
    by_kind: dict[str, float] = {}
    for message in messages:
        name = f"{message.kind} over {' x '.join(message.axes)}"
        by_kind[name] = by_kind.get(name, 0.0) + message.times * links_of(message)
    parts.extend(Part(name, seconds, "links") for name, seconds in by_kind.items())
    model_flops = flops_per_token(config) * config.tokens_per_step / topology.num_devices
    return Estimate(tuple(parts), counts, model_flops, chip.flops, config.tokens_per_step, hidden)


def _taken(
    message: Collective | Message, counts: Counts, axes: dict[str, int], topology: Topology, mesh: Mesh | None
) -> float:
    """Seconds of a collective alone on the links, on a mesh of these axes."""
    if isinstance(message, Collective):
        message = balanced(message, counts.messages)
    place = links.span(mesh, topology, parts_of(message.axes, axes), axes)
    seconds = links.seconds(message.kind, message.sent_bytes, place, topology.chip)
    # What is sent is counted evenly; the busiest device receives more.
    return seconds * (counts.busiest if message.kind == "ragged-all-to-all" else 1)


def schedule(config: Config, sizes: dict[str, int], topology: Topology, mesh: Mesh | None, module: Module) -> Overlap:
    """The collectives of a compiled step, and what its schedule hides of them. Arguments: `estimate`."""
    counts, axes = count(config, sizes, topology), split(sizes, config.mesh)
    taken = functools.partial(_taken, counts=counts, axes=axes, topology=topology, mesh=split_mesh(mesh, axes))
    return overlap(module, clock(config, sizes, topology, module), tuple(axes), tuple(axes.values()), taken)


def clock(config: Config, sizes: dict[str, int], topology: Topology, module: Module) -> Clock:
    """Seconds of the instructions of a compiled step, by the model of this file."""
    flops = topology.chip.flops * MATRIX_EFFICIENCY
    bandwidth = topology.chip.hbm_bandwidth * HBM_EFFICIENCY
    kernels = kernel_work(config, sizes, topology).items()
    return Clock(
        Traffic(module, vector_memory=topology.is_tpu),
        flops,
        bandwidth,
        {name: max(work.flops / flops, work.bytes / bandwidth) for name, work in kernels},
    )
