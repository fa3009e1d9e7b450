"""Compiles the training and evaluation steps ahead of time for devices that this machine does not have.

`libtpu` contains the TPU compiler. A step that it rejects, for example for lack of memory, would fail on TPUs too. The
compiler for GPUs is JAX's CUDA plugin (`gpu_compiler`). It does not refuse what is too large, so its figures are
compared with the memory of the device.
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
from unipool_jax.kernels.implementations import PLATFORM_IMPLEMENTATION, resolve_attention
from unipool_jax.parallel.mesh import make_mesh
from unipool_jax.planner import gpu_compiler
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
    """The devices of a topology such as `v5p:4x4x4` or `h100:16`.

    Raises:
      ConfigError: libtpu is missing, or the compiler does not know the topology.
    """
    parsed = parse_topology(topology)
    if parsed.is_tpu and importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            [
                f"mesh.topology={topology}: planning for TPUs needs their compiler; `pip install libtpu` "
                "(Linux on x86), or plan for h100:8, which can do without"
            ]
        )
    try:
        if not parsed.is_tpu:
            return gpu_compiler.devices(parsed)
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # the compilers' errors have no common class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        kind = "TPU" if parsed.is_tpu else "GPU"
        raise ConfigError([f"mesh.topology={topology}: the {kind} compiler does not know it ({reason})"]) from error


def missing_compiler(config: Config) -> str | None:
    """Why the step of `config` is only counted for `mesh.topology`, with what to install; None if it can be compiled.

    Without libtpu there is no plan for TPUs, which `devices_of` says.
    """
    assert config.mesh.topology is not None
    return None if parse_topology(config.mesh.topology).is_tpu else gpu_compiler.missing(config)


def topology_mesh(config: Config) -> Mesh:
    """The mesh of `config` over the devices of its topology.

    Raises:
      ConfigError: as `devices_of` and `mesh.make_mesh`.
    """
    assert config.mesh.topology is not None
    return make_mesh(config.mesh, devices_of(config.mesh.topology))


def for_devices(config: Config, platform: str) -> Config:
    """`config` with kernels resolved for `tpu` or `gpu`: while planning, the default backend is the CPU."""
    kernels, model = config.kernels, config.model
    implementation = kernels.implementation
    if implementation == "auto":
        implementation = PLATFORM_IMPLEMENTATION[platform]
    attention = resolve_attention(kernels.attention, model.compute_dtype, config.head_size, platform)
    kernels = dataclasses.replace(kernels, implementation=implementation, attention=attention)
    return dataclasses.replace(config, kernels=kernels)


def compile_step(config: Config, mesh: Mesh) -> Program:
    """Compile the training step of `config` for a mesh of absent devices.

    Raises:
      MemoryExceededError: the step does not fit in the memory of a TPU.
    """
    config, start = with_placement(for_devices(config, mesh.devices.flat[0].platform), mesh), time.monotonic()
    # Trace under the mesh, because its devices determine kernels, tiles and transports.
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        step: Any = make_train_step(config, mesh)
        lowered = step.lower(state_shapes(config, mesh), _batch(config, config.train.batch_size, mesh))
        # `Compiled.as_text` fails on modules with ragged all-to-alls; the compiler's own dump is complete.
        memory = _memory(lowered, {"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        texts = sorted(Path(folder).glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size)
        text = texts[-1].read_text()
    return Program(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        text,
        time.monotonic() - start,
    )


def compile_evaluation(config: Config, mesh: Mesh) -> Evaluation:
    """Compile the evaluation step of `config` for a mesh of absent devices.

    Raises:
      MemoryExceededError: as `compile_step`.
    """
    config, start = with_placement(for_devices(config, mesh.devices.flat[0].platform), mesh), time.monotonic()
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
