"""`unipool eval tasks=...`: zero-shot tasks on a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from unipool_jax.data.tokenizer import load_tokenizer
from unipool_jax.evaluation.requests import EvalRequest, TaskRequest
from unipool_jax.evaluation.scoring import LanguageModel
from unipool_jax.evaluation.target import check_tokenizer, evaluated_config, locate
from unipool_jax.training.checkpoint import Checkpoints, restore_model
from unipool_jax.training.metrics import plain_json
from unipool_jax.training.run_folder import RunError


def require_harness() -> None:
    """Raises RunError without lm-eval, which is an extra; `evaluation.harness` can be imported afterwards."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise RunError(
            f'tasks=: zero-shot tasks need lm-eval ({error}); in the checkout: pip install ".[harness]"'
        ) from error


def tasks_command(request: EvalRequest, tasks: TaskRequest) -> int:
    """Run tasks on the checkpoint that `request` names; prints a table and, last, one line of JSON.

    Raises:
      ConfigError, RunError, CheckpointError, DataError: with what to do about it.
    """
    require_harness()
    from unipool_jax.evaluation.harness import harness_version, load_tasks, run_tasks

    loaded = load_tasks(tasks)
    model, title = open_model(request)
    results, text = run_tasks(model, tasks, loaded)
    print_tasks(results, title=f"{title}, {harness_version()}")
    # What was asked, as evaluations on text say what was read: numbers of other questions are not comparable.
    known = {name: {**result, "text": text.get(name)} for name, result in results.items()}
    document = {"harness": harness_version(), **dataclasses.asdict(tasks), "tasks": list(results), "results": known}
    # A folder may hold a task twice, on two splits; a mean is of tasks that someone chose.
    average = average_accuracy(results) if tasks.tasks else None
    if average is not None:
        print(f"mean of acc over {len(results)} tasks: {average:.4f}")
    print(json.dumps(plain_json(document | {"average_acc": average})))
    return 0


def open_model(request: EvalRequest) -> tuple[LanguageModel, str]:
    """The checkpoint that is asked for, on one device, and its name for a title."""
    folder, step = locate(request)
    with Checkpoints(folder, read_only=True) as checkpoints:
        step = checkpoints.find(step)
        meta = checkpoints.meta(step)
        config = evaluated_config(folder.parent, meta, request.overrides, text=False)
        tokenizer = load_tokenizer(config.data.tokenizer)
        check_tokenizer(tokenizer, meta, checkpoints.path(step))
        title = f"{checkpoints.path(step)}: {config.scale_name} {config.method_name}"
        config, params, balance = restore_model(checkpoints, config, step)
    return LanguageModel(config, params, balance, tokenizer), title


def average_accuracy(results: Mapping[str, Mapping[str, float | int | None]]) -> float | None:
    """Plain mean of raw accuracy over tasks (method M8.5); None unless there are several and all report one."""
    values = [result.get("acc") for result in results.values()]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(values) == len(known) > 1 else None


def print_tasks(results: Mapping[str, Mapping[str, float | int | None]], title: str) -> None:
    """`title` and a table with a row per task: accuracies, then what else was measured, with standard errors."""
    print(title)
    names = {key: None for result in results.values() for key in result if not key.endswith("_stderr")}
    metrics = sorted(names.keys() - {"documents"}, key=lambda name: (not name.startswith("acc"), name))
    table = Table()
    for name in ("task", "documents", *metrics):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task, result in results.items():
        count = result.get("documents")
        table.add_row(task, "-" if count is None else f"{count:,d}", *(_cell(result, name) for name in metrics))
    Console(width=None if Console().is_terminal else 100).print(table)


def _cell(result: Mapping[str, float | int | None], metric: str) -> str:
    value, error = result.get(metric), result.get(f"{metric}_stderr")
    if value is None:
        return "-"
    pattern = ".4f" if metric.startswith("acc") else ".4g"
    return f"{value:{pattern}}" + ("" if error is None else f" ± {error:{pattern}}")
