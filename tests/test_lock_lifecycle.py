"""What a run's lock goes through, and everything that stops it (method M6.8, M6.9)."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tiny import tiny_config
from unipool_jax.config.compose import compose_config
from unipool_jax.config.rules import problems
from unipool_jax.config.schema import Config
from unipool_jax.moe.lock_lifecycle import (
    LockError,
    LockRecord,
    check_step,
    from_document,
    must_stop,
    new_record,
    observe,
    structure,
    to_document,
)
from unipool_jax.training.ownership import ownership_metrics

LAYERS, EXPERTS = 4, 8


def lock_config(*overrides: str) -> Config:
    """Four layers over eight experts, 20 steps, frozen at step 4 and locked at step 8."""
    schedule = ("train.steps=20", "train.eval_every=2", "lock.lock_step=8", "lock.anneal_steps=4")
    return tiny_config("unipool_lock", *schedule, "lock.entropy_warmup_steps=4", "lock.entropy_target=2", *overrides)


def planted(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    owner = np.random.default_rng(seed).permutation(np.repeat(np.arange(LAYERS), 2))
    return np.where(owner == np.arange(LAYERS)[:, None], 1000, 1), owner


def own_counts(record: LockRecord) -> np.ndarray:
    assert record.lock is not None
    return np.where(np.array(record.lock.owner) == np.arange(LAYERS)[:, None], 10, 0)


def advance(config: Config, until: int, record: LockRecord | None = None, loss: float = 3.0) -> LockRecord:
    """Evaluations every two steps up to `until`, all with the same loss."""
    record = new_record(config) if record is None else record
    counts = planted()[0]
    for step in range(record.observed + 2, until + 1, 2):
        seen = counts if record.lock is None else own_counts(record)
        record = observe(config, record, step, loss, seen, seen)
    return record


def test_freeze_fade_and_lock_come_at_their_steps() -> None:
    config, owner = lock_config(), planted()[1]
    stages = {step: advance(config, step).stage for step in range(0, 14, 2)}
    assert stages == {0: 0, 2: 0, 4: 1, 6: 1, 8: 2, 10: 2, 12: 2}
    frozen, locked = advance(config, 4), advance(config, 8)
    assert frozen.candidate is not None
    assert locked.lock is not None
    assert frozen.candidate.owner == locked.lock.owner == tuple(owner)
    assert (frozen.candidate.frozen, frozen.candidate.status, frozen.reference_loss) == (4, "optimal", 3.0)
    assert (locked.lock.locked, locked.history, locked.candidate) == (8, (), None)
    assert locked.expert_ids is not None
    np.testing.assert_array_equal(owner[locked.expert_ids], np.arange(LAYERS)[:, None].repeat(2, 1))
    # The lock takes the frozen partition whatever is used by then.
    other = planted(seed=1)[0]
    assert observe(config, advance(config, 6), 8, 3.0, other, other).lock == locked.lock


def test_counts_of_several_evaluations_are_smoothed_and_old_ones_forgotten() -> None:
    config = lock_config("lock.count_lookback=2")
    first, second = planted(0)[0], planted(1)[0]
    record = observe(config, new_record(config), 2, 3.0, first, first)
    record = observe(config, record, 4, 3.0, second * 100, second * 100)
    assert record.candidate is not None
    assert record.candidate.owner == tuple(planted(1)[1])
    record = observe(config, record, 6, 3.0, first, first)
    assert len(record.history) == 2


def test_unfaded_counts_decide() -> None:
    config = lock_config()
    counts, other = planted(0)[0], planted(1)[0]
    record = observe(config, new_record(config), 2, 3.0, other, counts)
    record = observe(config, record, 4, 3.0, other, counts)
    assert record.candidate is not None
    assert record.candidate.owner == tuple(planted(0)[1])


def test_a_repeated_or_late_evaluation_changes_nothing() -> None:
    config = lock_config()
    record, counts = advance(config, 4), planted(1)[0]
    assert observe(config, record, 4, 9.0, counts, counts) is record
    assert observe(config, record, 2, 9.0, counts, counts) is record
    locked = advance(config, 8)
    assert observe(config, locked, 20, 9.0, counts, counts) is locked  # the last step, and after it


def test_the_run_stops_after_losses_in_a_row_above_the_reference() -> None:
    config, counts = lock_config(), planted()[0]
    frozen = advance(config, 4, loss=3.0)
    once = observe(config, frozen, 6, 3.06, counts, counts)
    assert (once.excess, must_stop(config, once)) == (1, False)
    stopped = observe(config, once, 8, 3.07, counts, counts)
    assert (stopped.excess, must_stop(config, stopped)) == (2, True)
    assert stopped.lock is None  # checked before any transition
    recovered = observe(config, once, 8, 3.05, counts, counts)
    assert (recovered.excess, recovered.stage) == (0, 2)
    later = observe(config, recovered, 10, 3.06, own_counts(recovered), own_counts(recovered))
    assert later.excess == 1
    assert not must_stop(lock_config("lock.excess_evaluations=3"), stopped)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_decides_nothing(loss: float) -> None:
    counts = planted()[0]
    with pytest.raises(LockError, match="step 4"):
        observe(lock_config(), new_record(lock_config()), 4, loss, counts, counts)


def test_tokens_outside_a_lock_stop_the_run() -> None:
    config = lock_config()
    record = advance(config, 8)
    counts = own_counts(record)
    counts[0, np.array(record.lock.owner) != 0] = 1  # type: ignore[union-attr]
    with pytest.raises(LockError, match="6 tokens went to experts of other layers"):
        observe(config, record, 10, 3.0, counts, counts)


@pytest.mark.parametrize(
    ("seen", "step", "message"),
    [(2, 4, "evaluation after step 4"), (2, 7, "step 7 without a partition"), (6, 8, "step 8 without a lock"),
     (2, 9, "evaluation after step 8")],
)  # fmt: skip
def test_a_missed_evaluation_is_refused(seen: int, step: int, message: str) -> None:
    config = lock_config()
    with pytest.raises(LockError, match=message):
        check_step(config, advance(config, seen), step)


def test_steps_in_order_are_allowed() -> None:
    for config in (lock_config(), lock_config("lock.ownership=random_at_lock")):
        for step in range(20):
            check_step(config, advance(config, step - step % 2), step)
    config = lock_config("lock.ownership=random_from_start")
    for step in range(20):
        check_step(config, new_record(config), step)


def test_the_controls_draw_their_partitions_from_the_seed() -> None:
    at_lock, from_start = (lock_config(f"lock.ownership=random_{when}") for when in ("at_lock", "from_start"))
    start = new_record(from_start)
    assert start.lock is not None
    assert (start.stage, start.lock.status, start.lock.locked) == (2, "random", 0)
    assert advance(at_lock, 8).lock.owner == start.lock.owner  # type: ignore[union-attr]
    other = new_record(lock_config("lock.ownership=random_from_start", "train.seed=7"))
    assert other.lock != start.lock
    assert advance(from_start, 6, start).lock == start.lock


@pytest.mark.parametrize("ownership", ["learned", "random_at_lock", "random_from_start"])
def test_records_survive_a_checkpoint(ownership: str) -> None:
    config = lock_config(f"lock.ownership={ownership}")
    for step in range(2, 14, 2):
        record = advance(config, step)
        document = json.loads(json.dumps(to_document(config, record, step)))
        assert from_document(config, document, step) == record
        assert structure(config, {"lock": document}).locked == (record.lock is not None)
        # The time limit of the solver is no part of what was computed.
        assert from_document(_with(config, solver_seconds=5.0), document, step).stage == record.stage
    assert from_document(config, None, 0) == new_record(config)


def _with(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, lock=dataclasses.replace(config.lock, **changes))


def _put(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        node: Any = document
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value

    return change


BROKEN = [
    (6, _put("version", value=2), "version 2"),
    (6, lambda d: d.pop("history"), "incomplete"),
    (6, _put("settings", "anneal_steps", value=3), "lock.anneal_steps=4: it was 3"),
    (6, _put("settings", "ownership", value="random_at_lock"), "lock.ownership=learned"),
    (6, _put("steps", value=40), "train.steps=20: it was 40"),
    (6, _put("layers", value=2), "model.num_layers=4"),
    (6, _put("experts", value=16), "pool.experts=8"),
    (6, _put("observed", value=8), "later than step 6"),
    (6, _put("excess", value=-1), "-1 evaluations"),
    (6, _put("excess", value=2), "2 evaluations"),
    (6, _put("history", 0, 0, 0, value=-1), "routing counts"),
    (6, _put("history", 0, value=[[1]]), "routing counts"),
    (6, _put("history", value=[[[1] * 8] * 4] * 6), "6 sets of counts"),
    (6, _put("candidate", "owner", 0, value=9), "not a partition"),
    (6, _put("candidate", "owner", value=[0, 1]), "not a partition"),
    (6, _put("candidate", "coverage", value=[0.5]), "among 1 layers"),
    (6, _put("candidate", "coverage", 0, value=float("nan")), "not a share"),
    (6, _put("candidate", "frozen", value=2), "partition of step 2"),
    (6, _put("candidate", "locked", value=6), "a candidate at step 6"),
    (6, _put("reference_loss", value=None), "reference loss None"),
    (6, _put("reference_loss", value=float("inf")), "reference loss inf"),
    (6, _put("candidate", value=None), "no partition"),
    (6, lambda d: d.update(lock=d["candidate"]), "both a candidate and a lock"),
    (6, _put("runtime", "fade", value=0.4), "fade is 0.4"),
    (6, _put("runtime", "step", value=5), "step is 5"),
    (6, _put("runtime", "entropy_coefficient", value=None), "entropy_coefficient is None"),
    (8, _put("lock", "locked", value=6), "a lock of step 6"),
    (8, _put("lock", "owner", 0, value=-1), "not a partition"),
    (8, lambda d: d.update(lock=None), "no partition"),
]


@pytest.mark.parametrize(("step", "change", "message"), BROKEN, ids=[message for _, _, message in BROKEN])
def test_a_broken_record_is_refused(step: int, change: Callable[[dict[str, Any]], None], message: str) -> None:
    config = lock_config()
    document = copy.deepcopy(json.loads(json.dumps(to_document(config, advance(config, step), step))))
    change(document)
    with pytest.raises(LockError, match=message.replace(".", r"\.")):
        from_document(config, document, step)


def test_a_record_of_another_step_is_refused() -> None:
    config = lock_config()
    for seen, step in ((8, 6), (8, 0), (4, 2), (4, 0)):
        with pytest.raises(LockError, match="later than step"):
            from_document(config, to_document(config, advance(config, seen), step), step)
    with pytest.raises(LockError, match="has no lock state"):
        from_document(config, None, 6)


# Each line is one problem: overrides that make it, how the message must begin, and what it must advise.
REJECTED = [
    ("pool.experts=46", "pool of 46 experts", "42 or 48"),
    ("model.num_layers=1", "model.num_layers=1", "at least 2"),
    ("moe.top_k=9", "moe.top_k=9", "at most 8"),
    ("pool.groups=2", "pool.groups=2", "pool.groups=1"),
    ("moe.router=softmax", "moe.router=softmax", "moe.router=norm"),
    ("loss.balance=switch", "loss.balance=switch", "loss.balance=pool"),
    ("loss.balance=none", "loss.balance=none", "loss.balance=pool"),
    ("loss.pool_coefficient=0", "loss.pool_coefficient=0", "positive"),
    ("lock.lock_fraction=0", "lock.lock_fraction=0", "more than 0"),
    ("lock.lock_fraction=1", "lock.lock_fraction=1", "less than 1"),
    ("lock.lock_step=280", "lock.lock_fraction or lock.lock_step gives step 280", "train.steps=280"),
    ("lock.anneal_fraction=0", "lock.anneal_fraction=0", "more than 0"),
    ("lock.anneal_fraction=0.001", "lock.anneal_fraction or lock.anneal_steps gives step 0", "at least 1"),
    ("lock.anneal_fraction=0.5", "lock.anneal_fraction or lock.anneal_steps gives step 140", "shorten it"),
    ("lock.entropy_warmup_fraction=0", "lock.entropy_warmup_fraction=0", "more than 0"),
    ("lock.entropy_warmup_steps=71", "lock.entropy_warmup_fraction or", "lock.entropy_warmup_steps=70"),
    ("lock.entropy_coefficient=-1", "lock.entropy_coefficient=-1", "at least 0"),
    ("lock.entropy_coefficient=inf", "lock.entropy_coefficient=inf", "at most 1000"),
    ("lock.entropy_target=0.5", "lock.entropy_target=0.5", "at least 1"),
    ("lock.entropy_target=9", "lock.entropy_target=9", "at most 8"),
    ("lock.coverage_threshold=0", "lock.coverage_threshold=0", "more than 0"),
    ("lock.coverage_threshold=1.1", "lock.coverage_threshold=1.1", "at most 1"),
    ("lock.max_loss_excess=-0.1", "lock.max_loss_excess=-0.1", "at least 0"),
    ("lock.excess_evaluations=0", "lock.excess_evaluations=0", "at least 1"),
    ("lock.count_lookback=0", "lock.count_lookback=0", "at least 1"),
    ("lock.count_smoothing=0", "lock.count_smoothing=0", "more than 0"),
    ("lock.count_smoothing=1.5", "lock.count_smoothing=1.5", "at most 1"),
    ("train.eval_every=0", "train.eval_every=0", "divisor of 70"),
    ("train.eval_every=60", "train.eval_every=60", "train.eval_every=70"),
    ("train.eval_every=140", "train.eval_every=140", "freeze at step 70"),
    ("train.eval_batches=0", "train.eval_batches=0", "at least 1"),
    ("mesh.expert_placement=measured", "mesh.expert_placement=measured", "contiguous"),
    ("mesh.expert=16 train.batch_size=16 train.microbatch_size=16", "mesh.expert=16", "8 experts"),
    ("lock.ownership=none lock.lock_step=80", "lock.lock_step=80", "method=unipool_lock"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "names", "advises"), REJECTED, ids=[line for line, _, _ in REJECTED])
def test_each_rejection_is_one_problem(line: str, names: str, advises: str) -> None:
    found = problems(compose_config(["method=unipool_lock", *line.split()]))
    assert len(found) == 1, found
    assert found[0].startswith(names)
    assert advises in found[0].removeprefix(names)


@pytest.mark.parametrize("scale", ["demo", "182m", "469m", "650m", "830m", "978m"])
@pytest.mark.parametrize("ownership", ["learned", "random_at_lock", "random_from_start"])
def test_every_scale_can_be_locked(scale: str, ownership: str) -> None:
    config = compose_config([f"scale={scale}", "method=unipool_lock", f"lock.ownership={ownership}", "mode=describe"])
    assert problems(config) == []


def test_private_from_the_start_needs_no_evaluation() -> None:
    line = ["method=unipool_lock", "lock.ownership=random_from_start", "train.eval_every=0", "train.steps=60"]
    assert problems(compose_config(line)) == []


def test_metrics_of_each_stage() -> None:
    config, (counts, _) = lock_config(), planted()
    uniform = np.full((LAYERS, EXPERTS), 5)
    before, frozen, fading = advance(config, 2), advance(config, 4), advance(config, 6)
    found = ownership_metrics(config, before, frozen, 4, 3.0, counts, counts)
    assert (found["lock/stage"], found["lock/installed_stage"], found["lock/final_locked"]) == (0, 1, False)
    assert (found["lock/sum_k"], found["lock/union_size"], found["lock/layer_k"]) == (32, 8, [8] * 4)
    assert (found["lock/fade"], found["lock/next_fade"]) == (0, 0)
    assert found["lock/entropy_coefficient"] == pytest.approx(5e-3 * 3 / 4)
    assert found["lock/next_entropy_coefficient"] == pytest.approx(5e-3)
    assert found["lock/layer_coverage"] == pytest.approx([2000 / 2006] * 4)
    assert found["lock/assignment"] == "optimal"
    assert 2 < found["lock/routed_effective_k_max"] < 2.1

    found = ownership_metrics(config, frozen, fading, 6, 3.02, uniform, counts)
    assert found["lock/fade"] == pytest.approx(0.5 * (1 - np.cos(np.pi / 4)))
    assert found["lock/next_fade"] == pytest.approx(0.5)
    assert found["lock/natural_candidate_coverage_min"] == pytest.approx(2000 / 2006)
    assert found["lock/effective_candidate_coverage_min"] == pytest.approx(0.25)
    assert found["lock/routed_effective_k_mean"] == pytest.approx(8)
    assert (found["lock/reference_loss"], found["lock/loss_excess"]) == (3.0, pytest.approx(0.02))

    locked = advance(config, 8)
    own = own_counts(locked)
    own[0] = 0
    found = ownership_metrics(config, locked, locked, 10, 3.0, own, own)
    assert (found["lock/stage"], found["lock/final_locked"], found["lock/fade"]) == (2, True, 0)
    assert (found["lock/sum_k"], found["lock/union_size"], found["lock/layer_k"]) == (8, 8, [2] * 4)
    assert (found["lock/dead_in_mask"], found["lock/off_mask_routes"], found["lock/ownership_violations"]) == (2, 0, 0)
    assert found["lock/entropy_coefficient"] == 5e-3
    assert before.stage == 0
