"""Hashes of content that need not be read again while its files are untouched.

A hash of a large file takes seconds to minutes, so it is remembered together with what the file system says of the
file: size, times of change and number. Small files are read every time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unipool_jax.config.files import FileError, read_json, write_json
from unipool_jax.data.store_format import file_sha256

REMEMBERED = "hashes"
"""Folder inside `data.cache_dir` that remembers hashes."""

SMALL = 1 << 26
"""Bytes up to which content is read every time: a tenth of a second."""

_TOLD = 1 << 32
"""Bytes from which a line says that they are being read."""

SETTLED = 2.0
"""Seconds after its last change before a file's hash is remembered: a change within one tick of the clock of the file
system would not show in its times."""


def tokens_sha256(tokens: np.ndarray, dtype: np.dtype[Any]) -> str:
    """sha256 of token ids as little-endian `dtype`, whatever they are stored as."""
    return hashlib.sha256(np.ascontiguousarray(tokens, dtype.newbyteorder("<")).data).hexdigest()


def last_change(path: Path) -> int:
    """When a file or its metadata changed last, in nanoseconds: an edit that restores its time still shows."""
    found = path.stat()
    return max(found.st_mtime_ns, found.st_ctime_ns)


def remembered_sha256(path: Path, memory: Path | None) -> str:
    """sha256 of one file, remembered in the folder `memory` if it is large."""
    return Remembered(path, memory, path.stat().st_size).get("sha256", [path], lambda: file_sha256(path))


class Remembered:
    """Hashes of the parts of one store or file.

    Args:
      owner: the store or file.
      folder: where they are remembered; None, or one that cannot be written, remembers nothing.
      size: bytes of all parts together.
    """

    def __init__(self, owner: Path, folder: Path | None, size: int):
        self._owner, self._size = owner, size
        name = hashlib.sha256(str(owner.resolve()).encode()).hexdigest()[:24]
        self._file = None if folder is None or size <= SMALL else folder / f"{name}.json"
        self._known: dict[str, Any] = {}
        self._told = size < _TOLD
        if self._file is not None:
            # A damaged file costs no more than reading the content again.
            with contextlib.suppress(FileError):
                self._known = read_json(self._file)

    def get(self, part: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
        """`compute()`, or what it gave before for the same untouched `files`."""
        signs = [_signs(file) for file in files]
        found = self._known.get(part)
        if isinstance(found, list) and found[:1] == [signs]:
            return str(found[1])
        if not self._told:
            self._told = True
            print(f"{self._owner}: reading {self._size / 1e9:,.1f} GB to fingerprint it, once", file=sys.stderr)
        value = compute()
        if self._file is not None and time.time() - max(map(last_change, files)) / 1e9 > SETTLED:
            self._known[part] = [signs, value]
            with contextlib.suppress(FileError):
                write_json(self._file, self._known)
        return value


def _signs(path: Path) -> list[int]:
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
