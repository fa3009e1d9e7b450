"""The published ablation table at demo scale, with controls that separate its explanations.

    python -m benchmarks.ablations_demo                                    everything: a few hours on two CPU cores
    python -m benchmarks.ablations_demo --only vanilla unipool --seeds 1   part of it
    python -m benchmarks.ablations_demo --list                             commands, without running them

Nine rows of arXiv 2605.06665, table 5, and seven controls, each with every seed, on the embedded corpus with the demo's
settings and 12 layers, so that 6, 4 and 2 pools divide the depth as in the paper. Runs of one seed read the same
batches. A run that has finished is skipped, an interrupted one resumes, so the command can be repeated until
all are there. Each run's configuration, metrics and summary are copied into the results folder when it ends, so
another machine with that folder runs the rest. Beside them are the comparisons: `rows/` pairs the
published rows with vanilla, `controls/` pairs the controls with unipool.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.intervals import difference_cells, stored_losses
from unipool_jax.analysis.compare_command import compare_command
from unipool_jax.analysis.paired import CELLS
from unipool_jax.analysis.requests import CompareRequest
from unipool_jax.config.compose import compose_config, load_config
from unipool_jax.config.files import write_text
from unipool_jax.config.settings_table import frozen_differences
from unipool_jax.training.run_folder import CONFIG, SUMMARY

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
SETTINGS = ["scale=demo", "model.num_layers=12", "run.tensorboard=false", "train.keep_checkpoints=1"]
# What the published tables were made with, whatever the demo is tuned to.
SETTINGS += ["train.batch_size=16", "train.microbatch_size=16"]
SETTINGS += ["optimizer.beta2=0.999", "loss.switch_group_sequences=16"]


@dataclass(frozen=True)
class Case:
    """One line of the study."""

    name: str
    overrides: tuple[str, ...]
    published: float | None = None
    """Difference to vanilla at 182M after 30B tokens (method M9.4), nats per token."""
    question: str = ""
    """The question that a control answers."""


ROWS = (
    Case("vanilla", ("method=vanilla",), 0.0),
    Case("vanilla_normrouter", ("method=vanilla_normrouter",), +0.0058),
    Case("vanilla_aux_free", ("method=vanilla_aux_free",), -0.0078),
    Case("shared_layer_aux", ("method=shared_layer_aux",), +0.0163),
    Case("shared_pool_aux", ("method=shared_pool_aux",), -0.0137),
    Case("unipool", ("method=unipool",), -0.0288),
    Case("unipool_6_pools", ("method=unipool", "pool.groups=6"), -0.0196),
    Case("unipool_4_pools", ("method=unipool", "pool.groups=4"), -0.0218),
    Case("unipool_2_pools", ("method=unipool", "pool.groups=2"), -0.0104),
)
CONTROLS = (
    Case(
        "pool_of_8",
        ("method=unipool", "pool.experts=8"),
        question="As many experts for all layers as vanilla has in one: what does sharing bring without capacity, when "
        "each expert sees 12 times the tokens?",
    ),
    Case("half_pool", ("method=unipool", "pool.fraction=0.5"), question="Is it the number of experts?"),
    Case("double_pool", ("method=unipool", "pool.experts=192"), question="Is it the number of experts?"),
    Case("weak_balance", ("method=unipool", "loss.pool_coefficient=1e-4"), question="Is it balance over the pool?"),
    Case("strong_balance", ("method=unipool", "loss.pool_coefficient=1e-2"), question="Is it balance over the pool?"),
    Case(
        "previous_statistics",
        ("method=unipool", "loss.pool_statistics=previous"),
        question="Does the pool loss of the micro-batch before, as published, do what the exact one does?",
    ),
    Case("dense", ("method=dense",), question="Are experts of any kind worth it after so few tokens?"),
)


def command_of(case: Case, seed: int, steps: int, runs: Path, more: list[str]) -> list[str]:
    """Command line that trains one case with one seed."""
    half = max(1, steps // 2)
    rhythm = [f"train.steps={steps}", f"train.eval_every={half}", f"train.checkpoint_every={half}"]
    place = [f"train.seed={seed}", f"run.dir={runs}", f"run.name={folder_name(case, seed)}"]
    return [sys.executable, str(TRAIN), *SETTINGS, *case.overrides, *rhythm, *more, *place]


def folder_name(case: Case, seed: int) -> str:
    """Folder of one run."""
    return f"{case.name}-seed{seed}"


def recorded(case: Case, seed: int, command: list[str], out: Path) -> bool:
    """Whether the results hold this run; exits if they hold one of this name with other settings."""
    folder = out / "runs" / folder_name(case, seed)
    if not (folder / SUMMARY).exists():
        return False
    if others := frozen_differences(load_config(folder / CONFIG), compose_config(command[2:])):
        sys.exit(
            f"{folder}: was run with other {', '.join(others)}; give another --out and --runs, or the same settings"
        )
    return True


def record(case: Case, seed: int, runs: Path, out: Path) -> None:
    """Copy the files of a finished run, the summary last, because it marks the copy as complete."""
    folder = out / "runs" / folder_name(case, seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, "metrics.jsonl", SUMMARY):
        shutil.copyfile(runs / folder_name(case, seed) / name, folder / name)


def compare_recorded(seeds: list[int], out: Path) -> None:
    """Compare the rows and the controls as far as they are recorded."""

    def folders(cases: tuple[Case, ...]) -> list[str]:
        wanted = [out / "runs" / folder_name(case, seed) for case in cases for seed in seeds]
        return [str(folder) for folder in wanted if (folder / SUMMARY).exists()]

    vanilla, unipool = (tuple(case for case in ROWS if case.name == name) for name in ("vanilla", "unipool"))
    if folders(vanilla) and len(folders(ROWS)) > len(folders(vanilla)):
        compare_command(CompareRequest(tuple(folders(ROWS)), out=str(out / "rows")))
        write_text(out / "rows" / "published.md", published_table(out / "rows"))
    if folders(unipool) and folders(CONTROLS):
        compare_command(CompareRequest(tuple(folders(unipool + CONTROLS)), out=str(out / "controls")))


def published_table(comparison: Path) -> str:
    """The rows of a comparison minus vanilla, beside the published differences, as Markdown."""
    losses = stored_losses(comparison)
    head = ["row", "seeds", "valid loss", *CELLS, "published at 182M"]
    lines = [head, ["---"] * len(head)]
    for case in (case for case in ROWS if case.name in losses):
        found = losses[case.name]
        cells = ["-"] * len(CELLS) if case.name == "vanilla" else difference_cells(losses, case.name, "vanilla")
        mean = f"{statistics.fmean(found.values()):.4f}"
        lines.append([case.name, str(len(found)), mean, *cells, f"{case.published:+.4f}"])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def main() -> int:
    """Run the study."""
    names = [case.name for case in ROWS + CONTROLS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="steps of 4096 tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=names, metavar="CASE", help=f"of {', '.join(names)}")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations_demo"), help="where runs are kept")
    parser.add_argument("--out", type=Path, default=Path("results/ablations_demo"), help="where results go")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    options, more = parser.parse_known_args()
    cases = [case for case in ROWS + CONTROLS if options.only is None or case.name in options.only]
    runs, out = options.runs, options.out
    failed = []
    # Seed by seed, so that there is a complete table after half of the time.
    for seed in options.seeds:
        for case in cases:
            command = command_of(case, seed, options.steps, runs, more)
            if options.list:
                print(shlex.join(["python", "train.py", *command[2:]]) + f"  # {case.question}" * bool(case.question))
            elif not recorded(case, seed, command, out):
                print(f"== {folder_name(case, seed)}", flush=True)
                if subprocess.run(command, check=False).returncode:
                    failed.append(folder_name(case, seed))
                else:
                    record(case, seed, runs, out)
    if not options.list:
        compare_recorded(options.seeds, out)
    if failed:
        print(f"these runs failed and are not in the tables: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
