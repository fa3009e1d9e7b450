"""The LSTM that reads the states of steps, against NumPy and the best possible score of a known distribution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from unipool_jax.config.errors import UserError
from unipool_jax.verification.aggregator import (
    Traces,
    Trained,
    Training,
    balanced_accuracy,
    initial_params,
    load_aggregator,
    logits,
    pad,
    probabilities,
    save_aggregator,
    split_by_problem,
    train_aggregator,
    weighted_loss,
)

RIGHT, WRONG = np.array([0.10, 0.45, 0.25, 0.20]), np.array([0.55, 0.10, 0.15, 0.20])
"""Of right and wrong steps, the probabilities of the four states."""
FAULTY = 0.35
"""Probability that a step of a wrong answer is wrong."""


def simulated(count: int, seed: int) -> Traces:
    """Answers whose best possible score is known: see `bayes`."""
    rng = np.random.default_rng(seed)
    right_N, sequences = rng.random(count) < 0.5, []
    for right in right_N:
        wrong_T = (rng.random(rng.integers(3, 13)) < FAULTY) & ~right
        sequences.append([int(rng.choice(4, p=WRONG if wrong else RIGHT)) for wrong in wrong_T])
    return Traces(*pad(sequences), right_N, np.arange(count))


def bayes(traces: Traces) -> np.ndarray:
    """Log-likelihood ratio of right to wrong: steps are independent, those of wrong answers from a mixture."""
    ratio = np.log(RIGHT) - np.log((1 - FAULTY) * RIGHT + FAULTY * WRONG)
    inside_NT = np.arange(traces.states_NT.shape[1]) < traces.lengths_N[:, None]
    return (ratio[traces.states_NT] * inside_NT).sum(axis=1)


def area(scores_N: np.ndarray, right_N: np.ndarray) -> float:
    """Area under the ROC curve: how often a right answer scores higher than a wrong one, ties for one half."""
    higher = scores_N[right_N][:, None] - scores_N[~right_N][None]
    return float((higher > 0).mean() + (higher == 0).mean() / 2)


@pytest.fixture(scope="module")
def params() -> Any:
    return initial_params(0)


ROWS = [[1, 1, 2], [0], [3, 0, 1, 2, 1], [2, 2]]


def test_there_are_as_many_parameters_as_the_formula_says(params: Any) -> None:
    first, second = 4 * (4 * 64 + 64 * 64 + 64), 4 * (64 * 64 + 64 * 64 + 64)
    assert (first, second) == (17_664, 33_024)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == first + second + 65 == 50_753


def test_logits_are_those_of_numpy_and_padding_changes_none(params: Any) -> None:
    states_NT, lengths_N = pad(ROWS)
    expected = [oracles.lstm(jax.tree.map(np.float64, params["params"]), row, 2) for row in ROWS]
    for filler in (0, 3):
        filled_NT = np.where(np.arange(5) < lengths_N[:, None], states_NT, filler)
        found = logits(params, np.pad(filled_NT, ((0, 0), (0, filler))), lengths_N)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_that_of_numpy(params: Any) -> None:
    states_NT, lengths_N = pad(ROWS)
    right_N = np.array([True, False, True, True])

    def loss(params: Any) -> jax.Array:
        return weighted_loss(logits(params, states_NT, lengths_N), jnp.asarray(right_N), 0.75)

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    gradient = gradient["params"]
    exact = jax.tree.map(np.float64, params["params"])

    def by_numpy() -> float:
        """Cross-entropy by weight: 0.5 over the share of answers of this kind."""
        exact_logits = np.array([oracles.lstm(exact, row, 2) for row in ROWS])
        losses = np.where(right_N, np.log1p(np.exp(-exact_logits)) / 1.5, np.log1p(np.exp(exact_logits)) / 0.5)
        return float(losses.mean())

    assert float(value) == pytest.approx(by_numpy(), rel=1e-5)
    for place in (("layer_0", "if", "kernel"), ("layer_1", "hg", "kernel"), ("head", "bias")):
        array, found = exact, gradient
        for name in place:
            array, found = array[name], found[name]
        index = np.unravel_index(np.argmax(np.abs(found)), found.shape)
        before, values = array[index], []
        for step in (1e-4, -1e-4):
            array[index] = before + step
            values.append(by_numpy())
        array[index] = before
        assert float(found[index]) == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-3)


def test_answers_to_one_problem_stay_together() -> None:
    traces = simulated(40, 0)._replace(problems_N=np.arange(40) // 4)
    train, held = split_by_problem(traces, 0.2, 0)
    assert sorted([*train, *held]) == list(range(40))
    assert len(held) == 8
    assert not set(traces.problems_N[train]) & set(traces.problems_N[held])
    with pytest.raises(UserError, match="at least two"):
        split_by_problem(traces._replace(problems_N=np.zeros(40, int)), 0.2, 0)


def test_one_kind_of_answer_teaches_nothing() -> None:
    traces = simulated(40, 0)
    with pytest.raises(UserError, match="all right or all wrong"):
        train_aggregator(traces._replace(right_N=np.ones(40, bool)), Training(epochs=1))


def test_a_probability_and_not_a_logit_is_compared_with_a_half() -> None:
    right_N = np.array([True, True, False, False])
    assert balanced_accuracy(np.array([0.1, 2.0, -0.1, 0.3]), right_N) == 0.75


def test_an_answer_without_steps_has_no_chance(params: Any) -> None:
    with_steps, without = probabilities(params, [[1, 1], []])
    assert 0 < with_steps < 1
    assert without == 0.0


def test_parameters_are_read_back(params: Any, tmp_path: Path) -> None:
    save_aggregator(tmp_path / "a.safetensors", Trained(params, 1, 0.5))
    found = load_aggregator(tmp_path / "a.safetensors")
    assert jax.tree.all(jax.tree.map(np.array_equal, found, params))
    assert probabilities(found, ROWS) == probabilities(params, ROWS)
    (tmp_path / "b.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="unipool steps train"):
        load_aggregator(tmp_path / "b.safetensors")


def scores(count: int, how: Training) -> dict[str, float]:
    """Areas under the curve on new answers."""
    trained, new = train_aggregator(simulated(count, 1), how), simulated(2_000, 2)
    sequences = [row[:length].tolist() for row, length in zip(new.states_NT, new.lengths_N, strict=True)]
    any_failed_N = np.array([float(0 not in row) for row in sequences])
    return {
        "lstm": area(np.array(probabilities(trained.params, sequences)), new.right_N),
        "best possible": area(bayes(new), new.right_N),
        "any failed proof": area(any_failed_N, new.right_N),
    }


def test_learning_beats_the_rule_that_any_failed_proof_condemns() -> None:
    found = scores(800, Training(learning_rate=5e-3, epochs=6))
    assert found["best possible"] == pytest.approx(0.80, abs=0.02)
    assert found["any failed proof"] == pytest.approx(0.66, abs=0.03)
    assert found["any failed proof"] + 0.05 < found["lstm"] < found["best possible"] + 0.005


@pytest.mark.slow
def test_the_aggregator_comes_within_two_hundredths_of_the_best_possible_score() -> None:
    found = scores(6_000, Training(learning_rate=1e-3, epochs=20))
    assert found["best possible"] - 0.02 < found["lstm"]
    assert found["any failed proof"] < found["lstm"]
