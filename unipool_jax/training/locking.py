"""UniPool-lock during training: its record, the evaluations that advance it, and the re-indexing of the state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unipool_jax.config.schema import Config, ConfigError
from unipool_jax.moe.lock import locked_load, locked_tree, pool_counts
from unipool_jax.moe.lock_lifecycle import (
    LockError,
    LossExcessError,
    check_step,
    from_document,
    must_stop,
    observe,
    structure,
    to_document,
)
from unipool_jax.parallel.processes import broadcast_from_process_0, is_process_0
from unipool_jax.training.evaluate import EvalResult
from unipool_jax.training.ownership import draw_ownership_map, ownership_metrics
from unipool_jax.training.state import BalanceState, TrainState, state_shapes


def locked_state(config: Config, state: TrainState, expert_ids_LK: np.ndarray, mesh: Mesh | None = None) -> TrainState:
    """The state of the model after the lock, from that of a model with one pool; `state` is donated.

    Args:
      config: of the run, with one pool.
      state: before the lock.
      expert_ids_LK: the experts of each layer, ascending.
      mesh: of the run; each layer's experts are then sharded as its own bank.
    """
    after, trees = config.after_lock(), {"params": state.params, "opt_state": state.opt_state}
    # Computed from the previous arrays, because a newly created array would make the step compile twice.
    balance = BalanceState(
        expert_bias_GNE=jnp.swapaxes(state.balance.expert_bias_GNE, 0, 1)[..., : after.experts_per_pool],
        previous_load_GE=locked_load(state.balance.previous_load_GE, expert_ids_LK),
    )
    if mesh is None:
        moved = locked_tree(trees, expert_ids_LK)
    else:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state_shapes(after, mesh))
        moved = locked_tree(trees, expert_ids_LK, {name: getattr(shardings, name) for name in trees})
        balance = jax.device_put(balance, shardings.balance)
    return TrainState(state.step, moved["params"], moved["opt_state"], balance)


class Locking:
    """The lock of one run.

    Args:
      config: of the run.
      folder: of the run; ownership maps go to `lock/` inside it.
      document: meta document of the checkpoint that the run resumes from; None for a new run.
      step: completed steps of that checkpoint.
      mesh: of the run.

    Raises:
      LockError: the document does not match the configuration or the step.
      ConfigError: the experts of a locked layer do not divide over the mesh.
    """

    def __init__(
        self, config: Config, folder: Path, document: Mapping[str, Any] | None, step: int, mesh: Mesh | None = None
    ):
        private, parts = config.after_lock().experts_per_pool, 1 if mesh is None else mesh.shape["expert"]
        if private % parts:
            raise ConfigError([f"mesh.expert={parts}: must divide the {private} experts of a layer after the lock"])
        self._config, self._folder, self._mesh = config, folder, mesh
        self.record = from_document(config, None if document is None else document.get("lock"), step)
        self._reindexed = document is not None and structure(config, document).locked

    @property
    def structure(self) -> Config:
        """The configuration of the current model: `after_lock()` once it is re-indexed."""
        return self._config.after_lock() if self._reindexed else self._config

    def start(self, state: TrainState) -> TrainState:
        """The state to start with, re-indexed if experts are private from the start.

        Raises:
          LockError: the partition in a restored state differs from that in its record.
        """
        placed, candidate = state.balance.lock, self.record.candidate
        if placed is not None:
            expected = np.full(self.record.experts, -1) if candidate is None else np.array(candidate.owner)
            if (np.asarray(jax.device_get(placed.owner_M)) != expected).any():
                raise LockError(
                    "the partition in the checkpoint's arrays differs from the one in its lock record; "
                    "resume from another checkpoint"
                )
        return self._install(state)

    def has_seen(self, step: int) -> bool:
        """Whether the evaluation after `step` steps is in the record, which metrics may be ahead of."""
        return self.record.observed >= step

    def check(self, step: int) -> None:
        """Raise LockError if the record does not allow the update after `step` steps."""
        check_step(self._config, self.record, step)

    def in_pool_order(self, counts_LE: np.ndarray) -> np.ndarray:
        """Counts per layer and expert of the pool, `[L, M]`, from those of the current model."""
        ids_LK = self.record.expert_ids
        return counts_LE if ids_LK is None or not self._reindexed else pool_counts(counts_LE, ids_LK)

    def document(self, step: int) -> dict[str, Any]:
        """What the meta document of a checkpoint after `step` steps holds of the lock."""
        return {"lock": to_document(self._config, self.record, step)}

    def observe(self, step: int, result: EvalResult) -> dict[str, Any]:
        """Advance the record by an evaluation and return its metrics; `apply` then changes the state."""
        before = self.record
        counts_LM = result.counts_LE
        unfaded_LM = counts_LM if result.unfaded_counts_LE is None else result.unfaded_counts_LE
        self.record = after = observe(self._config, before, step, result.loss, counts_LM, unfaded_LM)
        document = json.dumps(to_document(self._config, after, step), sort_keys=True)
        if broadcast_from_process_0(document) != document:
            raise LockError(f"step {step}: processes disagree about the lock; run the same program in all of them")
        if after.stage != before.stage and is_process_0():
            partition = after.lock or after.candidate
            assert partition is not None
            name = "lock" if after.lock is not None else "freeze"
            title = f"{name} at step {step}, {partition.status} assignment ({partition.method})"
            path, first = self._folder / "lock" / f"{name}-{step}.png", self._config.moe.dense_layers
            draw_ownership_map(path, title, unfaded_LM, partition, first)
        return ownership_metrics(self._config, before, after, step, result.loss, counts_LM, unfaded_LM)

    def apply(self, state: TrainState) -> TrainState:
        """The state to continue with after an evaluation.

        Raises:
          LossExcessError: the run must stop.
        """
        if must_stop(self._config, self.record):
            lock, reference = self._config.lock, self.record.reference_loss
            raise LossExcessError(
                f"stopped after the evaluation at step {self.record.observed}: {lock.excess_evaluations} consecutive "
                f"losses more than lock.max_loss_excess={lock.max_loss_excess:g} above the loss at the freeze, "
                f"{reference:.4f}. Nothing was saved after it. Start a new run with a longer fade "
                "(lock.anneal_fraction), a later lock (lock.lock_fraction), or a larger lock.max_loss_excess"
            )
        return self._install(state)

    def _install(self, state: TrainState) -> TrainState:
        """The state in the structure, and with the partition, of the record."""
        ids_LK, candidate = self.record.expert_ids, self.record.candidate
        if ids_LK is not None and not self._reindexed:
            self._reindexed = True
            return locked_state(self._config, state, ids_LK, self._mesh)
        placed = state.balance.lock
        if candidate is None or placed is None:
            return state
        owner_M = jnp.zeros_like(placed.owner_M) + np.array(candidate.owner, np.int32)
        return state._replace(balance=state.balance._replace(lock=placed._replace(owner_M=owner_M)))


def open_lock(
    config: Config, folder: Path, document: Mapping[str, Any] | None, step: int, mesh: Mesh | None = None
) -> Locking | None:
    """The lock of a run; None for a run without one. Arguments and errors are those of `Locking`."""
    return None if config.lock.ownership == "none" else Locking(config, folder, document, step, mesh)
