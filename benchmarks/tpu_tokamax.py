"""tokamax's grouped products (GMM and TGMM, version 2) under the model that ours are held to. An optional peer.

Its kernels hold a code path for every *bucket* of rows: a tile with few rows runs a smaller product. The weight
gradient holds four in each, for the first and the last tile of a group. The bundles of a visit are those of the paths
taken, on average, and of the loop around them; what runs once before the loop is not counted.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

from benchmarks.tpu_schedule import Chip, Schedule, compile_for, mesh, paths  # before jax: it sets up the compiler

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from benchmarks.tpu_costs import BYTES, Cost, Problem, fastest, parts

INSTALLED = find_spec("tokamax") is not None
HOW_TO_INSTALL = "not installed; with Python 3.12 or newer: pip install tokamax==0.0.17"
# Rows of a tile and of its smallest bucket, which divides them.
ROW_TILES = ((128, 64), (192, 64), (256, 64), (256, 128), (384, 128), (512, 128), (512, 256), (768, 256))


class Tiles(NamedTuple):
    rows: int
    bucket: int
    columns: int


class Paths(NamedTuple):
    """What was compiled of a kernel: of a visit, bundles of the loop and of each path, smallest bucket first."""

    whole: Schedule
    loop: int
    of_bucket: Sequence[Sequence[int]]


class Visits(NamedTuple):
    """The tiles of rows that are computed, one entry each."""

    rows: np.ndarray[Any, np.dtype[np.int64]]
    """Rows that are read: from and to a multiple of the alignment."""
    bucket: np.ndarray[Any, np.dtype[np.int64]]
    """Index of the bucket."""
    case: np.ndarray[Any, np.dtype[np.int64]]
    """0 for a group's only tile, 1 for its first, 2 for its last, 3 for one between."""


def tokamax(product: str, problem: Problem, chip: Chip, known: dict[Any, Paths | None]) -> Cost | None:
    """tokamax at the tiles of least modelled time among those that compile; None where none do.

    The weight gradient is a new array. `known` keeps what was compiled: it depends on the tiles, not on the number of
    rows.
    """
    columns = problem.width if product == "input gradient" else problem.hidden
    candidates = [Tiles(*rows, part) for rows in ROW_TILES for part in parts(columns, columns)]

    def compiled(tiles: Tiles) -> Paths | None:
        key = (product, chip.name, problem[1:4], tiles)
        if key not in known:
            known[key] = _compile(product, problem, chip, tiles)
        return known[key]

    return fastest(chip, candidates, lambda tiles, of: cost(product, problem, chip, tiles, of), compiled)


def with_addition(fresh: Cost, problem: Problem) -> Cost:
    """The weight gradient and its addition to the sum over layers, which XLA does: two arrays read, one written."""
    gradient = problem.experts * problem.width * problem.hidden * 4
    # The floor is that of a kernel that adds in place: the sum read and written, where a new array is written only.
    return fresh._replace(bytes_after=3.0 * gradient, floor_bytes=fresh.floor_bytes + gradient)


def _compile(product: str, problem: Problem, chip: Chip, tiles: Tiles) -> Paths | None:
    """None where the compiler rejects the tiles, mostly for lack of vector memory."""
    # Private: the public `tokamax.ragged_dot` takes no tiles, and leaves those of its own choice one of v5p's two cores
    # without work.
    from tokamax._src.ops.gmm_v2.gmm_v2 import TileSizes, gmm_v2
    from tokamax._src.ops.gmm_v2.tgmm_v2 import tgmm_v2

    rows, experts, width, hidden, _ = problem
    sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
    narrow, wide = (jax.ShapeDtypeStruct((rows, size), jnp.bfloat16) for size in (width, hidden))
    bank = jax.ShapeDtypeStruct((experts, width, hidden), jnp.bfloat16)
    info = TileSizes(tiles.rows, hidden if product == "input gradient" else width, tiles.columns, tiles.bucket)
    functions: dict[str, tuple[Callable[..., Any], list[Any]]] = {
        "forward": (lambda x, bank, sizes: gmm_v2(x, bank, sizes, tile_info=info), [narrow, bank, sizes]),
        "input gradient": (
            lambda grad, bank, sizes: gmm_v2(grad, bank, sizes, tile_info=info, transpose_rhs=True),
            [wide, bank, sizes],
        ),
        "weight gradient": (
            lambda x, grad, sizes: tgmm_v2(x, grad, sizes, experts, tile_info=info, preferred_element_type=jnp.float32),
            [narrow, wide, sizes],
        ),
    }
    try:
        _, schedules = compile_for(chip, *functions[product])
    except jax.errors.JaxRuntimeError:
        return None
    ((name, whole),) = ((name, schedule) for name, schedule in schedules.items() if "gmm_v2" in name)
    loop, found = paths(name)
    buckets, cases = tiles.rows // tiles.bucket, 4 if product == "weight gradient" else 1
    if len(found) != buckets * cases:
        raise RuntimeError(f"{name}: {len(found)} paths with matrix products, expected {buckets} x {cases}")
    # The compiler lays out the largest bucket first, and in it the cases in the order of `Visits.case`.
    return Paths(whole, loop, [found[start : start + cases] for start in range(0, len(found), cases)][::-1])


def cost(product: str, problem: Problem, chip: Chip, tiles: Tiles, of: Paths | None) -> Cost:
    """Counted from its index maps: rows in blocks of the alignment, a block that two groups share is read for both; a
    matrix once, as its contracted width is not cut. Without what was compiled, the work of the matrix units alone.

    Cores share the tiles of columns.
    """
    gradient, alignment = product == "weight gradient", row_alignment(chip)
    contracted, columns = problem.width, problem.hidden
    if product == "input gradient":
        contracted, columns = columns, contracted
    visits, column_tiles = visit(problem.sizes, tiles, alignment, gradient), -(-columns // tiles.columns)
    bundles = 0.0
    if of is not None:
        taken = [of.of_bucket[b][c if gradient else 0] for b, c in zip(visits.bucket, visits.case, strict=True)]
        bundles = of.loop + float(np.mean(taken))
    matrix, rows, read = contracted * columns, problem.rows, int(visits.rows.sum())
    if gradient:
        # Experts without rows are written too, with zeros.
        banks = problem.experts * matrix * 4
        moved = banks + read * (column_tiles * contracted + columns) * BYTES
    else:
        banks = int(np.count_nonzero(problem.sizes)) * matrix * BYTES
        written = -(-rows // alignment) * alignment
        moved = banks + (column_tiles * read * contracted + written * columns) * BYTES
    return Cost(
        tiles=f"{tiles.rows}/{tiles.bucket} x {tiles.columns}",
        column_tiles=column_tiles,
        visits=len(visits.rows) * column_tiles,
        waves=float(-(-column_tiles // chip.cores) * len(visits.rows)),
        schedule=of.whole if of else Schedule(0, 0.0, 0),
        bundles=bundles,
        tile_flops=2.0 * float(np.mean(visits.bucket + 1)) * tiles.bucket * contracted * tiles.columns,
        bytes=float(moved),
        floor_flops=2.0 * rows * matrix,
        floor_bytes=float(banks + rows * (contracted + columns) * BYTES),
    )


@cache
def row_alignment(chip: Chip) -> int:
    """Rows of a block of bfloat16 in memory."""
    with jax.set_mesh(mesh(chip.topology)):
        return int(pltpu.get_tpu_info().get_sublane_tiling(jnp.dtype(jnp.bfloat16)))


def visit(sizes: np.ndarray[Any, Any], tiles: Tiles, alignment: int, gradient: bool) -> Visits:
    """A group's tiles start at its first row rounded down to the alignment. The weight gradient takes the smallest
    bucket that holds the rows, the other products the next larger one where the rows fill it."""
    rows, buckets, cases = [], [], []
    ends = np.cumsum(sizes)
    for first, end in zip(ends - sizes, ends, strict=True):
        if first == end:
            continue
        starts = range(first // alignment * alignment, end, tiles.rows)
        for index, start in enumerate(starts):
            size = min(end - start, tiles.rows)
            rows.append(-(-size // alignment) * alignment)
            buckets.append(min((size - gradient) // tiles.bucket, tiles.rows // tiles.bucket - 1))
            cases.append(2 * (index > 0) + (index < len(starts) - 1))
    return Visits(np.array(rows), np.array(buckets), np.array(cases))
