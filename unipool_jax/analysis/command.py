"""`python -m unipool_jax.analysis RUN_DIR`: every routing analysis of one checkpoint, as JSON, figures and a page.

python -m unipool_jax.analysis                               the newest checkpoint of the run saved to last
python -m unipool_jax.analysis runs/demo expert_parallel=4   device load of experts dealt out over four devices
python -m unipool_jax.analysis runs/demo step=160 split=test out=pages/demo draws=3
python -m unipool_jax.analysis runs/demo tasks_path=tasks/olmo tasks=[olmo_piqa] limit=200   the probe on tasks too
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from unipool_jax.analysis.analyse import Analysis, analyse
from unipool_jax.analysis.history import read_history
from unipool_jax.analysis.page import write_page
from unipool_jax.analysis.report import facts, parts
from unipool_jax.config.schema import Config, ConfigError, settings
from unipool_jax.data.corpus import Corpus, open_corpus
from unipool_jax.data.pipeline import Batch
from unipool_jax.data.splits import SPLIT_NAMES, SplitName
from unipool_jax.evaluation.scoring import LanguageModel
from unipool_jax.evaluation.task_request import WORDS, TaskRequest, require_harness, split_words
from unipool_jax.evaluation.text import evaluated_config
from unipool_jax.training.checkpoint import Checkpoints, restore_model
from unipool_jax.training.evaluate import Evaluator
from unipool_jax.training.run_folder import CHECKPOINTS, RunError, find_run
from unipool_jax.training.state import BalanceState

if TYPE_CHECKING:
    from unipool_jax.analysis.task_probe import TaskMeasure

_OVERRIDES = ("data.", "kernels.")
_ALSO = {"train.eval_batches", "train.eval_batch_size"}


@dataclass(frozen=True)
class AnalysisRequest:
    """What to analyse; the command line sets each field by its name."""

    run: str = "latest"
    """Folder of a run, or `latest`."""
    step: int | None = None
    """Which checkpoint of the run; None is the newest."""
    out: str | None = None
    """Folder for the results; None is `analysis/STEP` in the run folder."""
    split: SplitName = "valid"
    """The text: as much of this split as evaluation during training reads (train.eval_batches)."""
    expert_parallel: int | None = None
    """Devices that experts are dealt out over, for device load; None is 8, or the largest divisor of the experts of a
    pool below it."""
    draws: int = 1
    """Random draws of the randomisation probe; 0 leaves it out."""
    seed: int = 0
    """Of the probe."""
    tasks: TaskRequest | None = None
    """Multiple-choice tasks that the probe runs too."""
    overrides: tuple[tuple[str, Any], ...] = ()
    """Settings that replace those of the checkpoint, by dotted name."""


_NUMBERS: dict[str, tuple[str, Callable[[int], bool]]] = {
    "step": ("a whole number, 0 or more", lambda value: value >= 0),
    "expert_parallel": ("a whole number, 1 or more", lambda value: value >= 1),
    "draws": ("a whole number, 0 or more", lambda value: value >= 0),
    "seed": ("a whole number from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32),
}


def parse_request(arguments: Sequence[str]) -> AnalysisRequest:
    """The request that a command line makes: at most one folder, and `NAME=VALUE` words.

    Raises:
      ConfigError: with every word that is not understood.
    """
    problems: list[str] = []
    found: dict[str, Any] = {}
    overrides: list[tuple[str, Any]] = []
    known = settings(Config())
    tasks, words = split_words(arguments)
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name == "run":
            folder = text if equals else name
            if "run" in found or not folder:
                problems.append(f"{word}: give one run folder; `compare RUN RUN ...` looks at several")
            found["run"] = folder
        elif (name == "out" and text) or (name == "split" and text in SPLIT_NAMES):
            found[name] = text
        elif name in _NUMBERS:
            allowed, sound = _NUMBERS[name]
            if text.removeprefix("-").isdigit() and sound(int(text)):
                found[name] = int(text)
            else:
                problems.append(f"{word}: expected {allowed}")
        elif name in known and (name.startswith(_OVERRIDES) or name in _ALSO):
            try:
                overrides.append((name, yaml.safe_load(text)))
            except yaml.YAMLError:
                problems.append(f"{word}: its value cannot be read; a list is {name}=[a,b]")
        else:
            names = ", ".join(f"{option}=" for option in ("run", "out", "split", *_NUMBERS, *WORDS))
            problems.append(
                f"{word}: not understood; use a run folder, {names}, train.eval_batches=, train.eval_batch_size= or a "
                f"setting of data or kernels; splits are {', '.join(SPLIT_NAMES)}"
            )
    if tasks is not None and tasks.num_fewshot:
        problems.append(f"num_fewshot={tasks.num_fewshot}: the probe asks without examples; leave it out")
    if tasks is not None and found.get("draws") == 0:
        problems.append("draws=0: leaves the probe out, the only analysis that uses tasks; leave tasks out too")
    if problems:
        raise ConfigError(problems)
    return AnalysisRequest(**found, tasks=tasks, overrides=tuple(overrides))


def expert_devices(wanted: int | None, experts: int) -> int:
    """Devices to deal E experts out over: `wanted`, or for None the largest divisor of E up to 8.

    Raises:
      ConfigError: if `wanted` does not divide E.
    """
    if wanted is None:
        return max(size for size in range(1, 9) if experts % size == 0)
    if experts % wanted:
        sizes = [size for size in range(1, experts + 1) if experts % size == 0]
        raise ConfigError(
            [f"expert_parallel={wanted}: {experts} experts of a pool cannot be dealt out evenly; use one of {sizes}"]
        )
    return wanted


class OpenedRun(NamedTuple):
    """A checkpoint with routers and the text to look at it with, ready for `analyse` and its like."""

    run: Path
    step: int
    config: Config
    params: Any
    balance: BalanceState
    corpus: Corpus
    batches: Callable[[], Iterable[Batch]]
    """Gives the same batches of the text each time."""


def open_run(request: AnalysisRequest) -> OpenedRun:
    """Load the checkpoint that `request` names, on one device, and its text.

    Raises:
      ConfigError, RunError, CheckpointError, DataError: with what to do about it.
    """
    run = find_run(request.run)
    with Checkpoints(run / CHECKPOINTS, read_only=True) as checkpoints:
        step = checkpoints.find(request.step)
        meta = checkpoints.meta(step)
        config = evaluated_config(meta["config"], request.overrides)
        if config.moe.router == "none":
            raise RunError(f"{run}: moe.router=none, a dense model: there is no routing to analyse")
        corpus = open_corpus(config.data, config.model.vocab_size)
        if corpus.tokenizer.sha256 != meta["tokenizer_sha256"]:
            raise RunError(
                f"data.tokenizer={config.data.tokenizer}: not the one that {checkpoints.path(step)} was trained with"
            )
        # After a lock each layer has a pool of its own.
        config, params, balance = restore_model(checkpoints, config, step)
    evaluator = Evaluator(config, corpus, [request.split], limited=True)
    return OpenedRun(run, step, config, params, balance, corpus, lambda: evaluator.fixed(request.split))


def analyse_run(request: AnalysisRequest, opened: OpenedRun) -> Analysis:
    """Every analysis of an opened run.

    Raises:
      ConfigError: if experts cannot be dealt out as `request` asks.
    """
    return analyse(
        opened.config,
        opened.params,
        opened.balance,
        opened.batches,
        devices=expert_devices(request.expert_parallel, opened.config.experts_per_pool),
        draws=request.draws,
        seed=request.seed,
    )


def analyse_command(arguments: Sequence[str]) -> int:
    """Analyse as the command line says; writes `analysis.json`, figures and `report.html`, and says where.

    Raises:
      ConfigError, RunError, CheckpointError, DataError: with what to do about it.
    """
    request = parse_request(arguments)
    opened = open_run(request)
    run, step, config = opened.run, opened.step, opened.config
    print(f"{run}, step {step}: {config.scale_name} {config.method_name} on the {request.split} split", flush=True)
    measures = _task_measures(request, LanguageModel(config, opened.params, opened.balance, opened.corpus.tokenizer))
    analysis = analyse_run(request, opened)
    if measures:
        from unipool_jax.analysis.task_probe import probe_tasks

        found = probe_tasks(measures, analysis.counts_LE, config.moe.top_k, request.draws)
        analysis = dataclasses.replace(analysis, task_probe=found)
    folder = Path(request.out) if request.out else run / "analysis" / str(step)
    page = write_results(analysis, folder, run, step, request.split, " ".join(arguments))
    for name, value in facts(analysis).items():
        print(f"{name}: {value}")
    print(f"report: {page}")
    return 0


def _task_measures(request: AnalysisRequest, model: LanguageModel) -> list[TaskMeasure]:
    """Tasks for the probe, made ready (or refused) before anything that takes long."""
    if request.tasks is None:
        return []
    require_harness()
    from unipool_jax.analysis.task_probe import task_measure
    from unipool_jax.evaluation.harness import load_tasks

    limit = request.tasks.limit
    return [task_measure(model, task, limit, request.seed) for task in load_tasks(request.tasks)]


def write_results(analysis: Analysis, folder: Path, run: Path, step: int, split: str, arguments: str) -> Path:
    """Write `analysis.json`, the figures and the page into `folder`; returns the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {"run": str(run), "step": step, "split": split} | analysis.as_json()
    (folder / "analysis.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    config = analysis.config
    pools = "one pool" if config.pool.groups == 1 else f"{config.pool.groups} pools"
    title = f"Inside {run.name}: {config.method_name} after {step:,} steps"
    subtitle = (
        f"{config.scale_name}, {config.model.num_layers} layers, {config.total_experts} experts in {pools}, "
        f"top-{config.moe.top_k}; {analysis.tokens:,} tokens of the {split} split. Layers and experts count from 0."
    )
    command = f"python -m unipool_jax.analysis {arguments}".rstrip()
    return write_page(folder, title, subtitle, facts(analysis), parts(analysis, read_history(run, step)), command)
