"""The files of text that a setting or a command line names."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from unipool_jax.config.paths import named_files
from unipool_jax.data.errors import DataError
from unipool_jax.data.readers import SUFFIXES, file_format, is_readable

_SHOWN = 5


class Inputs(NamedTuple):
    """Files to read, in order, and those of folders and patterns that are not text."""

    files: list[Path]
    left_out: list[Path]

    def note(self) -> str | None:
        """A sentence about the files left out; None if there are none."""
        if not self.left_out:
            return None
        names = ", ".join(str(path) for path in self.left_out[:_SHOWN])
        more = f" and {len(self.left_out) - _SHOWN} more" if len(self.left_out) > _SHOWN else ""
        return f"left out, as their endings are none of {', '.join(SUFFIXES)}: {names}{more}"


def find_inputs(words: Iterable[str]) -> Inputs:
    """The files that `words` name: files, folders (all text files below them) and glob patterns.

    Raises:
      DataError: a word that names no file, a file of unknown format, a folder or pattern without a file of text, or a
        file that is named twice, whose text would count twice and could be in two splits.
    """
    found = Inputs([], [])
    named_by: dict[Path, str] = {}
    for word in words:
        try:
            paths = named_files(word)
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error
        if paths == [Path(word).expanduser()]:
            readable = paths
            file_format(paths[0])
        else:
            readable = [path for path in paths if is_readable(path)]
            found.left_out.extend(path for path in paths if not is_readable(path))
        if not paths:
            if not (Path(word).is_dir() or glob.has_magic(word)):
                file_format(Path(word))
            raise DataError(f"{word}: no such file, no folder of files, and no pattern that matches one")
        if not readable:
            raise DataError(f"{word}: {len(paths)} files, but none whose name ends in one of {', '.join(SUFFIXES)}")
        for path in readable:
            if (before := named_by.setdefault(path.resolve(), word)) is not word:
                raise DataError(f"{path}: named by {before} and by {word}; name it once")
            found.files.append(path)
    return found
