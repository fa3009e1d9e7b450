"""The TPU kernels against megablox, tokamax and `jax.lax.ragged_dot`, by the TPU compiler's own schedules.

Needs no TPU; tokamax takes part where it is installed (`pip install tokamax==0.0.17`, Python 3.12 or newer).

    python -m benchmarks.tpu_kernels                     # the three products at 768 -> 3072, 96 experts, four chips
    python -m benchmarks.tpu_kernels --peers 978m        # the same at another published scale
    python -m benchmarks.tpu_kernels --scales 182m 978m  # every kernel of the FFN at these published scales
    python -m benchmarks.tpu_kernels --write-tiles       # search tile sizes, write kernels/tpu_tiles.json

Nothing is timed. The compiler says how many instruction bundles one visit of a tile takes; how often each tile is
visited and which bytes move follows from the sizes of the groups, one draw of even random routing. A kernel's

    modelled time = max(visits x bundles / clock, FLOPs of the tiles visited / peak, bytes / HBM bandwidth)
    floor         = max(FLOPs / peak, each operand and result once / HBM bandwidth)

The second term of the model is there because a schedule may hold more products per cycle than the matrix units of the
chip complete.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.tpu_schedule import CHIPS, Chip  # before jax: it sets up the compiler

# isort: split
from benchmarks import tpu_tokamax
from benchmarks.grouped_matmul import environment
from benchmarks.tpu_costs import (
    PRODUCTS,
    Cost,
    Problem,
    megablox,
    our_cost,
    our_kernels,
    our_programs,
    ragged_dot_seconds,
)
from unipool_jax.config.files import write_json
from unipool_jax.kernels import tpu_tiles

# Experts and widths of the published scales.
SCALES = {
    "182m": (96, 768, 3072),
    "469m": (192, 1024, 4096),
    "650m": (288, 1024, 4096),
    "830m": (384, 1024, 4096),
    "978m": (192, 1536, 6144),
}
# Rows per expert of the table of tiles: those of the published scales at 8k, 16k and 64k rows, and some between.
ROWS_PER_EXPERT = (16, 22, 29, 43, 57, 86, 128, 171, 228, 342, 512, 683, 1024)
# Assumed cost of a pipeline step beside its instructions; decides only between tiles that are otherwise alike.
STEP_SECONDS = 0.35e-6
TILE_ROWS = (32, 48, *range(64, 513, 32))


def compare(chips: Sequence[Chip], rows: Sequence[int], scale: str) -> None:
    """The three products at a scale beside the kernels that JAX and tokamax bring."""
    known: dict[Any, Any] = {}
    slower: list[str] = []
    for chip in chips:
        for number in rows:
            problem = Problem.draw(number, *SCALES[scale])
            ours = our_kernels(problem, chip, list(PRODUCTS))
            title(chip, problem)
            for product, kernel in PRODUCTS.items():
                print(line(product, ours[kernel], chip))
                seconds = ours[kernel].seconds(chip)
                for peer, cost in peers(product, problem, chip, known):
                    if cost is None:
                        print(f"  {peer}: no tiles compiled")
                        continue
                    ratio = cost.seconds(chip) / seconds
                    print(line(f"  {peer}, {ratio:.2f} x ours", cost, chip), flush=True)
                    # A new array is not the same work as an addition to the sum over layers.
                    if 1 / ratio > 1.02 and peer != FRESH:
                        slower.append(f"{chip.name}, {number} rows, {product}: {1 / ratio:.2f} times {peer}")
            ragged, floor = ragged_dot_seconds(problem, chip), ours["grouped_matmul"].floor(chip)
            verdict = f"{ragged / floor:.1f} of the floor, by its own count" if ragged else "does not compile"
            print(f"  jax.lax.ragged_dot, forward: {verdict}", flush=True)
    print("\nOurs slower than a peer by more than 2%:", *(slower or ["nowhere"]), sep="\n  ")
    if not tpu_tokamax.INSTALLED:
        print(f"tokamax: {tpu_tokamax.HOW_TO_INSTALL}")


FRESH = "tokamax, fresh"
"""Its weight gradient without the addition."""


def peers(product: str, problem: Problem, chip: Chip, known: dict[Any, Any]) -> Iterator[tuple[str, Cost | None]]:
    """Other kernels of a product at their best tiles."""
    yield "megablox", megablox(product, problem, chip, known)
    if not tpu_tokamax.INSTALLED:
        return
    cost = tpu_tokamax.tokamax(product, problem, chip, known)
    if product != "weight gradient" or cost is None:
        yield "tokamax", cost
    else:
        yield FRESH, cost
        yield "tokamax, adding", tpu_tokamax.with_addition(cost, problem)


def all_kernels(chips: Sequence[Chip], scales: Sequence[str], rows: Sequence[int]) -> None:
    """Every kernel of the FFN, forward and backward, and the plain products."""
    for chip in chips:
        for scale in scales:
            for number in rows:
                problem = Problem.draw(number, *SCALES[scale])
                title(chip, problem)
                for name, cost in our_kernels(problem, chip, list(our_programs(problem))).items():
                    print(line(name, cost, chip), flush=True)


def title(chip: Chip, problem: Problem) -> None:
    """Name the problem and the columns of what follows."""
    print(f"\n{chip.name}, {problem.rows} rows, {problem.experts} experts, {problem.width} -> {problem.hidden}")
    print(f"{'':<30}{'tile':>20}{'visits':>8}{'bundles':>9}{'fill':>6}{'spills':>8}{'GB':>8}{'ms':>9}{'floor':>7}")


def line(name: str, cost: Cost, chip: Chip) -> str:
    """A row under `title`: of a visit, bundles, filled share of the matrix units and spills; of the whole, bytes moved,
    modelled time and its ratio to the floor."""
    schedule, seconds = cost.schedule, cost.seconds(chip)
    return (
        f"{name:<30}{cost.tiles:>20}{cost.visits:>8}{cost.bundles:>9.0f}{schedule.fill:>6.2f}{schedule.spills:>8}"
        f"{(cost.bytes + cost.bytes_after) / 1e9:>8.3f}{1e3 * seconds:>9.3f}{seconds / cost.floor(chip):>7.2f}"
    )


def write_tiles(scales: Sequence[str], rows: Sequence[int]) -> None:
    """Search the rows of a tile for every size of groups, then the columns at the given scales."""
    table = tpu_tiles.table()
    table.clear()
    table.update(made_with=environment(), tile_rows={}, columns={})
    for chip in CHIPS.values():
        table["tile_rows"][chip.device_kind] = best_tile_rows(chip)
        print(f"{chip.name}: tiles of", table["tile_rows"][chip.device_kind], flush=True)
    for chip in CHIPS.values():
        problems = [Problem.draw(number, *SCALES[scale]) for scale in scales for number in rows]
        table["columns"][chip.device_kind] = best_columns(chip, problems)
    write_json(Path(tpu_tiles.__file__).with_name("tpu_tiles.json"), table, indent=1)


def best_tile_rows(chip: Chip) -> dict[int, int]:
    """For each number of rows per expert the rows of a tile that make the forward product of the 182M scale fastest.

    Where the memory's bandwidth decides, those of the least work: instructions, and what a step of a pipeline costs.
    """
    _, experts, width, hidden = 0, *SCALES["182m"]
    schedules: dict[int, Cost] = {}
    for tile_rows in TILE_ROWS:
        problem = Problem.draw(128 * experts, experts, width, hidden)
        with replaced("tile_rows", lambda *_, tile_rows=tile_rows: tile_rows):
            schedules[tile_rows] = our_kernels(problem, chip, ["forward"])["grouped_matmul"]
    chosen: dict[int, int] = {}
    for rows in ROWS_PER_EXPERT:
        problem = Problem.draw(rows * experts, experts, width, hidden)
        costs = {
            tile_rows: our_cost("grouped_matmul", problem, tile_rows, known.column_tiles, chip, known.schedule)
            for tile_rows, known in schedules.items()
        }
        work = {tile_rows: cost.compute(chip) + cost.waves * STEP_SECONDS for tile_rows, cost in costs.items()}
        best = min(costs, key=lambda tile_rows: (max(costs[tile_rows].seconds(chip), work[tile_rows]), work[tile_rows]))
        chosen[rows] = best
    return chosen


def best_columns(chip: Chip, problems: Sequence[Problem]) -> dict[str, int]:
    """Columns of a tile, by kernel, shape and rows of a tile: the better of the two largest tiles that fit."""
    best: dict[str, tuple[float, int]] = {}
    for problem in problems:
        tile_rows = tpu_tiles.tile_rows(chip.device_kind, problem.rows / problem.experts)
        for rank in range(2):
            chosen: dict[str, int] = {}

            def choose(kind: str, key: str, *limits: int, rank: int = rank, chosen: dict[str, int] = chosen) -> int:
                fitting = tpu_tiles.fitting_columns(*limits)
                chosen[key] = fitting[min(rank, len(fitting) - 1)]
                return chosen[key]

            with replaced("columns", choose):
                costs = our_kernels(problem, chip, list(our_programs(problem)))
            for key, columns in chosen.items():
                seconds = costs[key.split()[0]].seconds(chip)
                if key not in best or seconds < best[key][0]:
                    best[key] = (seconds, columns)
        print(chip.name, f"{problem.rows} rows, {problem.width} -> {problem.hidden}, tiles of {tile_rows}", flush=True)
    return {key: columns for key, (_, columns) in sorted(best.items())}


@contextmanager
def replaced(name: str, function: Callable[..., int]) -> Iterator[None]:
    """Let the kernels choose their tiles by another function."""
    original = getattr(tpu_tiles, name)
    setattr(tpu_tiles, name, function)
    try:
        yield
    finally:
        setattr(tpu_tiles, name, original)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=[*CHIPS], default=[*CHIPS])
    parser.add_argument("--rows", nargs="+", type=int, default=[8192, 16384, 65536], help="rows per device")
    parser.add_argument("--scales", nargs="+", choices=[*SCALES], help="all our kernels at these, instead of peers")
    parser.add_argument("--peers", choices=[*SCALES], default="182m", help="the scale of the comparison with peers")
    parser.add_argument("--write-tiles", action="store_true", help="search tiles, columns at --scales (default 182m)")
    arguments = parser.parse_args()
    packages = ["libtpu", *["tokamax"] * tpu_tokamax.INSTALLED]
    print(", ".join([environment(), *(f"{name} {version(name)}" for name in packages)]))
    if arguments.write_tiles:
        write_tiles(arguments.scales or ["182m"], arguments.rows)
    elif arguments.scales:
        all_kernels([CHIPS[name] for name in arguments.chips], arguments.scales, arguments.rows)
    else:
        compare([CHIPS[name] for name in arguments.chips], arguments.rows, arguments.peers)


if __name__ == "__main__":
    main()
