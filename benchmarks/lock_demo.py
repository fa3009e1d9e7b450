"""UniPool-lock beside the shared pool, the ordinary mixture and random ownership: paired runs on real text.

    python -m benchmarks.lock_demo --out results/lock_demo
    python -m benchmarks.lock_demo --out /tmp/try --seeds 1 --overrides train.steps=16 train.eval_every=4

Every seed fixes initial weights and the order of the text, and all methods are evaluated on the same slice of the valid
split, so differences are taken seed by seed: their mean, and its 95% interval over seeds. Finished runs are not
repeated. What is kept of each run: its configuration, metrics, summary and ownership maps.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.intervals import Losses, differences_table
from unipool_jax.analysis.history import read_history
from unipool_jax.analysis.paired import paired
from unipool_jax.cli.guard import guarded
from unipool_jax.config.compose import compose_config
from unipool_jax.config.files import write_text
from unipool_jax.config.schema import Config
from unipool_jax.training.entry import run
from unipool_jax.training.run_folder import read_summary

METHODS = {
    "vanilla": ["method=vanilla"],
    "unipool": ["method=unipool"],
    "unipool_lock": ["method=unipool_lock"],
    "random_from_start": ["method=unipool_lock", "lock.ownership=random_from_start"],
}
BASELINE = "vanilla"
# What the published tables were made with, whatever the demo is tuned to.
SETTINGS = (
    "train.steps=320 train.batch_size=16 train.microbatch_size=16 train.eval_every=80 train.checkpoint_every=160 "
    "optimizer.beta2=0.999 loss.switch_group_sequences=16 train.keep_checkpoints=1"
)
KEPT = ("config.yaml", "metrics.jsonl", "summary.json", "lock")


def configuration(method: str, seed: int, folder: Path, overrides: list[str]) -> Config:
    """One run of the study."""
    place = [f"run.dir={folder}", f"run.name={method}-seed{seed}", f"train.seed={seed}", "run.tensorboard=false"]
    return compose_config([*METHODS[method], *SETTINGS.split(), *overrides, *place])


def read_lines(run_folder: Path, kind: str) -> list[dict[str, Any]]:
    """Metrics of one kind."""
    return [line for line in read_history(run_folder) if line["kind"] == kind]


def table(losses: Losses, tests: dict[str, np.ndarray]) -> str:
    """Markdown: final losses, and paired differences of the validation loss; test losses are `[seeds]`."""
    rows = [["run", "valid loss", "test loss"], ["---"] * 3]
    for method, by_seed in losses.items():
        rows.append([method, f"{np.mean(list(by_seed.values())):.4f}", f"{tests[method].mean():.4f}"])
    return "".join("| " + " | ".join(row) + " |\n" for row in rows) + "\n" + differences_table(losses)


def draw_curves(path: Path, steps: list[int], curves: dict[str, np.ndarray], marks: dict[str, int]) -> None:
    """Validation loss of every method, and its paired difference from the baseline with standard errors."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    losses, differences = figure.subplots(1, 2)
    for index, (method, curve) in enumerate(curves.items()):
        style: dict[str, Any] = {"label": method, "color": f"C{index}"}
        losses.plot(steps, curve.mean(axis=0), marker="o", markersize=3, **style)
        if method != BASELINE:
            each = [paired(line.tolist()) for line in (curve - curves[BASELINE]).T]
            error = [value.standard_error or 0.0 for value in each]
            differences.errorbar(steps, [value.mean for value in each], yerr=error, capsize=2, **style)
    for axes, name in ((losses, "validation loss (nats)"), (differences, f"minus {BASELINE}, same seed (nats)")):
        for label, step in marks.items():
            axes.axvline(step, color="grey", linewidth=0.8, linestyle=":")
            axes.annotate(label, (step, 1), xycoords=("data", "axes fraction"), fontsize=8, color="grey", va="bottom")
        axes.set_xlabel("step")
        axes.set_ylabel(name)
        axes.legend(fontsize=8)
    differences.axhline(0, color="black", linewidth=0.8)
    figure.savefig(path)


def main() -> int:
    """Train what is missing, then write the table and the curves; returns an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of what is kept")
    parser.add_argument("--runs", type=Path, default=Path("runs/lock_demo"), help="folder of the runs themselves")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 .. N")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--overrides", nargs="*", default=[], help="settings for all runs, as `unipool train` takes them"
    )
    arguments = parser.parse_args()
    seeds = range(1, arguments.seeds + 1)
    for seed in seeds:
        # Seed by seed, so that an interrupted study has complete pairs.
        for method in arguments.methods:
            config = configuration(method, seed, arguments.runs, arguments.overrides)
            if code := guarded(functools.partial(run, config)):
                return code
            kept, source = arguments.out / f"{method}-seed{seed}", arguments.runs / f"{method}-seed{seed}"
            kept.mkdir(parents=True, exist_ok=True)
            for name in KEPT:
                if (source / name).is_dir():
                    shutil.copytree(source / name, kept / name, dirs_exist_ok=True)
                elif (source / name).exists():
                    shutil.copy(source / name, kept / name)
    if not {BASELINE, "unipool"} <= set(arguments.methods):
        print("no table: it needs vanilla and unipool")
        return 0

    curves, tests, steps = {}, {}, []
    for method in arguments.methods:
        valid = [read_lines(arguments.out / f"{method}-seed{seed}", "valid") for seed in seeds]
        steps = [line["step"] for line in valid[0]]
        curves[method] = np.array([[line["loss"] for line in lines] for lines in valid])
        summaries = [read_summary(arguments.out / f"{method}-seed{seed}") for seed in seeds]
        tests[method] = np.array([summary["results"]["test"]["loss"] for summary in summaries])
    marks = {}
    if "unipool_lock" in arguments.methods:
        lines = read_lines(arguments.out / "unipool_lock-seed1", "valid")
        for name, stage in (("freeze", 1), ("lock", 2)):
            marks[name] = next(line["step"] for line in lines if line["lock/installed_stage"] == stage)
    losses = {m: dict(zip(seeds, curve[:, -1].tolist(), strict=True)) for m, curve in curves.items()}
    text = table(losses, tests)
    write_text(arguments.out / "table.md", text)
    draw_curves(arguments.out / "curves.png", steps, curves, marks)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
