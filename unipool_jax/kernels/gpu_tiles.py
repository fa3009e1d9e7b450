"""Tile sizes of the GPU kernels, derived from register and shared memory sizes; not tuned on a GPU."""

import math
from typing import NamedTuple


def tile_rows(expected_rows: float) -> int:
    """Rows of a GPU tile, a power of two, for groups with a mean of `expected_rows` rows."""
    return 2 ** max(4, min(7, math.ceil(math.log2(max(1.0, expected_rows)))))


class GpuTile(NamedTuple):
    """The tile of one program of a GPU kernel. Sizes are powers of two, at least 16, the minimum of Triton's dot.

    They are the largest with which the bfloat16 kernels of the published models, compiled for compute capabilities 8.0
    and 9.0, do not spill registers and fit shared memory (96 KiB and 144 KiB). Others were not tried on a GPU.

    Attributes:
        rows: rows of the output tile.
        columns: columns of the output tile.
        contraction: extent of the contracted axis that each step loads.
        num_warps: warps of 32 threads per program.
        num_stages: steps whose loads are in flight at once.
    """

    rows: int
    columns: int
    contraction: int
    num_warps: int
    num_stages: int


def row_pass_tile(rows: int, num_tiles: int, itemsize: int, depth: int, width: int) -> GpuTile:
    """Tile of a row pass over `[R, depth]` rows with `[R, width]` outputs.

    Args:
        rows: rows of the plan's tiles.
        num_tiles: tiles of this size that a program holds at once: its products and further inputs.
        itemsize: bytes per number of the operands. Float32 uses no tensor cores, and smaller tiles.
        depth: size of the contracted axis.
        width: number of columns.
    """
    columns = 256 // itemsize if num_tiles == 1 else 128 // itemsize
    return GpuTile(rows, _fit(columns, width), _fit(128 // itemsize, depth), 8 if rows > 64 else 4, 3)


def bank_tile(itemsize: int, depth: int, width: int) -> GpuTile:
    """Tile of the gradient of a `[depth, width]` matrix.

    Adding to a gradient in memory takes longer than the product of a few dozen rows. Small tiles let several programs
    share a multiprocessor, so that one computes while another waits for memory.
    """
    return GpuTile(_fit(64, depth), _fit(256 // itemsize, width), 32, 4, 3)


def _fit(size: int, extent: int) -> int:
    """`size`, or a smaller power of two, at least 16, that covers `extent`."""
    return min(size, max(16, 2 ** math.ceil(math.log2(extent))))
