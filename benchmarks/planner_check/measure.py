"""Times of training steps in processor seconds of one core, and what the compiler says of their memory.

Other programs share the machine. Processor time does not count their turns, and the least of several rounds is the one
that they disturbed least through caches and memory. All cases take turns, so a slow minute meets them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.contenders import random_tokens
from benchmarks.planner_check.cases import config_of
from unipool_jax.config.schema import Config
from unipool_jax.data.pipeline import Batch
from unipool_jax.planner.collectives import Module, parse
from unipool_jax.training.state import init_state
from unipool_jax.training.step import make_train_step

_FREE = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional"})
"""Instructions that start nothing themselves."""


class Measured(NamedTuple):
    """One case."""

    case: str
    seconds: list[float]
    """Processor time of a step, per round."""
    launches: int
    """Instructions that the compiled step runs, those of a loop once per trip."""
    state_bytes: int
    """Arguments of the compiled step, with the batch."""
    temporary_bytes: int
    """The compiler's figure for everything else."""


class Compiled(NamedTuple):
    """A step that is ready to run."""

    run: Callable[[], None]
    launches: int
    state_bytes: int
    temporary_bytes: int


def launches(module: Module) -> int:
    """Instructions that a step runs; what is fused into one runs as one."""
    inner = {
        instruction.rest.split("calls=")[1].split(",")[0].strip(" %)")
        for instruction, _, _ in module.instructions()
        if instruction.opcode == "fusion" and "calls=" in instruction.rest
    }
    return sum(
        times
        for instruction, computation, times in module.instructions()
        if computation not in inner and instruction.opcode not in _FREE
    )


def compile_case(config: Config) -> Compiled:
    """Compile the training step and start from fresh weights and random tokens."""
    inputs, targets = random_tokens(config)
    batch = jax.device_put(Batch(inputs, targets, np.ones(targets.shape, np.float32)))
    state = jax.jit(init_state, static_argnums=0)(config, jax.random.key(config.train.seed))
    step: Any = make_train_step(config)
    compiled = step.lower(state, batch).compile()
    memory = compiled.memory_analysis()

    def run() -> None:
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))

    run()
    return Compiled(run, launches(parse(compiled.as_text())), memory.argument_size_in_bytes, memory.temp_size_in_bytes)


def measure(cases: Sequence[str], rounds: int) -> list[Measured]:
    """Measure all cases in turn, `rounds` times; every second round in the opposite order."""
    steps = {}
    for case in cases:
        steps[case] = compile_case(config_of(case))
        print(f"compiled: {case}", flush=True)
    seconds: dict[str, list[float]] = {case: [] for case in cases}
    for turn in range(rounds):
        for case in cases if turn % 2 == 0 else cases[::-1]:
            start = time.process_time()
            steps[case].run()
            seconds[case].append(time.process_time() - start)
    return [
        Measured(case, seconds[case], found.launches, found.state_bytes, found.temporary_bytes)
        for case, found in steps.items()
    ]
