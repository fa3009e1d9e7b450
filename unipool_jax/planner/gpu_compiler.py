"""The GPU compiler without a GPU: JAX's CUDA plugin compiles for a described target.

The plugin needs the description of a GPU, which XLA reads from a device where there is one. Those here have the figures
of XLA's own collection (xla/backends/gpu/target_config/specs in openxla/xla, h100_sxm and b200) that its passes and
Triton read: limits of a block and a multiprocessor, and what its cost model divides by.
"""

from __future__ import annotations

import ctypes.util
import functools
import importlib
import importlib.util
from typing import NamedTuple

import jax
from jax.experimental import topologies

from unipool_jax.config.chips import CHIPS, Topology
from unipool_jax.config.schema import Config
from unipool_jax.kernels.implementations import resolve_attention

_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
_CUDNN = "9.10"
"""Version that plans assume: the oldest that has all attention this program asks for."""


class _Target(NamedTuple):
    """What differs between the described GPUs."""

    capability: int
    multiprocessors: int
    clock_ghz: float
    memory_bytes: int
    memory_bandwidth: int
    cache_bytes: int


_TARGETS = {
    "h100": _Target(9, 132, 1.98, 84942979072, 3352320000000, 52428800),
    "b200": _Target(10, 148, 1.965, 191514411008, 7672320000000, 132644864),
}


def missing(config: Config) -> str | None:
    """What to install to compile plans of `config` for GPUs, as a sentence; None if it is there.

    cuDNN is needed where attention is cuDNN's: the plugin asks it for its version and for the size of its buffers.
    """
    absent = []
    if not any(_there(plugin) for plugin in _PLUGINS):
        absent.append("JAX's CUDA plugin")
    attention = resolve_attention(
        config.kernels.attention, config.model.compute_dtype, config.head_size, platform="gpu"
    )
    if attention == "cudnn" and not (_there("nvidia.cudnn") or _finds_cudnn()):
        absent.append("cuDNN")
    if not absent:
        return None
    return f'compiling for GPUs needs {" and ".join(absent)}: pip install "unipool_jax[gpu-plan]" (Linux; needs no GPU)'


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package that would contain it
        return False


@functools.cache
def _finds_cudnn() -> bool:
    """Whether the system has a cuDNN of its own."""
    return ctypes.util.find_library("cudnn") is not None


@functools.cache
def devices(topology: Topology) -> tuple[jax.Device, ...]:
    """Absent GPUs of these nodes, to compile for; `missing` must be None and JAX restricted to the CPU before.

    Raises:
      RuntimeError: the plugin does not load, or does not fit the version of JAX.
    """
    chip, count = topology.chip, topology.num_devices
    inside = min(chip.node, count)
    importlib.import_module(next(plugin for plugin in _PLUGINS if _there(plugin)))
    description = topologies.get_topology_desc(
        platform="cuda",
        topology_name=f"{chip.name}:{count}",
        topology=f"1x{count // inside}x{inside}",
        target_config=_target_config(chip.name),
    )
    return tuple(description.devices)


def _target_config(name: str) -> str:
    """The target called `name` as text of XLA's `GpuTargetConfigProto`."""
    kind, target, (major, minor) = CHIPS[name].device_kind, _TARGETS[name], _CUDNN.split(".")
    return f"""gpu_device_info {{
  name: "{kind}" device_vendor: "NVIDIA Corporation" device_address_bits: 64
  cuda_compute_capability {{ major: {target.capability} feature_extension: ACCELERATED_FEATURES }}
  driver_version: "13.0.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0" dnn_version: "{_CUDNN}.0"
  core_count: {target.multiprocessors} fpus_per_core: 128 clock_rate_ghz: {target.clock_ghz}
  device_memory_size: {target.memory_bytes} memory_bandwidth: {target.memory_bandwidth}
  l2_cache_size: {target.cache_bytes}
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}}
platform_name: "CUDA" dnn_version_info {{ major: {major} minor: {minor} }} device_description_str: "{kind}"
"""
