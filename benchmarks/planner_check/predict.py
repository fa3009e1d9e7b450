"""The planner's count of a step on one core of this machine, and its estimate once the machine is calibrated."""

from __future__ import annotations

import dataclasses

from benchmarks.planner_check.fit import Machine, Step
from unipool_jax.config.chips import Chip, Topology
from unipool_jax.config.mesh_rules import AXES
from unipool_jax.config.schema import Config
from unipool_jax.planner.roofline import HBM_EFFICIENCY, MATRIX_EFFICIENCY, estimate
from unipool_jax.planner.work import Counts, count

_ALONE = dict.fromkeys(AXES, 1)


def chip_of(machine: Machine) -> Chip:
    """An entry like those of `config/chips.py`. What was fitted is what is reached, so the planner's factors go out."""
    peak, bandwidth = machine.peak / MATRIX_EFFICIENCY, machine.bandwidth / HBM_EFFICIENCY
    return Chip("cpu", "cpu", 1, 1, 1, peak, 0.0, bandwidth, 1.0, 0, 1)


def for_cpu(config: Config) -> Config:
    """`config` with the kernels that `auto` takes on a CPU."""
    kernels = dataclasses.replace(config.kernels, implementation="xla", attention="blocks")
    return dataclasses.replace(config, kernels=kernels)


def counted(config: Config) -> Counts:
    """Work and memory of a step; neither depends on the speed of the chip."""
    return count(for_cpu(config), _ALONE, Topology(chip_of(Machine(1.0, 1.0, 0.0)), (1,)))


def step_of(config: Config, launches: int) -> Step:
    """The work of a step in the form that the calibration takes."""
    return Step(tuple((work.flops, work.bytes) for work in counted(config).work), launches)


def predicted_seconds(config: Config, machine: Machine, launches: int) -> float:
    """The planner's estimate on the calibrated machine, and its launches."""
    found = estimate(for_cpu(config), _ALONE, Topology(chip_of(machine), (1,)), None)
    return found.seconds + launches * machine.launch


def predicted_bytes(config: Config) -> tuple[float, float]:
    """State and temporaries."""
    counts = counted(config)
    return counts.state_bytes, counts.temporary_bytes
