"""Contenders of `benchmarks.train_step`, each in its own process: our training step and the PyTorch twin's.

Separate processes separate peak memory, and keep libraries out of each other's allocators and
threads. This module and what it imports at the top load neither JAX nor PyTorch, for the same reason.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal

import numpy as np

from benchmarks.twin_settings import twin_settings
from unipool_jax.config.schema import Config

Kind = Literal["jax", "pytorch", "pytorch-compiled"]

KEEP_MEMORY = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.arena_max=1"
)
"""Value of GLIBC_TUNABLES with which freed memory is used again: a step's large arrays are fresh memory otherwise, and
on a virtual machine that gives freed pages back to its host, steps then take anything between one and two times as
long."""

_ENVIRONMENT = {
    # Threads of PyTorch's pool that spin while another process has its turn would slow that one down.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Compile time is that of a program never seen before.
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    # Several processes share a GPU.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}


class ContenderError(RuntimeError):
    """A contender that cannot run here; the message says why."""


@dataclass(frozen=True)
class Contender:
    """Something that trains."""

    name: str
    kind: Kind
    config: Config


@dataclass(frozen=True)
class Prepared:
    """A contender ready to train."""

    step: Callable[[], None]
    """Runs one optimizer step to its end."""
    device_peak: Callable[[], int]
    """Peak bytes in use on the accelerator; 0 without one."""


def has_torch() -> bool:
    """Whether PyTorch is installed."""
    return importlib.util.find_spec("torch") is not None


def random_tokens(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of one batch, int32 `[B, S]`, the same for every contender."""
    shape = (config.train.batch_size, config.data.sequence_length + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, dtype=np.int32)
    return tokens[:, :-1], tokens[:, 1:]


def prepare_jax(config: Config) -> Prepared:
    """Our training step."""
    import jax

    from unipool_jax.data.pipeline import Batch
    from unipool_jax.training.state import init_state
    from unipool_jax.training.step import make_train_step

    inputs_BS, targets_BS = random_tokens(config)
    batch = jax.device_put(Batch(inputs_BS, targets_BS, np.ones(targets_BS.shape, np.float32)))
    state = jax.jit(init_state, static_argnums=0)(config, jax.random.key(config.train.seed))
    train_step = make_train_step(config)

    def step() -> None:
        nonlocal state
        state, metrics = train_step(state, batch)
        jax.block_until_ready((state, metrics))

    def device_peak() -> int:
        statistics = jax.local_devices()[0].memory_stats()
        return statistics["peak_bytes_in_use"] if statistics else 0

    return Prepared(step, device_peak)


def prepare_torch(config: Config, *, compiled: bool) -> Prepared:
    """The PyTorch twin's training step, on as many threads as JAX uses: one per core of this process."""
    import torch

    from benchmarks.pytorch_baseline.model import Transformer
    from benchmarks.pytorch_baseline.train import Trainer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        # What JAX does with float32 products on a GPU.
        torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if on_gpu else "cpu")
    inputs_BS, targets_BS = (torch.from_numpy(array).long().to(device) for array in random_tokens(config))
    model = Transformer(twin_settings(config), max_length=config.data.sequence_length).to(device)
    trainer = Trainer(model, compiled=compiled)

    def step() -> None:
        trainer.step(inputs_BS, targets_BS)
        if on_gpu:
            torch.cuda.synchronize()

    return Prepared(step, torch.cuda.max_memory_allocated if on_gpu else lambda: 0)


class Worker:
    """A contender in its process; it waits for a command to run a step.

    The first step, which compiles, is made at once, and one more to settle.

    Attributes:
      contender: who it is.
      first_seconds: time of the first step.

    Raises:
      ContenderError: if it cannot make a step.
    """

    def __init__(self, contender: Contender):
        os.environ.update(_ENVIRONMENT)
        self.contender = contender
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(contender, other), daemon=True)
        self._process.start()
        other.close()
        self.first_seconds = self.step()
        self.step()

    def step(self) -> float:
        """Seconds of one training step."""
        self._connection.send(True)
        return self._receive()

    def finish(self) -> int:
        """End the process; returns its peak bytes on the accelerator, or resident without one."""
        self._connection.send(False)
        peak = int(self._receive())
        self._process.join()
        return peak

    def _receive(self) -> float:
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise ContenderError(f"{self.contender.name}: process ended with {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise ContenderError(f"{self.contender.name}: {answer}")
        return float(answer)


def _serve(contender: Contender, connection: Connection) -> None:
    """Body of the process: a step for every True received, peak memory at the end."""
    try:
        if contender.kind == "jax":
            prepared = prepare_jax(contender.config)
        else:
            prepared = prepare_torch(contender.config, compiled=contender.kind == "pytorch-compiled")
        while connection.recv():
            start = time.perf_counter()
            prepared.step()
            connection.send(time.perf_counter() - start)
    except Exception as error:
        connection.send(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
        return
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    connection.send(prepared.device_peak() or resident)
