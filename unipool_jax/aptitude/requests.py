"""Settings of the commands `aptitude anchors`, `aptitude score` and `aptitude select`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from unipool_jax.aptitude.rule import Variant
from unipool_jax.config.ranges import Range
from unipool_jax.config.words import Positional

_SEED = Range(0, 2**32 - 1)


@dataclass(frozen=True, kw_only=True)
class AnchorsRequest:
    """Choose questions that stand for each source: the nearest to the centers of seeded k-means.

    A file of candidates has one JSON object a line: `id`, `source` (the data set it comes from), `question`, `cot` (a
    list of solutions in text), `tir` (the same as programs, as many) and `answer`.

        unipool aptitude anchors candidates.jsonl out=anchors.json
        unipool aptitude anchors candidates.jsonl out=anchors.json embeddings=vectors.npy count=200
        unipool aptitude anchors candidates.jsonl out=anchors.json run=runs/a
    """

    candidates: Annotated[str, Positional()]
    """File of candidates."""
    out: str
    """File to write."""
    count: Annotated[int, Range(1, 1_000_000)] = 100
    """Anchors of each source. The standard error of a score by generation is up to `0.5 / sqrt(count)`."""
    embeddings: str | None = None
    """Array (.npy) with a row for each candidate, in the order of the file; null makes them of words (TF-IDF)."""
    run: str | None = None
    """Run whose hidden states are the embeddings: after the final norm, as the mean over a question."""
    step: Annotated[int | None, Range(0, 1_000_000_000)] = None
    """Which checkpoint of the run; null is the newest."""
    seed: Annotated[int, _SEED] = 0
    """Of the clustering."""

    def problems(self) -> Iterator[str]:
        """What does not go together."""
        if self.run is not None and self.embeddings is not None:
            yield f"run={self.run}: embeddings={self.embeddings} has embeddings already; leave one of both out"
        if self.step is not None and self.run is None:
            yield f"step={self.step}: without run= there are no checkpoints; give run=FOLDER, or leave step= out"


@dataclass(frozen=True, kw_only=True)
class AptitudeScoreRequest:
    """Score how much a question's solutions, in text and as programs, help a trained model with the anchors.

    A score is the mean over the anchors, each asked after one solution. Given again, the command goes on where it was.

        unipool aptitude score runs/a candidates=candidates.jsonl anchors=anchors.json out=scores.jsonl
        unipool aptitude score runs/a candidates=candidates.jsonl anchors=anchors.json out=half.jsonl part=0 parts=2
        unipool aptitude score runs/a candidates=candidates.jsonl anchors=anchors.json out=right.jsonl by=generation
    """

    run: Annotated[str, Positional()] = "latest"
    """Folder of a run, or `latest`, the run below runs/ that was saved to last."""
    candidates: str
    """File of candidates."""
    anchors: str
    """File written by `unipool aptitude anchors`."""
    out: str
    """File to write, or to go on with."""
    step: Annotated[int | None, Range(0, 1_000_000_000)] = None
    """Which checkpoint of the run; null is the newest."""
    by: Literal["likelihood", "generation"] = "likelihood"
    """`likelihood`: log-likelihood of an anchor's answer, in nats a token. `generation`: whether the answer that the
    model generates is right, as published; the Python in it is run, in a process without network or files to write."""
    max_tokens: Annotated[int, Range(1, 100_000)] = 128
    """Tokens of each of up to six continuations of an answer (`by=generation`)."""
    part: Annotated[int, Range(0, 9999)] = 0
    """Which part of the candidates, of `parts`: one for each device, in processes and files of their own."""
    parts: Annotated[int, Range(1, 10_000)] = 1
    """Into how many parts candidates are divided, by id."""
    seed: Annotated[int, _SEED] = 0
    """Of which of several solutions is shown."""

    def problems(self) -> Iterator[str]:
        """What does not go together."""
        if self.part >= self.parts:
            yield f"part={self.part}: parts={self.parts} are numbered from 0; give a part below parts"


@dataclass(frozen=True, kw_only=True)
class AptitudeSelectRequest:
    """Select by scores the solutions to fine-tune on, and say in a manifest beside them how.

    Writes one JSON object a solution: `id`, `source`, `format`, `prompt`, `response`.

        unipool aptitude select candidates.jsonl scores=[scores.jsonl] rules=[gsm8k:cot:0.3,math:tir:0.65] out=sft.jsonl
        unipool aptitude select candidates.jsonl scores=[scores.jsonl] rules=[gsm8k:cot:0.3] out=c.jsonl variant=random
    """

    candidates: Annotated[str, Positional()]
    """File of candidates."""
    scores: tuple[str, ...] = ()
    """Files written by `unipool aptitude score`; `variant=both`, `cot` and `tir` need none."""
    rules: tuple[str, ...]
    """For each source `SOURCE:FORMAT:QUANTILE`: the format of every question, and the quantile of differences (`cot`
    minus `tir`) below which, where the format is `cot`, or above which, where it is `tir`, the other is added. Choose
    quantiles on validation questions, never on a test."""
    out: str
    """File to write."""
    variant: Variant = "tata"
    """`tata`: the rule above. `random`, its control: as many questions in both formats, drawn at random. `one_format`:
    `cot` above a quantile, else `tir`, never both. `both`, `cot`, `tir`: of every question."""
    quantile: Annotated[float, Range(0, 1)] = 0.5
    """Of `variant=one_format`, in every source."""
    seed: Annotated[int, _SEED] = 0
    """Of `variant=random`."""
