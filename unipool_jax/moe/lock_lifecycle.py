"""The host's side of UniPool-lock: what evaluations have shown, what was decided, what may never be (method M6.8).

A `LockRecord` is a value. `observe` makes the next one from an evaluation; `problems` lists what is wrong with one;
`check_step` refuses an update that a record does not allow. Records travel in checkpoints as JSON documents.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from unipool_jax.config.errors import UserError
from unipool_jax.config.growth_schedule import saved_model
from unipool_jax.config.lock_schedule import make_schedule
from unipool_jax.config.schema import Config
from unipool_jax.config.settings_table import TABLE, kind
from unipool_jax.moe.assignment import Assignment, assign, expert_ids, random_assignment, smoothed_counts

VERSION = 1

_ROUNDING = 1e-12


class LockError(UserError, RuntimeError):
    """The lock of a run is not where its step says it must be; the message says what is wrong and what to do."""


class LossExcessError(RuntimeError):
    """Validation losses stayed too far above the one at the freeze; nothing was saved after the last of them."""


@dataclass(frozen=True)
class Partition:
    """Which layer owns which expert."""

    owner: tuple[int, ...]
    """The layer of each expert, `[M]`."""
    coverage: tuple[float, ...]
    """Share of each layer's smoothed counts on its own experts, `[L]`, when the partition was made."""
    status: str
    """`optimal`, `best_effort` or `random`, see `Assignment`."""
    method: str
    """Which problem gave it."""
    frozen: int
    """Step after which it was made."""
    locked: int | None = None
    """Step after which experts became private; None while it is a candidate."""

    def deficits(self, threshold: float) -> list[float]:
        """What each layer lacks of the coverage threshold."""
        return [max(0.0, threshold - covered) for covered in self.coverage]


@dataclass(frozen=True)
class LockRecord:
    """All that a run's lock depends on, besides the configuration."""

    settings: dict[str, Any]
    """The lock section of the configuration, which must not change."""
    steps: int
    """train.steps when the run began."""
    layers: int
    experts: int
    history: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """Routing counts of the last evaluations without fading, oldest first, each `[L, M]`."""
    observed: int = 0
    """Step of the last evaluation."""
    candidate: Partition | None = None
    lock: Partition | None = None
    reference_loss: float | None = None
    """Validation loss at the freeze."""
    excess: int = 0
    """Evaluations in a row too far above it."""

    @property
    def stage(self) -> int:
        """0 while layers share all experts, 1 during the fade, 2 after the lock."""
        return 2 if self.lock is not None else 1 if self.candidate is not None else 0

    @property
    def expert_ids(self) -> np.ndarray | None:
        """The experts of each layer in ascending order once they are private, int64 `[L, K]`."""
        return None if self.lock is None else expert_ids(np.array(self.lock.owner), self.layers)


def new_record(config: Config) -> LockRecord:
    """The record of a run before its first step; with random ownership from the start the lock is in it."""
    record = LockRecord(_settings(config), config.train.lengths[0], config.mixture_layers, config.total_experts)
    if config.lock.ownership != "random_from_start":
        return record
    drawn = random_assignment(np.zeros((record.layers, record.experts)), config.train.seed)
    return dataclasses.replace(record, lock=_partition(drawn, 0, 0))


def observe(
    config: Config, record: LockRecord, step: int, loss: float, counts_LM: np.ndarray, unfaded_LM: np.ndarray
) -> LockRecord:
    """What follows from an evaluation after `step` steps: nothing, a candidate, or the lock.

    An evaluation of a step seen before, or after the last step, changes nothing. One that makes the run stop
    (`must_stop`) only counts, and makes neither a candidate nor a lock.

    Args:
      config: of the run.
      record: before.
      step: completed steps.
      loss: validation loss, nats.
      counts_LM: choices per layer and expert of the pool.
      unfaded_LM: what they would be without fading; equal to `counts_LM` while nothing is faded.

    Raises:
      AssignmentError: if no partition could be found.
      LockError: if a locked layer was routed to an expert that is not its own, or a loss or count is impossible.
    """
    if step >= config.train.steps or step <= record.observed:
        return record
    if not math.isfinite(loss):
        raise LockError(f"step {step}: a validation loss of {loss} decides nothing; go on from an earlier checkpoint")
    record = dataclasses.replace(record, observed=step)
    if record.reference_loss is not None:
        excessive = loss > record.reference_loss + config.lock.max_loss_excess
        record = dataclasses.replace(record, excess=record.excess + 1 if excessive else 0)
    outside = off_mask_routes(record, counts_LM)
    if outside:
        raise LockError(f"step {step}: {outside} tokens went to experts of other layers after the lock; report this")
    if record.lock is not None or must_stop(config, record):
        return record

    newest = tuple(tuple(int(n) for n in row) for row in unfaded_LM)
    record = dataclasses.replace(record, history=(*record.history, newest)[-config.lock.count_lookback :])
    schedule = make_schedule(config)
    if step == schedule.freeze:
        found = _freeze(config, record)
        return dataclasses.replace(record, candidate=_partition(found, step), reference_loss=loss)
    if step == schedule.lock and record.candidate is not None:
        locked = dataclasses.replace(record.candidate, locked=step)
        return dataclasses.replace(record, candidate=None, lock=locked, history=())
    return record


def must_stop(config: Config, record: LockRecord) -> bool:
    """Whether the last evaluations were too bad to go on."""
    return record.excess >= config.lock.excess_evaluations


def off_mask_routes(record: LockRecord, counts_LM: np.ndarray) -> int:
    """Choices of experts that a locked layer does not own; 0 before the lock."""
    if record.lock is None:
        return 0
    own_LM = np.array(record.lock.owner) == np.arange(record.layers)[:, None]
    return int(np.where(own_LM, 0, counts_LM).sum())


def check_step(config: Config, record: LockRecord, step: int) -> None:
    """Refuse the update after `step` completed steps if the record does not belong there.

    Raises:
      LockError: if the evaluation at the freeze or at the lock was missed.
    """
    if config.lock.ownership == "random_from_start" or record.lock is not None:
        return
    schedule = make_schedule(config)
    missed = schedule.lock if step >= schedule.lock else schedule.freeze if step >= schedule.freeze else None
    if missed is not None and (step >= schedule.lock or record.candidate is None):
        what = "lock" if missed == schedule.lock else "partition"
        raise LockError(
            f"step {step} without a {what}: the evaluation after step {missed} that makes it has not happened. Go on "
            f"from a checkpoint of step {missed} or before (delete the later ones), or start a new run"
        )


def structure(config: Config, document: Mapping[str, Any]) -> Config:
    """The configuration of the model in a checkpoint: of the layers that it had, of G = L pools if it has a lock.

    Args:
      config: of the run.
      document: of the checkpoint, with a record under `lock` if the run has one, and the number of layers under
        `growth` if it grows.
    """
    config = saved_model(config, document)
    record = document.get("lock")
    return config.after_lock() if isinstance(record, Mapping) and record.get("lock") is not None else config


def to_document(config: Config, record: LockRecord, step: int) -> dict[str, Any]:
    """The record as JSON, with the coefficients of the update after `step` steps to be compared when it is read."""
    return {"version": VERSION, **dataclasses.asdict(record), "runtime": _runtime(config, step)}


def from_document(config: Config, document: Mapping[str, Any] | None, step: int) -> LockRecord:
    """The record in the document of a checkpoint after `step` steps.

    Raises:
      LockError: with everything that is wrong with it.
    """
    if document is None:
        if step == 0:
            return new_record(config)
        raise LockError(
            f"the checkpoint of step {step} has no lock state, and lock.ownership={config.lock.ownership} needs one; "
            "it is of a run without a lock; start a new run under another run.name"
        )
    try:
        if document["version"] != VERSION:
            raise LockError(f"lock state of version {document['version']}; this program reads version {VERSION}")
        fields = {field.name: document[field.name] for field in dataclasses.fields(LockRecord)}
        fields["history"] = tuple(tuple(tuple(row) for row in counts) for counts in fields["history"])
        for name in ("candidate", "lock"):
            if fields[name] is not None:
                parts = dict(fields[name])
                fields[name] = Partition(**parts | {key: tuple(parts[key]) for key in ("owner", "coverage")})
        record, runtime = LockRecord(**fields), dict(document["runtime"])
    except (KeyError, TypeError) as error:
        raise LockError(f"the lock state of step {step} is incomplete: {error!r}; use another checkpoint") from error
    found = [*problems(config, record, step), *_runtime_problems(config, runtime, step)]
    if found:
        raise LockError(
            f"the lock state in the checkpoint of step {step} cannot be used:\n"
            + "\n".join(f"  - {problem}" for problem in found)
            + "\nUse the configuration of that run or another checkpoint, or start a new run under another run.name."
        )
    return record


def problems(config: Config, record: LockRecord, step: int) -> list[str]:
    """Every broken invariant of a record after `step` steps (method M6.9); empty for a sound one."""
    found = []
    kept, wanted = record.settings, _settings(config)
    for name in sorted(kept.keys() | wanted.keys()):
        free = f"lock.{name}" in TABLE and kind(f"lock.{name}", config) == "free"
        if not free and kept.get(name) != wanted.get(name):
            found.append(f"lock.{name}={wanted.get(name)}: it was {kept.get(name)} when the run began")
    for name, was, now in (
        ("train.steps", record.steps, config.train.lengths[0]),
        ("model.num_layers", record.layers, config.mixture_layers),
        ("pool.experts", record.experts, config.total_experts),
    ):
        if was != now:
            found.append(f"{name}={now}: it was {was} when the run began")
    if found:
        return found
    if record.observed > step:
        found.append(f"it has seen the evaluation after step {record.observed}, which is later than step {step}")
    if not 0 <= record.excess < config.lock.excess_evaluations:
        found.append(f"{record.excess} evaluations above the margin; the run stops at {config.lock.excess_evaluations}")
    if len(record.history) > config.lock.count_lookback:
        found.append(f"{len(record.history)} sets of counts, more than lock.count_lookback")
    for counts in record.history:
        if len(counts) != record.layers or any(len(row) != record.experts or min(row) < 0 for row in counts):
            found.append(f"routing counts that are not {record.layers} x {record.experts} numbers of 0 or more")
    return found + _partition_problems(config, record, step)


def _partition_problems(config: Config, record: LockRecord, step: int) -> list[str]:
    found = []
    schedule, from_start = make_schedule(config), config.lock.ownership == "random_from_start"
    if record.candidate is not None and record.lock is not None:
        found.append("both a candidate and a lock")
    for partition in (record.candidate, record.lock):
        if partition is None:
            continue
        try:
            expert_ids(np.array(partition.owner), record.layers)
        except ValueError as error:
            found.append(str(error))
        if len(partition.owner) != record.experts or len(partition.coverage) != record.layers:
            found.append(f"a partition of {len(partition.owner)} experts among {len(partition.coverage)} layers")
        if not all(math.isfinite(covered) and 0 <= covered <= 1 for covered in partition.coverage):
            found.append("a coverage that is not a share")
        if not from_start and partition.frozen != schedule.freeze:
            found.append(f"a partition of step {partition.frozen}; the freeze is at step {schedule.freeze}")
        if not from_start and (record.reference_loss is None or not math.isfinite(record.reference_loss)):
            found.append(f"a partition with the reference loss {record.reference_loss}")
    if record.candidate is not None and not (
        record.candidate.locked is None and schedule.freeze <= step <= schedule.lock and not from_start
    ):
        found.append(f"a candidate at step {step}; there is one from step {schedule.freeze} to {schedule.lock}")
    if record.lock is not None:
        at = 0 if from_start else schedule.lock
        if record.lock.locked != at or step < at:
            found.append(f"a lock of step {record.lock.locked} at step {step}; the lock is at step {at}")
    if record.candidate is None and record.lock is None and (record.reference_loss is not None or from_start):
        found.append("no partition, although it was made before")
    return found


def _runtime(config: Config, step: int) -> dict[str, float]:
    schedule = make_schedule(config)
    return {
        "step": step,
        "fade": 0.0 if config.lock.ownership == "random_from_start" else schedule.fade(step),
        "entropy_coefficient": config.lock.entropy_coefficient * min(step / schedule.warmup, 1.0),
        "log_entropy_target": math.log(config.lock.entropy_target),
    }


def _runtime_problems(config: Config, stored: Mapping[str, Any], step: int) -> list[str]:
    wanted = _runtime(config, step)
    return [
        f"{name} is {stored.get(name)} there, and {value} here"
        for name, value in wanted.items()
        if not isinstance(stored.get(name), int | float) or abs(stored[name] - value) > _ROUNDING
    ]


def _settings(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config.lock)


def _freeze(config: Config, record: LockRecord) -> Assignment:
    lock = config.lock
    counts_LM = smoothed_counts([np.array(counts) for counts in record.history], lock.count_smoothing)
    if lock.ownership == "random_at_lock":
        return random_assignment(counts_LM, config.train.seed)
    return assign(counts_LM, lock.coverage_threshold, lock.solver, lock.solver_seconds)


def _partition(found: Assignment, frozen: int, locked: int | None = None) -> Partition:
    owner = tuple(int(layer) for layer in found.owner_M)
    return Partition(owner, tuple(found.coverage_L.tolist()), found.status, found.method, frozen, locked)
