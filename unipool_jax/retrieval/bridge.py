"""A trained run as the model that `coir-eval` and `mteb` ask for embeddings; neither is imported before it is used.

    from unipool_jax.retrieval.bridge import RunEncoder, coir_tasks

    coir.COIR(coir_tasks(["retrieval/stdlib_ccr"]), batch_size=128).run(RunEncoder("runs/finder"), "results")
    mteb.evaluate(RunEncoder("runs/finder"), mteb.get_tasks(["CosQA"]))

`coir-eval` 0.7 calls `encode_queries` and `encode_corpus`, `mteb` 2 the rest. Their batch sizes and devices are not
used: a run has its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unipool_jax.evaluation.requests import EvalRequest
from unipool_jax.evaluation.tasks_command import open_model
from unipool_jax.retrieval.embedding import embed, hidden_states
from unipool_jax.retrieval.folder import read_collection
from unipool_jax.retrieval.requests import Pooling
from unipool_jax.retrieval.search import unit

Document = str | Mapping[str, Any]
"""Text, or what has a `text` and perhaps a `title`."""
CoirTask = tuple[dict[str, dict[str, str]], dict[str, str], dict[str, dict[str, int]]]
"""Documents, queries and grades by query, each by id."""


class RunEncoder:
    """Embeddings of a trained run, as `unipool retrieval eval` makes them.

    Args:
      run: folder of the run.
      step: which checkpoint; None is the newest.
      layer, pooling: of the hidden states, as of `unipool retrieval eval`.
      titles: whether the title of a document is put before its text, as mteb does by itself and CoIR does not.

    Raises:
      UserError: no such run, or one that has no such layer.
    """

    def __init__(
        self,
        run: str,
        step: int | None = None,
        layer: int | None = None,
        pooling: Pooling = "mean",
        titles: bool = False,
    ):
        self._model, self.name = open_model(EvalRequest(run, step=step))
        self._states = hidden_states(self._model, layer)
        self._pooling, self._titles = pooling, titles

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        return embed(self._model, self._states, texts, self._pooling).vectors_ND

    def encode_queries(self, queries: Sequence[str], batch_size: int = 0, **rest: Any) -> np.ndarray:
        """Embeddings of texts, float32 `[N, D]`, in order; other arguments are not used."""
        return self._embed(list(queries))

    def encode_corpus(self, corpus: Sequence[Document], batch_size: int = 0, **rest: Any) -> np.ndarray:
        """Embeddings of documents, float32 `[N, D]`, in order; other arguments are not used."""
        return self._embed([self._text(document) for document in corpus])

    def _text(self, document: Document) -> str:
        if isinstance(document, str):
            return document
        title = document.get("title") if self._titles else None
        return f"{title} {document['text']}" if title else document["text"]

    def encode(self, inputs: Iterable[Mapping[str, Sequence[str]]], **rest: Any) -> np.ndarray:
        """Embeddings of the texts of all batches, float32 `[N, D]`, in order.

        Args:
          inputs: batches whose `text` is a list; mteb has put titles and texts of documents together.
          rest: task, split and kind of prompt, none of which changes an embedding.
        """
        return self._embed([text for batch in inputs for text in batch["text"]])

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines of all pairs, a tensor `[N, M]`; needs torch, as mteb does."""
        return _tensor(unit(np.asarray(embeddings1)) @ unit(np.asarray(embeddings2)).T)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines of the pairs of rows, a tensor `[N]`, as `similarity`."""
        return _tensor(np.sum(unit(np.asarray(embeddings1)) * unit(np.asarray(embeddings2)), axis=1))

    @property
    def mteb_model_meta(self) -> Any:
        """What mteb writes into its results; needs mteb."""
        from mteb.models.model_meta import ModelMeta

        name = f"unipool_jax/{Path(self.name.partition(':')[0]).parents[1].name}"
        return ModelMeta.create_empty(overwrites={"name": name, "revision": self.name})


def _tensor(values: np.ndarray) -> Any:
    """For mteb, which goes on in torch."""
    import torch

    return torch.from_numpy(values)


def coir_tasks(folders: Sequence[str], split: str = "test") -> dict[str, CoirTask]:
    """Collections as coir's `COIR` takes tasks: documents, queries and judgments, by the name of the folder.

    coir leaves out a document that has the id of the query, as both have in the tasks of a library: ids of queries get
    a prefix. Titles are empty, as coir needs them but does not use them.

    Args:
      folders: of collections.
      split: of `qrels/SPLIT.tsv`.

    Raises:
      FileError: no such collection, or one that is not as it should be.
    """
    found = {}
    for folder in folders:
        collection = read_collection(Path(folder), split)
        documents = {name: {"title": "", "text": text} for name, text in collection.documents.items()}
        queries = {f"query {name}": text for name, text in collection.queries.items()}
        grades = {f"query {name}": dict(judged) for name, judged in collection.grades.items()}
        found[Path(folder).name] = (documents, queries, grades)
    return found
