"""Rows that found no place in a receive buffer: a reason to stop, or counted step by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from unipool_jax.config import Config
from unipool_jax.training.metrics import device_loads


class OverflowedError(RuntimeError):
    """More rows arrived at a device than it can hold and `mesh.overflow=stop`; nothing was changed or saved."""


class Overflow:
    """Rows that went without their experts, of every step and not only of those that get a line of metrics.

    Args:
      config: of the run.
      mesh: None for a single device, where nothing overflows.
      meta: document of the checkpoint that the run goes on from; None for a new run.
    """

    def __init__(self, config: Config, mesh: Mesh | None, meta: Mapping[str, Any] | None):
        self._config, self._mesh = config, mesh
        before = (meta or {}).get("overflow", {"total": 0, "unwritten": 0})
        self.total: int = before["total"]
        """Rows since the beginning of the run."""
        self._unwritten: int = before["unwritten"]

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Count the rows of one step.

        Raises:
          OverflowedError: if there are any and `mesh.overflow=stop`.
        """
        rows = int(jax.device_get(metrics["overflow"]))
        if rows and self._config.mesh.overflow == "stop":
            raise self._error(step, rows, metrics)
        self.total += rows
        self._unwritten += rows

    def take(self) -> int:
        """Rows since the last call, for a line of metrics."""
        rows, self._unwritten = self._unwritten, 0
        return rows

    def document(self) -> dict[str, Any]:
        """For a checkpoint's document: what the argument `meta` is read for."""
        return {"overflow": {"total": self.total, "unwritten": self._unwritten}}

    def _error(self, step: int, rows: int, metrics: Mapping[str, jax.Array]) -> OverflowedError:
        assert self._mesh is not None
        counts_LE, devices = jax.device_get(metrics["counts_LE"]), self._mesh.shape["expert"]
        return OverflowedError(
            f"stopped at step {step}: {rows} rows found no place in a receive buffer; the busiest "
            f"device of a layer got {max(device_loads(counts_LE, devices)):.2f} times the mean on average, "
            f"mesh.receive_factor={self._config.mesh.receive_factor:g} times fit\n"
            "The step was not applied. Go on from the last checkpoint with a larger mesh.receive_factor (at most "
            f"{devices} is ever needed), with mesh.expert_placement=measured, or drop such rows with mesh.overflow=drop"
        )
