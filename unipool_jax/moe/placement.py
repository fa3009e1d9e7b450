"""Which experts share a device: a placement that evens out the load of devices in every layer.

With expert parallelism every layer waits for its busiest device. What counts is therefore the sum over layers of the
busiest device's load, and not the load of devices added up over layers: with specialized layers the second can be even
while every layer by itself is not.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_ROUNDS = 8


def busiest_sum(device_load_LP: np.ndarray) -> float:
    """Sum over layers of the load of the busiest device: what a placement is to make small."""
    return float(device_load_LP.max(axis=1).sum())


def device_load(counts_LE: np.ndarray, order_E: np.ndarray, devices: int) -> np.ndarray:
    """Choices per layer and device, `[L, P]`, when device p holds experts `order_E[p E/P : (p + 1) E/P]`."""
    return counts_LE[:, order_E].reshape(counts_LE.shape[0], devices, -1).sum(axis=2)


def strided_placement(experts: int, devices: int) -> np.ndarray:
    """The order in which device p holds the experts p, p + P, p + 2 P, ...: `[E]`, the expert at each place.

    P consecutive experts are on P devices, so a window of a multiple of P puts the same load on each.
    """
    return np.arange(experts).reshape(-1, devices).T.reshape(-1)


def measured_placement(counts_LE: np.ndarray, devices: int) -> np.ndarray:
    """An order of the experts of one pool whose P equal parts, one for each device, even out every layer.

    Experts are dealt out from the busiest down, each to the device with room where it adds least to
    `busiest_sum` of the loads so far; then pairs of experts on different devices are exchanged while that helps.
    The result is never worse than the order 0, 1, 2, ...

    Args:
      counts_LE: measured choices per layer and expert.
      devices: P, divides E.

    Returns:
      `[E]`, a permutation: the expert at each place.
    """
    counts_EL = counts_LE.T.astype(np.float64)
    experts, room = len(counts_EL), len(counts_EL) // devices
    load_PL, held = np.zeros((devices, counts_EL.shape[1])), [list[int]() for _ in range(devices)]
    for expert in np.argsort(-counts_EL.max(axis=1), kind="stable"):
        top_L = load_PL.max(axis=0)
        added_P = np.maximum(load_PL + counts_EL[expert], top_L).sum(axis=1) + 1e-9 * load_PL.sum(axis=1)
        full_P = np.array([len(found) == room for found in held])
        best = int(np.argmin(np.where(full_P, np.inf, added_P)))
        held[best].append(int(expert))
        load_PL[best] += counts_EL[expert]
    home_E = np.empty(experts, np.int64)
    for device, found in enumerate(held):
        home_E[found] = device
    _exchange_pairs(counts_EL, home_E, load_PL)

    order_E = np.lexsort((np.arange(experts), home_E))
    contiguous_E = np.arange(experts)
    better = busiest_sum(device_load(counts_LE, order_E, devices)) < busiest_sum(
        device_load(counts_LE, contiguous_E, devices)
    )
    return order_E if better else contiguous_E


class Round(NamedTuple):
    """One expert of every device on its way: from place `sent_P[p]` of device p to place `kept_P[q]` of device
    q = `to_P[p]`, a permutation of the devices. Places are those on the device."""

    to_P: list[int]
    sent_P: list[int]
    kept_P: list[int]


def exchange_rounds(order_E: np.ndarray, devices: int) -> list[Round]:
    """How experts get from the order 0, 1, 2, ... to `order_E` while no device holds more than one besides its own.

    Every device sends and receives E/P experts, so they can be dealt out into E/P rounds of one for each device (König:
    a regular bipartite multigraph is a sum of perfect matchings).
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching

    own = len(order_E) // devices
    waiting: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for place, expert in enumerate(order_E.tolist()):
        waiting.setdefault((expert // own, place // own), []).append((expert % own, place % own))
    rounds = []
    for _ in range(own):
        left = np.zeros((devices, devices), bool)
        for pair, experts in waiting.items():
            left[pair] = bool(experts)
        to_P = maximum_bipartite_matching(csr_array(left), perm_type="column").tolist()
        moves = [(device, *waiting[device, to].pop()) for device, to in enumerate(to_P)]
        kept = {to_P[device]: place for device, _, place in moves}
        rounds.append(Round(to_P, [sent for _, sent, _ in moves], [kept[device] for device in range(devices)]))
    return rounds


def _exchange_pairs(counts_EL: np.ndarray, home_E: np.ndarray, load_PL: np.ndarray) -> None:
    """Exchange experts between devices while the sum of busiest loads falls; changes the last two in place."""
    experts = len(counts_EL)
    for _ in range(_ROUNDS):
        improved = False
        for first in range(experts):
            here = home_E[first]
            others = np.flatnonzero(home_E != here)
            moved_XL = counts_EL[others] - counts_EL[first]
            there_X = home_E[others]
            # Loads of the two devices after each exchange, and the busiest of the devices that stay as they are.
            here_XL, there_XL = load_PL[here] + moved_XL, load_PL[there_X] - moved_XL
            rest_PL = np.stack([_top_without(load_PL, here, other) for other in range(len(load_PL))])
            sums_X = np.maximum(np.maximum(here_XL, there_XL), rest_PL[there_X]).sum(axis=1)
            best = int(np.argmin(sums_X))
            if sums_X[best] < load_PL.max(axis=0).sum() * (1 - 1e-9):
                second, there = others[best], there_X[best]
                load_PL[here], load_PL[there] = here_XL[best], there_XL[best]
                home_E[first], home_E[second] = there, here
                improved = True
        if not improved:
            return


def _top_without(load_PL: np.ndarray, first: int, second: int) -> np.ndarray:
    """Busiest load per layer over all devices but two, `[L]`; zeros where no other is left."""
    kept = np.delete(load_PL, [first, second], axis=0)
    return kept.max(axis=0) if len(kept) else np.zeros(load_PL.shape[1])
