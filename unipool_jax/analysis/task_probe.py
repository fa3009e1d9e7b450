"""The routing-randomization probe on multiple-choice tasks (method M8.1; results: M9.6).

`probe` with accuracy instead of loss: the model answers every question without and with each intervention, and
differences are paired by question. Importing this module needs lm-eval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from unipool_jax.analysis.observe import make_observed_step
from unipool_jax.analysis.probe import (
    Condition,
    Difference,
    Intervention,
    Items,
    Measure,
    Probe,
    deep_half,
    forced_choices,
    probe,
)
from unipool_jax.config.schema import ConfigError
from unipool_jax.data.pipeline import Batch
from unipool_jax.evaluation.harness import fitting_windows, questions_fingerprint
from unipool_jax.evaluation.scoring import LanguageModel, ScoreBatch, Scores, encode_pairs, score_windows


class TaskMeasure(NamedTuple):
    """The accuracy of a task."""

    name: str
    accuracy: Measure
    """From 0 to 1; items are questions."""
    metric: str
    """`acc_norm` if the task reports it, otherwise `acc` (method M10.17)."""
    questions: int
    text: str
    """Fingerprint of the questions, see `harness.questions_fingerprint`."""


class TaskProbe(NamedTuple):
    """Results of the probe on several tasks."""

    by_task: dict[str, Probe]
    """Accuracies from 0 to 1, by task."""
    metrics: dict[str, str]
    """See `TaskMeasure.metric`."""
    questions: dict[str, int]
    text: dict[str, str]
    """See `TaskMeasure.text`."""
    average: Probe
    """Plain mean over tasks."""


def forced_scores(model: LanguageModel, intervention: Intervention | None, seed: int) -> ScoreBatch:
    """Log-likelihoods under an intervention; `greedy_W` is always False."""
    step = make_observed_step(model.config)

    def score_batch(numbers_B: np.ndarray, batch: Batch) -> Scores:
        forced = None if intervention is None else forced_choices(model.config, intervention, seed, numbers_B, batch)
        loss_BS = np.asarray(step(model.params, model.balance, jax.device_put(batch), forced).loss_BS)
        return Scores(-loss_BS.sum(axis=1, dtype=np.float64), np.zeros(len(loss_BS), bool))

    return score_batch


def task_measure(model: LanguageModel, task: Any, limit: int | None = None, seed: int = 0) -> TaskMeasure:
    """The measure of accuracy on one task.

    Args:
      model: a model with routers.
      task: a multiple-choice task of lm-eval, from `harness.load_tasks`.
      limit: maximum number of questions, from the first; None is all.
      seed: of the random experts.

    Raises:
      ConfigError: not a multiple-choice task.
    """
    name = str(getattr(task, "task_name", None) or getattr(task, "name", task))
    if getattr(task, "OUTPUT_TYPE", None) != "multiple_choice":
        raise ConfigError([f"tasks={name}: the probe needs multiple-choice tasks; name such tasks with tasks=[...]"])
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    by_question: dict[int, list[Any]] = {}
    for request in task.instances:
        by_question.setdefault(request.doc_id, []).append(request)
    questions = [sorted(requests, key=lambda request: request.idx) for requests in by_question.values()]
    pairs = encode_pairs(model.tokenizer, [request.args for requests in questions for request in requests])
    parts = [fitting_windows(pair, model.max_length) for pair in pairs]
    windows = [window for part in parts for window in part]
    request_W = np.repeat(np.arange(len(parts)), [len(part) for part in parts])

    def results(log_likelihood_R: np.ndarray) -> list[dict[str, float]]:
        """The task's metrics of each question, from the log-likelihoods of all requests."""
        answers = iter(log_likelihood_R)
        return [task.process_results(q[0].doc, [(float(next(answers)), False) for _ in q]) for q in questions]

    metric = "acc_norm" if "acc_norm" in results(np.zeros(len(pairs)))[0] else "acc"

    def accuracy(intervention: Intervention | None) -> Items:
        scores = score_windows(model, windows, forced_scores(model, intervention, seed))
        log_likelihood_R = np.bincount(request_W, np.asarray(scores.log_likelihood_W), minlength=len(pairs))
        right_I = np.array([result[metric] for result in results(log_likelihood_R)], np.float64)
        return Items(right_I, np.ones(len(right_I)))

    return TaskMeasure(name, accuracy, metric, len(questions), questions_fingerprint(task.instances))


def probe_tasks(
    measures: Sequence[TaskMeasure],
    counts_LE: np.ndarray,
    top_k: int,
    draws: int = 1,
    visible_LE: np.ndarray | None = None,
) -> TaskProbe:
    """The probe on every task.

    Args:
      measures: of the tasks, from `task_measure`.
      counts_LE: routing counts per layer and expert on held-out text (not the tasks), for the matched variant.
      top_k: experts per token.
      draws: random draws to average over.
      visible_LE: with windows, the experts that each layer sees, bool.
    """
    layers = deep_half(len(counts_LE))
    probes = {found.name: probe(found.accuracy, counts_LE, top_k, layers, draws, visible_LE) for found in measures}
    return TaskProbe(
        probes,
        {found.name: found.metric for found in measures},
        {found.name: found.questions for found in measures},
        {found.name: found.text for found in measures},
        mean_probe(list(probes.values())),
    )


def mean_probe(probes: Sequence[Probe]) -> Probe:
    """Plain mean over probes of the same layers on different items."""
    first = probes[0]
    conditions = []
    for same in zip(*(one.conditions for one in probes), strict=True):
        by_layer = [_mean(values) for values in zip(*(condition.by_layer for condition in same), strict=True)]
        average = _mean([condition.average for condition in same])
        conditions.append(Condition(same[0].candidates, same[0].gates, by_layer, average))
    return Probe(
        float(np.mean([one.learned for one in probes])),
        first.layers,
        first.draws,
        conditions,
        sum(p.items for p in probes),
    )


def _mean(values: Sequence[Difference]) -> Difference:
    """Mean of independent differences."""
    errors = [value.standard_error for value in values if value.standard_error is not None]
    error = float(np.linalg.norm(errors)) / len(values) if len(errors) == len(values) else None
    return Difference(float(np.mean([value.mean for value in values])), error)
