"""Where, when and with what a run was trained: one entry for each process that trained it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import socket
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from unipool_jax.config.files import FileError, read_entries, write_json
from unipool_jax.config.version import VERSION, git_commit

SESSIONS = "sessions.json"
"""In the run folder."""

_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "GLIBC_TUNABLES", "CUDA_VISIBLE_DEVICES")
"""Variables that change how a program is compiled or where it runs."""


def utc_now() -> str:
    """The time of day, for example `2026-11-26T08:30:00.250Z`."""
    now = datetime.datetime.now(datetime.UTC)
    return f"{now:%Y-%m-%dT%H:%M:%S}.{now.microsecond // 1000:03d}Z"


def command_line() -> str:
    """The command of this process, quoted for a shell."""
    return shlex.join(sys.orig_argv)


def provenance() -> dict[str, Any]:
    """Machine, command, code and devices of this process."""
    return {
        "host": socket.gethostname(),
        "command": command_line(),
        "folder": os.getcwd(),
        "version": VERSION,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: found for name in _PACKAGES if (found := _version_of(name))},
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        "devices": {
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
    }


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class Session:
    """One process that trains a run, from its entry in `sessions.json` to the end that it writes there.

    An entry without an end is that of a process that was killed, or is still at work.

    Args:
      folder: of the run.
      step: completed steps at the beginning.
      writes: whether this process writes; in the others nothing is read or written.
    """

    def __init__(self, folder: Path, step: int, *, writes: bool = True):
        self._path, self._writes = folder / SESSIONS, writes
        self._entry: dict[str, Any] = {"start": utc_now(), "end": None, "step": step}
        self._earlier: list[dict[str, Any]] = []
        if writes:
            self._entry |= provenance()
            self._earlier = read_sessions(folder)
            self._write()

    @property
    def compile_seconds(self) -> float | None:
        """How long compiling the training step took the last time, on as many devices of this kind; None if unknown."""
        same = [entry for entry in self._earlier if entry.get("devices") == self._entry.get("devices")]
        known = [entry["compile_seconds"] for entry in same if isinstance(entry.get("compile_seconds"), float)]
        return known[-1] if known else None

    def compiled(self, seconds: float) -> None:
        """Record how long compiling the training step took."""
        self._entry["compile_seconds"] = round(seconds, 1)
        self._write()

    def ended(self, code: int) -> int:
        """Record the end; the exit code `code`."""
        self._end({"exit_code": code})
        return code

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._end({"error": f"{type(error).__name__}: {error}"})

    def _end(self, how: dict[str, Any]) -> None:
        """Record the end. A disk that is full must change neither an exit code nor the error that is reported."""
        self._entry |= {"end": utc_now()} | how
        try:
            self._write()
        except FileError as error:
            print(error, file=sys.stderr)

    def _write(self) -> None:
        if self._writes:
            write_json(self._path, {"sessions": [*self._earlier, self._entry]}, indent=2)


def read_sessions(folder: Path) -> list[dict[str, Any]]:
    """The entries of a run, oldest first.

    Raises:
      FileError: the file is damaged.
    """
    return read_entries(folder / SESSIONS, "sessions")
