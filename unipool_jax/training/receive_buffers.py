"""Receive buffers of the expert transport: how many rows arrive, how large they are, and rows that found no place."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from unipool_jax.config.schema import Config
from unipool_jax.data.store_format import write_atomically
from unipool_jax.moe.dispatch import UNMEASURED_FACTOR, rows_per_device
from unipool_jax.parallel.processes import is_main, told_by_main

FILE = "receive_buffers.json"
"""In the run folder: the size in use, and the size of the expert group it was measured for."""

_HEADROOM = 1.25
_STEP = 0.25


class OverflowedError(RuntimeError):
    """More rows arrived at a device than it can hold and `mesh.overflow=stop`; nothing was changed or saved."""


def fitted_factor(busiest: float, devices: int) -> float:
    """Size for loads of up to `busiest` times the mean: a quarter more, and up to the next quarter; at most `devices`,
    which has room for all rows of an expert group."""
    return min(max(math.ceil(busiest * _HEADROOM / _STEP) * _STEP, _HEADROOM), float(devices))


class ReceiveBuffers:
    """Buffers of the size that `mesh.receive_factor` gives, or, where that is null, that measured loads ask for.

    Their size changes no value: rows are computed with in the same order whatever room is behind them.

    Args:
      config: of the run.
      mesh: None for a single device, where nothing overflows.
      folder: of the run.
      meta: document of the checkpoint that the run goes on from; None for a new run.
    """

    def __init__(self, config: Config, mesh: Mesh | None, folder: Path, meta: Mapping[str, Any] | None):
        self._config, self._path = config, folder / FILE
        self._devices = 1 if mesh is None else mesh.shape["expert"]
        self._mean_rows = rows_per_device(config, mesh)
        self._measured = config.mesh.receive_factor is None and self._devices > 1
        self.factor = config.mesh.receive_factor or self._read() or UNMEASURED_FACTOR
        """Rows that a device can receive in one layer, over the mean."""
        self._busiest = 0.0
        before = (meta or {}).get("overflow", {"total": 0, "unwritten": 0})
        self.total: int = before["total"]
        """Rows without a place since the beginning of the run."""
        self._unwritten: int = before["unwritten"]

    def of(self, config: Config) -> Config:
        """`config` with buffers of the size in use."""
        return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, receive_factor=self.factor))

    def loads(self, metrics: Mapping[str, Any]) -> np.ndarray:
        """Rows of the busiest device of any micro-batch of a step over the mean, `[L]`."""
        return np.asarray(jax.device_get(metrics["received_L"])) / self._mean_rows

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Look at every step, not only those that get a line of metrics. Where one device has all experts none is lost.

        Raises:
          OverflowedError: if rows found no place and `mesh.overflow=stop`.
        """
        if self._devices == 1:
            return
        self._busiest = max(self._busiest, float(self.loads(metrics).max()))
        rows = int(jax.device_get(metrics["overflow"]))
        if rows and self._config.mesh.overflow == "stop":
            too_small, self.factor = self.factor, fitted_factor(self._busiest, self._devices)
            self._write()
            raise self._error(step, rows, too_small)
        self.total += rows
        self._unwritten += rows

    def resize(self) -> bool:
        """At a checkpoint: follow what was measured since the one before; what goes on here begins with that.

        Compiling the step again takes a while, so buffers shrink only where that frees a quarter of them.

        Returns:
          Whether the size is another now.
        """
        if not self._measured:
            return False
        wanted, before = fitted_factor(self._busiest, self._devices), self.factor
        if self._busiest and (wanted > before or wanted <= 0.75 * min(before, self._devices)):
            self.factor = wanted
        self._busiest = 0.0
        self._write()
        return self.factor != before

    def take(self) -> int:
        """Rows without a place since the last call, for a line of metrics."""
        rows, self._unwritten = self._unwritten, 0
        return rows

    def document(self) -> dict[str, Any]:
        """For a checkpoint's document: what the argument `meta` is read for."""
        return {"overflow": {"total": self.total, "unwritten": self._unwritten}}

    def _read(self) -> float | None:
        """The size that process 0 finds for an expert group like this one."""
        if not self._measured:
            return None
        text = told_by_main(self._path.read_text(encoding="utf-8") if is_main() and self._path.exists() else "{}")
        found = json.loads(text)
        return float(found["receive_factor"]) if found.get("expert_devices") == self._devices else None

    def _write(self) -> None:
        if not (self._measured and is_main()):
            return
        text = json.dumps({"expert_devices": self._devices, "receive_factor": self.factor})
        write_atomically(self._path, f"{text}\n".encode())

    def _error(self, step: int, rows: int, too_small: float) -> OverflowedError:
        remedy = (
            f"The same command goes on from the last checkpoint with buffers of {self.factor:g} times the mean"
            if self._measured
            else f"Go on from the last checkpoint with mesh.receive_factor={self.factor:g}, or null to have it measured"
        )
        return OverflowedError(
            f"stopped at step {step}: {rows} rows found no place in a receive buffer; the busiest device got "
            f"{self._busiest:.2f} times the mean, {too_small:g} times fit\n"
            f"The step was not applied. {remedy}; mesh.expert_placement=measured evens loads out, mesh.overflow=drop "
            "leaves such rows out"
        )
