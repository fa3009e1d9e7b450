"""Tables of the pruning study, from what is there.

    python -m benchmarks.pruning_study.report

Differences are paired by seed, with their 95% t interval; fewer than three seeds show nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from benchmarks.intervals import Losses, difference_cells, markdown_table, stored_losses
from benchmarks.pruning_study.__main__ import pools
from benchmarks.pruning_study.cases import AXES, KEPT, PARENTS, POOL_ARMS, RESULTS
from unipool_jax.analysis.paired import CELLS


def right_after(folder: Path, key: str = "pruned") -> Losses:
    """Losses right after pruning, by case and seed."""
    found: defaultdict[str, dict[int, float]] = defaultdict(dict)
    for name, losses in pools(folder).items():
        case, _, seed = name.rpartition("-seed")
        found[case][int(seed)] = losses[key]
    return dict(found)


def recovery_table(start: Losses, end: Losses) -> str:
    """Each arm right after pruning and after recovery, beside random and beside the model from scratch."""
    rows = []
    for axis in AXES:
        for arm in [*(name for name, _ in axis.arms), "scratch"]:
            name = f"{axis.name}_{arm}"
            if name not in end:
                continue
            first = f"{statistics.fmean(start[name].values()):.4f}" if name in start else "-"
            row = [axis.name, arm, str(len(end[name])), first, f"{statistics.fmean(end[name].values()):.4f}"]
            for other in ("random", "scratch"):
                minus = f"{axis.name}_{other}"
                known = minus in end and minus != name
                row += difference_cells(end, name, minus) if known else ["-"] * len(CELLS)
            rows.append(row)
    beside = [f"minus {other}: {cell}" for other in ("random", "scratch") for cell in CELLS]
    return markdown_table(["axis", "arm", "seeds", "after pruning", "after recovery", *beside], rows)


def pool_table(losses: Losses, sources: Losses) -> str:
    """What is added to the loss by dropping experts, of a pool and of a per-layer mixture."""
    rows = []
    for method in PARENTS:
        for experts in KEPT:
            for arm in POOL_ARMS:
                name = f"{method}_{experts}_{arm}"
                if name in losses:
                    both = {name: losses[name], "source": sources[name]}
                    mean = f"{statistics.fmean(losses[name].values()):.4f}"
                    row = [method, str(experts), arm, str(len(losses[name])), mean]
                    rows.append([*row, *difference_cells(both, name, "source")])
    return markdown_table(["parent", "experts of 32", "importance", "seeds", "loss", *CELLS], rows)


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS, help="of the study")
    folder: Path = parser.parse_args().folder
    start = right_after(folder)
    print(recovery_table(start, stored_losses(folder / "runs")))
    print(pool_table(start, right_after(folder, "source")), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
