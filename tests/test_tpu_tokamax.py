"""How the benchmark counts tokamax's kernels: tiles, bytes, and the paths in the compiler's listing."""

import importlib
import os
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest

SIZES = np.array([5, 0, 30, 13, 8], np.int32)
ALIGNMENT = 8


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    """`benchmarks.tpu_tokamax`, whose import sets up the TPU compiler: here in a copy of the environment, so that other
    tests keep theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        module = importlib.import_module("benchmarks.tpu_tokamax")
        patch.setattr(module, "row_alignment", lambda chip: ALIGNMENT)
        yield module


def test_tiles_start_with_their_group_and_take_a_bucket(benchmark: ModuleType) -> None:
    """Rows 0-5, 5-35 in tiles from 0, 16 and 32, 35-48 in one from 32, 48-56."""
    visits = benchmark.visit(SIZES, benchmark.Tiles(16, 8, 128), ALIGNMENT, gradient=False)
    assert visits.rows.tolist() == [8, 16, 16, 8, 16, 8]
    assert visits.case.tolist() == [0, 1, 3, 2, 0, 0]
    # Eight rows fill the first bucket of 8: the products go on to the next one, the weight gradient does not.
    assert visits.bucket.tolist() == [0, 1, 1, 0, 1, 1]
    gradient = benchmark.visit(SIZES, benchmark.Tiles(16, 8, 128), ALIGNMENT, gradient=True)
    assert gradient.bucket.tolist() == [0, 1, 1, 0, 1, 0]


@pytest.mark.parametrize("product", ["forward", "input gradient", "weight gradient"])
def test_cost_is_that_of_the_copies(benchmark: ModuleType, product: str) -> None:
    problem = benchmark.Problem(int(SIZES.sum()), len(SIZES), 128, 256, SIZES)
    (chip,) = (chip for chip in importlib.import_module("benchmarks.tpu_schedule").CHIPS.values() if chip.name == "v5p")
    columns, contracted = (128, 256) if product == "input gradient" else (256, 128)
    of_bucket = [[100, 101, 102, 103], [200, 201, 202, 203]]
    of = benchmark.Paths(importlib.import_module("benchmarks.tpu_schedule").Schedule(0, 0.5, 0), 10, of_bucket)
    cost = benchmark.cost(product, problem, chip, benchmark.Tiles(16, 8, 128), of)

    moved, bank, starts = 0, None, np.cumsum(SIZES) - SIZES
    for column in range(columns // 128):
        for group, (start, size) in enumerate(zip(starts, SIZES, strict=True)):
            row, end = start, start + size
            while row < end:
                stop = min(end, row // ALIGNMENT * ALIGNMENT + 16)
                read = -(-stop // ALIGNMENT) * ALIGNMENT - row // ALIGNMENT * ALIGNMENT
                moved += 2 * read * contracted
                if product == "weight gradient":
                    moved += 2 * read * 128
                else:
                    # The last, unfinished block waits for the next group; at the end nothing is left of it.
                    moved += 2 * (stop // ALIGNMENT - row // ALIGNMENT) * ALIGNMENT * 128
                if bank != (group, column):
                    moved += contracted * 128 * (4 if product == "weight gradient" else 2)
                    bank = (group, column)
                row = stop
    if product == "weight gradient":
        moved += contracted * columns * 4  # zeros for the group without rows
    assert cost.bytes == moved
    assert cost.visits == 6 * (columns // 128)
    # Two tiles of columns go to the two cores of a v5p.
    assert cost.waves == 6
    paths = [100, 201, 203, 102, 200, 100] if product == "weight gradient" else [100, 200, 200, 100, 200, 200]
    assert cost.bundles == 10 + np.mean(paths)
    assert cost.floor_flops == 2 * 56 * 128 * 256
    if product == "weight gradient":
        adding = benchmark.with_addition(cost, problem)
        array = 5 * 128 * 256 * 4
        assert adding.seconds(chip) - cost.seconds(chip) == pytest.approx(3 * array / chip.bandwidth)
        assert adding.floor_bytes - cost.floor_bytes == array


LISTING = """\
LB: loop body
     0   :  { %s1 = sld [smem:[#allocation0]] }
   0x1 LB: > { %s2 = sadd.s32 1, %s1 }
   0x2   :  { %3 = sbr.rel (!%p1) target = $region1 }
   0x3   :  {}
   0x4 LB: > { %s4 = sphi %s1, %s9 }
   0x5   : > { %5 = sbr.rel (%p2) target = $region2 }
   0x6   :  {}
   0x7   : > { %v6 = vmatmul.mubr.bf16.gmra.mrb[0] %v1 }
   0x8   : > { %v7 = vpop.f32 }
base_bounds: (1)
   0x9   : > { vst [vmem:[#allocation3]] %v7 }
   0xa PF: > { %6 = sbr.rel (%p3) target = $region3 }
   0xb   : > { %v8 = vmatmul.mubr.bf16.gmra.mrb[0] %v2 }
   0xc PF: > { %s9 = sadd.s32 1, %s4 }
   0xd   :  { %7 = sbr.rel (!%p4) target = $region4 }
   0xe   :  {}
   0xf PF:  { %s10 = sadd.s32 1, %s9 }
  0x10   :  { vsyncpa [#allocation4], 1 }
"""


def test_paths_are_read_from_the_listing(benchmark: ModuleType) -> None:
    """The loop from 0x4 to 0xe holds a path of four bundles from 0x6, one of one from 0xb, and six others."""
    assert importlib.import_module("benchmarks.tpu_schedule").read_paths(LISTING) == (6, [4, 1])
