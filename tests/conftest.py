"""Settings of every test process; they must be in the environment before jax starts."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.version import Version

# `TEST_PLATFORM=cuda` runs what is asked for on a GPU: docs/testing.md says which tests are made for it.
_PLATFORM = os.environ.get("TEST_PLATFORM", "cpu")
os.environ["JAX_PLATFORMS"] = "cpu" if _PLATFORM == "cpu" else f"{_PLATFORM},cpu"
if _PLATFORM != "cpu":
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
# The TPU's compiler works without a TPU: look for none, and let several processes compile at once.
os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
# Tests compile many tiny programs and run each a few times: compiling fast matters, running fast does not.
_FLAGS = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8" if _PLATFORM == "cpu" else ""
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
# The older emitters halve the time of compiling; XLA removed them, and the flag, between jaxlib 0.11.0 and 0.11.1. The
# compiler for TPUs reads the same variable. Both end a process for a flag that they do not know, so this one is set
# where jaxlib knows it and is gone once JAX has read it.
_KEPT = os.environ["XLA_FLAGS"]
if Version(importlib.metadata.version("jaxlib")) < Version("0.11.1"):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# One LLVM module a program: splitting it lets many cores compile in parallel, and costs a sixth more CPU time.
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
# For processes that compile for CPUs alone.
os.environ["CPU_XLA_FLAGS"] = os.environ["XLA_FLAGS"]
import jax  # noqa: E402 - the environment comes first

jax.devices()
os.environ["XLA_FLAGS"] = _KEPT
# Tasks of lm-eval read their documents through a cache; no network, and nothing left in the home folder.
_CACHE = tempfile.TemporaryDirectory()
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=_CACHE.name)

_MOST_MEMORY = 1536 * 2**20
"""Bytes of a test process above which it forgets its compiled programs. Two processes fit a machine of 8 GB."""


def pytest_collection_finish() -> None:
    """Leave what the imports made out of every later garbage collection: tracing allocates, and so collects, a lot."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="module")
def steps_are_shared() -> Iterator[None]:
    """Runs of one test file share their compiled steps; for `pytestmark`, ahead of the runs that its fixtures make."""
    from shared_steps import share_steps

    with pytest.MonkeyPatch.context() as patch:
        share_steps(patch)
        yield


@pytest.fixture
def gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler for GPUs is not installed, so their plans are counted."""
    from unipool_jax.planner import gpu_compiler

    monkeypatch.setattr(gpu_compiler, "_there", lambda _: False)
    monkeypatch.setattr(gpu_compiler, "_finds_cudnn", lambda: False)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """JAX keeps every program it compiled, and tests compile thousands."""
    yield
    if (statm := Path("/proc/self/statm")).exists():
        resident = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if resident > _MOST_MEMORY:
            jax.clear_caches()
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
