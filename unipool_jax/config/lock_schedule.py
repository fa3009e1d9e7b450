"""When a run with UniPool-lock freezes, fades and locks, and which configurations allow one (method M6.1, M6.2).

The published code also rejects features of its framework that do not exist here (M6.10): pipeline stages, several
validation sets, layers without experts, fp16 and fp8, legacy matmuls, capacity and padding, delayed weight gradients,
graph capture, overlapped reductions. Expert parallelism is allowed here: the lock re-indexes a sharded bank too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from unipool_jax.config import mesh_rules
from unipool_jax.config.block_rules import layers_with_experts
from unipool_jax.config.schema import Config


class LockSchedule(NamedTuple):
    """Boundaries of the phases, in completed optimizer steps."""

    freeze: int
    """The partition is fixed at the evaluation after this step, and the fade begins."""
    lock: int
    """Experts become private at the evaluation after this step."""
    warmup: int
    """Steps over which the entropy coefficient rises."""

    def fade(self, step: int) -> float:
        """How far experts outside the partition are faded in the update after `step` steps: 0 not at all, 1 fully.

        `0.5 (1 - cos(pi x))`, x the elapsed fraction of the fade: exactly 0 and 1 at its ends, and 0 outside.
        """
        if not self.freeze <= step <= self.lock:
            return 0.0
        return 0.5 * (1.0 - math.cos(math.pi * (step - self.freeze) / (self.lock - self.freeze)))


def make_schedule(config: Config) -> LockSchedule:
    """The schedule of a run. Fractions of train.steps, before any extension, are rounded half to even; steps override
    fractions."""
    lock, steps = config.lock, config.train.lengths[0]

    def resolve(given: int | None, fraction: float) -> int:
        return round(fraction * steps) if given is None else given

    end = resolve(lock.lock_step, lock.lock_fraction)
    freeze = end - resolve(lock.anneal_steps, lock.anneal_fraction)
    return LockSchedule(freeze, end, resolve(lock.entropy_warmup_steps, lock.entropy_warmup_fraction))


def problems(config: Config) -> Iterator[str]:
    """One message for each reason why a run cannot be locked as configured; none without a lock."""
    if config.lock.ownership == "none":
        for name in ("lock_step", "anneal_steps", "entropy_warmup_steps"):
            value = getattr(config.lock, name)
            if value is not None:
                yield f"lock.{name}={value}: unused with lock.ownership=none; choose method=unipool_lock, or remove it"
        return
    yield from _model_problems(config)
    yield from _schedule_problems(config)


def _model_problems(config: Config) -> Iterator[str]:
    layers, total, top_k = config.mixture_layers, config.total_experts, config.moe.top_k
    why = f"lock.ownership={config.lock.ownership}"
    if config.pool.groups != 1:
        yield f"pool.groups={config.pool.groups}: {why} starts with one pool for all layers; set pool.groups=1"
    if config.moe.router != "norm":
        yield f"moe.router={config.moe.router}: {why} fades the scores of NormRouter; set moe.router=norm"
    if config.loss.balance != "pool":
        yield f"loss.balance={config.loss.balance}: {why} needs the pool loss; set loss.balance=pool"
    if config.mesh.expert_placement not in ("auto", "contiguous"):
        yield (
            f"mesh.expert_placement={config.mesh.expert_placement}: with {why} experts are placed by their owners; set "
            "mesh.expert_placement=contiguous"
        )
    if layers < 2:
        yield f"{layers_with_experts(config)}: {why} divides the pool among layers; set at least 2"
    elif total % layers or total < layers:
        lower = total // layers * layers
        nearest = " or ".join(str(n) for n in (lower, lower + layers) if n)
        yield (
            f"pool of {total} experts: {why} divides it equally among {layers_with_experts(config)}; set "
            f"pool.experts to a multiple of {layers}, for example {nearest}"
        )
    else:
        private = total // layers
        if top_k > private:
            yield (
                f"moe.top_k={top_k}: {why} leaves each layer {private} experts ({total} among {layers}); set at "
                f"most {private}, or add experts"
            )
        if config.lock.entropy_target > private:
            yield (
                f"lock.entropy_target={config.lock.entropy_target:g}: each layer will own {private} experts; set at "
                f"most {private}"
            )
        if config.pool.groups == 1:
            before = set(mesh_rules.problems(config))
            yield from (problem for problem in mesh_rules.problems(config.after_lock()) if problem not in before)


def _schedule_problems(config: Config) -> Iterator[str]:
    lock, steps, every = config.lock, config.train.lengths[0], config.train.eval_every
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
            "anneal", anneal, f"the fade must begin after step 0 and end at step {schedule.lock}", "shorten it"
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
            f"train.eval_every=0: experts are assigned during an evaluation; set train.eval_every to a divisor of "
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
