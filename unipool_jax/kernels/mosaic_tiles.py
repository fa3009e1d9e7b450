"""Tile sizes of the Mosaic GPU kernels, derived from registers and shared memory of Hopper."""

import math
from typing import NamedTuple

ROWS = 8
"""Rows of a tile of memory as `wgmma` reads it: first rows and numbers of rows are multiples."""
COLUMNS = 64
"""Columns of one in 16 bits, and the least M of `wgmma`: widths are multiples."""
_SHARED = 224 * 1024
"""Bytes of shared memory of a multiprocessor that blocks can use; two of them share it."""
MULTIPROCESSORS = 132
"""Of an H100 or H200. Others are served too, less evenly."""


def tile_rows(num_rows: int, num_groups: int) -> int:
    """Rows of a tile for `num_rows` rows in `num_groups` groups, a multiple of 8 up to 128.

    A group of 2.5 standard deviations above the mean, which may start 7 rows into its first tile, is cut into equal
    tiles.
    """
    expected = num_rows / num_groups
    most = min(num_rows, expected + 2.5 * math.sqrt(expected) + ROWS - 1)
    return max(ROWS, math.ceil(most / math.ceil(most / 128) / ROWS) * ROWS)


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
        rows: contracted rows that each step loads, a multiple of 64.
        stages: steps whose loads are in flight at once.
        blocks: of the persistent grid.
    """

    depth: int
    columns: int
    rows: int
    stages: int
    blocks: int


def row_tile(rows: int, num_rows: int, num_banks: int, num_beside: int) -> RowTile:
    """Tile of a row pass with tiles of `rows` rows.

    Args:
        rows: of the plan's tiles.
        num_rows: arrays of rows that are multiplied. With one of them each bank has its product.
        num_banks: banks.
        num_beside: further inputs of the epilogue.
    """
    num_products = num_banks if num_rows == 1 else 1
    for columns in (128, 64):
        held = 2 * rows * columns * num_beside
        step = 2 * COLUMNS * (rows * num_rows + columns * num_banks)
        stages = min(4, (_SHARED // 2 - held) // step)
        if stages > 1 and num_products * rows * columns <= 128 * 128:
            break
    return RowTile(rows, columns, COLUMNS, max(2, stages), min(rows, 32), 2 * MULTIPROCESSORS)


def bank_tile() -> BankTile:
    """Tile of the gradient: 32 KiB of sums, and as many steps as leave room for a second block.

    Three took 0.85 of the time of two at 16,384 rows on an H200, and 1.02 at 4,096 (docs/kernels.md).
    """
    return BankTile(64, 128, 64, 3, 2 * MULTIPROCESSORS)
