"""Does sharing experts change how far a model composes rules? Dense, per-layer and pooled models prove equations.

    python -m benchmarks.trig_study                       # trains what is missing
    python -m benchmarks.trig_study --report              # the tables of what is there
    python -m benchmarks.trig_study --out /tmp/try --work /tmp/try/work --seeds 1 --limit 5 --train 50 \\
        --overrides train.steps=20

All have the same active parameters, read the same text in the same order for a seed, and solve the same problems, of
which none is in the text. Of each run a file is kept: what it proves of each test, its size, its losses and its time.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.intervals import Losses, difference_cells, kept_runs, markdown_table, mean_cell
from unipool_jax.analysis.paired import CELLS
from unipool_jax.cli.guard import guarded
from unipool_jax.config.compose import compose_config
from unipool_jax.config.files import write_json
from unipool_jax.config.schema import Config
from unipool_jax.evaluation.requests import EvalRequest
from unipool_jax.evaluation.tasks_command import open_model
from unipool_jax.model.report import count_parameters
from unipool_jax.rewriting.command import measure
from unipool_jax.rewriting.requests import TrigEvalRequest
from unipool_jax.rewriting.text import TESTS, TOKENIZER, TRAIN, read_problems, write_data
from unipool_jax.training.entry import run
from unipool_jax.training.run_folder import read_summary

RESULTS = Path(__file__).resolve().parents[1] / "results" / "trig_rewrite"
WORK = Path("runs/trig_study")
METHODS = ("dense", "vanilla", "unipool")
PAIRS = (("vanilla", "dense"), ("unipool", "dense"), ("unipool", "vanilla"))
SEEDS = 3
TRAIN_PROBLEMS, TEST_PROBLEMS = 4_000, 40
"""Of each depth and of each test; a run reads the text one and a half times."""
SETTINGS = (
    "scale=demo data=trig_rewrite model.num_layers=4 model.hidden_size=96 model.ffn_size=192 model.vocab_size=256 "
    "data.sequence_length=192 train.batch_size=16 train.microbatch_size=16 train.steps=400 train.eval_every=0 "
    "train.checkpoint_every=400 train.keep_checkpoints=1 loss.switch_group_sequences=16 run.tensorboard=false"
)


def configuration(method: str, seed: int, work: Path, overrides: Sequence[str]) -> Config:
    """One run of the study, on the text in the folder of the work."""
    place = [
        *(f"run.dir={work / 'runs'}", f"run.name={method}-seed{seed}", f"data.cache_dir={work / 'cache'}"),
        *(f"data.files=[{work / 'data' / TRAIN}]", f"data.tokenizer={work / 'data' / TOKENIZER}"),
    ]
    return compose_config([f"method={method}", *SETTINGS.split(), *overrides, *place, f"train.seed={seed}"])


def prove(config: Config, work: Path, limit: int | None) -> dict[str, Any]:
    """What a trained model proves, and what it is."""
    folder = Path(config.run.dir) / str(config.run.name)
    request = TrigEvalRequest(str(folder), data=str(work / "data"), limit=limit)
    model, _ = open_model(EvalRequest(str(folder)))
    results = [
        result._asdict()
        for name in TESTS
        for result in measure(request, model, name, read_problems(work / "data" / f"{name}.jsonl", limit), "greedy")
    ]
    counts = count_parameters(config)
    valid = read_summary(folder)["results"]["valid"]["loss"]
    tokens = config.train.steps * config.train.batch_size * config.data.sequence_length
    size = {"parameters": counts["total"], "active": counts["active"], "tokens": tokens}
    return {"method": config.method_name, "seed": config.train.seed, **size, "valid_loss": valid, "results": results}


def stored(out: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """What was kept of each run, by method and seed."""
    return kept_runs(out, METHODS, "method")


def rates(runs: dict[str, dict[int, dict[str, Any]]], test: str, policy: str = "model") -> Losses:
    """Share of a test's problems that are proved, by method and seed."""
    return {
        method: {
            seed: next(r["passed"] for r in one["results"] if (r["test"], r["policy"]) == (test, policy))
            for seed, one in by_seed.items()
        }
        for method, by_seed in runs.items()
    }


def tables(runs: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """Markdown: the models, what they prove by test, and the differences paired by seed."""
    models = []
    for method, by_seed in runs.items():
        one = next(iter(by_seed.values()))
        loss = statistics.fmean(found["valid_loss"] for found in by_seed.values())
        sizes = [f"{one[name]:,}" for name in ("parameters", "active", "tokens")]
        models.append([method, str(len(by_seed)), *sizes, f"{loss:.4f}"])
    proved, differences = [], []
    for test in TESTS:
        found = rates(runs, test)
        chance = rates(runs, test, "random")
        cells = [mean_cell(list(by_seed.values())) for by_seed in found.values()]
        proved.append([test, *cells, f"{statistics.fmean(next(iter(chance.values())).values()):.3f}"])
        for name, minus in PAIRS:
            if name in found and minus in found:
                differences.append([test, f"{name} - {minus}", *difference_cells(found, name, minus)])
    return [
        markdown_table(["model", "seeds", "parameters", "active", "tokens", "valid loss"], models),
        markdown_table(["test", *runs, "random"], proved),
        markdown_table(["test", "models", *CELLS], differences),
    ]


def main() -> int:
    """Make the text, train and measure what is missing, print the tables; returns an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of what is kept")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the text and the runs themselves")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="seeds 1 .. N")
    parser.add_argument("--train", type=int, default=TRAIN_PROBLEMS, help="training problems of each depth")
    parser.add_argument("--limit", type=int, default=TEST_PROBLEMS, help="problems of each test")
    parser.add_argument(
        "--overrides", nargs="*", default=[], help="settings for all runs, as `unipool train` takes them"
    )
    parser.add_argument("--report", action="store_true", help="print the tables only")
    arguments = parser.parse_args()
    work: Path = arguments.work.resolve()
    if not arguments.report and not (work / "data" / TOKENIZER).exists():
        write_data(work / "data", arguments.train, arguments.limit, seed=0, whole_proofs=False)
    for seed in range(1, 0 if arguments.report else arguments.seeds + 1):
        for method in METHODS:  # seed by seed, so that an interrupted study has complete pairs
            kept = arguments.out / f"{method}-seed{seed}.json"
            if kept.exists():
                continue
            config, start = configuration(method, seed, work, arguments.overrides), time.process_time()
            if code := guarded(functools.partial(run, config)):
                return code
            found = prove(config, work, arguments.limit)
            arguments.out.mkdir(parents=True, exist_ok=True)
            write_json(kept, found | {"cpu_seconds": round(time.process_time() - start)}, indent=1)
    print("\n".join(tables(stored(arguments.out))), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
