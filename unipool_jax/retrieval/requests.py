"""Settings of the commands `retrieval data`, `retrieval eval` and `retrieval tune`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from unipool_jax.config.ranges import Range
from unipool_jax.config.words import Positional

Pooling = Literal["mean", "last"]

_SEED = Range(0, 2**32 - 1)


@dataclass(frozen=True, kw_only=True)
class RetrievalDataRequest:
    """Make two retrieval tasks of Python sources, by default of the standard library of this Python.

    stdlib_docstring: the first sentence of a docstring finds its function. stdlib_ccr: the first part of a function
    finds its rest. Of another library they are called docstring and ccr. The functions of a fifth of the files are to
    test on, the others to train on; documents are those of both. Numbers of two Pythons are comparable where the
    digests that are printed are the same.

        unipool retrieval data out=retrieval
        unipool retrieval data out=retrieval library=my_package
        unipool retrieval data out=retrieval human_eval=true
    """

    out: str
    """Folder to write a folder for each task into: corpus.jsonl, queries.jsonl, qrels/train.tsv, qrels/test.tsv and
    about.json."""
    library: str | None = None
    """Folder of Python files; null is the standard library."""
    human_eval: bool = False
    """Make human_eval instead: the 164 prompts of HumanEval find their solutions, all to test on. They are in the
    package human-eval (the extra `human-eval`)."""
    seed: Annotated[int, _SEED] = 0
    """Of the places where functions are cut, and of the files that are tested on."""

    def problems(self) -> Iterator[str]:
        """What does not go together."""
        if self.human_eval and self.library is not None:
            yield f"library={self.library}: human_eval=true makes a task of a package; leave one of both out"


@dataclass(frozen=True)
class RetrievalEvalRequest:
    """Let a model find documents by the cosine of its hidden states, beside BM25 and chance.

    A collection is a folder with corpus.jsonl (`_id`, `text` and perhaps `title` on each line), queries.jsonl (`_id`
    and `text`) and qrels/test.tsv (query, document and grade on each line, with tabs between). Prints a table and,
    last, one line of JSON.

        unipool retrieval eval runs/demo data=[retrieval/stdlib_docstring,retrieval/stdlib_ccr]
        unipool retrieval eval runs/demo data=[retrieval/stdlib_ccr] layer=2 pooling=last limit=200
    """

    run: Annotated[str, Positional()] = "latest"
    """Folder of a run, or `latest`, the run below runs/ that was saved to last."""
    step: Annotated[int | None, Range(0, 1_000_000_000)] = None
    """Which checkpoint of the run; null is the newest."""
    data: tuple[str, ...] = ()
    """Folders of collections."""
    split: str = "test"
    """Of the judgments, qrels/SPLIT.tsv."""
    titles: bool = False
    """Put the title of a document before its text; scores with and without are not comparable."""
    limit: Annotated[int | None, Range(1, 1_000_000_000)] = None
    """Queries of each collection at most, the first ones; null is all. Documents are always all."""
    layer: Annotated[int | None, Range(0, 100_000)] = None
    """Embeddings are hidden states after this many layers; null is the last layer, after the final norm."""
    pooling: Pooling = "mean"
    """Over the tokens of a text: their mean, or the last one."""
    seed: Annotated[int, _SEED] = 0
    """Of the random scores."""

    def problems(self) -> Iterator[str]:
        """What is missing."""
        if not self.data:
            yield "data=[]: which collections? Make some with unipool retrieval data, and give data=[FOLDER,FOLDER]"


@dataclass(frozen=True, kw_only=True)
class RetrievalTuneRequest:
    """Teach a model to find documents: contrastive fine-tuning (InfoNCE), as a new run at step 0.

    The cosine of a query with its document shall be the highest among the documents of its batch. Evaluate the new run
    with the same pooling.

        unipool retrieval tune runs/demo out=runs/finder data=[retrieval/stdlib_docstring,retrieval/stdlib_ccr]
        unipool retrieval eval runs/finder data=[retrieval/stdlib_docstring,retrieval/stdlib_ccr]
    """

    run: Annotated[str, Positional()] = "latest"
    """Folder of a run, or `latest`, the run below runs/ that was saved to last."""
    step: Annotated[int | None, Range(0, 1_000_000_000)] = None
    """Which checkpoint of the run; null is the newest."""
    out: str
    """Folder of the new run, for example runs/finder; it must not exist."""
    data: tuple[str, ...] = ()
    """Folders of collections."""
    split: str = "train"
    """Of the judgments, qrels/SPLIT.tsv."""
    titles: bool = False
    """Put the title of a document before its text."""
    pooling: Pooling = "mean"
    """Over the tokens of a text: their mean, or the last one."""
    steps: Annotated[int, Range(1, 10_000_000)] = 200
    """Batches to learn from."""
    batch_size: Annotated[int, Range(2, 100_000)] = 32
    """Queries of a batch; each has the documents of the others as wrong answers."""
    length: Annotated[int, Range(1, 1_048_576)] = 128
    """Tokens of a text that are read, at most those of the model."""
    learning_rate: Annotated[float, Range(0, 1, open_low=True)] = 2e-4
    """Of Adam, at its highest."""
    temperature: Annotated[float, Range(0, 1e3, open_low=True)] = 0.05
    """Cosines are divided by it."""
    seed: Annotated[int, _SEED] = 0
    """Of the order of queries."""

    def problems(self) -> Iterator[str]:
        """What is missing."""
        if not self.data:
            yield "data=[]: which collections? Make some with unipool retrieval data, and give data=[FOLDER,FOLDER]"
