"""What grouped products make of experts of unequal rows: rows computed, matrices read. Uniform random routing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unipool_jax.kernels import tpu_tiles, xla_loops
from unipool_jax.kernels.group_plan import block_shape

Array = NDArray[np.float64]

_COPIED = 3
"""Times that a matrix is moved for a turn of a loop: out of the bank into a copy, and from that, which exceeds a core's
cache, into the product. Tiles behind blocks copy too, but matrices that mostly stay in cache."""


class GroupCosts(NamedTuple):
    """Of the experts of a bank, in one layer."""

    padding: float
    """Computed rows over real rows."""
    reads: float
    """Times that a weight is moved in a pass over the rows, mean over all experts."""
    sums: float
    """Times that the gradient of a weight is read and written in a backward pass."""
    repeated: float = 0.0
    """Rows whose gate and up products the backward pass computes again, padding among them, over real rows."""


def expected_tile_rows(group: float, tile: int) -> float:
    """Mean number of tile rows for a group with a mean of `group` rows.

    The first tile starts at the block of 16 rows in which its group starts, on average 7.5 rows earlier.
    """
    before = (tpu_tiles.ROW_ALIGNMENT - 1) / 2
    return _mean(group, lambda rows: np.ceil((np.maximum(rows, 1) + before) / tile)) * tile


def blocks(rows: float, groups: float, share: float) -> GroupCosts:
    """For the padded blocks of plain XLA.

    Every expert has a block of the same rows, whether it has rows or not. What does not fit goes through tiles, which
    read and add to matrices once more, and whose gate and up products are not kept.

    Args:
      rows: in all groups together.
      groups: the experts.
      share: of them, those with rows.
    """
    block, tile = block_shape(int(rows), round(groups))
    group = rows / groups
    tiles = share * _mean(group / share, lambda found: np.ceil(np.maximum(found - block, 0) / tile), rows)
    return GroupCosts((block + tiles * tile) / group, 1 + tiles, 1 + tiles, tiles * tile / group)


def loops(rows: float, groups: float, share: float) -> GroupCosts:
    """For the loops of plain XLA over wide experts on a CPU, with the arguments of `blocks`."""
    step, seen = xla_loops.step_rows(block_shape(int(rows), round(groups))[0]), rows / groups / share
    turns = share * _mean(seen, lambda found: xla_loops.turns_and_steps(found, step)[0], rows)
    steps = _mean(seen, lambda found: np.minimum(xla_loops.turns_and_steps(found, step)[1], rows / step), rows)
    return GroupCosts(steps * step / seen, _COPIED * turns, turns)


def _mean(group: float, function: Callable[[Array], Array], rows: float = math.inf) -> float:
    """The mean of a function of the rows of a group, of which there are `group` on average; of `rows`, whole ones."""
    deviations = np.linspace(-4, 4, 401)
    weights = np.exp(-0.5 * deviations**2)
    sizes = np.maximum(group + math.sqrt(group * (1 - group / rows)) * deviations, 0)
    found = function(sizes if math.isinf(rows) else np.rint(sizes))
    return float(np.sum(found * weights) / np.sum(weights))
