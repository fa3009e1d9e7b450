"""Rows that grouped products compute and matrices that they read, against draws of uniform random routing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.planner_check.cases import config_of
from benchmarks.planner_check.predict import counted
from unipool_jax.planner.group_rows import blocks, loops

WIDE = "{} model.num_layers=1 model.hidden_size=1024 model.ffn_size=1024 {}"
"""Experts of 2^20 weights a matrix."""


def drawn(rows: int, experts: int, visible: int) -> list[int]:
    """Rows of each expert in 4000 layers; the visible ones come first."""
    odds = np.arange(experts) < visible
    return [int(found) for found in np.random.default_rng(0).multinomial(rows, odds / visible, size=4000).flat]


@pytest.mark.parametrize("visible", [32, 16])
def test_blocks_and_tiles_of_plain_xla(visible: int) -> None:
    """Of 1024 rows in 32 groups every block has 40 rows, those of empty experts too, and tiles have 32."""
    tiles = sum(math.ceil(max(rows - 40, 0) / 32) for rows in drawn(1024, 32, visible)) / (4000 * 32)
    found = blocks(1024, 32, visible / 32)
    assert found.padding == pytest.approx((40 + 32 * tiles) / 32, rel=0.01)
    # A matrix is read for its block and for each tile, and its gradient is added to as often.
    assert found.reads == found.sums == pytest.approx(1 + tiles, rel=0.02)
    assert found.repeated == pytest.approx(tiles, rel=0.1)


@pytest.mark.parametrize(
    ("rows", "experts", "visible", "step"),
    [(1024, 8, 8, 16), (1100, 4, 4, 48), (1024, 4, 4, 32), (2048, 24, 12, 16), (1600, 16, 2, 16), (1000, 1, 1, 128)],
)
def test_turns_of_loops(rows: int, experts: int, visible: int, step: int) -> None:
    """An expert is visited in turns of at most 12 steps, the last padded to a whole one; no turn exceeds the buffer."""
    turns = computed = 0
    for left in drawn(rows, experts, visible):
        while left > 0:
            turns += 1
            computed += min(math.ceil(min(left, 12 * step) / step) * step, rows)
            left -= 12 * step
    found = loops(rows, experts, visible / experts)
    assert found.padding == pytest.approx(computed / (4000 * rows), rel=0.01)
    assert found.sums == pytest.approx(turns / (4000 * experts), rel=0.01)
    assert (found.reads, found.repeated) == (3 * found.sums, 0)


def test_wide_experts_on_a_cpu_are_counted_in_loops() -> None:
    """Of 1024 tokens over four experts; not with bfloat16, and not with few rows an expert."""

    def padding(case: str) -> float:
        forward = next(work for work in counted(config_of(case)).work if work.name == "experts forward")
        return forward.flops / forward.unpadded_flops

    wide, few = "moe.experts_per_layer=4", "moe.experts_per_layer=32"
    assert padding(WIDE.format("vanilla", wide)) == pytest.approx(loops(1024, 4, 1).padding)
    assert padding(WIDE.format("vanilla", f"{wide} model.compute_dtype=bfloat16")) == blocks(1024, 4, 1).padding
    assert padding(WIDE.format("vanilla", few)) == blocks(1024, 32, 1).padding
    assert padding(f"vanilla {wide}") == blocks(1024, 4, 1).padding


def test_what_tiles_compute_again_and_loops_copy_is_in_the_work() -> None:
    """The gate and up products of tiles. A turn reads a matrix, writes the copy and reads it, forward and backward."""
    found = {work.name: work for work in counted(config_of("unipool")).work}
    forward, backward, costs = found["experts forward"], found["experts backward"], blocks(1024, 32, 1)
    assert backward.flops / forward.flops == pytest.approx(2 + 2 / 3 * costs.repeated / costs.padding)
    counts, turns = counted(config_of(WIDE.format("unipool", "moe.experts_per_layer=4"))), loops(1024, 4, 1).sums
    bank = 4 * 3 * 2**20
    assert counts.bank_traffic_bytes == pytest.approx(turns * bank * (2 * 3 * 4 + 8))
