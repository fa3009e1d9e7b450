"""The pruning study: its runs are valid, cost what they are said to, and its tables are those of its numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks.pruning_study import cases
from benchmarks.pruning_study.report import pool_table, recovery_table
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
    losses = {"heads_random": {1: 3.0, 2: 3.1, 3: 3.2}, "heads_scratch": {1: 2.9, 2: 2.9, 3: 2.9}}
    start = {"heads_random": {1: 4.0, 2: 4.0, 3: 4.3}}
    lines = recovery_table(start, losses).splitlines()
    assert len(lines) == 4
    assert "| heads | random | 3 | 4.1000 | 3.1000 |" in lines[2]
    assert "+0.2000" in lines[2]
    pools = pool_table({"vanilla_8_random": {1: 5.0}}, {"vanilla_8_random": {1: 3.0}})
    assert "| vanilla | 8 | random | 1 | 5.0000 | +2.0000 |" in pools
