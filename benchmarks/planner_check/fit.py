"""Three constants of a machine, fitted to measured steps, and how good the predictions from them are. Pure NumPy.

A step takes the sum over its operations of max(FLOPs / peak, bytes / bandwidth), and a constant per launch. Where it
is known which resource bounds each operation, that is linear in 1 / peak, 1 / bandwidth and the launch cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Step(NamedTuple):
    """What a step does, as counted."""

    operations: tuple[tuple[float, float], ...]
    """FLOPs and bytes of each kind."""
    launches: float


class Machine(NamedTuple):
    """What the model knows of a machine."""

    peak: float
    """FLOP/s of products."""
    bandwidth: float
    """Bytes/s of everything else."""
    launch: float
    """Seconds per launched instruction."""

    def seconds(self, step: Step) -> float:
        """The predicted time of a step."""
        bound = sum(max(flops / self.peak, moved / self.bandwidth) for flops, moved in step.operations)
        return bound + step.launches * self.launch


class Quality(NamedTuple):
    """Predictions beside measurements."""

    mean_error: float
    """Mean of |predicted / measured - 1|."""
    worst_error: float
    rank_correlation: float
    """Spearman's."""


def calibrate(steps: Sequence[Step], seconds: Sequence[float]) -> Machine:
    """The machine whose model has the least squared relative errors.

    For every division of the operations into those bound by compute and those bound by memory that some machine can
    have, the three constants are fitted, none below zero. The machine whose own model errs least is taken: going from
    one division to the next that fits it would stop at the first that is its own answer, which need not be the best.
    """
    intensities = sorted({flops / moved for step in steps for flops, moved in step.operations})
    best, least = Machine(1.0, 1.0, 0.0), np.inf
    # Between two intensities the division is the same.
    for flops_per_byte in (*intensities, 2 * intensities[-1] + 1):
        rows = [_terms(step, flops_per_byte) for step in steps]
        flop, byte, launch = nonnegative_least_squares(
            np.array(rows) / np.array(seconds)[:, None], np.ones(len(seconds))
        )
        # A resource that bounds nothing costs nothing; a tiny cost keeps its inverse finite.
        found = Machine(float(1 / max(flop, 1e-18)), float(1 / max(byte, 1e-18)), float(launch))
        missed = np.array([found.seconds(step) for step in steps]) / np.array(seconds) - 1
        if (error := float(missed @ missed)) < least:
            best, least = found, error
    return best


def _terms(step: Step, flops_per_byte: float) -> tuple[float, float, float]:
    """FLOPs of operations that compute bounds, bytes of the others, launches."""
    by_compute = [flops >= moved * flops_per_byte for flops, moved in step.operations]
    flops = sum(pair[0] for pair, compute in zip(step.operations, by_compute, strict=True) if compute)
    moved = sum(pair[1] for pair, compute in zip(step.operations, by_compute, strict=True) if not compute)
    return flops, moved, step.launches


def nonnegative_least_squares(matrix: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """`argmin |matrix x - wanted|` over x >= 0, by trying every set of columns: for a handful of them."""
    columns = matrix.shape[1]
    best, least = np.zeros(columns), float(wanted @ wanted)
    # Columns of very different units: scaled, so that none is taken for a multiple of rounding errors.
    scale = np.abs(matrix).max(axis=0)
    scale[scale == 0] = 1
    for chosen in range(1, 1 << columns):
        kept = [column for column in range(columns) if chosen >> column & 1]
        part = np.linalg.lstsq(matrix[:, kept] / scale[kept], wanted, rcond=None)[0] / scale[kept]
        missed = matrix[:, kept] @ part - wanted
        if (part >= 0).all() and float(missed @ missed) < least:
            best, least = np.zeros(columns), float(missed @ missed)
            best[kept] = part
    return best


def proportional(amounts: Sequence[float], seconds: Sequence[float]) -> float:
    """The factor c for which c x amount has the least squared relative errors from the seconds."""
    ratio = np.array(amounts) / np.array(seconds)
    return float(ratio.sum() / (ratio @ ratio))


def quality(predicted: Sequence[float], measured: Sequence[float]) -> Quality:
    """Errors and rank correlation."""
    errors = np.abs(np.array(predicted) / np.array(measured) - 1)
    correlation = np.corrcoef(ranks(predicted), ranks(measured))[0, 1]
    return Quality(float(errors.mean()), float(errors.max()), float(correlation))


def ranks(values: Sequence[float]) -> NDArray[np.float64]:
    """Places in ascending order from 0; equal values share the mean of theirs."""
    array = np.array(values)
    return ((array[:, None] > array).sum(1) + (array[:, None] >= array).sum(1) - 1) / 2
