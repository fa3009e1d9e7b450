"""`unipool analyse`: every routing analysis of one checkpoint, as JSON, figures and a page."""

from __future__ import annotations

import dataclasses
import functools
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from unipool_jax.analysis.analyse import Analysis, analyse
from unipool_jax.analysis.history import read_history
from unipool_jax.analysis.page import write_page
from unipool_jax.analysis.report import facts, parts
from unipool_jax.analysis.requests import AnalysisRequest
from unipool_jax.config.files import write_json
from unipool_jax.config.schema import Config, ConfigError
from unipool_jax.config.words import to_words
from unipool_jax.data.corpus import Corpus, open_corpus
from unipool_jax.data.pipeline import Batch
from unipool_jax.evaluation.scoring import LanguageModel
from unipool_jax.evaluation.target import check_tokenizer, evaluated_config, reads_own_text
from unipool_jax.evaluation.tasks_command import require_harness
from unipool_jax.training.checkpoint import Checkpoints, restore_model
from unipool_jax.training.evaluate import Evaluator
from unipool_jax.training.run_folder import CHECKPOINTS, RunError, find_run
from unipool_jax.training.state import BalanceState

if TYPE_CHECKING:
    from unipool_jax.analysis.task_probe import TaskMeasure


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
    text: str
    """Fingerprint of the text of these batches, its tokenizer and windows, as in evaluations."""
    own_text: bool | None
    """Whether it is the text that the run was trained beside; None in a run of an earlier version."""


def open_run(request: AnalysisRequest) -> OpenedRun:
    """Load the checkpoint that `request` names, on one device, and its text.

    Raises:
      ConfigError, RunError, CheckpointError, DataError: with what to do about it.
    """
    run = find_run(request.run)
    with Checkpoints(run / CHECKPOINTS, read_only=True) as checkpoints:
        step = checkpoints.find(request.step)
        meta = checkpoints.meta(step)
        config = evaluated_config(run, meta, request.overrides)
        if config.moe.router == "none":
            raise RunError(f"{run}: moe.router=none, a dense model: there is no routing to analyse")
        corpus = open_corpus(config.data, config.model.vocab_size)
        check_tokenizer(corpus.tokenizer, meta, checkpoints.path(step))
        own_text = reads_own_text(run, meta, corpus)
        # After a lock each layer has a pool of its own.
        config, params, balance = restore_model(checkpoints, config, step)
    evaluator = Evaluator(config, corpus, [request.split], limited=True)
    text = evaluator.fixed(request.split).fingerprint()
    batches = functools.partial(evaluator.fixed, request.split)
    return OpenedRun(run, step, config, params, balance, corpus, batches, text, own_text)


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


def analyse_command(request: AnalysisRequest) -> int:
    """Analyse; writes `analysis.json`, figures and `report.html`, and says where.

    Raises:
      ConfigError, RunError, CheckpointError, DataError: with what to do about it.
    """
    opened = open_run(request)
    run, step, config = opened.run, opened.step, opened.config
    print(f"{run}, step {step}: {config.scale_name} {config.method_name} on the {request.split} split", flush=True)
    measures = _task_measures(request, LanguageModel(config, opened.params, opened.balance, opened.corpus.tokenizer))
    analysis = analyse_run(request, opened)
    if measures:
        from unipool_jax.analysis.task_probe import probe_tasks

        found = probe_tasks(measures, analysis.counts_LE, config.moe.top_k, request.draws, config.visible)
        analysis = dataclasses.replace(analysis, task_probe=found)
    folder = Path(request.out) if request.out else run / "analysis" / str(step)
    page = write_results(analysis, folder, opened, request)
    for name, value in facts(analysis).items():
        print(f"{name}: {value}")
    print(f"report: {page}")
    return 0


def _rule(config: Config) -> str:
    starts, span = config.pool.starts, config.pool.span
    return f"pool.starts={starts}, pool.span={span}" if isinstance(starts, str) else "starts listed"


def _task_measures(request: AnalysisRequest, model: LanguageModel) -> list[TaskMeasure]:
    """Tasks for the probe, made ready (or refused) before anything that takes long."""
    if request.tasks is None:
        return []
    require_harness()
    from unipool_jax.analysis.task_probe import task_measure
    from unipool_jax.evaluation.harness import load_tasks

    limit = request.tasks.limit
    return [task_measure(model, task, limit, request.seed) for task in load_tasks(request.tasks)]


def write_results(analysis: Analysis, folder: Path, opened: OpenedRun, request: AnalysisRequest) -> Path:
    """Write `analysis.json`, the figures and the page into `folder`; returns the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    run, step = opened.run, opened.step
    document = {"run": str(run), "step": step, "split": request.split, "text": opened.text, "own_text": opened.own_text}
    write_json(folder / "analysis.json", document | analysis.as_json(), indent=1)
    config = analysis.config
    pools = "one pool" if config.pool.groups == 1 else f"{config.pool.groups} pools"
    if config.windows is not None:
        pools = f"one bank with windows ({_rule(config)})"
    title = f"Inside {run.name}: {config.method_name} after {step:,} steps"
    subtitle = (
        f"{config.scale_name}, {config.model.num_layers} layers, {config.total_experts} experts in {pools}, "
        f"top-{config.moe.top_k}; {analysis.tokens:,} tokens of the {request.split} split. "
        "Layers and experts count from 0."
    )
    if opened.own_text is False:
        subtitle += " This is not the text that the run was trained beside."
    command = shlex.join(["unipool", "analyse", *to_words(request)])
    return write_page(folder, title, subtitle, facts(analysis), parts(analysis, read_history(run, step)), command)
