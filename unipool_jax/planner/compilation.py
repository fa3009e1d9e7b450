"""Compiles the training and evaluation steps ahead of time for a TPU topology, on a machine without TPUs.

`libtpu` contains the TPU compiler. A step that it rejects, for example for lack of memory, would fail on TPUs too.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from unipool_jax.config.chips import parse_topology
from unipool_jax.config.schema import Config, ConfigError
from unipool_jax.data.pipeline import Batch
from unipool_jax.parallel.mesh import make_mesh
from unipool_jax.training.placement import with_placement
from unipool_jax.training.sharding import batch_sharding, replicated
from unipool_jax.training.state import state_shapes
from unipool_jax.training.step import make_eval_step, make_train_step


class Program(NamedTuple):
    """A compiled step; bytes are those of one device."""

    argument_bytes: int
    """Training state and batch; the state is updated in place."""
    temporary_bytes: int
    """All other memory of a step: gathered weights, gradients, activations."""
    code_bytes: int
    text: str
    """The compiled module, in XLA's textual form."""
    seconds: float
    """Compilation time."""


class Evaluation(NamedTuple):
    """A compiled evaluation step."""

    temporary_bytes: int
    """Of one device, in addition to the training state, which stays in memory."""
    seconds: float
    """Compilation time."""


class MemoryExceededError(Exception):
    """The compiler ran out of device memory for the step; the message is the first line of its error."""


def prepare() -> None:
    """Restrict JAX to the CPU. Call before JAX initializes its devices; this process cannot train afterwards."""
    # Do not query the cloud's metadata server for a TPU, and allow several processes to compile.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_threefry_partitionable", True)


@functools.cache
def devices_of(topology: str) -> tuple[jax.Device, ...]:
    """The devices of a TPU topology such as `v5p:4x4x4`.

    Raises:
      ConfigError: libtpu is missing, or its compiler does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            [
                f"mesh.topology={topology}: planning for TPUs needs their compiler; `pip install libtpu` "
                "(Linux on x86), or plan for gpu:8, which needs none"
            ]
        )
    parse_topology(topology)
    try:
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # the compiler's errors have no common class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError([f"mesh.topology={topology}: the TPU compiler does not know it ({reason})"]) from error


def topology_mesh(config: Config) -> Mesh:
    """The mesh of `config` over the devices of its TPU topology.

    Raises:
      ConfigError: as `devices_of` and `mesh.make_mesh`.
    """
    assert config.mesh.topology is not None
    return make_mesh(config.mesh, devices_of(config.mesh.topology))


def for_tpu(config: Config) -> Config:
    """`config` with kernels resolved for TPU: while planning, the default backend is the CPU."""
    kernels = config.kernels
    if kernels.implementation == "auto":
        kernels = dataclasses.replace(kernels, implementation="pallas_tpu")
    if kernels.attention == "auto":
        kernels = dataclasses.replace(kernels, attention="splash")
    return dataclasses.replace(config, kernels=kernels)


def compile_step(config: Config, mesh: Mesh) -> Program:
    """Compile the training step of `config` for a mesh of absent TPUs.

    Raises:
      MemoryExceededError: the step does not fit in device memory.
    """
    config, start = with_placement(for_tpu(config), mesh), time.monotonic()
    # Trace under the mesh, because its devices determine kernels, tiles and transports.
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        step: Any = make_train_step(config, mesh)
        lowered = step.lower(state_shapes(config, mesh), _batch(config, config.train.batch_size, mesh))
        # `Compiled.as_text` fails on modules with ragged all-to-alls; the compiler's own dump is complete.
        memory = _memory(lowered, {"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        texts = sorted(Path(folder).glob("*.after_optimizations.txt"), key=lambda path: path.stat().st_size)
        text = texts[-1].read_text()
    return Program(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        text,
        time.monotonic() - start,
    )


def compile_evaluation(config: Config, mesh: Mesh) -> Evaluation:
    """Compile the evaluation step of `config` for a mesh of absent TPUs.

    Raises:
      MemoryExceededError: as `compile_step`.
    """
    config, start = with_placement(for_tpu(config), mesh), time.monotonic()
    with jax.set_mesh(mesh):
        step: Any = make_eval_step(config, mesh)
        state = state_shapes(config, mesh)
        batch = _batch(config, config.train.eval_batch_size, mesh)
        lengths = jax.ShapeDtypeStruct((config.model.vocab_size,), jnp.int32, sharding=replicated(mesh))
        memory = _memory(step.lower(state.params, state.balance, batch, lengths), {})
    return Evaluation(memory.temp_size_in_bytes, time.monotonic() - start)


def _batch(config: Config, sequences: int, mesh: Mesh) -> Batch:
    """Shapes and shardings of a batch."""
    shape, rows = (sequences, config.data.sequence_length), batch_sharding(mesh)
    dtypes = (jnp.int32, jnp.int32, jnp.float32, *((jnp.int32,) if config.data.document_mask else ()))
    arrays: Any = (jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for dtype in dtypes)
    return Batch(*arrays)


def _memory(lowered: Any, options: dict[str, Any]) -> Any:
    """The compiler's memory analysis of a program."""
    try:
        return lowered.compile(compiler_options=options).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "Ran out of memory" in str(error):
            raise MemoryExceededError(" ".join(str(error).split())[:300]) from error
        raise
