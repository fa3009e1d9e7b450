"""Our checkpoints as models of EleutherAI's lm-eval, and its tasks on them.

Importing this module needs lm-eval (`pip install ".[harness]"`), so import it where it is used, after
`tasks_command.require_harness`. PyTorch is not needed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import lm_eval
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from unipool_jax.config.schema import ConfigError
from unipool_jax.data.pipeline import Batch
from unipool_jax.data.store_format import json_sha256
from unipool_jax.evaluation.continuing import draw_batch, drawn_text
from unipool_jax.evaluation.requests import TaskRequest
from unipool_jax.evaluation.scoring import (
    LanguageModel,
    Scores,
    Window,
    encode_pairs,
    padded_length,
    plain_scores,
    row_count,
    score_windows,
)
from unipool_jax.model.sampling import Sampling
from unipool_jax.training.run_folder import RunError

_GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}


def harness_version() -> str:
    """Name and version of the harness, to report with every score."""
    return f"lm-eval {importlib.metadata.version('lm-eval')}"


def fitting_windows(pair: Window, max_length: int) -> list[Window]:
    """`pair` as windows of a model with `max_length` positions; together they score each token once.

    A context that is too long is truncated from the left. A continuation of more than `max_length` tokens becomes
    several windows, each with as much context as fits (as in `loglikelihood_rolling`). An empty continuation has none.
    """
    context, continuation = pair
    if len(continuation) == 0:
        return []
    if len(continuation) <= max_length:
        return [Window(context[-(max_length + 1 - len(continuation)) :], continuation)]
    rolling = get_rolling_token_windows([int(t) for t in continuation], int(context[-1]), max_length, context_len=1)
    return [Window(*make_disjoint_window(window)) for window in rolling]


class UniPoolLM(LM):
    """A checkpoint as an lm-eval model, on one device.

    Example: `lm_eval.simple_evaluate(model=UniPoolLM(model), tasks=["arc_easy"])`.

    Args:
      model: the checkpoint.
      seed: of sampling with a temperature. Samples also depend on which requests are in one batch.
    """

    def __init__(self, model: LanguageModel, seed: int = 0) -> None:
        super().__init__()
        self._model = model
        self._key = jax.random.key(seed)
        self.asked: dict[str, list[Instance]] = {}
        """The requests of each task so far."""

    def _note(self, requests: Sequence[Instance]) -> None:
        for request in requests:
            self.asked.setdefault(str(request.task_name), []).append(request)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation given its context, and whether greedy decoding produces it.

        See `encode_pairs` for how texts are split and for empty contexts, `fitting_windows` for texts that are too
        long. An empty continuation gives 0.0 and True.
        """
        self._note(requests)
        arguments = [(str(context), str(continuation)) for context, continuation in (r.args for r in requests)]
        answers = self._score(encode_pairs(self._model.tokenizer, arguments))
        for pair, answer in zip(arguments, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-likelihood in nats of each text, in disjoint windows, the first token after an end-of-document token."""
        self._note(requests)
        model, texts = self._model, [str(request.args[0]) for request in requests]
        start = np.array([model.tokenizer.eod], np.int32)
        answers = self._score([Window(start, tokens) for tokens in model.tokenizer.encode_batch(texts)])
        for text, (answer, _) in zip(texts, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answer)
        return [answer for answer, _ in answers]

    def _score(self, pairs: Sequence[Window]) -> list[tuple[float, bool]]:
        parts = [fitting_windows(pair, self._model.max_length) for pair in pairs]
        everything = [window for windows in parts for window in windows]
        score_batch = plain_scores(self._model)
        with tqdm(total=len(everything), desc="scoring", unit=" texts", disable=None) as bar:

            def counted(numbers_B: np.ndarray, batch: Batch) -> Scores:
                scores = jax.device_get(score_batch(numbers_B, batch))
                bar.update(int((numbers_B >= 0).sum()))
                return scores

            scores = score_windows(self._model, everything, counted)
        answers, first = [], 0
        for windows in parts:
            span = slice(first, first := first + len(windows))
            answers.append((float(np.sum(scores.log_likelihood_W[span])), bool(np.all(scores.greedy_W[span]))))
        return answers

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The continuation of each context, up to a stop string (excluded), the end of the document or `max_gen_toks`.

        Greedy unless `do_sample` or a temperature is set. A context that is too long is truncated from the left.

        Raises:
          RunError: a `max_gen_toks` that leaves no position for the context, or unknown settings.
        """
        self._note(requests)
        tokenizer = self._model.tokenizer
        contexts = tokenizer.encode_batch([str(request.args[0]) for request in requests])
        groups: dict[tuple[Sampling, int], list[int]] = {}
        prompts, stops = [], []
        for number, (request, tokens) in enumerate(zip(requests, contexts, strict=True)):
            sampling, until = self._sampling(request.args[1])
            room = self._model.max_length - sampling.max_tokens
            tokens = tokens[-room:] if len(tokens) else np.array([tokenizer.eod], np.int32)
            groups.setdefault((sampling, padded_length(len(tokens), room)), []).append(number)
            prompts.append(tokens)
            stops.append(until)
        answers = [""] * len(requests)
        for batch, ((sampling, width), members) in enumerate(sorted(groups.items(), key=lambda item: -item[0][1])):
            most = max(1, self._model.batch_tokens // (width + sampling.max_tokens))
            rows = row_count(len(members), most)
            for start in range(0, len(members), rows):
                chosen = members[start : start + rows]
                key = jax.random.fold_in(jax.random.fold_in(self._key, batch), start)
                drawn = draw_batch(self._model, [prompts[number] for number in chosen], rows, width, key, sampling)
                for number, tokens in zip(chosen, drawn, strict=True):
                    text = drawn_text(self._model, prompts[number], tokens, sampling)
                    answers[number] = _until(text, stops[number])
                    self.cache_hook.add_partial("generate_until", requests[number].args, answers[number])
        return answers

    def _sampling(self, settings: dict[str, Any]) -> tuple[Sampling, list[str]]:
        """Sampling parameters and stop strings of a request."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(settings))
        if unknown := sorted(kwargs.keys() - _GENERATION):
            raise RunError(f"generation_kwargs of the task: unknown {', '.join(unknown)}; use {sorted(_GENERATION)}")
        tokenizer, max_tokens = self._model.tokenizer, int(kwargs["max_gen_toks"])
        if not 1 <= max_tokens < self._model.max_length:
            raise RunError(
                f"max_gen_toks={max_tokens}: the model was trained on {self._model.max_length} positions "
                f"(data.sequence_length) and the context needs one; set at most {self._model.max_length - 1}"
            )
        temperature = float(kwargs.get("temperature", 1.0 if kwargs["do_sample"] else 0.0))
        top_p = float(kwargs.get("top_p", 1.0))
        until = [str(stop) for stop in kwargs["until"] if stop]
        return Sampling(tokenizer.vocab_size, tokenizer.eod, max_tokens, temperature, top_p), until


def _until(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first stop string in it."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def load_tasks(request: TaskRequest) -> list[Any]:
    """The requested tasks, or groups of tasks, with their documents.

    Raises:
      ConfigError: unknown names.
      RunError: a folder without tasks, or documents that cannot be read.
    """
    path = request.tasks_path
    if path is not None and not any(Path(path).glob("**/*.yaml")):
        raise RunError(f"tasks_path={path}: no tasks (*.yaml); create them with unipool tasks {path}")
    manager = TaskManager(include_path=path, include_defaults=path is None)
    names = request.tasks or tuple(sorted(manager.all_subtasks))
    known = set(manager.all_tasks)
    if unknown := [name for name in names if name not in known]:
        advice = f"choose from {', '.join(sorted(known))}" if path else f"{harness_version()} has no such task"
        raise ConfigError([f"tasks={name}: unknown; {advice}" for name in unknown])
    loaded = []
    for name in names:
        try:
            found = manager.load(name)
        except Exception as error:  # tasks, the data set library and the network raise errors of many types
            reason = " ".join(str(error).split())[:300]
            raise RunError(
                f"tasks={name}: its documents cannot be read ({type(error).__name__}: {reason}). "
                + (
                    f"If {path} was moved after the export, export again."
                    if path
                    else "Without network, use local tasks: unipool tasks FOLDER, then tasks_path=FOLDER"
                )
            ) from error
        loaded += list(found["groups"].values()) or list(found["tasks"].values())
    return loaded


def questions_fingerprint(requests: Iterable[Instance]) -> str:
    """sha256 of what a task asks and of its documents, answers included; the order of requests does not matter."""

    def digest(request: Instance) -> str:
        asked = [request.request_type, request.doc_id, request.idx, request.args, request.doc]
        return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()

    return json_sha256(sorted(map(digest, requests)))


class TaskResults(NamedTuple):
    """Results by task."""

    metrics: dict[str, dict[str, float | int | None]]
    """Metrics by lm-eval's names, each with its `NAME_stderr`, and `documents`."""
    text: dict[str, str]
    """Fingerprints of the questions, see `questions_fingerprint`; of groups none."""


def run_tasks(model: LanguageModel, request: TaskRequest, tasks: Sequence[Any], bootstrap: int = 1000) -> TaskResults:
    """Ask a checkpoint the questions of tasks.

    Args:
      model: the checkpoint.
      request: limit and number of examples.
      tasks: from `load_tasks`.
      bootstrap: resamples for standard errors without a formula (perplexity); 0 disables all standard errors.
    """
    # lm-eval bootstraps in forked processes, and forking a process with JAX's threads may hang.
    os.environ["DISABLE_MULTIPROC"] = "1"
    answering = UniPoolLM(model)
    found: Any = lm_eval.simple_evaluate(
        model=answering,
        tasks=list(tasks),
        num_fewshot=request.num_fewshot,
        limit=request.limit,
        bootstrap_iters=bootstrap,
        log_samples=False,
        # The default task manager would index 15,000 tasks.
        task_manager=TaskManager(include_defaults=False),
    )
    results: dict[str, dict[str, float | int | None]] = {}
    for name, values in found["results"].items():
        metrics = {key.partition(",")[0]: value for key, value in values.items() if "," in key}
        counted = found["n-samples"].get(name)
        results[name] = {key: None if value == "N/A" else value for key, value in metrics.items()}
        results[name]["documents"] = None if counted is None else counted["effective"]
    asked = {name: questions_fingerprint(requests) for name, requests in answering.asked.items()}
    return TaskResults(results, asked)
