"""The calibration and the scores of `benchmarks.planner_check`, on machines that are known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks.planner_check.cases import CALIBRATION, HELD_OUT, config_of
from benchmarks.planner_check.fit import (
    Machine,
    Step,
    calibrate,
    nonnegative_least_squares,
    proportional,
    quality,
    ranks,
)
from benchmarks.planner_check.predict import counted, predicted_seconds, step_of


@pytest.mark.parametrize("least", [0.0, 6e8])
def test_the_constants_of_a_machine_are_found_again(least: float) -> None:
    """Operations bound by either resource; none is bound by memory on a machine of one FLOP per byte in the second."""
    random, machine = np.random.default_rng(0), Machine(4e10, 8e9, 3e-6)
    steps = [
        Step(
            tuple(zip(random.uniform(least, 1e9, 5), random.uniform(1e6, 3e8, 5), strict=True)),
            random.uniform(50, 2000),
        )
        for _ in range(8)
    ]
    bound = [flops / moved > 5 for step in steps for flops, moved in step.operations]
    assert 0 < sum(bound) < len(bound)
    found = calibrate(steps, [machine.seconds(step) for step in steps])
    np.testing.assert_allclose(found, machine, rtol=1e-6)


def test_an_operation_takes_its_slower_resource_and_a_launch_its_constant() -> None:
    step = Step(((8.0, 1.0), (2.0, 30.0)), 5)
    assert Machine(4.0, 10.0, 0.5).seconds(step) == 2.0 + 3.0 + 2.5


def test_no_constant_is_negative() -> None:
    """The second column would be taken with a negative sign."""
    matrix, wanted = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]]), np.array([3.0, 2.0, 1.0])
    np.testing.assert_allclose(nonnegative_least_squares(matrix, wanted), [2.0, 0.0])
    np.testing.assert_allclose(nonnegative_least_squares(matrix, wanted[::-1].copy() + 1), [1.0, 1.0])


def test_errors_are_relative_and_ranks_share_ties() -> None:
    assert ranks([3.0, 1.0, 3.0, 7.0]).tolist() == [1.5, 0.0, 1.5, 3.0]
    found = quality([1.1, 2.0, 4.5], [1.0, 2.0, 3.0])
    assert found.mean_error == pytest.approx(0.2)
    assert found.worst_error == pytest.approx(0.5)
    assert found.rank_correlation == pytest.approx(1.0)
    assert quality([3.0, 1.0, 2.0], [1.0, 2.0, 3.0]).rank_correlation == pytest.approx(-0.5)
    assert proportional([1.0, 4.0], [2.0, 8.0]) == pytest.approx(2.0)


def test_held_out_cases_are_many_and_not_calibrated_on() -> None:
    configs = [config_of(case) for case in (*CALIBRATION, *HELD_OUT)]
    assert len(HELD_OUT) >= 24
    assert len(set(configs)) == len(configs)


def test_activations_have_the_bytes_of_their_type() -> None:
    config = config_of("unipool")
    narrow = dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype="bfloat16"))
    wide, half = ({work.name: work.bytes for work in counted(case).work} for case in (config, narrow))
    assert wide["projections"] == 2 * half["projections"]
    assert wide["optimiser"] == half["optimiser"]


def test_a_calibrated_chip_gives_the_calibrated_time() -> None:
    """The planner's estimate on the chip made from the constants is the fitted model, for every case."""
    machine = Machine(4e10, 8e9, 3e-6)
    for case in HELD_OUT[::6]:
        config = config_of(case)
        assert predicted_seconds(config, machine, 100) == pytest.approx(machine.seconds(step_of(config, 100)))
