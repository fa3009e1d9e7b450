"""Placement of experts on devices by measured loads."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unipool_jax.moe.placement import busiest_sum, device_load, exchange_rounds, measured_placement


def specialized(layers: int, experts: int, seed: int = 0) -> np.ndarray:
    """Layers that send most of their tokens to consecutive experts of their own."""
    random = np.random.default_rng(seed)
    center = np.arange(layers)[:, None] * experts / layers
    distance = (np.arange(experts) - center) / (experts / layers)
    share = np.exp(-(distance**2)) + 0.02 * random.uniform(size=(layers, experts))
    return (10_000 * share / share.sum(axis=1, keepdims=True)).astype(np.int64)


def over_mean(counts: np.ndarray, order: np.ndarray, devices: int) -> float:
    """Busiest device over mean, averaged over layers."""
    load = device_load(counts, order, devices)
    return float((load.max(axis=1) / load.mean(axis=1)).mean())


def test_device_load_by_hand() -> None:
    counts = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    order = np.array([3, 0, 2, 1])
    np.testing.assert_array_equal(device_load(counts, order, 2), [[5, 5], [13, 13]])
    assert busiest_sum(device_load(counts, order, 2)) == 18


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.sampled_from([(4, 2), (6, 3), (8, 2), (8, 8)]), st.integers(0, 10_000))
def test_a_placement_is_a_permutation_and_never_worse(layers: int, sizes: tuple[int, int], seed: int) -> None:
    experts, devices = sizes
    counts = np.random.default_rng(seed).integers(0, 50, (layers, experts))
    order = measured_placement(counts, devices)
    assert sorted(order.tolist()) == list(range(experts))
    contiguous = busiest_sum(device_load(counts, np.arange(experts), devices))
    assert busiest_sum(device_load(counts, order, devices)) <= contiguous


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([(4, 2), (6, 3), (8, 2), (8, 8), (60, 4)]), st.integers(0, 10_000))
def test_experts_reach_any_order_in_rounds_of_one_for_each_device(sizes: tuple[int, int], seed: int) -> None:
    experts, devices = sizes
    order = np.random.default_rng(seed).permutation(experts)
    before = np.arange(experts).reshape(devices, -1)
    after = np.full_like(before, -1)
    rounds = exchange_rounds(order, devices)
    assert len(rounds) == experts // devices
    for to, sent, kept in rounds:
        assert sorted(to) == list(range(devices))
        for device in range(devices):
            after[to[device], kept[to[device]]] = before[device, sent[device]]
    np.testing.assert_array_equal(after.reshape(-1), order)


@pytest.mark.parametrize("seed", range(5))
def test_small_cases_come_close_to_the_best_of_all_placements(seed: int) -> None:
    counts = specialized(3, 6, seed)
    best = min(busiest_sum(device_load(counts, np.array(order), 3)) for order in itertools.permutations(range(6)))
    assert busiest_sum(device_load(counts, measured_placement(counts, 3), 3)) <= 1.05 * best


def test_specialized_layers_even_out_layer_by_layer() -> None:
    """Twelve layers, 96 experts, 8 devices: what packing by totals over layers cannot do at all."""
    counts = specialized(12, 96)
    contiguous = over_mean(counts, np.arange(96), 8)
    placed = over_mean(counts, measured_placement(counts, 8), 8)
    assert contiguous > 2
    assert placed < 1.15
