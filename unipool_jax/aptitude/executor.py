"""Programs that a model wrote, run in a process of their own without network, within time, memory and output.

What is contained, and what is not, is in docs/after_pretraining.md.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import platform
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import IO, Literal, NamedTuple

from unipool_jax.aptitude import contained
from unipool_jax.config.errors import UserError

_SOURCE = inspect.getsource(contained)

Status = Literal["ok", "error", "time", "memory", "output", "killed"]
"""`ok`: ended without an error; `error`: with one; `time`, `memory`, `output`: over that limit; `killed`: by a signal.
"""


class Execution(NamedTuple):
    """What became of a program."""

    status: Status
    output: str
    """Of its standard output and, after it, the last line of its standard error; cut to the limit."""
    seconds: float
    """From start to end, of the clock on the wall."""


@dataclass(frozen=True)
class Limits:
    """Of one program."""

    seconds: float = 5.0
    """Of the clock on the wall, and, rounded up, of the processor; includes the start of Python."""
    memory_mib: int = 1024
    """Address space."""
    characters: int = 400
    """Of output; the published limit of this method."""


def unavailable() -> str | None:
    """Why programs cannot be run here."""
    if sys.platform != "linux" or platform.machine() != contained.MACHINE:
        return (
            f"programs are run where Linux on {contained.MACHINE} filters their system calls; this is "
            f"{sys.platform} on {platform.machine()}, where nothing would contain them"
        )
    return None


def bootstrap(limits: Limits) -> str:
    """The text of a program that gives up its rights and then runs the one on its standard input."""
    return f"{_SOURCE}\n\nmain({math.ceil(limits.seconds)}, {limits.memory_mib << 20})\n"


def execute(source: str, limits: Limits | None = None) -> Execution:
    """Run a Python program.

    It starts in an empty folder, with no environment and no input.

    Args:
      source: its text.
      limits: of time, memory and output.

    Raises:
      UserError: nothing here contains programs.
    """
    if (why := unavailable()) is not None:
        raise UserError(why)
    limits = limits or Limits()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as program:
        program.write(source.encode("utf-8", "replace"))
        program.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-X", "utf8", "-c", bootstrap(limits)],
            stdin=program,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            said, complaint, over = _read(process, start + limits.seconds, 4 * limits.characters)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    return _judged(said, complaint, over, code, limits, time.monotonic() - start)


def _read(process: subprocess.Popen[bytes], deadline: float, most: int) -> tuple[bytes, bytes, Status | None]:
    """Output and complaints of a process until both end, or the limit that ended it; keeps `most` bytes of output."""
    assert process.stdout is not None
    assert process.stderr is not None
    kept: dict[IO[bytes], bytes] = {process.stdout: b"", process.stderr: b""}
    with process.stdout, process.stderr, selectors.DefaultSelector() as waiting:
        for pipe in kept:
            waiting.register(pipe, selectors.EVENT_READ)
        over: Status | None = None
        while over is None and waiting.get_map():
            ready = waiting.select(max(0.0, deadline - time.monotonic()))
            for key, _ in ready:
                pipe = process.stdout if key.fileobj is process.stdout else process.stderr
                new = os.read(pipe.fileno(), 1 << 16)
                # Of complaints the end says what happened.
                kept[pipe] = (kept[pipe] + new)[:most] if pipe is process.stdout else (kept[pipe] + new)[-4096:]
                if not new:
                    waiting.unregister(pipe)
            if len(kept[process.stdout]) == most:
                over = "output"
            elif time.monotonic() >= deadline:
                over = "time"
        if over is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            over = "time" if process.poll() is None else None
        return kept[process.stdout], kept[process.stderr], over


def _judged(said: bytes, complaint: bytes, over: Status | None, code: int, limits: Limits, seconds: float) -> Execution:
    output = said.decode("utf-8", "replace")
    status: Status = "ok" if code == 0 else "error" if code > 0 else "time" if code == -signal.SIGXCPU else "killed"
    if over is not None:
        return Execution(over, output[: limits.characters], seconds)
    if len(output) > limits.characters and status == "ok":
        status = "output"
    if status == "error":
        last = complaint.decode("utf-8", "replace").strip().rpartition("\n")[2]
        if last.startswith("MemoryError"):
            status = "memory"
        output += last
    return Execution(status, output[: limits.characters], seconds)
