"""When a run with UniPool-lock freezes, fades and locks, and which configurations allow one (spec F.1, F.2, F.10).

Of the published rejections (spec F.10) those about the framework of the published code have nothing to reject here:
pipeline stages, several validation sets, layers without experts, fp16 and fp8, legacy matmuls, capacity and padding,
delayed weight gradients, graph capture, overlapped reductions. Expert parallelism is allowed, as the lock re-indexes
the bank wherever its experts live.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from unipool_jax.config import mesh_rules
from unipool_jax.config.schema import Config


class LockSchedule(NamedTuple):
    """Boundaries in completed optimiser steps."""

    freeze: int
    """The partition is decided at the evaluation after this step, and its fade begins."""
    lock: int
    """At the evaluation after this step experts become private."""
    warmup: int
    """Steps over which the entropy coefficient rises."""

    def fade(self, step: int) -> float:
        """How far experts outside the partition are faded in the update after `step` steps: 0 is not at all, 1 wholly.

        `0.5 (1 - cos(pi x))` with x the share of the fade that is over; exactly 0 and 1 at its ends, and 0 outside.
        """
        if not self.freeze <= step <= self.lock:
            return 0.0
        return 0.5 * (1.0 - math.cos(math.pi * (step - self.freeze) / (self.lock - self.freeze)))


def make_schedule(config: Config) -> LockSchedule:
    """Boundaries of a run: fractions of train.steps, rounded half to even, unless steps are given."""
    lock, steps = config.lock, config.train.steps

    def resolve(given: int | None, fraction: float) -> int:
        return round(fraction * steps) if given is None else given

    end = resolve(lock.lock_step, lock.lock_fraction)
    freeze = end - resolve(lock.anneal_steps, lock.anneal_fraction)
    return LockSchedule(freeze, end, resolve(lock.entropy_warmup_steps, lock.entropy_warmup_fraction))


def problems(config: Config) -> Iterator[str]:
    """What keeps a run from being locked as configured, one message for each; nothing without a lock."""
    if config.lock.ownership == "none":
        for name in ("lock_step", "anneal_steps", "entropy_warmup_steps"):
            value = getattr(config.lock, name)
            if value is not None:
                yield f"lock.{name}={value}: nothing is locked; choose method=unipool_lock, or remove it"
        return
    yield from _model_problems(config)
    yield from _schedule_problems(config)


def _model_problems(config: Config) -> Iterator[str]:
    layers, total, top_k = config.model.num_layers, config.total_experts, config.moe.top_k
    why = f"lock.ownership={config.lock.ownership}"
    if config.pool.groups != 1:
        yield f"pool.groups={config.pool.groups}: {why} starts from one pool for all layers; set pool.groups=1"
    if config.moe.router != "norm":
        yield f"moe.router={config.moe.router}: {why} fades the scores of NormRouter; set moe.router=norm"
    if config.loss.balance != "pool":
        yield f"loss.balance={config.loss.balance}: {why} is balanced by the pool loss alone; set loss.balance=pool"
    if config.mesh.expert_placement != "contiguous":
        yield (
            f"mesh.expert_placement={config.mesh.expert_placement}: with {why} the owner of an expert decides where it "
            "lives; set mesh.expert_placement=contiguous"
        )
    if layers < 2:
        yield f"model.num_layers={layers}: {why} divides the pool among layers; use at least 2"
    elif total % layers or total < layers:
        lower = total // layers * layers
        nearest = " or ".join(str(n) for n in (lower, lower + layers) if n)
        yield (
            f"pool of {total} experts: {why} gives every one of model.num_layers={layers} layers as many; set "
            f"pool.experts to a multiple of {layers}, for example {nearest}"
        )
    else:
        private = total // layers
        if top_k > private:
            yield (
                f"moe.top_k={top_k}: {why} leaves {private} experts to a layer ({total} among {layers}); choose at "
                f"most {private}, or more experts"
            )
        if config.lock.entropy_target > private:
            yield (
                f"lock.entropy_target={config.lock.entropy_target:g}: a layer will own {private} experts; choose at "
                f"most {private}"
            )
        if config.pool.groups == 1:
            before = set(mesh_rules.problems(config))
            yield from (problem for problem in mesh_rules.problems(config.after_lock()) if problem not in before)


def _schedule_problems(config: Config) -> Iterator[str]:
    lock, steps, every = config.lock, config.train.steps, config.train.eval_every
    schedule = make_schedule(config)
    if lock.ownership == "random_from_start":
        if schedule.warmup < 1:
            yield _resolves("entropy_warmup", schedule.warmup, "must be at least 1", "set lock.entropy_warmup_steps=1")
        return
    anneal = schedule.lock - schedule.freeze
    if schedule.lock >= steps:
        yield _resolves("lock", schedule.lock, f"must come before train.steps={steps}", "lower one of them")
    if anneal < 1:
        yield _resolves("anneal", anneal, "must be at least 1", "set lock.anneal_steps")
    elif anneal >= schedule.lock:
        yield _resolves(
            "anneal", anneal, f"the fade must be shorter than the way to the lock, {schedule.lock}", "lower one of them"
        )
    elif not 1 <= schedule.warmup <= schedule.freeze:
        yield _resolves(
            "entropy_warmup",
            schedule.warmup,
            f"must be at least 1 and at most the freeze, step {schedule.freeze}",
            f"set lock.entropy_warmup_steps={schedule.freeze}",
        )
    elif every == 0:
        yield (
            f"train.eval_every=0: experts are assigned at an evaluation; set train.eval_every to a divisor of "
            f"{math.gcd(schedule.freeze, schedule.lock)}"
        )
    elif schedule.freeze % every or schedule.lock % every:
        yield (
            f"train.eval_every={every}: must divide the freeze at step {schedule.freeze} and the lock at step "
            f"{schedule.lock}, for example train.eval_every={math.gcd(schedule.freeze, schedule.lock)}; or move them "
            "with lock.lock_step and lock.anneal_steps"
        )


def _resolves(part: str, found: int, allowed: str, advice: str) -> str:
    steps = {"lock": "lock_step", "anneal": "anneal_steps"}.get(part, "entropy_warmup_steps")
    return f"lock.{part}_fraction or lock.{steps} gives step {found}: {allowed}; {advice}"
