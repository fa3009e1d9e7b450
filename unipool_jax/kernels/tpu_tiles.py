"""Tile sizes of the TPU kernels.

`tpu_tiles.json` holds the sizes that a search over the TPU compiler's schedules found for the published scales;
`python -m benchmarks.tpu_kernels --write-tiles` regenerates it. Other devices and shapes follow the rules here.
"""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

# Rows of a bfloat16 memory tile (16 x 128), the smallest unit of a DMA.
ROW_ALIGNMENT = 16
# Columns of a memory tile of any dtype.
LANES = 128
_TABLE = Path(__file__).with_name("tpu_tiles.json")


@cache
def table() -> dict[str, Any]:
    """The checked-in table: `tile_rows[device kind]`, rows of a tile by rows per group (ascending), and
    `columns[device kind]`, columns of a tile by `columns_key`."""
    content: dict[str, Any] = json.loads(_TABLE.read_text())
    return content


def tile_rows(device_kind: str, expected_rows: float) -> int:
    """Rows of a TPU tile for groups with a mean of `expected_rows` rows: the table's entry for the next larger size.

    Without an entry, a group of 2.5 standard deviations above the mean, which may start inside a block of 16 rows, is
    cut into equal tiles of at most 512 rows.
    """
    for rows_per_group, rows in table()["tile_rows"].get(device_kind, {}).items():
        if expected_rows <= int(rows_per_group):
            return int(rows)
    most_rows = expected_rows + 2.5 * math.sqrt(expected_rows) + ROW_ALIGNMENT - 1
    return math.ceil(most_rows / math.ceil(most_rows / 512) / 32) * 32


def row_counts(tile_rows: int) -> tuple[int, ...]:
    """Rows of a tile that a kernel can compute, ascending: the smallest number that holds the tile's rows is taken.

    The whole tile, and for large tiles, where arithmetic takes longer than memory, half of it and five sixths.
    """
    if tile_rows < 256:
        return (tile_rows,)
    return (tile_rows // 2, tile_rows * 5 // 6 // ROW_ALIGNMENT * ROW_ALIGNMENT, tile_rows)


def columns_key(name: str, contracted: int, width: int, dtype: str, tile_rows: int) -> str:
    """The key of a kernel and its shapes in the table of columns."""
    return f"{name} {contracted}->{width} {dtype} {tile_rows} rows"


def columns(
    device_kind: str, key: str, width: int, fixed_bytes: int, bytes_per_column: int, vmem_bytes: int, cores: int
) -> int:
    """Columns of a TPU tile: the table's entry if there is one, else as many as fit in memory.

    Args:
        device_kind: `jax.Device.device_kind`.
        key: key in the table, from `columns_key`.
        width: all columns, a multiple of 128. Tiles divide it evenly into multiples of 128.
        fixed_bytes: vector memory that does not depend on the number of columns.
        bytes_per_column: vector memory per column.
        vmem_bytes: available vector memory.
        cores: cores that share the tiles; the number of tiles is a multiple of it where possible.

    Raises:
        ValueError: the smallest tile does not fit.
    """
    chosen = table()["columns"].get(device_kind, {}).get(key)
    if chosen:
        return int(chosen)
    choices = fitting_columns(width, fixed_bytes, bytes_per_column, vmem_bytes, cores)
    if not choices:
        raise ValueError(
            f"{key}: a tile of {LANES} columns takes {fixed_bytes + LANES * bytes_per_column:,} bytes, but "
            f"tiles may use {vmem_bytes:,} bytes of vector memory on {device_kind}; set kernels.implementation=xla"
        )
    return choices[0]


def fitting_columns(width: int, fixed_bytes: int, bytes_per_column: int, vmem_bytes: int, cores: int) -> list[int]:
    """The tile widths that fit in memory, largest first."""
    parts = [parts for parts in range(1, width // LANES + 1) if width % (parts * LANES) == 0]
    balanced = [number for number in parts if number % cores == 0]
    tiles = [width // number for number in balanced or parts]
    return [columns for columns in tiles if fixed_bytes + columns * bytes_per_column <= vmem_bytes]
