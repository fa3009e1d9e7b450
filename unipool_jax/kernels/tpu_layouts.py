"""How the arrays of the TPU kernels lie in memory: padded, halved, stacked.

- Padded: rows `[R, C]` to multiples of 16 rows and 128 columns, banks `[E, K, N]` to multiples of 128.
- Halved: rows `[R, 2, C / 2]`, the halves of a row on an axis of their own. That is how XLA lays out what a ragged
  all-to-all sends and receives: a row of 16-bit numbers is then in one piece of memory.
- Stacked: arrays of all layers, `[L, R, C]` or `[L, R, 2, C / 2]`. A kernel gets the whole stack and the place of one
  layer, and reads or writes there, so that nothing is copied into the stack or out of it.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from unipool_jax.kernels.implementations import target_device_kind
from unipool_jax.kernels.tpu_call import seen_as_tpu
from unipool_jax.kernels.tpu_tiles import LANES
from unipool_jax.kernels.tpu_visits import BLOCK, round_up_to_block

HALVED_ON = ("TPU v5 lite", "TPU v5")
"""Devices for which kernels on halved rows have been compiled."""


def can_be_halved(rows: int, width: int, hidden: int, dtype: jax.typing.DTypeLike) -> bool:
    """Whether the kernels take and give rows of experts as `[R, 2, D / 2]`.

    Tiles of columns of each half are shared by the cores of a device, and of the two axes of a bank's gradient, the
    wider one is divided into tiles.
    """
    with seen_as_tpu():
        return halved_on(target_device_kind(), pltpu.get_tpu_info().num_cores, rows, width, hidden, dtype)


def halved_on(device_kind: str, cores: int, rows: int, width: int, hidden: int, dtype: jax.typing.DTypeLike) -> bool:
    """`can_be_halved` on a device of this kind with so many cores."""
    return (
        device_kind in HALVED_ON
        and jnp.dtype(dtype) == jnp.bfloat16
        and rows % BLOCK == 0
        and width % (2 * LANES * cores) == 0
        and hidden > width
    )


def stack_shape(rows: int, columns: int) -> tuple[int, int]:
    """R and C of the stacks `[L, R, C]` that a kernel reads from and writes to."""
    return round_up_to_block(rows), -(-columns // LANES) * LANES


def padded(array: jax.Array) -> jax.Array:
    """Rows `[R, C]` or a bank `[E, K, N]`, padded with zeros; usually unchanged."""
    granules = (BLOCK, LANES) if array.ndim == 2 else (1, LANES, LANES)
    missing = [(0, -size % granule) for size, granule in zip(array.shape, granules, strict=True)]
    return jnp.pad(array, missing) if any(after for _, after in missing) else array


def padded_rows(array: jax.Array) -> jax.Array:
    """Rows `[R, C]` padded; halved and stacked ones need no padding."""
    return padded(array) if array.ndim == 2 else array


def row_shape(rows: jax.Array) -> tuple[int, ...]:
    """Shape of one row: `[C]`, or halved `[2, C / 2]`."""
    return rows.shape[1:] if rows.ndim == 2 else rows.shape[-2:]
