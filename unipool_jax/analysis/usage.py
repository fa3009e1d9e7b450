"""Which layers use which experts: NumPy functions of routing counts, of routed tokens, and of expert weights.

`training.metrics.routing_diagnostics` has the metrics that need only counts and are written at each evaluation
(coverage, entropy, Jaccard, unions). Here are the maps, and what needs the experts of single tokens.

`counts_LE` and `experts_LNK` index experts within the layer's pool; `_LM` has one column for each of the M = G E
experts, ordered by pool. `visible_LM` says which of them a layer sees: those of its pool, or of its window over one
bank.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from unipool_jax.moe.placement import device_load as placed_load
from unipool_jax.moe.placement import strided_placement


def pool_offsets(layers: int, groups: int, experts: int) -> np.ndarray:
    """Index of the first expert of each layer's pool among all M, int64 `[L]`."""
    return np.arange(layers) // (layers // groups) * experts


def expert_counts(experts_LNK: np.ndarray, num_experts: int) -> np.ndarray:
    """Routing counts per layer and expert, int64 `[L, E]`, from the experts of each token."""
    return np.stack([np.bincount(e.reshape(-1), minlength=num_experts) for e in experts_LNK]).astype(np.int64)


def usage_map(counts_LE: np.ndarray, groups: int) -> np.ndarray:
    """Routing counts per layer and expert of all pools, int64 `[L, M]`; 0 for experts of other pools."""
    layers, experts = counts_LE.shape
    map_LM = np.zeros((layers, groups * experts), np.int64)
    columns_LE = pool_offsets(layers, groups, experts)[:, None] + np.arange(experts)
    np.put_along_axis(map_LM, columns_LE, counts_LE.astype(np.int64), axis=1)
    return map_LM


def even_shares(visible_LM: np.ndarray) -> np.ndarray:
    """Fraction of each layer's choices per expert if it routes evenly over what it sees, `[L, M]`; rows sum to 1."""
    return visible_LM / visible_LM.sum(axis=1, keepdims=True)


def sharing_pairs(visible_LM: np.ndarray) -> np.ndarray:
    """Whether two different layers see an expert in common, bool `[L, L]`."""
    shared_LL = (visible_LM.astype(np.int64) @ visible_LM.T) > 0
    return np.asarray(shared_LL & ~np.eye(len(visible_LM), dtype=bool))


def row_shares(counts_LM: np.ndarray) -> np.ndarray:
    """Fraction of each layer's tokens per expert (method M8.3), `[L, M]`; rows sum to 1, or 0 without tokens."""
    return counts_LM / np.maximum(counts_LM.sum(axis=1, keepdims=True), 1)


def total_shares(counts_LM: np.ndarray) -> np.ndarray:
    """Fraction of all tokens per expert (method M8.3), float64 `[M]`; uniform use is 1/M."""
    return counts_LM.sum(axis=0) / max(counts_LM.sum(), 1)


def column_shares(counts_LM: np.ndarray) -> np.ndarray:
    """Fraction of each expert's tokens from each layer, float64 `[L, M]`; columns sum to 1, or 0 for dead experts."""
    return counts_LM / np.maximum(counts_LM.sum(axis=0, keepdims=True), 1)


def even_owner_share(visible_LM: np.ndarray) -> np.ndarray:
    """Largest fraction of an expert's tokens from one layer if layers route evenly over what they see, `[M]`."""
    even_LM = even_shares(visible_LM)
    return np.asarray(even_LM.max(axis=0) / even_LM.sum(axis=0))


def owners(counts_LM: np.ndarray) -> np.ndarray:
    """The layer that uses each expert most, int64 `[M]`; ties go to the first layer, -1 for dead experts."""
    return np.where(counts_LM.sum(axis=0) > 0, counts_LM.argmax(axis=0), -1)


def ownership_order(counts_LM: np.ndarray) -> np.ndarray:
    """Experts sorted by owner, then by descending fraction of the owner, dead experts last, int64 `[M]`."""
    owner_M = owners(counts_LM)
    share_M = column_shares(counts_LM).max(axis=0)
    return np.lexsort((-share_M, np.where(owner_M < 0, len(counts_LM), owner_M)))


def dead_experts(counts_LM: np.ndarray) -> list[int]:
    """Experts without tokens from any layer (method M8.4)."""
    return np.flatnonzero(counts_LM.sum(axis=0) == 0).tolist()


def unique_experts(experts_LNK: np.ndarray, groups: int, num_experts: int) -> np.ndarray:
    """Number of distinct experts that each token visits over the L layers (method M8.2), int64 `[N]`."""
    layers = len(experts_LNK)
    global_LNK = experts_LNK + pool_offsets(layers, groups, num_experts)[:, None, None]
    sorted_NL = np.sort(np.swapaxes(global_LNK, 0, 1).reshape(experts_LNK.shape[1], -1), axis=1)
    return 1 + (np.diff(sorted_NL, axis=1) != 0).sum(axis=1)


def chance_unique(visible_LM: np.ndarray, top_k: int) -> float:
    """Expected number of distinct experts of a token if each layer draws k of those it sees uniformly, independently.

    A layer that sees W experts misses each with probability 1 - k/W, so the number is the sum over experts of
    `1 - prod (1 - k/W)` over the layers that see it; with one pool and k = 1, `M (1 - (1 - 1/M)^L)` (method M8.2).
    """
    missed_LM = 1 - top_k * even_shares(visible_LM)
    return float((1 - missed_LM.prod(axis=0)).sum())


def same_expert(experts_LNK: np.ndarray, groups: int) -> np.ndarray:
    """Number of experts that two layers choose in common, summed over tokens, int64 `[L, L]`; the diagonal is `N k`.

    0 for layers of different pools.
    """
    layers = len(experts_LNK)
    size = layers // groups
    common_LL = np.zeros((layers, layers), np.int64)
    for i in range(layers):
        for j in range(i, (i // size + 1) * size):
            pairs_NKK = experts_LNK[i][:, :, None] == experts_LNK[j][:, None, :]
            common_LL[i, j] = common_LL[j, i] = pairs_NKK.sum()
    return common_LL


def chance_same_expert(counts_LE: np.ndarray, groups: int, tokens: int) -> np.ndarray:
    """Expected `same_expert` if layers choose independently with their own expert fractions, float64 `[L, L]`.

    `tokens * sum_e p_i(e) p_j(e)` with `p_i(e) = counts[i, e] / tokens`; the diagonal is that of `same_expert`.
    """
    layers = len(counts_LE)
    expected_LL = counts_LE.astype(np.float64) @ counts_LE.T / max(tokens, 1)
    pool_L = np.arange(layers) // (layers // groups)
    expected_LL *= pool_L[:, None] == pool_L[None, :]
    np.fill_diagonal(expected_LL, counts_LE.sum(axis=1))
    return expected_LL


def expert_similarity(gate_GEDF: np.ndarray, up_GEDF: np.ndarray, down_GEFD: np.ndarray) -> np.ndarray:
    """Cosine between the experts of each pool, float64 `[G, E, E]`.

    An expert's vector is the concatenation of its three matrices (gate, up, down). Hidden units are compared by
    position, so only experts with a common origin (an upcycled model, copies) are similar: independently trained ones
    are near 0 even if they compute the same function.
    """
    gram_GEE: np.ndarray | float = 0.0
    for weights in (gate_GEDF, up_GEDF, down_GEFD):
        flat_GEX = weights.reshape(*weights.shape[:2], -1)
        gram_GEE = gram_GEE + (flat_GEX @ flat_GEX.swapaxes(1, 2)).astype(np.float64)
    gram_GEE = np.asarray(gram_GEE)
    length_GE = np.sqrt(np.maximum(np.diagonal(gram_GEE, axis1=1, axis2=2), 1e-300))
    return gram_GEE / (length_GE[:, :, None] * length_GE[:, None, :])


class DeviceLoad(NamedTuple):
    """Load imbalance of the devices that experts are sharded over."""

    by_layer_L: np.ndarray
    """Maximum over mean load per layer, float64 `[L]`; 1 is perfect balance, 0 no tokens."""
    critical_path: float
    """Rows of the busiest device summed over layers, relative to perfect balance: the slowdown of the expert part of a
    forward pass, because every layer waits for its busiest device."""
    whole_model: float
    """Maximum over mean load of all layers together, which a pool-level loss balances."""


def device_load(counts_LE: np.ndarray, devices: int, *, strided: bool = False) -> DeviceLoad:
    """Load of the devices of an expert-parallel group: device p holds the experts `p E/P .. (p+1) E/P - 1` of a pool.

    Args:
      counts_LE: routing counts per layer and expert.
      devices: P, devices of the group; must divide E.
      strided: device p holds the experts p, p + P, p + 2 P, ... instead, as with windows over one bank.

    Raises:
      ValueError: P does not divide E.
    """
    layers, experts = counts_LE.shape
    if devices < 1 or experts % devices:
        sizes = [p for p in range(1, experts + 1) if experts % p == 0]
        raise ValueError(
            f"{experts} experts of a pool cannot be sharded equally over {devices} devices; choose one of {sizes}"
        )
    order_E = strided_placement(experts, devices) if strided else np.arange(experts)
    load_LP = placed_load(counts_LE.astype(np.int64), order_E, devices)
    mean_L, total_P = load_LP.mean(axis=1), load_LP.sum(axis=0)
    by_layer_L = np.divide(load_LP.max(axis=1), mean_L, out=np.zeros(layers), where=mean_L > 0)
    total = max(float(mean_L.sum()), 1e-300)
    return DeviceLoad(by_layer_L, float(load_LP.max(axis=1).sum()) / total, float(total_P.max()) / total)
