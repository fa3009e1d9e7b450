"""What pruning costs, and what importance, CLAP and SLNP are worth: hours on two CPU cores.

    python -m benchmarks.sharing_study.text --out ~/sharing_study        # the text, from packages
    python -m benchmarks.pruning_study --text ~/sharing_study            # everything
    python -m benchmarks.pruning_study --text ~/sharing_study --only experts --seeds 1
    python -m benchmarks.pruning_study.report                            # the tables of the results

A parent of 8 layers is cut down along each axis, by a score of importance or a control, and trained on for a fifth of
its steps, beside a small model from scratch at equal total compute. Pools, and per-layer mixtures beside them, lose
experts without training. Runs of one seed have one parent and read the same batches. What is there is skipped, so the
command can be repeated until all is.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import jax

from benchmarks.pruning_study.cases import (
    AXES,
    KEPT,
    PARENTS,
    POOL_ARMS,
    RESULTS,
    SEEDS,
    TOKENS,
    Axis,
    parent_words,
    recovery_words,
    scratch_words,
)
from unipool_jax.cli.main import execute
from unipool_jax.config.files import RESTORE, read_json, write_json
from unipool_jax.pruning.report import REPORT
from unipool_jax.training.run_folder import SUMMARY, read_summary

POOLS = "pools.json"
"""Losses of pools with fewer experts, by case."""


def train(name: str, words: tuple[str, ...], runs: Path, out: Path) -> Path:
    """Train a run that is not there, and keep its numbers."""
    folder, kept = runs / name, out / "runs" / name
    if not (kept / SUMMARY).exists() or not folder.exists():
        if code := execute(["train", *words, f"run.dir={runs}", f"run.name={name}"]):
            sys.exit(code)
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "metrics.jsonl", kept / "metrics.jsonl")
        summary = {name: value for name, value in read_summary(folder).items() if name != "text"}  # with its folder
        write_json(kept / SUMMARY, summary, indent=2)
    return folder


def prune(parent: Path, folder: Path, words: tuple[str, ...], seed: int) -> None:
    """Prune a parent anew."""
    shutil.rmtree(folder, ignore_errors=True)
    execute(["prune", str(parent), f"out={folder}", f"tokens={TOKENS}", f"seed={seed}", *words])


def study_axis(axis: Axis, parent: Path, seed: int, text: Path, runs: Path, out: Path) -> None:
    """The arms of one axis, and the model from scratch."""
    words = recovery_words(axis, text, seed)
    for arm, how in axis.arms:
        name = f"{axis.name}_{arm}-seed{seed}"
        if (out / "runs" / name / SUMMARY).exists():
            continue
        pruned = runs / f"{name}-pruned"
        prune(parent, pruned, (*axis.sizes, *how), seed)
        train(name, (*words, f"run.init_from={pruned}"), runs, out)
        keep_loss(out, name, pruned)
    train(f"{axis.name}_scratch-seed{seed}", scratch_words(axis, text, seed), runs, out)


def study_pools(method: str, parent: Path, seed: int, runs: Path, out: Path) -> None:
    """A pool, or a mixture, with fewer experts and as it is."""
    for experts in KEPT:
        for arm, how in POOL_ARMS.items():
            name = f"{method}_{experts}_{arm}-seed{seed}"
            if name not in pools(out):
                pruned = runs / f"pool-{name}"
                prune(parent, pruned, (f"pool.experts={experts}", *how), seed)
                keep_loss(out, name, pruned)


def pools(out: Path) -> dict[str, dict[str, float]]:
    """What is there of losses right after pruning, by run: of the parent and of what is left of it."""
    path = out / POOLS
    found: dict[str, dict[str, float]] = read_json(path, RESTORE) if path.exists() else {}
    return found


def keep_loss(out: Path, name: str, pruned: Path) -> None:
    """Add the losses of a pruned run to those that are kept."""
    loss = read_json(pruned / REPORT, RESTORE)["loss"]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / POOLS, pools(out) | {name: {key: loss[key] for key in ("source", "pruned")}}, indent=2)


def main() -> int:
    """Run the study, or a part of it."""
    names = [axis.name for axis in AXES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder made by benchmarks.sharing_study.text")
    parser.add_argument("--runs", type=Path, default=Path("runs/pruning_study"), help="where runs are kept")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results go")
    parser.add_argument("--only", nargs="+", choices=[*names, "pools"], default=[*names, "pools"], metavar="PART")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    options = parser.parse_args()
    text: Path = options.text.expanduser().resolve()
    # Arms of one axis train the same program.
    jax.config.update("jax_compilation_cache_dir", str((options.runs / "programs").resolve()))
    for seed in options.seeds:
        for method in PARENTS:
            if method == "unipool" or "pools" in options.only:
                parent = train(f"{method}-seed{seed}", parent_words(method, text, seed), options.runs, options.out)
            if "pools" in options.only:
                study_pools(method, parent, seed, options.runs, options.out)
        parent = options.runs / f"unipool-seed{seed}"
        for axis in AXES:
            if axis.name in options.only:
                study_axis(axis, parent, seed, text, options.runs, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
