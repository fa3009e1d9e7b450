"""Retrieval tasks made of Python sources, by default the standard library of the Python that runs; no downloads.

`docstring`: the first sentence of a function's docstring finds the function without it. `ccr`: the first part of a
function finds its rest (code context retrieval).
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import random
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from unipool_jax.config.files import FileError, read_text
from unipool_jax.retrieval.folder import Collection

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
"""Folders that are not read."""
TESTED = 0.2
"""Share of the files whose functions are tested on."""
SHARES = 0.4, 0.7
"""Of the length of a function, between which it is cut; those of CoIR (arXiv 2407.02883)."""

_SENTENCE = re.compile(r"(.+?[.!?])(?=\s|$)")


class Function(NamedTuple):
    """A function with a docstring."""

    name: str
    """File, qualified name and line."""
    sentence: str
    """The first of its docstring."""
    code: str
    """From `def` on, without the docstring."""


def standard_library() -> Path:
    """The folder of the standard library of this Python."""
    return Path(sysconfig.get_path("stdlib"))


def functions(folder: Path) -> Iterator[Function]:
    """Every function below a folder that has a docstring and more than that, by file and line.

    Files that are no Python, such as templates, are left out.
    """
    for file, source, tree in _modules(folder):
        yield from _functions(tree, source.splitlines(), file)


def training_sources(folder: Path, seed: int) -> Iterator[str]:
    """The files below a folder that hold no function that `divided` tests on, each whole: text to pre-train on.

    Args:
      folder: of Python files.
      seed: of the tasks.
    """
    return (source for file, source, _ in _modules(folder) if not held_out(file, seed))


def _modules(folder: Path) -> Iterator[tuple[str, str, ast.Module]]:
    """Name inside the folder, source and syntax tree of each Python file."""
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder)
        if LEFT_OUT.isdisjoint(inside.parts):
            try:
                source = read_text(path)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # about escapes in other people's strings
                    tree = ast.parse(source)
            except (FileError, ValueError, SyntaxError):
                continue
            yield inside.as_posix(), source, tree


def _functions(tree: ast.AST, lines: list[str], where: str) -> Iterator[Function]:
    for node in ast.iter_child_nodes(tree):
        inside = where
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inside = f"{where}:{node.name}" if where.endswith(".py") else f"{where}.{node.name}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            sentence, code = _first_sentence(ast.get_docstring(node) or ""), _without_docstring(node, lines)
            if sentence and code:
                yield Function(f"{inside}:{node.lineno}", sentence, code)
        yield from _functions(node, lines, inside)


def _first_sentence(docstring: str) -> str:
    paragraph = " ".join(inspect.cleandoc(docstring).partition("\n\n")[0].split())
    found = _SENTENCE.match(paragraph)
    return found[1] if found else paragraph


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str | None:
    """Lines of a function without those of its docstring; None if nothing else is in its body, or shares a line."""
    first, *rest = node.body
    end = first.end_lineno
    assert end is not None
    if not rest or first.lineno == node.lineno or rest[0].lineno == end:
        return None
    code = lines[node.lineno - 1 : first.lineno - 1] + lines[end : node.end_lineno]
    return textwrap.dedent("\n".join(code)).strip()


def docstring_pairs(found: Iterable[Function]) -> list[tuple[str, str, str]]:
    """Name, sentence and function."""
    return _once((one.name, one.sentence, one.code) for one in found)


def ccr_pairs(found: Iterable[Function], seed: int) -> list[tuple[str, str, str]]:
    """Name, first part and rest of each function, cut at random between `SHARES` of its characters.

    Args:
      found: functions.
      seed: of the cuts; a function is cut at the same place whichever others there are.
    """
    pairs = []
    for name, _, code in found:
        cut = round(len(code) * random.Random(f"{seed} {name}").uniform(*SHARES))
        pairs.append((name, code[:cut], code[cut:]))
    return _once(pairs)


def _once(pairs: Iterable[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """The pairs whose two texts were in no pair before."""
    queries, documents, kept = set[str](), set[str](), []
    for name, query, document in pairs:
        if query not in queries and document not in documents:
            kept.append((name, query, document))
            queries.add(query)
            documents.add(document)
    return kept


def pair_collection(pairs: Iterable[tuple[str, str, str]]) -> Collection:
    """A collection in which each query has the document of its own name, of grade 1."""
    pairs = list(pairs)
    return Collection(
        {name: document for name, _, document in pairs},
        {name: query for name, query, _ in pairs},
        {name: {name: 1} for name, _, _ in pairs},
    )


def divided(collection: Collection, seed: int) -> dict[str, Collection]:
    """The same documents with the queries of `train` and of `test`: those of a file are all in one of them.

    Args:
      collection: whose ids begin with a file.
      seed: of the draws, see `held_out`.
    """
    parts = {"train": dict[str, str](), "test": dict[str, str]()}
    for name, query in collection.queries.items():
        parts["test" if held_out(name.partition(":")[0], seed) else "train"][name] = query
    return {
        part: collection._replace(queries=queries, grades={name: collection.grades[name] for name in queries})
        for part, queries in parts.items()
    }


def held_out(file: str, seed: int) -> bool:
    """Whether the functions of a file are tested on: drawn from the seed and the name alone."""
    return random.Random(f"{seed} {file}").random() < TESTED


def digest(collection: Collection) -> str:
    """The first 16 digits of a SHA-256 of all of a collection: numbers can be compared where it is the same."""
    return hashlib.sha256(json.dumps(collection).encode()).hexdigest()[:16]


def library_tasks(folder: Path, seed: int) -> dict[str, Collection]:
    """The two tasks by name.

    Args:
      folder: of Python files.
      seed: of the cuts.

    Raises:
      FileError: no function there has a docstring.
    """
    found = list(functions(folder))
    if not found:
        raise FileError(f"{folder}: no Python file with a function that has a docstring; name another folder")
    pairs = {"docstring": docstring_pairs(found), "ccr": ccr_pairs(found, seed)}
    return {name: pair_collection(made) for name, made in pairs.items()}
