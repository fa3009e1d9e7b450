"""Which files a word on a command line means, and whether they are there.

A word means a file, the files of a folder, or those that a pattern matches.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from pathlib import Path


def expanded(word: str) -> Path:
    """`word` as a path, `~` and `~name` replaced by home folders; the name of nobody stays as it is."""
    return Path(os.path.expanduser(word))


def named_files(word: str) -> list[Path]:
    """The files that `word` names: itself, all files below a folder, or all that a glob pattern matches.

    Sorted by path, so that every machine reads them in the same order. `**` matches folders at any depth; hidden files
    and folders count only where they are named. A file whose own name looks like a pattern is that file.

    Returns:
      The files; none for a word that names no file.

    Raises:
      OSError: a folder that cannot be read.
    """
    path = expanded(word)
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(_below(path), key=str)
    matched = [Path(name) for name in glob.glob(str(path), recursive=True)]
    files = {path for path in matched if path.is_file()}
    return sorted(files.union(*(_below(path) for path in matched if path.is_dir())), key=str)


def _below(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if os.path.realpath(parent) in seen:  # a link to a folder above would have no end
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        paths = (Path(parent, name) for name in names if not name.startswith("."))
        found += [path for path in paths if path.is_file()]
    return found


def is_path(text: str) -> bool:
    """Whether `text` can be a path: the operating system rejects NUL with a ValueError."""
    return bool(text.strip()) and "\0" not in text


def is_file(path: str) -> bool:
    """Whether there is such a file that can be seen."""
    return is_path(path) and _safe(Path(path).is_file)


def is_dir(path: str) -> bool:
    """Whether there is such a folder that can be seen."""
    return is_path(path) and _safe(Path(path).is_dir)


def names_files(word: str) -> bool:
    """Whether `named_files` finds any."""
    return is_path(word) and _safe(lambda: bool(named_files(word)))


def _safe(ask: Callable[[], bool]) -> bool:
    """`ask()`; False for a path that is too long or not permitted, which counts as absent."""
    try:
        return ask()
    except (OSError, ValueError):
        return False
