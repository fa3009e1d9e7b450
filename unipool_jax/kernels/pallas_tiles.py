"""Tile sizes of the Pallas kernels."""

import math

# Rows of the smallest piece of a bfloat16 buffer that a TPU moves between its memories (a 16 x 128 tile).
TPU_ROW_ALIGNMENT = 16


def tpu_tile_rows(expected_rows: float) -> int:
    """Rows of a TPU tile, for groups of `expected_rows` rows on average."""
    return max(32, min(512, math.ceil((expected_rows + 2.5 * math.sqrt(expected_rows) + 15) / 32) * 32))


def gpu_tile_rows(expected_rows: float) -> int:
    """Rows of a GPU tile, a power of two, for groups of `expected_rows` rows on average."""
    return 2 ** max(4, min(7, math.ceil(math.log2(max(1.0, expected_rows)))))
