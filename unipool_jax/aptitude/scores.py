"""The table of scores: one line a question, appended as they come, so that scoring that was killed goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unipool_jax.aptitude.candidates import FORMATS, Candidate, Format
from unipool_jax.config.errors import UserError
from unipool_jax.config.files import FileError, read_lines, writing

_ADVICE = "delete the line, and score again"


class Shown(NamedTuple):
    """One question to a model: an anchor after a demonstration."""

    question: str
    solution: str
    """Of the demonstration."""
    anchor: str
    """The anchor's question."""
    answer: str
    """The anchor's answer."""


Scorer = Callable[[Sequence[Shown]], Sequence[float | None]]
"""How well a model does with each, the more the better: 1 and 0 for right and wrong, or a log-likelihood. None for
what it cannot read."""


class Use(NamedTuple):
    """Experts that the solutions in both formats visit."""

    distance: float
    """Between their shares of experts, 0 to 1."""
    tokens_cot: int
    tokens_tir: int


Observer = Callable[[str, str, str], Use | None]
"""Compares the experts of two solutions, given the question and both; None for what it cannot read."""


class Score(NamedTuple):
    """What showing a question's solutions is worth."""

    id: str
    under: str
    """Fingerprint of the model, the anchors, the seed and the way of scoring."""
    shown: int
    """Which solution."""
    cot: float | None
    """Mean over the anchors; None where one of them could not be read in either format."""
    tir: float | None
    error: float | None
    """Standard error of `cot - tir` over anchors, which are the same for both."""
    use: Use | None = None
    """None of a model without routers."""

    def as_json(self) -> dict[str, Any]:
        """A line of the table."""
        return self._asdict() | {"use": None if self.use is None else self.use._asdict()}

    @property
    def difference(self) -> float:
        """NaN without scores."""
        return np.nan if self.cot is None or self.tir is None else self.cot - self.tir


def score(
    candidate: Candidate,
    anchors: Sequence[Mapping[str, str]],
    scorer: Scorer,
    seed: int,
    under: str,
    observer: Observer | None = None,
) -> Score:
    """Score one candidate.

    `S = 1/A sum_i score(G(question, solution, anchor_i))` for one solution in either format, and M = 1. The candidate
    itself is left out of the anchors: its demonstration has the answer.

    Args:
      candidate: what is shown.
      anchors: of its source.
      scorer: what is asked.
      seed: of the choice of a solution.
      under: see `Score`.
      observer: looks at the experts.

    Raises:
      UserError: no anchor is left.
    """
    shown = candidate.pair(seed)
    others = [one for one in anchors if one["id"] != candidate.id]
    if not others:
        raise UserError(f"anchors: none of source {candidate.source} to score {candidate.id} on; choose more anchors")
    solutions: dict[Format, str] = {"cot": candidate.cot[shown], "tir": candidate.tir[shown]}
    asked = [
        Shown(candidate.question, solutions[kind], one["question"], one["answer"]) for kind in FORMATS for one in others
    ]
    use = observer(candidate.question, *(solutions[kind] for kind in FORMATS)) if observer is not None else None
    found = scorer(asked)
    known = [value for value in found if value is not None]
    if len(known) < len(asked):
        return Score(candidate.id, under, shown, None, None, None, use)
    values_FA = np.array(known, np.float64).reshape(2, len(others))
    spread = float(np.std(values_FA[0] - values_FA[1], ddof=1) / np.sqrt(len(others))) if len(others) > 1 else None
    cot, tir = values_FA.mean(axis=1).tolist()
    return Score(candidate.id, under, shown, cot, tir, spread, use)


def read_scores(path: Path) -> dict[str, Score]:
    """Scores by id; raises FileError for a damaged line or a second score of a question."""
    number = float | None
    fields: dict[str, Any] = {"id": str, "under": str, "shown": int, "cot": number, "tir": number, "error": number}
    fields |= {"use": dict | None, "use.distance": float, "use.tokens_cot": int, "use.tokens_tir": int}
    found: dict[str, Score] = {}
    for line in read_lines(path, fields, _ADVICE):
        if line.problem is not None:
            raise line.problem
        record = line.record
        if record["id"] in found:
            raise FileError(f"{path}: two scores of {record['id']!r}; delete one of the lines")
        own = {name: record[name] for name in Score._fields}
        use = own["use"] and Use(**{name: own["use"][name] for name in Use._fields})
        found[record["id"]] = Score(**(own | {"use": use}))
    return found


def append_scores(
    path: Path,
    candidates: Sequence[Candidate],
    anchors: Mapping[str, Sequence[Mapping[str, str]]],
    scorer: Scorer,
    seed: int,
    under: str,
    observer: Observer | None = None,
) -> Iterator[Score]:
    """Score the candidates that a file does not have yet; each is in the file when it is yielded.

    Raises:
      UserError: the file has scores under something else, or a source has no anchors.
      FileError: it cannot be read or written.
    """
    if strange := sorted({one.source for one in candidates} - anchors.keys()):
        raise UserError(f"anchors: none of source {strange[0]}; choose them with unipool aptitude anchors")
    done = _whole_lines(path)
    if others := [one.id for one in done.values() if one.under != under]:
        raise UserError(
            f"{path}: {others[0]} was scored by another model, seed or way, or on other anchors; choose another out"
        )
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            for candidate in candidates:
                if candidate.id not in done:
                    new = score(candidate, anchors[candidate.source], scorer, seed, under, observer)
                    file.write((json.dumps(new.as_json()) + "\n").encode())
                    file.flush()
                    yield new


def _whole_lines(path: Path) -> dict[str, Score]:
    """The scores in a file, from which a last line that was not finished is cut."""
    if not path.exists():
        return {}
    with writing(path), path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
    return read_scores(path) if b"\n" in content else {}
