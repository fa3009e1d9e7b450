"""Receive buffers of the expert transport: their capacity, the rows they receive, and the rows that overflow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from unipool_jax.config.files import FileError, check_fields, read_json, write_json
from unipool_jax.config.schema import Config
from unipool_jax.moe.capacity import UNMEASURED_FACTOR, rows_per_device
from unipool_jax.parallel.processes import broadcast_from_process_0, is_process_0, process_0_first

FILE = "receive_buffers.json"
"""In the run folder: the capacity factor in use, and the size of the expert group it was measured for."""

_HEADROOM = 1.25
_STEP = 0.25
"""Factors are rounded up to a multiple of this."""


class OverflowedError(RuntimeError):
    """A device received more rows than its buffer holds, with `mesh.overflow=stop`; the step was not applied."""


def fitted_factor(busiest: float, devices: int) -> float:
    """Capacity factor for loads of up to `busiest` times the mean, with headroom.

    At most `devices`, the size of the expert group, with which a buffer holds all of the group's rows.
    """
    return min(max(math.ceil(busiest * _HEADROOM / _STEP) * _STEP, _HEADROOM), float(devices))


class ReceiveBuffers:
    """The capacity factor of a run: `mesh.capacity_factor` or, where that is null, one fitted to measured loads.

    Capacity changes no result unless rows overflow: received rows are processed in the same order.

    Args:
      config: of the run.
      mesh: None for a single device, where nothing overflows.
      folder: of the run.
      meta: meta document of the checkpoint that the run resumes from; None for a new run.
    """

    def __init__(self, config: Config, mesh: Mesh | None, folder: Path, meta: Mapping[str, Any] | None):
        self._config, self._path = config, folder / FILE
        self._devices = 1 if mesh is None else mesh.shape["expert"]
        self._mean_rows = rows_per_device(config, mesh)
        self._measured = config.mesh.capacity_factor is None and self._devices > 1
        self.factor = config.mesh.capacity_factor or self._read() or UNMEASURED_FACTOR
        """Rows that a device can receive in one layer, relative to the mean."""
        self._busiest_load = 0.0
        before = (meta or {}).get("overflow", {"total": 0, "unwritten": 0})
        self.total: int = before["total"]
        """Rows that overflowed since the beginning of the run."""
        self._unwritten: int = before["unwritten"]

    def configured(self, config: Config) -> Config:
        """`config` with the capacity factor in use."""
        return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, capacity_factor=self.factor))

    def loads(self, metrics: Mapping[str, Any]) -> np.ndarray:
        """Rows received by the busiest device in any micro-batch of a step, relative to the mean, `[L]`."""
        return np.asarray(jax.device_get(metrics["received_L"])) / self._mean_rows

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Record the loads and overflow of a step; call for every step, not only those that are logged.

        Raises:
          OverflowedError: rows overflowed and `mesh.overflow=stop`.
        """
        if self._devices == 1:
            return
        self._busiest_load = max(self._busiest_load, float(self.loads(metrics).max()))
        rows = int(jax.device_get(metrics["overflow"]))
        if rows and self._config.mesh.overflow == "stop":
            previous, self.factor = self.factor, fitted_factor(self._busiest_load, self._devices)
            self._write()
            raise self._error(step, rows, previous)
        self.total += rows
        self._unwritten += rows

    def resize(self) -> bool:
        """Fit the factor to the loads since the previous checkpoint, and save it. Call at every checkpoint.

        Returns:
          Whether the factor changed.
        """
        if not self._measured:
            return False
        wanted, before = fitted_factor(self._busiest_load, self._devices), self.factor
        # The step must be recompiled, so buffers shrink only if that frees at least a quarter.
        if self._busiest_load and (wanted > before or wanted <= 0.75 * min(before, self._devices)):
            self.factor = wanted
        self._busiest_load = 0.0
        self._write()
        return self.factor != before

    def take_overflow(self) -> int:
        """Rows that overflowed since the last call."""
        rows, self._unwritten = self._unwritten, 0
        return rows

    def document(self) -> dict[str, Any]:
        """What a checkpoint's meta document must hold to restore the counts."""
        return {"overflow": {"total": self.total, "unwritten": self._unwritten}}

    def _read(self) -> float | None:
        """The saved factor, if it was measured for an expert group of this size. Process 0 reads the file."""
        if not self._measured:
            return None
        found = process_0_first(lambda: self._read_file() if is_process_0() else 0.0)
        return float(broadcast_from_process_0(repr(found))) or None

    def _read_file(self) -> float:
        """0 where there is no factor for this size of the expert group."""
        if not self._path.exists():
            return 0.0
        advice = "delete it; loads are then measured again"
        found = read_json(self._path, advice)
        check_fields(found, self._path, {"expert_devices": int, "receive_factor": float}, advice)
        factor = found["receive_factor"]
        if not 0 < factor < math.inf:
            raise FileError(f"{self._path}: receive_factor is {factor}, expected more than 0; {advice}")
        return float(factor) if found["expert_devices"] == self._devices else 0.0

    def _write(self) -> None:
        if not (self._measured and is_process_0()):
            return
        write_json(self._path, {"expert_devices": self._devices, "receive_factor": self.factor})

    def _error(self, step: int, rows: int, previous: float) -> OverflowedError:
        remedy = (
            f"The same command resumes from the last checkpoint with buffers of {self.factor:g} times the mean"
            if self._measured
            else f"Resume from the last checkpoint with mesh.capacity_factor={self.factor:g}, "
            "or null to fit it to loads"
        )
        # Windows are spread over all devices already.
        balance = "" if self._config.windows else "mesh.expert_placement=measured balances loads; "
        return OverflowedError(
            f"stopped at step {step}: {rows} rows overflowed the receive buffers; the busiest device received "
            f"{self._busiest_load:.2f} times the mean, its buffer holds {previous:g} times\n"
            f"The step was not applied. {remedy}. {balance}a new run with mesh.overflow=drop drops such rows"
        )
