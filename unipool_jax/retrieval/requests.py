"""Settings of the command `retrieval data`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from unipool_jax.config.ranges import Range

_SEED = Range(0, 2**32 - 1)


@dataclass(frozen=True, kw_only=True)
class RetrievalDataRequest:
    """Make two retrieval tasks of Python sources, by default of the standard library of this Python.

    stdlib_docstring: the first sentence of a docstring finds its function. stdlib_ccr: the first part of a function
    finds its rest. Of another library they are called docstring and ccr. Numbers of two Pythons are comparable where
    the digests that are printed are the same.

        unipool retrieval data out=retrieval
        unipool retrieval data out=retrieval library=my_package
    """

    out: str
    """Folder to write a folder for each task into: corpus.jsonl, queries.jsonl, qrels/test.tsv and about.json."""
    library: str | None = None
    """Folder of Python files; null is the standard library."""
    seed: Annotated[int, _SEED] = 0
    """Of the places where functions are cut."""
