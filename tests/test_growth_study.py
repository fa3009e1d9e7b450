"""The arithmetic of the growth study: equal FLOPs, and FLOPs to a loss."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from benchmarks.growth_study import ARMS, configuration, equal_steps, flops_to, stored, table
from unipool_jax.config.files import write_json
from unipool_jax.config.rules import problems
from unipool_jax.training.flops import flops_spent


@pytest.mark.parametrize("arm", ARMS)
def test_arms_spend_the_flops_of_the_scratch_run(arm: str) -> None:
    config, scratch = (configuration(name, 1, Path("runs"), []) for name in (arm, "scratch"))
    assert not problems(config)
    steps, budget = config.train.steps, flops_spent(scratch, scratch.train.steps)
    assert (steps == 500) == (arm in ("scratch", "final"))
    assert flops_spent(config, steps) == pytest.approx(budget, rel=2e-3)
    shorter = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps - 1))
    assert flops_spent(shorter, steps - 1) < budget <= flops_spent(config, steps)
    assert equal_steps(shorter, budget) == steps


def test_flops_to_a_loss_are_linear_between_evaluations() -> None:
    curve = np.array([[10.0, 20.0, 30.0], [4.0, 3.0, 2.0]])
    assert [flops_to(curve, loss) for loss in (5.0, 4.0, 2.5, 2.0, 1.0)] == [10.0, 10.0, 25.0, 30.0, None]


def test_table_says_who_reached_the_loss() -> None:
    scratch = np.array([[50.0, 100.0], [3.0, 2.0]])
    quick, slow = np.array([[40.0, 80.0], [3.0, 1.0]]), np.array([[40.0, 90.0], [4.0, 3.0]])
    found = table({"scratch": {1: scratch, 2: scratch}, "apollo": {1: quick, 2: slow}})
    assert "| scratch | 2.0000 | 100.0%, 100.0% | 2 of 2 |" in found
    assert "| apollo | 2.0000 | 60.0%, - | 1 of 2 |" in found
    assert "| apollo | scratch | +0.0000 |" in found


def test_what_is_kept_of_a_run_is_its_curve(tmp_path: Path) -> None:
    kept = {"arm": "scratch", "seed": 2, "overrides": [], "steps": 5, "flops": [1.0, 2.0], "loss": [4.0, 3.0]}
    write_json(tmp_path / "scratch-seed2.json", kept)
    found = stored(tmp_path)
    assert list(found) == ["scratch"]
    np.testing.assert_array_equal(found["scratch"][2], [[1.0, 2.0], [4.0, 3.0]])
