"""Tables and figures of the sharing study, from the runs that are there.

    python -m benchmarks.sharing_study.report            # prints the tables, draws the figures

Differences are paired by seed, with their 95% t interval; fewer than three seeds show nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.intervals import Losses, difference_cells, markdown_table
from benchmarks.sharing_study.cases import CASES, RESULTS
from unipool_jax.analysis.history import read_history
from unipool_jax.analysis.paired import CELLS, paired
from unipool_jax.training.run_folder import SUMMARY, read_summary

TEXTS = ("valid", "held_out")
MAIN = ("dense", "vanilla", "unipool", "unipool_centered")
AT_ONE_RATE = (
    ("vanilla_0.004", "dense_0.004"),
    ("unipool_0.004", "vanilla_0.004"),
    ("unipool_centered_0.004", "vanilla_0.004"),
    ("unipool_centered_0.004", "unipool_0.004"),
    ("vanilla_0.008", "dense_0.008"),
    ("unipool_0.008", "vanilla_0.008"),
    ("unipool_centered_0.008", "vanilla_0.008"),
    ("unipool_centered_0.008", "unipool_0.008"),
)
DRAWN = ("unipool_0.004", "unipool_centered_0.004", "unipool_published", "shared_pool_aux")
"""Cases of the figures beside the dense model and the per-layer mixture, all at one rate."""
ROUTING = {
    "load/busiest_over_mean": "busiest expert over the mean",
    "routing/zero_gates": "share of tokens without an expert",
}
"""Metrics that are drawn over time."""
HIGHER = ("", "_0.008", "_0.016")
WHY = (
    ("unipool_published", "vanilla_0.004"),
    ("unipool_published", "unipool_0.004"),
    ("unipool_normalized", "unipool_0.004"),
    ("shared_pool_aux", "vanilla_0.004"),
    ("shared_pool_aux", "unipool_published"),
    ("vanilla_normrouter", "vanilla_0.004"),
    ("unipool_published", "vanilla_normrouter"),
    ("half_pool", "unipool_0.004"),
    ("half_pool", "vanilla_0.004"),
    ("double_pool", "unipool_0.004"),
    ("two_pools", "unipool_0.004"),
    ("ring_16_of_32", "unipool_0.004"),
    ("tied_inner_32", "unipool_0.004"),
    ("tied_inner_32", "vanilla_0.004"),
    ("tied_inner_32", "shared_pool_aux"),
    ("unipool_top2", "vanilla_top2"),
    ("cs_moe", "vanilla_top2"),
    ("unipool_8_layers", "vanilla_8_layers"),
    ("unipool_20m", "vanilla_20m"),
    ("vanilla_again", "vanilla_0.004"),
    ("unipool_again", "unipool_0.004"),
    ("shared_pool_aux_0.008", "vanilla_0.008"),
    ("shared_pool_aux_0.016", "unipool_published"),
    # Beside the best of vanilla.
    *((f"{name}{rate}", "vanilla_0.016") for name in ("unipool_published", "shared_pool_aux") for rate in HIGHER),
)

Runs = dict[str, dict[int, Path]]
"""Folders of finished runs, by case and seed."""


def finished_runs(folder: Path) -> Runs:
    """Finished runs in the order of the cases."""
    found: Runs = {case.name: {} for case in CASES}
    for summary in sorted(folder.glob(f"*-seed*/{SUMMARY}")):
        name, _, seed = summary.parent.name.rpartition("-seed")
        found[name][int(seed)] = summary.parent
    return {name: by_seed for name, by_seed in found.items() if by_seed}


def losses(runs: Runs, text: str) -> Losses:
    """Loss at the end on one of `TEXTS`."""
    return {name: {seed: _result(run, text)["loss"] for seed, run in by_seed.items()} for name, by_seed in runs.items()}


def _result(run: Path, text: str) -> dict[str, Any]:
    result: dict[str, Any] = read_summary(run)["results"][text]
    return result


def runs_table(runs: Runs) -> str:
    """What each case reached, as means over seeds."""
    rows = []
    for name, by_seed in runs.items():
        results = [_result(run, "valid") for run in by_seed.values()]
        cells = [name, str(len(by_seed)), *(f"{_mean(runs, name, text):.4f}" for text in TEXTS)]
        if "routing/zero_gates" in results[0]:
            zero = statistics.fmean(statistics.fmean(result["routing/zero_gates"]) for result in results)
            busiest = [result["load/busiest_over_mean"] for result in results]
            used = statistics.fmean(result["experts/used"] for result in results)
            cells += [f"{zero:.2%}", f"{statistics.fmean(busiest):.1f}", f"{used:.1f}"]
        rows.append([*cells, *["-"] * (7 - len(cells))])
    return markdown_table(["run", "seeds", "valid", "held out", "zero gates", "busiest/mean", "experts used"], rows)


def _mean(runs: Runs, name: str, text: str) -> float:
    return statistics.fmean(_result(run, text)["loss"] for run in runs[name].values())


def best_rates(runs: Runs) -> dict[str, str]:
    """Of each main method the case with the lowest mean loss on the valid split, among those with most seeds."""
    best = {}
    for method in MAIN:
        cases = [c.name for c in CASES if c.part == "main" and c.name.rpartition("_")[0] == method and c.name in runs]
        complete = max((len(runs[name]) for name in cases), default=0)
        cases = [name for name in cases if len(runs[name]) == complete]
        if cases:
            best[method] = min(cases, key=lambda name: _mean(runs, name, "valid"))
    return best


def differences_table(runs: Runs, pairs: Iterable[tuple[str, str]]) -> str:
    """Paired differences of these cases on both texts."""
    rows = []
    for name, minus in pairs:
        if name in runs and minus in runs:
            rows += [[f"{name} - {minus}", text, *difference_cells(losses(runs, text), name, minus)] for text in TEXTS]
    return markdown_table(["difference", "text", *CELLS], rows)


def tables(runs: Runs) -> list[str]:
    """The tables of the page: losses, differences at each method's best rate, at equal rates, and the cases of why."""
    best = best_rates(runs)
    pairs = [(best[name], best[minus]) for name, minus in zip(MAIN[1:], (MAIN[0], MAIN[1], MAIN[1]), strict=True)]
    return [
        runs_table(runs),
        differences_table(runs, pairs),
        differences_table(runs, AT_ONE_RATE),
        differences_table(runs, WHY),
    ]


def valid_curves(runs: Runs, name: str) -> dict[int, dict[int, float]]:
    """Loss on the valid split by seed and number of tokens."""
    curves = {}
    for seed, run in runs[name].items():
        curves[seed] = {line["tokens"]: line["loss"] for line in _seen(run)}
    return curves


def _seen(run: Path) -> list[dict[str, Any]]:
    """Evaluations of a run, with the tokens trained on: the last training line's before each."""
    found, seen = [], 0
    for line in read_history(run):
        if line["kind"] == "train":
            seen = line["tokens"]
        elif line["kind"] == "valid":
            found.append(line | {"tokens": seen})
    return found


def draw_losses(runs: Runs, path: Path, minus: str = "vanilla_0.004") -> None:
    """The differences to one case over its tokens and FLOPs, with their intervals."""
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    base = valid_curves(runs, minus)
    for place, name in enumerate(("dense_0.004", *DRAWN)):
        curves = valid_curves(runs, name)
        seeds = sorted(curves.keys() & base.keys())
        tokens = sorted(curves[seeds[0]])
        spans = [paired([curves[seed][at] - base[seed][at] for seed in seeds]) for at in tokens]
        mean = np.array([span.mean for span in spans])
        low, high = np.array([span.interval for span in spans]).T
        millions = np.array(tokens) / 1e6 + 0.05 * place  # beside each other, not over each other
        axes.errorbar(millions, mean, [mean - low, high - mean], marker="o", capsize=3, label=name)
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set(xlabel="million tokens", ylabel=f"valid loss minus {minus}, nats per token")
    _flops_axis(axes, runs, minus)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_routing(runs: Runs, path: Path) -> None:
    """Load and tokens without an expert over tokens and FLOPs, as means over seeds."""
    figure, panels = plt.subplots(1, len(ROUTING), figsize=(9, 3.6), layout="constrained")
    for name in ("vanilla_0.004", *DRAWN):
        lines = [[one for one in read_history(run) if one["kind"] == "train"] for run in runs[name].values()]
        millions = [line["tokens"] / 1e6 for line in lines[0]]
        for axes, (key, label) in zip(panels, ROUTING.items(), strict=True):
            axes.plot(millions, np.mean([[np.mean(line[key]) for line in run] for run in lines], axis=0), label=name)
            axes.set(xlabel="million tokens", ylabel=label)
    for axes in panels:
        _flops_axis(axes, runs, "vanilla_0.004")
    panels[-1].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _flops_axis(axes: Axes, runs: Runs, name: str) -> None:
    """A second axis above; routers alone differ between methods, by less than the width of a line."""
    last = read_summary(next(iter(runs[name].values())))
    teraflops = last["flops"] / last["tokens"] / 1e6  # of a million tokens
    above = axes.secondary_xaxis("top", functions=(lambda x: x * teraflops, lambda x: x / teraflops))
    above.set_xlabel(f"training TFLOPs of {name}")


def main() -> int:
    """Print the tables and draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS, help="of the study")
    folder: Path = parser.parse_args().folder
    runs = finished_runs(folder / "runs")
    print("\n".join(tables(runs)), end="")
    matplotlib.use("agg")
    draw_losses(runs, folder / "curves.png")
    draw_routing(runs, folder / "routing.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
