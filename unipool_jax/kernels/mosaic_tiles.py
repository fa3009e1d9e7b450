"""Tile sizes of the Mosaic GPU kernels, derived from registers and shared memory of Hopper; not tuned on a GPU."""

import math
from typing import NamedTuple

ROWS = 8
"""Rows of a tile of memory as `wgmma` reads it: first rows and numbers of rows are multiples."""
COLUMNS = 64
"""Columns of one in 16 bits, and the least M of `wgmma`: widths are multiples."""
_MULTIPROCESSORS = 132
"""Of an H100 or H200. Others are served too, less evenly."""


def tile_rows(expected_rows: float) -> int:
    """Rows of a tile for groups with a mean of `expected_rows` rows, a multiple of 8 up to 128.

    A group of 2.5 standard deviations above the mean, which may start 7 rows into its first tile, is cut into equal
    tiles.
    """
    most = expected_rows + 2.5 * math.sqrt(expected_rows) + ROWS - 1
    return max(16, math.ceil(most / math.ceil(most / 128) / ROWS) * ROWS)


class RowTile(NamedTuple):
    """One visit of the row pass.

    Attributes:
        rows: rows of the output tile, the N of `wgmma`: a multiple of 8 up to 256.
        columns: columns of the output tile, the M of `wgmma`: 64 or 128.
        depth: extent of the contracted axis that each step loads, a multiple of 64.
        stages: steps whose loads are in flight at once.
        chunk: rows that the epilogue has in registers at once.
        blocks: of the persistent grid.
    """

    rows: int
    columns: int
    depth: int
    stages: int
    chunk: int
    blocks: int


class BankTile(NamedTuple):
    """One visit of the gradient of the bank.

    Attributes:
        depth: rows of the tile of the matrix, the M of `wgmma`: 64 or 128.
        columns: columns of the tile of the matrix, a multiple of 64.
        rows: contracted rows that each step loads, a multiple of 8.
        stages: steps whose loads are in flight at once.
        blocks: of the persistent grid.
    """

    depth: int
    columns: int
    rows: int
    stages: int
    blocks: int


def row_tile(rows: int, num_products: int, num_operands: int) -> RowTile:
    """Tile of a row pass with tiles of `rows` rows.

    Args:
        rows: of the plan's tiles.
        num_products: sums of `[columns, rows]` float32 in registers: 255 a thread, of which the epilogue needs some.
        num_operands: pairs of rows and matrices that each step loads.
    """
    columns = 128 if num_products * rows <= 128 else 64
    step = 2 * COLUMNS * (rows + columns) * num_operands
    # Two blocks share the 227 KiB of a multiprocessor.
    stages = max(2, min(4, 104 * 1024 // step))
    return RowTile(rows, columns, COLUMNS, stages, min(rows, 32), 2 * _MULTIPROCESSORS)


def bank_tile() -> BankTile:
    """Tile of the gradient: 32 KiB of sums, and as many steps as leave room for a second block."""
    return BankTile(64, 128, 64, 2, 2 * _MULTIPROCESSORS)
