"""Every setting says what it does to a run, and everything that depends on that is derived from the one table."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import jax
import numpy as np
import pytest

from tiny import tiny_batch, tiny_config, tiny_state
from unipool_jax.config.compose import compose_config, differences
from unipool_jax.config.parsing import bare
from unipool_jax.config.ranges import RANGES
from unipool_jax.config.schema import Config, settings
from unipool_jax.config.settings_table import (
    TABLE,
    frozen_differences,
    kind,
    measured_settings,
    shared_settings,
)
from unipool_jax.config.words import kind_of
from unipool_jax.evaluation.target import with_overrides
from unipool_jax.training.step import make_train_step

NAMES = list(settings(Config()))


def other_value(name: str, value: Any) -> Any:
    """A value of the right type that is not `value`."""
    hint = bare(kind_of(name))
    if typing.get_origin(hint) is typing.Literal:
        return next(choice for choice in typing.get_args(hint) if choice != value)
    if typing.get_origin(hint) is tuple:
        item = {int: 1, float: 0.5, str: "other"}[typing.get_args(hint)[0]]
        return (*(value or ()), value[-1] if value else item)
    if hint is bool:
        return not value
    if hint is str:
        return f"{value}x"
    low, high = RANGES[name].low, RANGES[name].high
    candidates = [(value or 1) + 1, (value or 1) / 2, low + (high - low) / 3]
    return next(hint(x) for x in candidates if hint(x) in RANGES[name] and hint(x) != value)


def changed(config: Config, name: str) -> Config:
    """`config` with another value of one setting, valid or not."""
    value = other_value(name, settings(config)[name])
    if "." not in name:
        return dataclasses.replace(config, **{name: value})
    return with_overrides(config, [(name, value)])


def test_every_setting_is_in_the_table_and_nothing_else() -> None:
    assert set(TABLE) == set(NAMES), "say in settings_table.py what a new setting does to a run"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_frozen_follows_from_the_table(name: str) -> None:
    """Whatever changes numbers or measurements is refused on resume; whatever does not may change."""
    config = compose_config(["method=unipool"])
    other = changed(config, name)
    assert differences(config, other) == [name]
    does = {kind(name, config), kind(name, other)}
    assert frozen_differences(config, other) == ([name] if does & {"numbers", "measured", "place"} else [])
    assert frozen_differences(config, other, places=False) == ([name] if does & {"numbers", "measured"} else [])


_LEARNED = ["method=unipool_lock"]
_DROP = ["mesh.overflow=drop", "mesh.expert=2", "mesh.data=1"]
_FIXED = [*_DROP, "mesh.capacity_factor=1.5"]
_PLACED = [*_FIXED, "mesh.expert_placement=measured"]
_MOVING = ["train.eval_slice=moving"]
_START = ["method=unipool_lock", "lock.ownership=random_from_start"]


@pytest.mark.parametrize(
    ("name", "more", "wanted"),
    [
        ("train.eval_every", [], "free"),
        ("train.eval_every", _LEARNED, "numbers"),
        ("train.eval_every", ["method=unipool_lock", "lock.ownership=random_at_lock"], "numbers"),
        ("train.eval_every", _START, "free"),
        ("train.eval_every", _MOVING, "measured"),
        ("train.eval_every", _PLACED, "numbers"),
        ("train.eval_batches", [], "measured"),
        ("train.eval_batches", _LEARNED, "numbers"),
        ("train.eval_slice", [], "measured"),
        ("train.eval_slice", _LEARNED, "numbers"),
        ("train.eval_batch_size", _LEARNED, "rounding"),
        ("mesh.overflow", [], "free"),
        ("mesh.overflow", ["mesh.overflow=drop"], "free"),
        ("mesh.overflow", _DROP, "numbers"),
        ("mesh.capacity_factor", ["mesh.expert=2", "mesh.data=1"], "free"),
        ("mesh.capacity_factor", _DROP, "numbers"),
        ("mesh.expert", [], "rounding"),
        ("mesh.expert", _DROP, "numbers"),
        ("mesh.expert_placement", _DROP, "numbers"),
        ("train.checkpoint_every", _FIXED, "free"),
        ("train.checkpoint_every", _DROP, "numbers"),
        ("train.microbatch_size", [], "rounding"),
        ("train.microbatch_size", _LEARNED, "numbers"),
        ("train.microbatch_size", ["loss.pool_statistics=previous"], "numbers"),
        ("train.microbatch_size", _DROP, "numbers"),
        ("train.nonfinite", [], "free"),
        ("optimizer.extension", [], "free"),
        ("optimizer.extension", ["train.earlier_steps=[9]"], "numbers"),
        ("kernels.implementation", [], "rounding"),
        ("model.remat", [], "rounding"),
        ("data.files", [], "place"),
        ("lock.solver_seconds", _LEARNED, "free"),
        ("optimizer.learning_rate", [], "numbers"),
        ("plan.compiled", [], "free"),
    ],
)  # fmt: skip
def test_where_it_depends_on_other_settings(name: str, more: list[str], wanted: str) -> None:
    assert kind(name, compose_config(more)) == wanted


def test_a_setting_is_frozen_if_it_is_so_before_or_after() -> None:
    config = compose_config(["mesh.expert=2", "mesh.data=1"])
    dropping = compose_config(["mesh.expert=2", "mesh.data=1", "mesh.overflow=drop"])
    assert frozen_differences(config, dropping) == frozen_differences(dropping, config) == ["mesh.overflow"]


def test_what_decides_the_text_of_an_evaluation() -> None:
    fixed = ["train.eval_batches", "train.eval_slice", "data.sequence_length", "data.split", "data.split_order"]
    assert measured_settings(compose_config([])) == fixed
    assert set(measured_settings(compose_config(_MOVING))) == {*fixed, "train.eval_every"}


def test_what_processes_agree_on() -> None:
    shared = set(shared_settings())
    assert {"optimizer.learning_rate", "train.seed", "train.steps", "train.eval_every", "mesh.data"} <= shared
    assert shared.isdisjoint({"distributed.process_id", "data.cache_dir", "data.num_threads", "data.files"})


def step_of(config: Config) -> tuple[float, bytes]:
    """The loss of one training step, and the bits of the parameters after it."""
    state, metrics = make_train_step(config, None)(tiny_state(config), tiny_batch(config))
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state.params)]
    return float(jax.device_get(metrics["loss/total"])), b"".join(leaves)


@pytest.mark.filterwarnings("ignore:NormRouter over")
def test_free_settings_change_no_bit() -> None:
    """All of them at once, so that two programs are compiled and not fifty."""
    config = tiny_config("unipool")
    free = [name for name in NAMES if kind(name, config) in ("free", "place")]
    other = config
    for name in free:
        other = changed(other, name)
    assert set(differences(config, other)) == set(free)
    assert step_of(config) == step_of(other)
