"""Does sharing experts change what hidden states find? Dense, per-layer and pooled models retrieve Python functions.

    python -m benchmarks.retrieval_study                  # trains and tunes what is missing
    python -m benchmarks.retrieval_study --report         # the tables of what is there
    python -m benchmarks.retrieval_study --out /tmp/try --work /tmp/try/work --library some/package --seeds 1 \\
        --tune 5 --overrides train.steps=5

All have the same active parameters. For a seed they read the same text in the same order, and are tuned on the same
batches. The text is the Python of this machine's standard library without the files whose functions are tested on.
Each model is measured as it was trained and after contrastive tuning, beside BM25 and chance, on the queries to test
on of both tasks of `unipool retrieval data`.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.intervals import Losses, difference_cells, kept_runs, markdown_table, mean_cell
from unipool_jax.analysis.paired import CELLS
from unipool_jax.cli.guard import guarded
from unipool_jax.config.compose import compose_config
from unipool_jax.config.files import read_json, write_atomically, write_json, write_text
from unipool_jax.config.schema import Config
from unipool_jax.data.train_tokenizer import train_tokenizer
from unipool_jax.evaluation.requests import EvalRequest
from unipool_jax.evaluation.scoring import LanguageModel
from unipool_jax.evaluation.tasks_command import open_model
from unipool_jax.model.report import count_parameters
from unipool_jax.retrieval.baselines import bm25_scorer, random_scorer
from unipool_jax.retrieval.command import summarize
from unipool_jax.retrieval.embedding import embed, hidden_states
from unipool_jax.retrieval.folder import Collection, Index, make_index
from unipool_jax.retrieval.library import digest, divided, library_tasks, standard_library, training_sources
from unipool_jax.retrieval.requests import RetrievalTuneRequest
from unipool_jax.retrieval.search import Scorer, cosine_scorer
from unipool_jax.retrieval.tuning import examples, tune
from unipool_jax.training.entry import run
from unipool_jax.training.run_folder import read_summary

RESULTS = Path(__file__).resolve().parents[1] / "results" / "retrieval"
WORK = Path("runs/retrieval_study")
TEXT, TOKENIZER, BASELINES = "python.jsonl", "tokenizer.json", "baselines.json"
METHODS = ("dense", "vanilla", "unipool")
PAIRS = (("vanilla", "dense"), ("unipool", "dense"), ("unipool", "vanilla"))
STATES = ("frozen", "tuned")
SEEDS, TASK_SEED, VOCABULARY = 3, 0, 2048
TUNE_STEPS, TUNE_BATCH, TUNE_RATE = 140, 32, 1e-3
"""The rate had a lower loss on queries to tune on than 3e-3: dense, one other seed, 100 steps."""
SETTINGS = (
    "scale=demo data=text model.num_layers=4 model.hidden_size=64 model.ffn_size=128 data.sequence_length=64 "
    "train.batch_size=32 train.microbatch_size=32 train.steps=240 train.eval_every=0 train.eval_batch_size=64 "
    "train.eval_batches=16 train.checkpoint_every=240 train.keep_checkpoints=1 loss.switch_group_sequences=32 "
    "run.tensorboard=false"
)


def write_texts(library: Path, work: Path) -> None:
    """The text to pre-train on, and a tokenizer made of it."""
    sources = list(training_sources(library, TASK_SEED))
    write_text(work / TEXT, "".join(json.dumps({"text": source}) + "\n" for source in sources))
    write_atomically(work / TOKENIZER, train_tokenizer(sources, VOCABULARY))


def configuration(method: str, seed: int, work: Path, overrides: Sequence[str]) -> Config:
    """One run of the study."""
    place = [
        *(f"run.dir={work / 'runs'}", f"run.name={method}-seed{seed}", f"data.cache_dir={work / 'cache'}"),
        *(f"data.files=[{work / TEXT}]", f"data.tokenizer={work / TOKENIZER}", f"model.vocab_size={VOCABULARY}"),
    ]
    return compose_config([f"method={method}", *SETTINGS.split(), *overrides, *place, f"train.seed={seed}"])


class Tasks:
    """The queries to test on of both tasks, and those to tune on.

    Args:
      library: folder of Python files.
    """

    def __init__(self, library: Path):
        whole = library_tasks(library, TASK_SEED)
        self.digests = {name: digest(collection) for name, collection in whole.items()}
        parts = {name: divided(collection, TASK_SEED) for name, collection in whole.items()}
        self.tested: dict[str, tuple[Collection, Index]] = {
            name: (part["test"], make_index(part["test"])) for name, part in parts.items()
        }
        self.examples = [example for part in parts.values() for example in examples(part["train"])]

    def baselines(self) -> dict[str, Any]:
        """What BM25 and chance find."""
        results = []
        for name, (collection, index) in self.tested.items():
            queries = list(collection.queries.values())
            scorers = {"bm25": bm25_scorer(queries, index.texts), "random": random_scorer(len(index.texts), 0)}
            results += [summarize(name, retriever, index, scorer)._asdict() for retriever, scorer in scorers.items()]
        return {"python": platform.python_version(), "digests": self.digests, "results": results}

    def measure(self, model: LanguageModel, state: str) -> list[dict[str, Any]]:
        """What the cosines of a model find."""
        states, results = hidden_states(model, None), []
        for name, (collection, index) in self.tested.items():
            texts = (list(collection.queries.values()), index.texts)
            found = [embed(model, states, one, "mean") for one in texts]
            scorer: Scorer = cosine_scorer(*(one.vectors_ND for one in found))
            result = summarize(name, state, index, scorer)._replace(cut=sum(one.cut for one in found))
            results.append(result._asdict())
        return results


def examine(config: Config, tasks: Tasks, steps: int) -> dict[str, Any]:
    """What a trained model finds, frozen and tuned, and what it is."""
    folder = Path(config.run.dir) / str(config.run.name)
    model, _ = open_model(EvalRequest(str(folder)))
    results = tasks.measure(model, "frozen")
    request = RetrievalTuneRequest(  # of which only the numbers count here
        run=str(folder),
        out="",
        data=tuple(tasks.tested),
        steps=steps,
        batch_size=TUNE_BATCH,
        learning_rate=TUNE_RATE,
        seed=config.train.seed,
    )
    params, losses = tune(model, tasks.examples, request)
    results += tasks.measure(model._replace(params=params), "tuned")
    counts, tokens = count_parameters(config), config.train.batch_size * config.data.sequence_length
    return {
        "method": config.method_name,
        "seed": config.train.seed,
        "parameters": counts["total"],
        "active": counts["active"],
        "tokens": config.train.steps * tokens,
        "valid_loss": read_summary(folder)["results"]["valid"]["loss"],
        "tune_steps": steps,
        "tune_loss": statistics.fmean(losses[-20:]),
        "results": results,
    }


def stored(out: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """What was kept of each run, by method and seed."""
    return kept_runs(out, METHODS, "method")


def scores(runs: Mapping[str, Mapping[int, dict[str, Any]]], task: str, state: str) -> Losses:
    """nDCG@10 on a task, by method and seed."""
    return {
        method: {seed: _score(one["results"], task, state)["ndcg_10"] for seed, one in by_seed.items()}
        for method, by_seed in runs.items()
    }


def _score(results: Iterable[dict[str, Any]], task: str, retriever: str) -> dict[str, Any]:
    return next(one for one in results if (one["collection"], one["retriever"]) == (task, retriever))


def tables(runs: Mapping[str, Mapping[int, dict[str, Any]]], baselines: dict[str, Any]) -> list[str]:
    """Markdown: the models, what they find, and the differences paired by seed."""
    models = []
    for method, by_seed in runs.items():
        one = next(iter(by_seed.values()))
        losses = [statistics.fmean(found[name] for found in by_seed.values()) for name in ("valid_loss", "tune_loss")]
        sizes = [f"{one[name]:,}" for name in ("parameters", "active", "tokens")]
        models.append([method, str(len(by_seed)), *sizes, *(f"{loss:.4f}" for loss in losses)])
    found_rows, differences = [], []
    tasks = list(dict.fromkeys(one["collection"] for one in baselines["results"]))
    for task in tasks:
        beside = [f"{_score(baselines['results'], task, name)['ndcg_10']:.4f}" for name in ("bm25", "random")]
        for state in STATES:
            found = scores(runs, task, state)
            cells = [mean_cell(list(by_seed.values()), 4) for by_seed in found.values()]
            found_rows.append([task, state, *cells, *beside])
            for name, minus in PAIRS:
                if name in found and minus in found:
                    differences.append([task, state, f"{name} - {minus}", *difference_cells(found, name, minus)])
    for task in tasks:
        before, after = (scores(runs, task, state) for state in STATES)
        for method in runs:
            both = {"tuned": after[method], "frozen": before[method]}
            differences.append([task, "", f"{method}: tuned - frozen", *difference_cells(both, "tuned", "frozen")])
    return [
        markdown_table(["model", "seeds", "parameters", "active", "tokens", "valid loss", "tuning loss"], models),
        markdown_table(["task", "states", *runs, "BM25", "random"], found_rows),
        markdown_table(["task", "states", "difference", *CELLS], differences),
    ]


def study(arguments: argparse.Namespace) -> int:
    """Train, tune and measure what is missing; returns an exit code."""
    work: Path = arguments.work.resolve()
    if not (work / TOKENIZER).exists():
        write_texts(arguments.library, work)
    tasks = Tasks(arguments.library)
    # Seeds of a method run the same programs.
    jax.config.update("jax_compilation_cache_dir", str(work / "programs"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not (arguments.out / BASELINES).exists():
        write_json(arguments.out / BASELINES, tasks.baselines(), indent=1)
    if read_json(arguments.out / BASELINES)["digests"] != tasks.digests:
        sys.exit(f"{arguments.out}: of other tasks than {arguments.library} has with this Python; choose another --out")
    for seed in range(1, arguments.seeds + 1):
        for method in METHODS:  # seed by seed, so that an interrupted study has complete pairs
            kept = arguments.out / f"{method}-seed{seed}.json"
            if kept.exists():
                continue
            config, start = configuration(method, seed, work, arguments.overrides), time.process_time()
            if code := guarded(functools.partial(run, config)):
                return code
            found = examine(config, tasks, arguments.tune)
            write_json(kept, found | {"cpu_seconds": round(time.process_time() - start)}, indent=1)
    return 0


def main() -> int:
    """Run what is missing and print the tables; returns an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of what is kept")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the text and the runs themselves")
    parser.add_argument("--library", type=Path, default=standard_library(), help="folder of Python files")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="seeds 1 .. N")
    parser.add_argument("--tune", type=int, default=TUNE_STEPS, help="steps of contrastive tuning")
    parser.add_argument(
        "--overrides", nargs="*", default=[], help="settings for all runs, as `unipool train` takes them"
    )
    parser.add_argument("--report", action="store_true", help="print the tables only")
    arguments = parser.parse_args()
    if not arguments.report and (code := study(arguments)):
        return code
    print("\n".join(tables(stored(arguments.out), read_json(arguments.out / BASELINES))), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
