"""What attention costs: FLOPs, memory traffic and memory of its products, by implementation and kind of layer."""

from __future__ import annotations

import math
from typing import NamedTuple

from unipool_jax.config.chips import Topology
from unipool_jax.config.schema import Config
from unipool_jax.kernels.attention import LANES, splash_tile, splash_tiles
from unipool_jax.kernels.causal import QUERY_BLOCKS, computed_scores
from unipool_jax.kernels.tiled import TILE, WHOLE

WIDE = 4
"""Bytes of a float32 number."""


class AttentionCost(NamedTuple):
    """Of all sequences and heads of a device, in the average layer."""

    flops: float
    """Of all passes of a step, without the padding of heads to the matrix unit."""
    bytes: float
    kept_bytes: float
    """What the backward pass keeps of a layer that is not recomputed, beside queries, keys and values."""
    working_bytes: float
    """Of the layer that is computed, in its backward pass."""
    evaluation_bytes: float
    """The same of a forward pass."""


def narrow(config: Config) -> int:
    """Bytes of a number in `model.compute_dtype`."""
    return 2 if config.model.compute_dtype == "bfloat16" else WIDE


def attention_cost(config: Config, topology: Topology, rows: float, forward: int) -> AttentionCost:
    """The cost of the products of scores and values.

    Args:
      config: of the model.
      topology: where it runs. What runs there by default is counted.
      rows: sequences times query heads of a device.
      forward: forward passes over a layer.
    """
    if fused(config, topology):
        return _fused(config, rows, forward + recomputes_product(config))
    return _blocks(config, rows, forward)


def fused(config: Config, topology: Topology) -> bool:
    """Whether a kernel computes scores without writing them; kernels for GPUs are counted like those for TPUs."""
    if config.kernels.attention != "auto":
        return config.kernels.attention != "blocks"
    return topology.chip.torus_axes > 0 or config.model.compute_dtype == "bfloat16"


def recomputes_product(config: Config) -> bool:
    """Whether a layer computes its attention product again although it is not recomputed itself."""
    return config.attention.kind == "alternating" and not config.recomputes_attention


def padding(config: Config, topology: Topology) -> float:
    """Computed channels of a head over real ones."""
    unit = topology.chip.matrix_unit
    return math.ceil(config.head_size / unit) * unit / config.head_size


def _blocks(config: Config, rows: float, forward: int) -> AttentionCost:
    length, size = config.data.sequence_length, config.head_size
    again = recomputes_product(config)
    full, of_window = computed_scores(length), computed_scores(length, config.attention.window)
    if config.attention.kind == "switch" and config.attention.gate == "learned":
        # The window, and what it hides: of the rest a block sees a window less than of everything.
        full += of_window - min(config.attention.window * length, full)
    by_layer = [rows * (full if sees_all else of_window) for sees_all in config.sees_all]
    scores = sum(by_layer) / len(by_layer)
    if length > WHOLE and any(config.sees_all):
        tile, sequence = WIDE * rows * TILE * TILE, WIDE * rows * length
        # Backward five products. Of the gradients, those of keys and values are sums that all tiles add to.
        return AttentionCost(
            flops=(2 * (forward + again) + 5) * 2 * scores * size,
            bytes=scores * (2 * WIDE * (forward + again) + 5 * WIDE),
            kept_bytes=0 if again else sequence,
            working_bytes=4 * tile + 3 * sequence * size,
            evaluation_bytes=2 * tile,
        )
    # Forward, the compiler computes the scores twice, for their maximum and for their exponentials, which it keeps in
    # float32 for the product with the values. Backward, it computes them again, and four more products.
    products = 3 * (forward + again) + 4 + (0 if config.recomputes_attention or again else 1)
    # One of the blocks of queries at a time; those of a window are computed at once.
    block = rows * length * length / QUERY_BLOCKS
    return AttentionCost(
        flops=products * 2 * scores * size,
        bytes=scores * (2 * WIDE * (forward + again) + 5 * WIDE),
        kept_bytes=0 if again else 6 * scores,
        working_bytes=8 * max(by_layer),
        evaluation_bytes=WIDE * (block if any(config.sees_all) else min(block, by_layer[0])),
    )


def _fused(config: Config, rows: float, forward: int) -> AttentionCost:
    length, size, window = config.data.sequence_length, config.head_size, config.attention.window
    tile, full, of_window = splash_tile(length), splash_tiles(length), splash_tiles(length, window)
    if config.attention.kind == "switch" and config.attention.gate == "learned":
        # Both are computed one after the other.
        full += of_window
    layers = config.sees_all
    tiles = rows * sum(full if sees_all else of_window for sees_all in layers) / len(layers)
    # Two products forward; backward, one kernel for keys and values with four, and one for queries with three.
    side, sequence = narrow(config) * tile * size, narrow(config) * rows * length * size
    return AttentionCost(
        flops=(2 * forward + 7) * 2 * tiles * tile * tile * size,
        # A tile reads two matrices; queries, results, their gradients and those of keys and values move once.
        bytes=tiles * 2 * side * (forward + 2) + sequence * (2 * forward + 6),
        kept_bytes=sequence + WIDE * rows * length,
        working_bytes=2 * sequence + WIDE * rows * length * LANES,
        evaluation_bytes=sequence,
    )
