"""What bounds the expert kernels of one device: compute and memory traffic by rows per expert."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from unipool_jax.config.chips import Chip, Topology
from unipool_jax.config.mesh_rules import AXES
from unipool_jax.config.schema import Config
from unipool_jax.kernels import tpu_tiles
from unipool_jax.planner.windows import mean_width
from unipool_jax.planner.work import count


class ExpertKernels(NamedTuple):
    """The expert kernels of a model on one chip, in the forward pass of a layer."""

    chip: Chip
    rows: float
    """Mean rows of an expert that a layer sees."""
    tile_rows: int | None
    """Rows of a tile of the TPU kernels; None on other chips, whose tiles are not modelled."""
    padding: float
    """Computed rows over real rows: the last tile of an expert is not full."""
    intensity: float
    """FLOPs, without padding, per byte to or from high-bandwidth memory."""

    @property
    def memory_share(self) -> float:
        """Fraction of the chip's peak that memory bandwidth allows, at most 1."""
        return min(1.0, self.intensity * self.chip.hbm_bandwidth / self.chip.flops)

    @property
    def peak_share(self) -> float:
        """Fraction of the chip's peak that memory bandwidth and padding allow, for any schedule of these tiles."""
        return min(self.memory_share, 1 / self.padding)


def expert_kernels(config: Config, chip: Chip, sequences: int) -> ExpertKernels:
    """The expert kernels of `config` on a single device that holds all experts.

    Args:
      config: the model.
      chip: the device.
      sequences: of a micro-batch, each of `data.sequence_length` tokens.
    """
    train = dataclasses.replace(config.train, batch_size=sequences, microbatch_size=sequences)
    alone = Topology(chip, (1,) * max(1, chip.torus_axes))
    works = count(dataclasses.replace(config, train=train), dict.fromkeys(AXES, 1), alone).work
    forward = next(work for work in works if work.name == "experts forward")
    routed = sequences * config.data.sequence_length * config.moe.top_k
    return ExpertKernels(
        chip,
        routed / mean_width(config),
        tpu_tiles.tile_rows(chip.device_kind, routed / config.experts_per_pool) if chip.torus_axes else None,
        forward.flops / forward.unpadded_flops,
        forward.unpadded_flops / forward.bytes,
    )
