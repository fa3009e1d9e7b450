"""UniPool-lock in a run: the record beside the state, the evaluations that move it, and the re-indexing at the lock."""

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
from unipool_jax.parallel.processes import is_main, told_by_main
from unipool_jax.training.evaluate import EvalResult
from unipool_jax.training.ownership import draw_ownership_map, ownership_metrics
from unipool_jax.training.state import BalanceState, TrainState, state_shapes


def locked_state(config: Config, state: TrainState, expert_ids_LK: np.ndarray, mesh: Mesh | None = None) -> TrainState:
    """The state of a run with one pool as that of the model after the lock; `state` is used up.

    Args:
      config: of the run, with its one pool.
      state: before the lock.
      expert_ids_LK: the experts of each layer in ascending order.
      mesh: on which the arrays are; each expert then lives where the mesh places its owner's share of the bank.
    """
    after, trees = config.after_lock(), {"params": state.params, "opt_state": state.opt_state}
    # Made from the arrays before, as an array that was not computed from the others would have the step compiled twice.
    balance = BalanceState(
        expert_bias_GNE=jnp.swapaxes(state.balance.expert_bias_GNE, 0, 1)[..., : after.experts_per_pool],
        previous_load_GE=locked_load(state.balance.previous_load_GE, expert_ids_LK),
    )
    if mesh is None:
        moved = locked_tree(trees, expert_ids_LK)
    else:
        places = jax.tree.map(lambda leaf: leaf.sharding, state_shapes(after, mesh))
        moved = locked_tree(trees, expert_ids_LK, {name: getattr(places, name) for name in trees})
        balance = jax.device_put(balance, places.balance)
    return TrainState(state.step, moved["params"], moved["opt_state"], balance)


class Locking:
    """The lock of one run.

    Args:
      config: of the run.
      folder: of the run; ownership maps go to `lock/` inside it.
      document: of the checkpoint that the run goes on from; None for a new run.
      step: completed steps of that checkpoint.
      mesh: of the run.

    Raises:
      LockError: if the document does not fit the configuration or the step.
      ConfigError: if the experts of a locked layer do not divide over the mesh.
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
        """The configuration of the model as it is now."""
        return self._config.after_lock() if self._reindexed else self._config

    def start(self, state: TrainState) -> TrainState:
        """The state to begin with: re-indexed where experts are private from the start.

        Raises:
          LockError: if the partition of a restored state is not that of its record.
        """
        placed, candidate = state.balance.lock, self.record.candidate
        if placed is not None:
            expected = np.full(self.record.experts, -1) if candidate is None else np.array(candidate.owner)
            if (np.asarray(jax.device_get(placed.owner_M)) != expected).any():
                raise LockError("the partition among the arrays of the checkpoint is not the one in its lock state")
        return self._install(state)

    def check(self, step: int) -> None:
        """Refuse the update after `step` steps where the record does not allow it; raises LockError."""
        check_step(self._config, self.record, step)

    def in_pool_order(self, counts_LE: np.ndarray) -> np.ndarray:
        """Counts per layer and expert of the pool, `[L, M]`, from those of the model as it is now."""
        ids_LK = self.record.expert_ids
        return counts_LE if ids_LK is None or not self._reindexed else pool_counts(counts_LE, ids_LK)

    def document(self, step: int) -> dict[str, Any]:
        """What a checkpoint after `step` steps keeps of the lock."""
        return {"lock": to_document(self._config, self.record, step)}

    def observe(self, step: int, result: EvalResult) -> dict[str, Any]:
        """Draw the consequences of an evaluation, and return its metrics; `apply` puts them in place."""
        before = self.record
        counts_LM = result.counts_LE
        unfaded_LM = counts_LM if result.unfaded_counts_LE is None else result.unfaded_counts_LE
        self.record = after = observe(self._config, before, step, result.loss, counts_LM, unfaded_LM)
        said = json.dumps(to_document(self._config, after, step), sort_keys=True)
        if told_by_main(said) != said:
            raise LockError(f"step {step}: processes disagree about the lock; are all of them the same program?")
        if after.stage != before.stage and is_main():
            partition = after.lock or after.candidate
            assert partition is not None
            name = "lock" if after.lock is not None else "freeze"
            title = f"{name} at step {step}, {partition.status} assignment ({partition.method})"
            draw_ownership_map(self._folder / "lock" / f"{name}-{step}.png", title, unfaded_LM, partition)
        return ownership_metrics(self._config, before, after, step, result.loss, counts_LM, unfaded_LM)

    def apply(self, state: TrainState) -> TrainState:
        """The state to go on with after an evaluation.

        Raises:
          LossExcessError: if the run must stop.
        """
        if must_stop(self._config, self.record):
            lock, reference = self._config.lock, self.record.reference_loss
            raise LossExcessError(
                f"stopped after the evaluation at step {self.record.observed}: {lock.excess_evaluations} evaluations "
                f"in a row more than lock.max_loss_excess={lock.max_loss_excess:g} above the loss at the freeze, "
                f"{reference:.4f}. Nothing was saved after it. Start a new run with a longer fade "
                "(lock.anneal_fraction), a later lock (lock.lock_fraction), or a larger lock.max_loss_excess"
            )
        return self._install(state)

    def _install(self, state: TrainState) -> TrainState:
        """Bring the arrays in line with the record."""
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
