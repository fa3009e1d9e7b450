"""Tile sizes of the GPU kernels: reasoned from register and shared memory, never timed."""

import math
from typing import NamedTuple


def tile_rows(expected_rows: float) -> int:
    """Rows of a GPU tile, a power of two, for groups of `expected_rows` rows on average."""
    return 2 ** max(4, min(7, math.ceil(math.log2(max(1.0, expected_rows)))))


class GpuTile(NamedTuple):
    """What one program of a GPU kernel computes. Sizes are powers of two, at least 16: Triton's dot wants no less.

    They are the largest with which bfloat16 kernels of the published models, compiled for compute capabilities 8.0 and
    9.0, keep every number of a tile in registers and fit shared memory (96 KiB and 144 KiB). None was timed on a GPU.

    Attributes:
        rows: rows of the program's tile of the output.
        columns: columns of that tile.
        contraction: how much of the contracted axis each step loads.
        num_warps: warps of 32 threads that share the tile.
        num_stages: steps whose loads are in flight at once.
    """

    rows: int
    columns: int
    contraction: int
    num_warps: int
    num_stages: int


def row_pass_tile(rows: int, num_tiles: int, itemsize: int, depth: int, width: int) -> GpuTile:
    """Tile of a pass over `rows` rows of `depth` numbers into `width` columns.

    Args:
        rows: rows of the plan's tiles.
        num_tiles: how many tiles of this size a program holds at once: its products and what it reads beside them.
        itemsize: bytes of a number in the operands. Float32 is multiplied without tensor cores, in smaller tiles.
        depth: the contracted extent.
        width: the extent of the columns.
    """
    columns = 256 // itemsize if num_tiles == 1 else 128 // itemsize
    return GpuTile(rows, _fit(columns, width), _fit(128 // itemsize, depth), 8 if rows > 64 else 4, 3)


def bank_tile(itemsize: int, depth: int, width: int) -> GpuTile:
    """Tile of the gradient of a `depth` by `width` matrix.

    Adding to a gradient in memory takes longer than the products of a few dozen rows: small tiles let several programs
    share a multiprocessor, so that one computes while another waits for memory.
    """
    return GpuTile(_fit(64, depth), _fit(256 // itemsize, width), 32, 4, 3)


def _fit(size: int, extent: int) -> int:
    """`size`, or less where a smaller power of two covers the whole extent."""
    return min(size, max(16, 2 ** math.ceil(math.log2(extent))))
