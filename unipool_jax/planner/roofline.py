"""Modelled time of a step: each operation by its slower resource, and every collective in full.

Kernels overlap their arithmetic with their own memory traffic, so an operation takes the longer of the two. Operations
follow one another, and a layer waits for its tokens and its weights, so collectives are added: none is taken to hide
behind computation, although the compiler starts many of them early. `docs/planner.md` has the formulas and limits.
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
"""Share of the matrix units' peak that a product reaches. Assumed; schedules of our kernels fill 0.64 to 0.94."""
HBM_EFFICIENCY = 0.9
"""Share of the memory's published bandwidth. Assumed."""


class Part(NamedTuple):
    """Time of one kind of work, and what bounds it."""

    name: str
    seconds: float
    bound: str
    """`matrix unit`, `memory` or `links`."""


class Estimate(NamedTuple):
    """A step of one device as modelled."""

    parts: tuple[Part, ...]
    counts: Counts
    model_flops: float
    """Of one device's share of the step, without recomputation."""
    peak_flops: float
    tokens_per_step: int

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(part.seconds for part in self.parts)

    @property
    def utilisation(self) -> float:
        """Model FLOPs over what the device could do in that time (MFU)."""
        return self.model_flops / (self.seconds * self.peak_flops)

    @property
    def tokens_per_second(self) -> float:
        """Of all devices."""
        return self.tokens_per_step / self.seconds

    @property
    def utilisation_with_hidden_links(self) -> float:
        """MFU if every collective hid behind computation."""
        computing = sum(part.seconds for part in self.parts if part.bound != "links")
        return self.model_flops / (max(computing, self.seconds - computing) * self.peak_flops)

    def seconds_by_bound(self) -> dict[str, float]:
        """Time by what bounds it."""
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
      config: what is trained.
      sizes: of the mesh axes.
      topology: the devices.
      mesh: of these devices, which says where on the torus an axis lies; None behind a switch.
      compiled: collectives of the compiled step; without them those that `work.count` expects.
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
        by_kind[name] = by_kind.get(name, 0.0) + taken
    parts.extend(Part(name, taken, "links") for name, taken in by_kind.items())
    model_flops = flops_per_token(config) * config.tokens_per_step / topology.num_devices
    return Estimate(tuple(parts), counts, model_flops, chip.flops, config.tokens_per_step)
