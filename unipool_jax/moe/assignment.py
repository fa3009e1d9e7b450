"""Which layer owns which expert: the assignment of UniPool-lock, from routing counts, on the host (method M6.6).

L layers, M = L K experts; every expert gets one owner and every layer K experts. All arithmetic is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from unipool_jax.config.errors import UserError

Solver = Literal["auto", "r2_exact"]

_TOLERANCE = 1e-9
_TIE_BREAK = 1e-7
_RELAXED_REWARD = 1000.0
_MILP_SOLVED, _MILP_LIMIT, _MILP_INFEASIBLE = 0, 1, 2


class AssignmentError(UserError, RuntimeError):
    """No partition could be found; the message says why and what to do."""


class Assignment(NamedTuple):
    """A partition of the experts among the layers, and how well it fits the counts that it was made from."""

    owner_M: np.ndarray
    """The layer that owns each expert, int64 `[M]`."""
    coverage_L: np.ndarray
    """Share of each layer's choices on its own experts, float64 `[L]`; 1 for a layer without choices."""
    status: Literal["optimal", "best_effort", "random"]
    """`optimal`: every layer reaches the threshold; `best_effort`: no partition does; `random`: nobody asked."""
    method: Literal["linear_sum", "strict", "relaxed", "random"]
    """Which problem gave the partition."""

    def deficits(self, threshold: float) -> np.ndarray:
        """What each layer lacks of the threshold, float64 `[L]`."""
        return np.maximum(0.0, threshold - self.coverage_L)


def smoothed_counts(history: Sequence[np.ndarray], newest_weight: float) -> np.ndarray:
    """Weighted mean of counts `[L, M]`, oldest first: age a weighs `w (1 - w)^a`, normalized to 1; float64."""
    ages = np.arange(len(history))[::-1]
    weights = newest_weight * (1.0 - newest_weight) ** ages
    return np.tensordot(weights / weights.sum(), np.asarray(history, np.float64), axes=1)


def coverage(counts_LM: np.ndarray, owner_M: np.ndarray) -> np.ndarray:
    """Share of each layer's choices that lie on the experts it owns, float64 `[L]`; 1 for a layer without choices."""
    counts = np.asarray(counts_LM, np.float64)
    own_LM = owner_M == np.arange(len(counts))[:, None]
    total_L = counts.sum(axis=1)
    on_own_L = np.where(own_LM, counts, 0.0).sum(axis=1)
    return np.divide(on_own_L, total_L, out=np.ones_like(total_L), where=total_L > 0)


def expert_ids(owner_M: np.ndarray, num_layers: int) -> np.ndarray:
    """The experts of each layer in ascending order, int64 `[L, K]`.

    Raises:
      ValueError: if `owner_M` does not give every layer the same number of experts.
    """
    owner = np.asarray(owner_M)
    per_layer = np.bincount(owner, minlength=num_layers) if owner.size and owner.min() >= 0 else np.zeros(1)
    if len(per_layer) != num_layers or (per_layer * num_layers != owner.size).any():
        raise ValueError(f"not a partition of {owner.size} experts into {num_layers} equal parts: {owner.tolist()}")
    return np.argsort(owner, kind="stable").reshape(num_layers, -1)


def random_assignment(counts_LM: np.ndarray, seed: int) -> Assignment:
    """A partition drawn uniformly, the same for the same seed and shape; `counts_LM` only gives its coverage."""
    layers, experts = counts_LM.shape
    owner_M = np.random.default_rng(seed).permutation(np.repeat(np.arange(layers), experts // layers))
    return Assignment(owner_M, coverage(counts_LM, owner_M), "random", "random")


def assign(counts_LM: np.ndarray, threshold: float, solver: Solver = "auto", seconds: float = 30.0) -> Assignment:
    """The partition that gives layers the experts they use.

    `auto` solves the linear assignment that maximizes the routed share summed over layers (each layer K times against
    each expert once). Where a layer then lacks coverage, the strict integer program of the published code looks for a
    partition in which none does; where there is none, the linear assignment stands, as best effort.

    `r2_exact` solves the published integer programs alone. Their strict objective is a tie-break below the solver's
    gap, so it returns any partition that reaches the threshold, not the best-covering one.

    Args:
      counts_LM: routing counts, smoothed or not; finite and not negative.
      threshold: share of each layer's choices that its own experts should have.
      solver: which of the two.
      seconds: limit of one integer program.

    Raises:
      AssignmentError: if an integer program is neither solved nor proved infeasible.
      ValueError: for counts that are not a matrix of M = L K columns, negative, or not finite.
    """
    counts = np.asarray(counts_LM, np.float64)
    if counts.ndim != 2 or counts.shape[0] < 1 or counts.shape[1] == 0 or counts.shape[1] % counts.shape[0]:
        raise ValueError(f"counts of shape {counts.shape}: the experts must be a multiple of the layers")
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError("counts must be finite and not negative")

    if solver == "auto":
        best = _finished(_linear_sum(counts), counts, "best_effort", "linear_sum")
        if best.coverage_L.min() >= threshold - _TOLERANCE:
            return best._replace(status="optimal")
        fallback = best
    strict = _integer_program(counts, threshold, seconds)
    if strict is not None:
        found = _finished(strict, counts, "optimal", "strict")
        if found.coverage_L.min() < threshold - _TOLERANCE:
            raise AssignmentError(f"the integer program's partition covers {found.coverage_L.min()}, below {threshold}")
        return found
    if solver == "auto":
        return fallback
    relaxed = _integer_program(counts, None, seconds)
    if relaxed is None:
        raise AssignmentError("the relaxed integer program has no solution, although every partition is one")
    return _finished(relaxed, counts, "best_effort", "relaxed")


def _finished(
    owner_M: np.ndarray,
    counts: np.ndarray,
    status: Literal["optimal", "best_effort"],
    method: Literal["linear_sum", "strict", "relaxed"],
) -> Assignment:
    expert_ids(owner_M, len(counts))  # one owner each, K experts each
    return Assignment(owner_M, coverage(counts, owner_M), status, method)


def _linear_sum(counts: np.ndarray) -> np.ndarray:
    """Owners that maximize the share of choices on own experts, summed over layers."""
    layers, experts = counts.shape
    share_LM = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(np.repeat(share_LM, experts // layers, axis=0), maximize=True)
    owner_M = np.empty(experts, np.int64)
    owner_M[columns] = rows // (experts // layers)
    return owner_M


def _integer_program(counts: np.ndarray, threshold: float | None, seconds: float) -> np.ndarray | None:
    """Owners by the published program, with coverage rows for a threshold and relaxed without; None: infeasible."""
    layers, experts = counts.shape
    share = experts // layers
    if threshold is not None:
        # A layer that has not the coverage even with its K most used experts proves infeasibility without a search.
        most_L = np.sort(counts, axis=1)[:, experts - share :].sum(axis=1)
        if (most_L < (threshold - _TOLERANCE) * counts.sum(axis=1)).any():
            return None
    rank_LM = np.empty(counts.shape)
    np.put_along_axis(
        rank_LM, np.argsort(-counts, axis=1, kind="stable"), np.arange(1.0, experts + 1)[None].repeat(layers, 0), axis=1
    )
    tie_LM = _TIE_BREAK * (rank_LM + np.arange(1, experts + 1) / (experts + 1))
    cell = np.arange(layers * experts)
    ones = np.ones(layers * experts)
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, vstack

    per_layer = csr_array((ones, (cell // experts, cell)), shape=(layers, cell.size))
    per_expert = csr_array((ones, (cell % experts, cell)), shape=(experts, cell.size))
    constraints = [LinearConstraint(per_layer, share, share), LinearConstraint(per_expert, -np.inf, 1)]
    if threshold is None:
        reward_LM = _RELAXED_REWARD + counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
        cost = tie_LM - reward_LM
    else:
        covered = vstack([csr_array((counts.ravel(), (cell // experts, cell)), shape=(layers, cell.size))])
        constraints.append(LinearConstraint(covered, threshold * counts.sum(axis=1), np.inf))
        cost = 1.0 + tie_LM
    found = milp(
        cost.ravel(),
        integrality=ones,
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"time_limit": seconds, "presolve": True},
    )
    if found.status == _MILP_INFEASIBLE:
        return None
    if found.status == _MILP_LIMIT:
        raise AssignmentError(
            f"lock.solver_seconds={seconds:g}: not enough for the integer program over {layers} layers and {experts} "
            "experts; raise lock.solver_seconds (it may change when the run goes on), or start a run with a lower "
            "lock.coverage_threshold"
        )
    if found.status != _MILP_SOLVED:
        raise AssignmentError(f"the integer program failed: {found.message}")
    chosen_LM = np.rint(found.x).reshape(layers, experts)
    return np.argmax(chosen_LM, axis=0)
