"""The cost of a grouped product on a TPU, from the compiler's schedule: ours, megablox's and `jax.lax.ragged_dot`'s.

That of tokamax is in `benchmarks.tpu_tokamax`.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import product as product_of
from typing import Any, NamedTuple, TypeVar

from benchmarks.tpu_schedule import Chip, Schedule, compile_for, mesh, paths  # before jax: it sets up the compiler

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from numpy.typing import NDArray

from benchmarks.grouped_matmul import group_sizes
from unipool_jax.kernels import pallas_tpu, tpu_tiles
from unipool_jax.kernels.group_plan import make_group_plan
from unipool_jax.kernels.tpu_bank_pass import BANK_PASS

ALIGNMENT = tpu_tiles.ROW_ALIGNMENT
BYTES = 2  # of a bfloat16 value; bank gradients are float32


class Problem(NamedTuple):
    """Rows, experts and widths, and one draw of the groups' sizes."""

    rows: int
    experts: int
    width: int
    hidden: int
    sizes: NDArray[np.int32]

    @classmethod
    def draw(cls, rows: int, experts: int, width: int, hidden: int) -> "Problem":
        return cls(rows, experts, width, hidden, group_sizes(rows, experts, skew=0.0))


class Cost(NamedTuple):
    """The work of a kernel for a problem, and its schedule."""

    tiles: str
    """Rows, contracted width where it is cut, and columns of a tile."""
    column_tiles: int
    visits: int
    """Tiles computed, over all tiles of columns."""
    waves: float
    """Visits one after another: the cores of a device share the tiles of columns."""
    schedule: Schedule
    bundles: float
    """Of a visit, on average."""
    tile_flops: float
    """Of a visit, on average."""
    bytes: float
    floor_flops: float
    floor_bytes: float
    bytes_after: float = 0.0
    """Moved by another program behind the kernel."""

    def compute(self, chip: Chip) -> float:
        """Modelled time of the instructions, in seconds."""
        return self.waves * max(self.bundles / chip.clock, self.tile_flops * chip.cores / chip.flops)

    def seconds(self, chip: Chip) -> float:
        """Modelled time."""
        return max(self.compute(chip), self.bytes / chip.bandwidth) + self.bytes_after / chip.bandwidth

    def floor(self, chip: Chip) -> float:
        """Lower bound of any kernel's time on this chip."""
        return max(self.floor_flops / chip.flops, self.floor_bytes / chip.bandwidth)


class Shape(NamedTuple):
    """Operands of one of our kernels: rows read at full width, rows read in tiles of columns, banks, outputs."""

    full: tuple[int, ...]
    tiled: int
    banks: int
    outputs: int
    width: int


def our_shapes(problem: Problem) -> dict[str, Shape]:
    """The row passes of the FFN by name, and the two plain products."""
    width, hidden = problem.width, problem.hidden
    return {
        "grouped_matmul": Shape((width,), 0, 1, 1, hidden),
        "grouped_matmul_transposed": Shape((hidden,), 0, 1, 1, width),
        "expert_ffn_in": Shape((width,), 0, 2, 3, hidden),
        "expert_ffn_gate_gradient": Shape((width,), 2, 1, 3, hidden),
        "expert_ffn_rows_gradient": Shape((hidden, hidden), 0, 2, 1, width),
    }


def our_cost(name: str, problem: Problem, tile_rows: int, column_tiles: int, chip: Chip, schedule: Schedule) -> Cost:
    """Counted from the definition of a tile: a group's rows from the block of 16 that it starts in. A block that two
    groups share is read once. Of a kernel's paths for tiles with few rows, those taken count."""
    ends = np.cumsum(problem.sizes)
    starts = ends - problem.sizes
    busy = problem.sizes > 0
    first = starts // ALIGNMENT * ALIGNMENT
    read = -(-ends[-1] // ALIGNMENT) * ALIGNMENT
    tiles = (-(-(ends - first) // tile_rows))[busy].sum()
    bundles = float(schedule.bundles)
    matrix = problem.width * problem.hidden
    if name == BANK_PASS:
        narrow, wide = sorted((problem.width, problem.hidden))
        flops = 2.0 * problem.rows * matrix
        tile_flops = 2 * tile_rows * matrix / column_tiles
        gradient = busy.sum() * matrix * 4 * 2
        moved = gradient + read * (narrow * column_tiles + wide) * BYTES
        least = gradient + problem.rows * (narrow + wide) * BYTES
    else:
        shape = our_shapes(problem)[name]
        contracted = sum(shape.full)
        products = contracted * shape.banks // len(shape.full)
        flops = 2.0 * problem.rows * products * shape.width
        counts = tpu_tiles.row_counts(tile_rows)
        ranks = [
            bisect_left(counts, min(end - start, tile_rows))
            for group_first, end in zip(first[busy], ends[busy], strict=True)
            for start in range(group_first, end, tile_rows)
        ]
        if schedule.paths:
            if len(schedule.paths) != len(counts):
                raise RuntimeError(f"{name}: {len(schedule.paths)} paths with matrix products, expected {len(counts)}")
            bundles += float(np.mean(np.take(schedule.paths, ranks))) - sum(schedule.paths)
        tile_flops = 2 * float(np.mean(np.take(counts, ranks))) * products * shape.width / column_tiles
        banks = busy.sum() * matrix * shape.banks * BYTES
        out = problem.rows * shape.outputs * shape.width * BYTES
        moved = banks + out + read * (contracted * column_tiles + shape.tiled * shape.width) * BYTES
        least = banks + out + problem.rows * (contracted + shape.tiled * shape.width) * BYTES
    width = max(problem.width, problem.hidden) if name == BANK_PASS else our_shapes(problem)[name].width
    return Cost(
        tiles=f"{tile_rows} x {width // column_tiles}",
        column_tiles=column_tiles,
        visits=int(tiles * column_tiles),
        waves=float(-(-column_tiles // chip.cores) * tiles),
        schedule=schedule,
        bundles=bundles,
        tile_flops=tile_flops,
        bytes=float(moved),
        floor_flops=flops,
        floor_bytes=float(least),
    )


def our_programs(problem: Problem) -> dict[str, tuple[Callable[..., Any], list[Any], tuple[int, ...]]]:
    """Functions, their arguments' shapes and the donated ones."""
    rows, experts, width, hidden, _ = problem

    def plan(sizes: jax.Array) -> Any:
        return make_group_plan(sizes, rows, implementation="pallas_tpu")

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    sizes, narrow, wide = array(experts, dtype=jnp.int32), array(rows, width), array(rows, hidden)
    into, out = array(experts, width, hidden), array(experts, hidden, width)
    into_f32, out_f32 = array(*into.shape, dtype=jnp.float32), array(*out.shape, dtype=jnp.float32)
    return {
        "forward": (
            lambda sizes, x, bank: pallas_tpu.matmul(x, bank, plan(sizes), transpose_bank=False),
            [sizes, narrow, into],
            (),
        ),
        "input gradient": (
            lambda sizes, grad, bank: pallas_tpu.matmul(grad, bank, plan(sizes), transpose_bank=True),
            [sizes, wide, into],
            (),
        ),
        "weight gradient": (
            lambda sizes, x, grad, total: pallas_tpu.bank_gradient(x, grad, plan(sizes), total),
            [sizes, narrow, wide, into_f32],
            (3,),
        ),
        "ffn": (
            lambda sizes, x, gate, up, down: pallas_tpu.ffn_forward(x, gate, up, down, plan(sizes), keep_products=True),
            [sizes, narrow, into, into, out],
            (),
        ),
        "ffn backward": (
            lambda sizes, grad, x, gate, up, down, gate_out, up_out, *totals: pallas_tpu.ffn_backward(
                grad, x, gate, up, down, plan(sizes), (gate_out, up_out), totals
            ),
            [sizes, narrow, narrow, into, into, out, wide, wide, into_f32, into_f32, out_f32],
            (8, 9, 10),
        ),
    }


def our_kernels(problem: Problem, chip: Chip, names: Sequence[str]) -> dict[str, Cost]:
    """Compile our kernels for the chip, several in one program, and count what they do."""
    costs: dict[str, Cost] = {}
    for name, (function, arguments, donate) in our_programs(problem).items():
        if name not in names:
            continue
        _, schedules = compile_for(chip, function, arguments, donate)
        tile_rows = tpu_tiles.tile_rows(chip.device_kind, problem.rows / problem.experts)
        for kernel, column_tiles in pallas_grids(function, arguments, chip).items():
            schedule = schedules.get(kernel, Schedule(0, 0, 0))
            if kernel != BANK_PASS:
                # In the order of `row_counts`: more rows take more bundles.
                schedule = schedule._replace(paths=tuple(sorted(paths(kernel)[1])))
            costs[kernel] = our_cost(kernel, problem, tile_rows, column_tiles, chip, schedule)
    return costs


def pallas_grids(function: Callable[..., Any], arguments: Sequence[Any], chip: Chip) -> dict[str, int]:
    """Tiles of columns of every kernel in the function, by name."""
    grids: dict[str, int] = {}

    def walk(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                (grids[equation.params["name"]],) = equation.params["grid_mapping"].grid
                continue
            for value in equation.params.values():
                if hasattr(value, "jaxpr"):
                    walk(value.jaxpr)

    with jax.set_mesh(mesh(chip.topology)):
        walk(jax.make_jaxpr(lambda *operands: function(*operands))(*arguments).jaxpr)
    return grids


PRODUCTS = {
    "forward": "grouped_matmul",
    "input gradient": "grouped_matmul_transposed",
    "weight gradient": BANK_PASS,
}


Tiles = TypeVar("Tiles")
Compiled = TypeVar("Compiled")


def fastest(
    chip: Chip,
    candidates: Iterable[Tiles],
    cost: Callable[[Tiles, Compiled | None], Cost],
    compiled: Callable[[Tiles], Compiled | None],
) -> Cost | None:
    """The candidate of least modelled time among those that compile; None where none do.

    Those are compiled that a bound from bytes and arithmetic alone, the `cost` of None, does not exclude: once it
    passes the best time, no schedule can help.
    """
    best: Cost | None = None
    bounds = {tiles: cost(tiles, None).seconds(chip) for tiles in candidates}
    for tiles, bound in sorted(bounds.items(), key=lambda item: item[1]):
        if best is not None and bound >= best.seconds(chip):
            break
        result = compiled(tiles)
        if result is not None:
            best = min((cost(tiles, result), *([best] if best else [])), key=lambda cost: cost.seconds(chip))
    return best


def megablox(product: str, problem: Problem, chip: Chip, schedules: dict[Any, Schedule | None]) -> Cost | None:
    """Megablox at the tiles of least modelled time among those that compile; None where none do.

    `schedules` keeps what was compiled: a schedule depends on the tiles, not on the number of rows.
    """
    _, experts, width, hidden, _ = problem
    contracted, columns = (hidden, width) if product == "input gradient" else (width, hidden)

    def compiled(tiles: tuple[int, int, int]) -> Schedule | None:
        key = (product, chip.name, experts, width, hidden, tiles)
        if key not in schedules:
            schedules[key] = _megablox_schedule(product, problem, chip, tiles)
        return schedules[key]

    def cost(tiles: tuple[int, int, int], schedule: Schedule | None) -> Cost:
        return _megablox_cost(product, problem, tiles, chip, schedule or Schedule(0, 0.0, 0))

    return fastest(chip, product_of((128, 256, 512), parts(contracted, 3072), parts(columns, 1536)), cost, compiled)


def parts(width: int, most: int) -> list[int]:
    """A width, and its half to quarter, where these are valid tiles and at most `most`."""
    return [width // parts for parts in (1, 2, 3, 4) if width % (parts * 128) == 0 and width // parts <= most]


def _megablox_schedule(product: str, problem: Problem, chip: Chip, tiles: tuple[int, int, int]) -> Schedule | None:
    """None where the compiler rejects the tiles, mostly for lack of vector memory."""
    rows, experts, width, hidden, _ = problem
    sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
    narrow, wide = (jax.ShapeDtypeStruct((rows, size), jnp.bfloat16) for size in (width, hidden))
    bank = jax.ShapeDtypeStruct((experts, width, hidden), jnp.bfloat16)
    total = jax.ShapeDtypeStruct((experts, width, hidden), jnp.float32)
    functions: dict[str, tuple[Callable[..., Any], list[Any], tuple[int, ...]]] = {
        "forward": (lambda x, bank, sizes: gmm(x, bank, sizes, jnp.bfloat16, tiles), [narrow, bank, sizes], ()),
        "input gradient": (
            lambda grad, bank, sizes: gmm(grad, bank, sizes, jnp.bfloat16, tiles, transpose_rhs=True),
            [wide, bank, sizes],
            (),
        ),
        "weight gradient": (
            lambda x, grad, sizes, total: tgmm(x.T, grad, sizes, jnp.float32, tiles, existing_out=total),
            [narrow, wide, sizes, total],
            (3,),
        ),
    }
    try:
        _, schedules = compile_for(chip, *functions[product])
    except jax.errors.JaxRuntimeError:
        return None
    return next((schedule for name, schedule in schedules.items() if "gmm" in name), None)


def _megablox_cost(product: str, problem: Problem, tiles: tuple[int, int, int], chip: Chip, schedule: Schedule) -> Cost:
    """Counted from its grid: row tiles at multiples of their size, visited once per group that has rows in them; a
    block is read when the grid moves on to another one."""
    tile_rows, tile_k, tile_n = tiles
    ends = np.cumsum(problem.sizes)
    starts = ends - problem.sizes
    groups, row_tiles = np.array(
        [
            (group, tile)
            for group, (start, end) in enumerate(zip(starts, ends, strict=True))
            for tile in range(start // tile_rows, -(-end // tile_rows))
            if end > start
        ]
    ).T
    matrix, visits, busy = problem.width * problem.hidden, len(groups), len(np.unique(groups))
    row_moves = 1 + int(np.count_nonzero(np.diff(row_tiles)))
    flops = 2.0 * problem.rows * matrix
    if product == "weight gradient":
        tiles_k, tiles_n = -(-problem.width // tile_k), -(-problem.hidden // tile_n)
        steps = tiles_n * tiles_k * visits
        gradient = busy * matrix * 4 * 2
        moved = tiles_n * tiles_k * row_moves * tile_rows * (tile_k + tile_n) * BYTES + gradient
        least = gradient + problem.rows * (problem.width + problem.hidden) * BYTES
    else:
        contracted, columns = (
            (problem.hidden, problem.width) if product == "input gradient" else (problem.width, problem.hidden)
        )
        tiles_k, tiles_n = -(-contracted // tile_k), -(-columns // tile_n)
        steps = tiles_n * visits * tiles_k
        row_reads, bank_reads = (row_moves, busy) if tiles_k == 1 else (visits * tiles_k, visits * tiles_k)
        written = row_moves * tile_rows * tile_n
        moved = tiles_n * (row_reads * tile_rows * tile_k + bank_reads * tile_k * tile_n + written) * BYTES
        least = (busy * matrix + problem.rows * (contracted + columns)) * BYTES
    return Cost(
        tiles=f"{tile_rows} x {tile_k} x {tile_n}",
        column_tiles=tiles_n,
        visits=steps,
        waves=-(-tiles_n // chip.cores) * steps / tiles_n,
        schedule=schedule,
        bundles=float(schedule.bundles),
        tile_flops=2.0 * tile_rows * tile_k * tile_n,
        bytes=float(moved),
        floor_flops=flops,
        floor_bytes=float(least),
    )


def ragged_dot_seconds(problem: Problem, chip: Chip) -> float | None:
    """Time of the forward product by `jax.lax.ragged_dot`, from the compiler's own count of FLOPs and bytes.

    None where it does not compile. On v5p it becomes a kernel, whose count is the estimate that its author gave.
    """
    shapes = [
        jax.ShapeDtypeStruct((problem.rows, problem.width), jnp.bfloat16),
        jax.ShapeDtypeStruct((problem.experts, problem.width, problem.hidden), jnp.bfloat16),
        jax.ShapeDtypeStruct((problem.experts,), jnp.int32),
    ]
    try:
        program, _ = compile_for(chip, jax.lax.ragged_dot, shapes)
    except jax.errors.JaxRuntimeError:
        return None
    cost = program.cost_analysis()
    return max(cost["flops"] / chip.flops, cost["bytes accessed"] / chip.bandwidth)
