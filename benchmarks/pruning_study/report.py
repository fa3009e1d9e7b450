"""Tables of the pruning study, from what is there.

    python -m benchmarks.pruning_study.report

Differences are paired by seed, with their 95% t interval; fewer than three seeds show nothing.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from benchmarks.intervals import Losses, difference_cells, markdown_table, mean_cell, stored_losses
from benchmarks.pruning_study.__main__ import pools
from benchmarks.pruning_study.cases import AXES, CONTROLS, KEPT, PARENTS, POOL_ARMS, RESULTS
from unipool_jax.analysis.paired import CELLS


def right_after(folder: Path, key: str = "pruned") -> Losses:
    """Losses right after pruning, by case and seed."""
    found: defaultdict[str, dict[int, float]] = defaultdict(dict)
    for name, losses in pools(folder).items():
        case, _, seed = name.rpartition("-seed")
        found[case][int(seed)] = losses[key]
    return dict(found)


def recovery_table(start: Losses, end: Losses) -> str:
    """Each arm right after pruning and after recovery, as means over seeds."""
    rows = []
    for axis in AXES:
        for arm in [*(name for name, _ in axis.arms), "scratch"]:
            name = f"{axis.name}_{arm}"
            if name in end:
                first = f"{statistics.fmean(start[name].values()):.4f}" if name in start else "-"
                rows.append([axis.name, arm, str(len(end[name])), first, f"{statistics.fmean(end[name].values()):.4f}"])
    return markdown_table(["axis", "arm", "seeds", "after pruning", "after recovery"], rows)


def differences_table(end: Losses) -> str:
    """After recovery: every score minus chance, what is done beside a score minus the score alone, and from scratch."""
    rows = []
    for axis in AXES:
        arms = [name for name, _ in axis.arms]
        pairs = [(arm, "random") for arm in arms[1:]] + [(arm, "importance") for arm in arms[len(CONTROLS) :]]
        for arm, minus in [*pairs, ("importance", "scratch")]:
            name, other = f"{axis.name}_{arm}", f"{axis.name}_{minus}"
            if name in end and other in end:
                rows.append([axis.name, arm, minus, *difference_cells(end, name, other)])
    return markdown_table(["axis", "arm", "minus", *CELLS], rows)


def added(losses: Losses, sources: Losses) -> Losses:
    """What is added to the loss of the parents by dropping experts, by case of the study of pools."""
    names = [f"{m}_{n}_{arm}" for m, n, arm in itertools.product(PARENTS, KEPT, POOL_ARMS)]
    return {
        name: {seed: loss - sources[name][seed] for seed, loss in losses[name].items()}
        for name in names
        if name in losses
    }


def pool_table(losses: Losses, sources: Losses) -> str:
    """What dropping experts adds to the loss of a pool and of a per-layer mixture, and the difference of the two."""
    extra, rows = added(losses, sources), []
    for experts, arm in itertools.product(KEPT, POOL_ARMS):
        pool, mixture = (f"{method}_{experts}_{arm}" for method in PARENTS)
        if pool in extra and mixture in extra:
            both = [mean_cell(list(extra[name].values())) for name in (pool, mixture)]
            rows.append([str(experts), arm, *both, *difference_cells(extra, pool, mixture)])
    return markdown_table(["experts of 32", "importance", "pool, added", "per-layer mixture, added", *CELLS], rows)


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS, help="of the study")
    folder: Path = parser.parse_args().folder
    start = right_after(folder)
    print(recovery_table(start, end := stored_losses(folder / "runs")))
    print(differences_table(end))
    print(pool_table(start, right_after(folder, "source")), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
