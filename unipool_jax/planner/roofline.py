"""Roofline model of a step: the time of each operation on its slower resource, plus that of every collective.

A kernel overlaps compute with its own memory traffic, so an operation takes the longer of the two. Operations run one
after another. Collectives are added in full, as if none overlapped with compute, although the compiler starts many of
them early. `docs/planner.md` has the formulas and their limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import Mesh

from unipool_jax.config.chips import Topology
from unipool_jax.config.schema import Config
from unipool_jax.planner import links
from unipool_jax.planner.collectives import Collective
from unipool_jax.planner.work import Counts, Message, count
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

    @property
    def seconds(self) -> float:
        """Time of a step."""
        return sum(part.seconds for part in self.parts)

    @property
    def utilisation(self) -> float:
        """Model FLOPs utilization (MFU)."""
        return self.model_flops / (self.seconds * self.peak_flops)

    @property
    def tokens_per_second(self) -> float:
        """Of all devices."""
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
    config: Config,
    sizes: dict[str, int],
    topology: Topology,
    mesh: Mesh | None,
    compiled: Sequence[Collective] | None = None,
) -> Estimate:
    """Model the time of a step.

    Args:
      config: of the run.
      sizes: of the mesh axes.
      topology: the devices.
      mesh: of these devices, which determines where an axis lies on the torus; None for devices behind a switch.
      compiled: collectives of the compiled step; None uses those that `work.count` expects.
    """
    counts, chip = count(config, sizes, topology), topology.chip
    parts = []
    for work in counts.work:
        compute = work.flops / (chip.flops * MATRIX_EFFICIENCY)
        memory = work.bytes / (chip.hbm_bandwidth * HBM_EFFICIENCY)
        parts.append(Part(work.name, max(compute, memory), "matrix unit" if compute >= memory else "memory"))
    messages: Sequence[Collective | Message] = counts.messages if compiled is None else compiled
    by_kind: dict[str, float] = {}
    for message in messages:
        place = links.span(mesh, topology, message.axes, sizes)
        name = f"{message.kind} over {' x '.join(message.axes)}"
        taken = message.times * links.seconds(message.kind, message.sent_bytes, place, chip)
        if message.kind == "ragged-all-to-all":
            taken *= counts.busiest  # what is sent is counted evenly; the busiest device receives more
        by_kind[name] = by_kind.get(name, 0.0) + taken
    parts.extend(Part(name, taken, "links") for name, taken in by_kind.items())
    model_flops = flops_per_token(config) * config.tokens_per_step / topology.num_devices
    return Estimate(tuple(parts), counts, model_flops, chip.flops, config.tokens_per_step)
