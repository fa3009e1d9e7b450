"""What is selected from: questions with solutions in text (`cot`) and as programs (`tir`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unipool_jax.config.errors import UserError
from unipool_jax.config.files import FileError, read_lines
from unipool_jax.data.store_format import json_sha256

Format = Literal["cot", "tir"]
"""Chain of thought, or tool-integrated reasoning: prose with Python that is run."""

FORMATS: tuple[Format, Format] = ("cot", "tir")
_ADVICE = "what a line must have: unipool aptitude anchors --help"


@dataclass(frozen=True)
class Candidate:
    """A question with its solutions."""

    id: str
    source: str
    """The data set it comes from: anchors and thresholds are those of its source."""
    question: str
    cot: tuple[str, ...]
    tir: tuple[str, ...]
    """As many as in `cot`; each tells the solution at its place in `cot` as a program."""
    answer: str

    def pair(self, seed: int) -> int:
        """Which solution is shown, drawn from the seed and the id alone: the order of a file does not matter."""
        return int(json_sha256([seed, self.id]), 16) % len(self.cot)

    def as_json(self) -> dict[str, Any]:
        """A line of a file of candidates."""
        return {**self.__dict__, "cot": list(self.cot), "tir": list(self.tir)}


def read_candidates(path: Path) -> list[Candidate]:
    """The candidates of a file in the order of the file.

    Raises:
      FileError: it cannot be read, is empty, or a line lacks something, has an id that was there before, or not as
        many solutions in one format as in the other.
    """
    fields: dict[str, Any] = dict.fromkeys(("id", "source", "question", "answer"), str)
    fields |= {key: kind for name in FORMATS for key, kind in ((name, list), (f"{name}.*", str))}
    found: dict[str, Candidate] = {}
    for number, line in enumerate(read_lines(path, fields, _ADVICE), 1):
        if line.problem is not None:
            raise line.problem
        record, where = line.record, f"{path} line {number}"
        cot, tir = tuple(record["cot"]), tuple(record["tir"])
        if not cot or len(cot) != len(tir):
            raise FileError(
                f"{where}: {len(cot)} solutions in cot and {len(tir)} in tir; a question needs as many of both, each "
                f"program beside the text it tells again"
            )
        if record["id"] in found:
            raise FileError(f"{where}: the id {record['id']!r} was there before; give every question its own")
        found[record["id"]] = Candidate(record["id"], record["source"], record["question"], cot, tir, record["answer"])
    if not found:
        raise FileError(f"{path}: no candidates; {_ADVICE}")
    return list(found.values())


def fingerprint(candidates: Sequence[Candidate]) -> str:
    """sha256 of candidates, whatever their order."""
    return json_sha256([one.as_json() for one in sorted(candidates, key=lambda one: one.id)])


def by_source(candidates: Sequence[Candidate]) -> dict[str, list[int]]:
    """Places of the candidates of each source, in the order of their ids; sources in alphabetical order."""
    found: dict[str, list[int]] = {name: [] for name in sorted({one.source for one in candidates})}
    for place in sorted(range(len(candidates)), key=lambda place: candidates[place].id):
        found[candidates[place].source].append(place)
    return found


def check_embeddings(vectors_ND: np.ndarray, count: int, where: str) -> np.ndarray:
    """Embeddings as float64 `[N, D]`; raises UserError where they are not one finite vector for each candidate."""
    if vectors_ND.ndim != 2 or vectors_ND.dtype.kind not in "fiu":
        raise UserError(f"{where}: shape {vectors_ND.shape} of {vectors_ND.dtype}; a row of numbers for each candidate")
    if len(vectors_ND) != count:
        raise UserError(f"{where}: {len(vectors_ND)} rows for {count} candidates; embed that file, in its order")
    if not np.isfinite(vectors_ND).all():
        rows = np.flatnonzero(~np.isfinite(vectors_ND).all(axis=1))
        raise UserError(f"{where}: row {rows[0]} is not finite; embed that question again")
    return vectors_ND.astype(np.float64)
