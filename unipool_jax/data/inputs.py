"""The files of text that a setting or a command line names."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from unipool_jax.config.paths import expanded, named_files
from unipool_jax.data.errors import DataError
from unipool_jax.data.readers import SUFFIXES, file_format, is_readable

_SHOWN = 5


class Inputs(NamedTuple):
    """Files to read, in order, and those of folders and patterns that hold no text."""

    files: list[Path]
    other: list[Path]
    """Files of unknown endings."""
    empty: list[Path]

    def note(self) -> str | None:
        """A line for each reason to leave files out; None if all are read."""
        reasons = []
        if self.other:
            reasons.append(f"left out, as their endings are none of {', '.join(SUFFIXES)}: {_listed(self.other)}")
        if self.empty:
            reasons.append(f"left out, as they are empty: {_listed(self.empty)}")
        return "\n".join(reasons) or None


def _listed(paths: list[Path]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(map(str, paths[:_SHOWN])) + more


def find_inputs(words: Iterable[str]) -> Inputs:
    """The files that `words` name: files, folders (all text files below them) and glob patterns.

    Raises:
      DataError: a word that names no file, a file of unknown format, a folder or pattern without a file of text, or a
        file that is there twice, whose text would count twice and could be in two splits.
    """
    found = Inputs([], [], [])
    known: dict[Path, tuple[Path, str]] = {}
    for word in words:
        try:
            paths = named_files(word)
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error
        if paths == [expanded(word)]:
            readable = paths
            file_format(paths[0])
        else:
            readable = [path for path in paths if is_readable(path) and path.stat().st_size]
            found.other.extend(path for path in paths if not is_readable(path))
            found.empty.extend(path for path in paths if is_readable(path) and not path.stat().st_size)
        if not paths:
            if not (Path(word).is_dir() or glob.has_magic(word)):
                file_format(Path(word))
            raise DataError(f"{word}: no such file, no folder of files, and no pattern that matches one")
        if not readable:
            raise DataError(
                f"{word}: {len(paths)} files, but none with text whose name ends in one of {', '.join(SUFFIXES)}"
            )
        for path in readable:
            before, by = known.setdefault(path.resolve(), (path, word))
            if before is not path:
                raise DataError(f"{path} (of {word}): the same file as {before} (of {by}); name it once")
            found.files.append(path)
    return found
