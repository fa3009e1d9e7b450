"""`unipool eval`: loss of a checkpoint on the splits it was trained beside, or on any text."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from unipool_jax.config.schema import Config
from unipool_jax.data.corpus import open_corpus, open_texts
from unipool_jax.data.splits import SplitName
from unipool_jax.evaluation.requests import EvalRequest
from unipool_jax.evaluation.target import check_tokenizer, evaluated_config, locate, reads_own_text
from unipool_jax.parallel.mesh import usable_mesh
from unipool_jax.training.checkpoint import Checkpoints, restore_model
from unipool_jax.training.evaluate import EvalResult, Evaluator, print_results
from unipool_jax.training.metrics import plain_json
from unipool_jax.training.run_folder import RunError


class Evaluation(NamedTuple):
    """Results on text."""

    checkpoint: Path
    config: Config
    results: dict[str, EvalResult]
    """By split, or `text` for files."""
    own_text: bool | None
    """Whether it is the text that the run was trained beside; None in a run of an earlier version, which does not say.
    """


def evaluate_text(request: EvalRequest) -> Evaluation:
    """Loss of the checkpoint that `request` names, on its splits or files.

    Raises:
      ConfigError, RunError, CheckpointError, DataError: with what to do about it.
    """
    folder, step = locate(request)
    with Checkpoints(folder, read_only=True) as checkpoints:
        step = checkpoints.find(step)
        meta = checkpoints.meta(step)
        # Of files that are given, nothing of the run's own text is read, which need not be there.
        files = [("data.source", "files"), ("data.stores", ())] if request.files else []
        config = evaluated_config(folder.parent, meta, [*request.overrides, *files])
        mesh = usable_mesh(config)
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            return _evaluate(config, request, checkpoints, step, meta, mesh)


def evaluate_command(request: EvalRequest) -> int:
    """Evaluate on text or tasks; prints a table and, last, one line of JSON.

    Raises:
      ConfigError, RunError, CheckpointError, DataError: with what to do about it.
    """
    if request.tasks is not None:
        from unipool_jax.evaluation.tasks_command import tasks_command

        return tasks_command(request, request.tasks)
    found = evaluate_text(request)
    table = {name: result.as_json() for name, result in found.results.items()}
    print_results(table, title=f"{found.checkpoint}: {found.config.scale_name} {found.config.method_name}")
    print(json.dumps({"results": plain_json(table), "own_text": found.own_text}))
    return 0


def _evaluate(
    config: Config,
    request: EvalRequest,
    checkpoints: Checkpoints,
    step: int,
    meta: Mapping[str, Any],
    mesh: Mesh | None,
) -> Evaluation:
    vocab_size = config.model.vocab_size
    splits: dict[str, SplitName]
    if request.files:
        corpus, splits = open_texts(config.data, request.files, vocab_size), {"text": "test"}
    else:
        corpus = open_corpus(config.data, vocab_size)
        present = [split for split in corpus.splits() if split != "train"]
        splits = {split: split for split in request.splits or present}
    if not splits:
        raise RunError(f"data.split={config.data.split}: valid and test are empty; use splits=[train]")
    check_tokenizer(corpus.tokenizer, meta, checkpoints.path(step))
    own = False if request.files else reads_own_text(checkpoints.directory.parent, meta, corpus)
    _, params, balance = model = restore_model(checkpoints, config, step, mesh)
    evaluator = Evaluator(model.config, corpus, splits=list(splits.values()), limited=False, mesh=mesh)
    results = {name: evaluator.evaluate(params, balance, evaluator.fixed(split)) for name, split in splits.items()}
    found = {name: result for name, result in results.items() if result is not None}
    return Evaluation(checkpoints.path(step), config, found, own)
