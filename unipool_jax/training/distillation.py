"""Distillation: a run learns from the next-token distributions of another model, its teacher (arXiv 1503.02531)."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax

from unipool_jax.config.schema import Config, DistillConfig
from unipool_jax.data.pipeline import Batch
from unipool_jax.model.transformer import Positions, apply
from unipool_jax.parallel.head import Head
from unipool_jax.training.state import BalanceState, layer_inputs


@functools.partial(jax.tree_util.register_dataclass, data_fields=("params", "balance"), meta_fields=("config",))
@dataclasses.dataclass(frozen=True)
class Teacher:
    """A model that is not trained."""

    config: Config
    """Of the teacher, with the mesh and the kernels of the run that learns from it."""
    params: Any
    balance: BalanceState


def teacher_head(teacher: Teacher, batch: Batch) -> Head:
    """What the teacher's logits for a batch are made of, as it is evaluated: no row is dropped, nothing is trained."""
    config = teacher.config
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, capacity_factor=math.inf))
    inputs, positions = layer_inputs(config, teacher.balance), Positions(segments=batch.segments)
    return apply(config, teacher.params, batch.inputs, inputs, positions).head


def taught_loss(
    settings: DistillConfig, head: Head, teacher: Teacher, batch: Batch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a run with a teacher, and its two parts by their names among the metrics; sums over positions."""
    total, text, apart = head.distilled_loss(
        teacher_head(teacher, batch), batch.targets, batch.weights, settings.weight, settings.temperature
    )
    return total, {"loss/lm": text, "loss/distill": apart}
