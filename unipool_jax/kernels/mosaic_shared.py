"""What both kernels of `mosaic_gpu` are made of: a persistent grid, and tiles in shared memory.

Tiles come and go as a whole between memory and shared memory (TMA), and a warpgroup of 128 threads multiplies them from
there (`wgmma`). A persistent grid runs over the visits, so that the two blocks of a multiprocessor are at different
places: one computes while the other loads or stores.

What no interpreter can see (waits for `wgmma`, fences before it, multiples of 8 and of 64) is listed in
docs/kernels.md, with where the code has it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu

from unipool_jax.kernels.mosaic_tiles import ROWS

# Its signatures changed from JAX 0.10 to 0.11, and mypy checks with both.
plgpu: Any = mosaic_gpu
SWAPPED = (1, 0)
"""The axes of a transposed matrix."""


def call(kernel: Callable[..., None], outputs: Any, blocks: int, name: str, interpret: Any) -> Callable[..., Any]:
    """The kernel as a function of its operands, run by so many blocks; `name` is what programs and profiles say."""
    kernel.__name__ = name
    return plgpu.kernel(kernel, out_type=outputs, grid=(blocks,), grid_names=("block",), interpret=interpret)


def persistent(count: jax.Array, blocks: int, visit: Callable[[jax.Array], None]) -> None:
    """Every `blocks`-th of `count` visits, from that of this block on."""
    block = lax.axis_index("block")
    visits = lax.div(count - block + (blocks - 1), jnp.int32(blocks))
    lax.fori_loop(0, visits, lambda turn, _: visit(block + turn * blocks), None)


def buffer(shape: tuple[int, int], dtype: jax.typing.DTypeLike, rows: int = ROWS) -> Any:
    """Shared memory. With `rows=1` any of its rows can be the first of a copy."""
    return plgpu.SMEM(shape, dtype, transforms=_transforms(shape[1], dtype, rows))


def loaded(shape: tuple[Any, int], dtype: jax.typing.DTypeLike, index: Callable[..., Any], delay: int = 1) -> Any:
    """A block that a pipeline loads, and may replace `delay` steps behind its use."""
    return plgpu.BlockSpec(shape, index, transforms=_transforms(shape[1], dtype, ROWS), delay_release=delay)


def _transforms(columns: int, dtype: jax.typing.DTypeLike, rows: int) -> tuple[Any, Any]:
    """The order of a tile in shared memory that `wgmma` and TMA agree on."""
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * size * 8)
    return plgpu.TilingTransform((rows, swizzle // size)), plgpu.SwizzleTransform(swizzle)
