"""The assignment of experts to layers (method M6.6)."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from unipool_jax.moe.assignment import (
    AssignmentError,
    Solver,
    assign,
    coverage,
    expert_ids,
    random_assignment,
    smoothed_counts,
)

SOLVERS: tuple[Solver, ...] = ("auto", "r2_exact")


def planted(layers: int, per_layer: int, inside: int = 1000, outside: int = 1, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Counts in which every layer uses its own experts, shuffled over the pool; and the owners."""
    owner = np.random.default_rng(seed).permutation(np.repeat(np.arange(layers), per_layer))
    return np.where(owner == np.arange(layers)[:, None], inside, outside), owner


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("layers", "per_layer"), [(2, 1), (4, 2), (6, 8), (12, 8)])
def test_a_planted_partition_is_recovered(solver: Solver, layers: int, per_layer: int) -> None:
    counts, owner = planted(layers, per_layer)
    found = assign(counts, 0.9, solver)
    np.testing.assert_array_equal(found.owner_M, owner)
    assert found.status == "optimal"
    assert found.method == ("linear_sum" if solver == "auto" else "strict")
    expected = 1000 * per_layer / (1000 * per_layer + (layers - 1) * per_layer)
    np.testing.assert_allclose(found.coverage_L, expected)
    assert not found.deficits(0.9).any()


@pytest.mark.parametrize("solver", SOLVERS)
def test_experts_that_every_layer_wants_leave_the_others_wanting(solver: Solver) -> None:
    counts = np.ones((6, 48))
    counts[:, :8] = 1000
    found = assign(counts, 0.95, solver)
    assert found.status == "best_effort"
    assert found.method == ("linear_sum" if solver == "auto" else "relaxed")
    np.testing.assert_allclose(found.deficits(0.95), np.maximum(0, 0.95 - found.coverage_L))
    # Eight wanted experts among six layers: the sum of shares is the same for any owners of them.
    assert found.coverage_L.sum() == pytest.approx((8 * 1000 + 40) / (8 * 1000 + 40))


def test_the_strict_program_finds_what_the_largest_total_misses() -> None:
    """Against all partitions of four experts among two layers, and all of three among three."""
    methods = []
    for seed in range(60):
        layers, experts = ((2, 4), (3, 3))[seed % 2]
        counts = np.random.default_rng(seed).pareto(0.8, (layers, experts)) * 1000 + 10
        partitions = set(itertools.permutations(np.repeat(np.arange(layers), experts // layers).tolist()))
        covered = [coverage(counts, np.array(partition)) for partition in partitions]
        fairest = max(each.min() for each in covered)
        found = assign(counts, fairest)
        assert found.status == "optimal"
        assert found.coverage_L.min() == pytest.approx(fairest)
        methods.append(found.method)
        beyond = assign(counts, min(1.0, fairest * 1.01))
        assert beyond.status == "best_effort"
        assert beyond.coverage_L.sum() == pytest.approx(max(each.sum() for each in covered))
    assert {"linear_sum", "strict"} == set(methods)


@pytest.mark.parametrize("solver", SOLVERS)
@hypothesis_settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_result_is_a_partition(solver: Solver, data: st.DataObject) -> None:
    layers = data.draw(st.integers(1, 5))
    experts = layers * data.draw(st.integers(1, 3))
    rows = st.lists(st.integers(0, 50) | st.just(0), min_size=experts, max_size=experts)
    counts = np.array(data.draw(st.lists(rows, min_size=layers, max_size=layers)))
    threshold = data.draw(st.sampled_from([0.3, 0.6, 0.95, 1.0]))
    found = assign(counts, threshold, solver)
    ids = expert_ids(found.owner_M, layers)
    assert sorted(ids.ravel().tolist()) == list(range(experts))
    assert (np.diff(ids, axis=1) > 0).all()
    np.testing.assert_allclose(found.coverage_L, coverage(counts, found.owner_M))
    assert (found.status == "optimal") == (found.coverage_L.min() >= threshold - 1e-9)
    again = assign(counts, threshold, solver)
    np.testing.assert_array_equal(found.owner_M, again.owner_M)


@hypothesis_settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 3))
def test_the_linear_assignment_covers_most_and_agrees_with_the_relaxed_program(
    seed: int, layers: int, per_layer: int
) -> None:
    counts = np.random.default_rng(seed).integers(1, 1000, (layers, layers * per_layer))
    total = assign(counts, 1.0).coverage_L.sum()
    other = assign(counts, 1.0, "r2_exact")
    drawn = random_assignment(counts, seed)
    assert total >= drawn.coverage_L.sum() - 1e-12
    assert total >= other.coverage_L.sum() - 1e-9
    # The published objective holds 1000 per expert beside the share, and the solver's relative gap is 1e-4.
    assert other.coverage_L.sum() >= total - 1e-4 * 1000 * layers * per_layer


@hypothesis_settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.permutations(range(4)))
def test_layers_are_treated_alike(seed: int, order: list[int]) -> None:
    counts = np.random.default_rng(seed).permutation(np.arange(4 * 12)).reshape(4, 12).astype(float) ** 2
    found, permuted = assign(counts, 0.95), assign(counts[order], 0.95)
    assert found.coverage_L.sum() == pytest.approx(permuted.coverage_L.sum())
    assert found.status == permuted.status


def test_the_largest_published_pool_takes_milliseconds() -> None:
    counts = np.random.default_rng(0).pareto(1.0, (48, 384)) * 1000
    assign(counts, 0.95)
    start = time.perf_counter()
    assert assign(counts, 0.95).status == "best_effort"
    assert time.perf_counter() - start < 1.0


def test_smoothing_weighs_the_newest_most_and_leaves_one_snapshot_alone() -> None:
    old, middle, new = (np.full((2, 4), value) for value in (1, 10, 100))
    np.testing.assert_array_equal(smoothed_counts([new], 0.5), new)
    np.testing.assert_allclose(smoothed_counts([old, middle, new], 0.5), (1 * 1 + 10 * 2 + 100 * 4) / 7)
    np.testing.assert_array_equal(smoothed_counts([old, new], 1.0), new)


def test_random_partitions_repeat_with_their_seed() -> None:
    counts = np.ones((4, 12))
    first, second, other = (random_assignment(counts, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.owner_M, second.owner_M)
    assert (first.owner_M != other.owner_M).any()
    assert (np.bincount(first.owner_M) == 3).all()
    np.testing.assert_allclose(first.coverage_L, 0.25)


def test_what_is_refused() -> None:
    for counts in (np.ones((2, 3)), np.ones(4), -np.ones((2, 4)), np.full((2, 4), np.nan), np.ones((0, 0))):
        with pytest.raises(ValueError, match=r"counts|shape"):
            assign(counts, 0.9)
    for owner in ([0, 0, 0, 1], [0, 1, 2, 2], [-1, 0, 1, 1]):
        with pytest.raises(ValueError, match="not a partition"):
            expert_ids(np.array(owner), 2)


def test_a_program_without_time_is_an_error_with_advice() -> None:
    counts = np.random.default_rng(1).integers(1, 1000, (12, 96))
    with pytest.raises(AssignmentError, match=r"lock\.solver_seconds=1e-06.*raise"):
        assign(counts, 0.12, "r2_exact", seconds=1e-6)
