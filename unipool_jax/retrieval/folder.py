"""Collections in BEIR's format: `corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv` in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unipool_jax.config.files import FileError, read_bytes, read_lines, write_text

CORPUS, QUERIES, QRELS = "corpus.jsonl", "queries.jsonl", "qrels"
HEADER = ("query-id", "corpus-id", "score")
_ADVICE = "the format of a collection: unipool retrieval eval --help"


class Collection(NamedTuple):
    """Documents, queries, and which documents answer which queries."""

    documents: dict[str, str]
    """Texts by id."""
    queries: dict[str, str]
    """Texts by id; only those with judged documents."""
    grades: dict[str, dict[str, int]]
    """By query, the grades of judged documents; a document is relevant from grade 1 on."""


class Index(NamedTuple):
    """The documents of a collection with each text once.

    Documents are in descending order of their ids as strings, in which trec_eval ranks documents of equal score; a text
    stands where the first of its documents does.
    """

    texts: list[str]
    """U different ones."""
    text_D: np.ndarray
    """Text of each document, int32 `[D]`."""
    grades: list[dict[int, int]]
    """By query, the grades of judged documents by their place."""
    text_grades: list[dict[int, int]]
    """The same by text: of documents with one text, the highest grade."""


def make_index(collection: Collection) -> Index:
    """The index of a collection; queries are in its order."""
    ids = sorted(collection.documents, reverse=True)
    place = {name: number for number, name in enumerate(ids)}
    texts: dict[str, int] = {}
    text_D = np.array([texts.setdefault(collection.documents[name], len(texts)) for name in ids], np.int32)
    grades, text_grades = [], []
    for query in collection.queries:
        judged = {place[name]: grade for name, grade in collection.grades[query].items()}
        merged: dict[int, int] = {}
        for number, grade in judged.items():
            text = int(text_D[number])
            merged[text] = max(grade, merged.get(text, grade))
        grades.append(judged)
        text_grades.append(merged)
    return Index(list(texts), text_D, grades, text_grades)


def read_collection(folder: Path, split: str = "test", titles: bool = False) -> Collection:
    """Read a collection.

    Args:
      folder: has the three files.
      split: of `qrels/SPLIT.tsv`.
      titles: whether the title of a document is put before its text, with a blank between; else it is not used.

    Raises:
      FileError: a file is missing or not as it should be, an id is there twice or is not known, or nothing is judged.
    """
    documents = _texts(folder / CORPUS, titles)
    queries = _texts(folder / QUERIES, titles=False)
    path = folder / QRELS / f"{split}.tsv"
    grades: dict[str, dict[str, int]] = {}
    for number, (query, document, grade) in _judgments(path):
        where = f"{path} line {number}"
        if query not in queries:
            raise FileError(f"{where}: the query {query!r} is not in {QUERIES}; {_ADVICE}")
        if document not in documents:
            raise FileError(f"{where}: the document {document!r} is not in {CORPUS}; {_ADVICE}")
        if document in grades.setdefault(query, {}):
            raise FileError(f"{where}: {query!r} and {document!r} are there twice; {_ADVICE}")
        grades[query][document] = grade
    if not grades:
        raise FileError(f"{path}: no judgments, so there is nothing to measure; {_ADVICE}")
    return Collection(documents, {name: queries[name] for name in grades}, grades)


def write_collection(folder: Path, parts: Mapping[str, Collection]) -> None:
    """Write collections of the same documents, by the name of their split, without titles; raises FileError."""

    def rows(texts: Mapping[str, str], **more: str) -> str:
        return _lines({"_id": name, **more, "text": text} for name, text in texts.items())

    write_text(folder / CORPUS, rows(next(iter(parts.values())).documents, title=""))
    write_text(folder / QUERIES, "".join(rows(part.queries) for part in parts.values()))
    for split, part in parts.items():
        judged = [(query, name, grade) for query, found in part.grades.items() for name, grade in found.items()]
        lines = ("\t".join(map(str, row)) for row in (HEADER, *judged))
        write_text(folder / QRELS / f"{split}.tsv", "".join(f"{line}\n" for line in lines))


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def _texts(path: Path, titles: bool) -> dict[str, str]:
    """Texts by id; a title may be missing or null."""
    found: dict[str, str] = {}
    for number, line in enumerate(read_lines(path, {"_id": str, "text": str}, _ADVICE), 1):
        if line.problem is not None:
            raise line.problem
        name, title = line.record["_id"], line.record.get("title")
        if name in found:
            raise FileError(f"{path} line {number}: the id {name!r} is there twice; {_ADVICE}")
        if titles and title is not None and not isinstance(title, str):
            raise FileError(f"{path} line {number}: title is {title!r:.80}, expected text; {_ADVICE}")
        found[name] = f"{title} {line.record['text']}" if titles and title else line.record["text"]
    if not found:
        raise FileError(f"{path}: empty; {_ADVICE}")
    return found


def _judgments(path: Path) -> Iterable[tuple[int, tuple[str, str, int]]]:
    """Line number, and query, document and grade."""
    try:
        lines = read_bytes(path, _ADVICE).decode().splitlines()
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: not UTF-8; {_ADVICE}") from error
    for number, line in enumerate(lines, 1):
        fields = tuple(line.split("\t"))
        if number == 1 and fields == HEADER:
            continue
        try:
            query, document, grade = fields
            yield number, (query, document, int(grade))
        except ValueError as error:
            expected = "a query, a document and a whole number, with tabs between"
            raise FileError(f"{path} line {number}: {line!r:.80}, expected {expected}; {_ADVICE}") from error
