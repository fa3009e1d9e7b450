"""Differences of a stored study, paired by seed, with their intervals: what the tables in `results/` are made with.

    python -m benchmarks.intervals results/lock_demo
    python -m benchmarks.intervals results/ablations_demo/rows --minus vanilla

The folder holds runs named `NAME-seedN`, whose summaries are read, or a `compare.json` with the losses of runs that may
be gone.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from unipool_jax.analysis.paired import CELLS, paired
from unipool_jax.config.files import RESTORE, read_json
from unipool_jax.training.run_folder import SUMMARY, read_summary

Losses = dict[str, dict[int, float]]
"""Validation loss at the end of training, by name and seed."""


def stored_losses(folder: Path) -> Losses:
    """The losses of a study.

    Raises:
      SystemExit: the folder has no runs and no comparison.
    """
    found: defaultdict[str, dict[int, float]] = defaultdict(dict)
    if (folder / "compare.json").exists():
        for group in read_json(folder / "compare.json", RESTORE)["groups"]:
            for seed, run in group["runs"].items():
                found[name_of(Path(run))][int(seed)] = group["valid_loss_by_seed"][seed]
    else:
        for path in sorted(folder.glob(f"*-seed*/{SUMMARY}")):
            seed = int(path.parent.name.rpartition("-seed")[2])
            found[name_of(path.parent)][seed] = read_summary(path.parent)["results"]["valid"]["loss"]
    if not found:
        sys.exit(f"{folder}: no compare.json and no NAME-seedN/{SUMMARY} in it; give the folder of a study")
    return dict(found)


def kept_runs(folder: Path, names: Iterable[str], key: str) -> dict[str, dict[int, dict[str, Any]]]:
    """What a study kept of each run, in files `NAME-seedN.json`, by name and seed; names without a run are left out.

    Args:
      folder: of the study.
      names: in the order of its tables.
      key: under which a file has its name.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in names}
    for path in sorted(folder.glob("*-seed*.json")):
        one = read_json(path, RESTORE)
        found[one[key]][one["seed"]] = one
    return {name: by_seed for name, by_seed in found.items() if by_seed}


def mean_cell(values: Sequence[float], digits: int = 3) -> str:
    """Mean over seeds with its 95% t interval, where there are seeds enough for one."""
    interval, shown = paired(values).interval, f".{digits}f"
    mean = format(statistics.fmean(values), shown)
    return mean if interval is None else f"{mean} ({interval[0]:{shown}} to {interval[1]:{shown}})"


def name_of(run: Path) -> str:
    """`unipool` of `unipool-seed1`."""
    return run.name.rpartition("-seed")[0]


def difference_cells(losses: Losses, name: str, minus: str) -> list[str]:
    """The cells of a table's row, see `Paired.cells`; dashes without a common seed."""
    seeds = sorted(losses[name].keys() & losses[minus].keys())
    if not seeds:
        return ["-"] * (len(CELLS) - 1) + ["not shown: no seed in common"]
    return paired([losses[name][seed] - losses[minus][seed] for seed in seeds]).cells()


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lines of a Markdown table."""
    return "".join("| " + " | ".join(row) + " |\n" for row in [head, ["---"] * len(head), *rows])


def differences_table(losses: Losses, minus: Sequence[str] | None = None) -> str:
    """Markdown: every name minus these, or minus each before it."""
    pairs = itertools.combinations(losses, 2) if minus is None else itertools.product(minus, losses)
    rows = [[name, other, *difference_cells(losses, name, other)] for other, name in pairs if name != other]
    return markdown_table(["run", "minus", *CELLS], rows)


def main() -> int:
    """Print the table of one study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the study")
    parser.add_argument("--minus", nargs="+", metavar="NAME", help="what is subtracted; every pair without it")
    arguments = parser.parse_args()
    losses = stored_losses(arguments.folder)
    if unknown := [name for name in arguments.minus or [] if name not in losses]:
        parser.error(f"--minus {' '.join(unknown)}: there are {', '.join(losses)}")
    print(differences_table(losses, arguments.minus), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
