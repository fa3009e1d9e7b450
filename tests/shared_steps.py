"""Training and evaluation steps that the runs of one test file share, so that each is compiled once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest

from unipool_jax.config.schema import Config, RunConfig
from unipool_jax.training import evaluate, growth_step, loop
from unipool_jax.training.step import make_eval_step, make_train_step


def _what_is_compiled(config: Config) -> Config:
    """Neither the folder, nor the rhythm of a run, nor who made the partition of a lock changes a step."""
    train = dataclasses.replace(
        config.train,
        log_every=1,
        eval_every=1,
        eval_batches=1,
        checkpoint_every=1,
        keep_checkpoints=1,
        nonfinite="stop",
    )
    lock = config.lock
    if lock.ownership != "none":
        lock = dataclasses.replace(lock, ownership="learned")
    return dataclasses.replace(config, run=RunConfig(), train=train, lock=lock)


def share_steps(patch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Have runs and evaluations share their steps; the list holds the name and function of all that were asked for."""
    made: list[tuple[str, Any]] = []

    def share(name: str, make: Callable[..., Any]) -> Callable[..., Any]:
        cached = functools.cache(make)

        def remember(config: Config, mesh: Any = None) -> Any:
            made.append((name, cached(_what_is_compiled(config), mesh)))
            return made[-1][1]

        return remember

    patch.setattr(loop, "make_train_step", share("train", make_train_step))
    patch.setattr(evaluate, "make_eval_step", share("eval", make_eval_step))
    share_growth(patch)
    return made


def share_growth(patch: pytest.MonkeyPatch) -> None:
    """Have runs that grow share the programs of their stages and depths."""
    for name in ("depth_programs", "stage_programs"):
        cached = functools.cache(getattr(growth_step, name))

        def remember(stage: Config, mesh: Any, *deep: Any, cached: Callable[..., Any] = cached) -> Any:
            unrolled = [each._replace(config=_what_is_compiled(each.config)) for each in deep]
            return cached(_what_is_compiled(stage), mesh, *unrolled)

        patch.setattr(growth_step, name, remember)
