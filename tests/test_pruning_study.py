"""The pruning study: its runs are valid, cost what they are said to, and its tables are those of its numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks.pruning_study import cases
from benchmarks.pruning_study.report import differences_table, pool_table, recovery_table
from unipool_jax.config.compose import compose_config
from unipool_jax.config.rules import validate
from unipool_jax.config.words import from_words
from unipool_jax.pruning.requests import PruneRequest
from unipool_jax.training.flops import flops_per_token

TEXT = Path("text")


@pytest.mark.parametrize("axis", [cases.AXES[0], cases.AXES[-1]], ids=lambda axis: axis.name)
def test_the_runs_of_an_axis(axis: cases.Axis) -> None:
    """Recovery and the model from scratch are the model that is left, and all compute is the same."""
    parent = cases.parent_config(TEXT, 1)
    small = cases.small_config(axis, TEXT, 1)
    recovery, scratch = (
        compose_config(list(words(axis, TEXT, 1))) for words in (cases.recovery_words, cases.scratch_words)
    )
    for config in (parent, recovery, scratch):
        described = dataclasses.replace(config, mode="describe", data=dataclasses.replace(config.data, source="demo"))
        validate(dataclasses.replace(described, data=dataclasses.replace(described.data, stores=(), tokenizer="demo")))
    assert recovery.model == scratch.model == small.model
    assert recovery.total_experts == scratch.total_experts == small.total_experts
    spent = parent.train.steps * flops_per_token(parent) + recovery.train.steps * flops_per_token(recovery)
    assert scratch.train.steps * flops_per_token(scratch) == pytest.approx(spent, rel=2e-3)


@pytest.mark.parametrize("axis", cases.AXES, ids=lambda axis: axis.name)
def test_the_arms_of_an_axis(axis: cases.Axis) -> None:
    assert cases.small_config(axis, TEXT, 1) != cases.parent_config(TEXT, 1)
    assert len({name for name, _ in axis.arms}) == len(axis.arms)
    for _, how in axis.arms:
        from_words(PruneRequest, ["runs/parent", "out=x", *axis.sizes, *how])


def test_tables_of_the_study() -> None:
    arms = ("random", "magnitude", "importance", "clap", "scratch")
    losses = {f"layers_{arm}": {seed: 3.0 + at + 0.1 * seed for seed in (1, 2, 3)} for at, arm in enumerate(arms)}
    lines = recovery_table({"layers_random": {1: 4.0, 2: 4.0, 3: 4.3}}, losses).splitlines()
    assert lines[2] == "| layers | random | 3 | 4.1000 | 3.2000 |"
    assert lines[-1] == "| layers | scratch | 3 | - | 7.2000 |"
    found = [line.split(" | ")[1:4] for line in differences_table(losses).splitlines()[2:]]
    assert found == [
        ["magnitude", "random", "+1.0000"],
        ["importance", "random", "+2.0000"],
        ["clap", "random", "+3.0000"],
        ["clap", "importance", "+1.0000"],
        ["importance", "scratch", "-2.0000"],
    ]


def test_the_table_of_pools() -> None:
    """What each parent loses, from its own loss before."""
    after = {"unipool_8_random": {1: 5.0, 2: 5.5, 3: 6.0}, "vanilla_8_random": {1: 7.0, 2: 7.0, 3: 7.0}}
    before = {"unipool_8_random": {1: 4.0, 2: 4.5, 3: 5.0}, "vanilla_8_random": {1: 4.0, 2: 4.0, 3: 4.0}}
    line = pool_table(after, before).splitlines()[2]
    assert line.startswith("| 8 | random | 1.000 (1.000 to 1.000) | 3.000 (3.000 to 3.000) | -2.0000 |")
