"""What training prints: the progress line, and the copy of everything printed in the folder of the run."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO, cast

from unipool_jax.config.errors import UserError

LOG = "log.txt"
"""In the run folder: what its processes printed, one after another."""

_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|\r")
_END_OF_LINE = "\x1b[K"
"""Erases what an earlier, longer text left on the line: `Progress` ends a line with it on a terminal."""


def format_seconds(seconds: float) -> str:
    """`75` as `1:15`, `3700` as `1:01:40`, days as `2d 03:00:00`."""
    days, rest = divmod(max(0, round(seconds)), 86_400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    if days:
        return f"{days}d {hours:02d}:{minutes:02d}:{rest:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """A progress line that is rewritten in place on a terminal; one line per step elsewhere.

    Args:
      steps: of the run.
      stream: standard output by default.
      clock: seconds from any origin; the elapsed time counts from here.
    """

    def __init__(self, steps: int, stream: TextIO | None = None, clock: Callable[[], float] = time.perf_counter):
        self._steps = steps
        self._stream = stream or sys.stdout
        self._in_place = self._stream.isatty()
        self._open_line = False
        self._clock, self._started = clock, clock()

    def step(
        self,
        step: int,
        loss: float,
        learning_rate: float,
        rate: float | None,
        left: float | None,
        zero_gates: float = 0.0,
    ) -> None:
        """Show one step.

        Args:
          step: completed steps.
          loss: language-model loss, nats.
          learning_rate: of this step.
          rate: tokens per second; None while unknown.
          left: remaining seconds; None while unknown.
          zero_gates: share of tokens whose gates are all zero, over all layers; shown from 1% on.
        """
        text = f"step {step:>{len(str(self._steps))}}/{self._steps}  loss {loss:.4f}  lr {learning_rate:.2e}"
        if zero_gates >= 0.01:
            text += f"  {zero_gates:.0%} zero gates"
        if rate is not None:
            text += f"  {rate:,.0f} tokens/s"
        text += f"  {format_seconds(self._clock() - self._started)} elapsed"
        if left is not None:
            text += f"  {format_seconds(left)} left"
        if self._in_place:
            self._stream.write(f"\r{text}{_END_OF_LINE}")
            self._open_line = True
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def message(self, text: str) -> None:
        """Print a line that stays."""
        self._stream.write(("\n" if self._open_line else "") + text + "\n")
        self._stream.flush()
        self._open_line = False


class _Log:
    """The file of a run, as plain lines. It never stops the run: after a failure nothing more is written to it.

    Args:
      path: appended to.
      errors: where a failure is told.
    """

    def __init__(self, path: Path, errors: TextIO):
        self._path, self._errors = path, errors
        self._stream: TextIO | None = None
        self._at_line_start = True
        with self._failures():
            self._stream = path.open("a", encoding="utf-8", errors="backslashreplace")

    def write(self, text: str) -> None:
        # On a terminal a line is rewritten in place; here each version of it is a line, and no line is empty.
        text = _ESCAPES.sub("", text.replace(_END_OF_LINE, "\n"))
        if self._at_line_start:
            text = text.lstrip("\n")
        if self._stream is None or not text:
            return
        self._at_line_start = text.endswith("\n")
        with self._failures():
            self._stream.write(text)
            self._stream.flush()

    def close(self) -> None:
        with self._failures():
            if self._stream is not None:
                self._stream.close()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._stream = None
            self._errors.write(f"{self._path}: {error.strerror}; what is printed from now on is not in it\n")


class _Copy(io.TextIOBase):
    """A stream that also writes to the log."""

    def __init__(self, stream: TextIO, log: _Log):
        self._to, self._log = stream, log

    def write(self, text: str) -> int:
        self._log.write(text)
        return self._to.write(text)

    def flush(self) -> None:
        self._to.flush()

    def isatty(self) -> bool:
        return self._to.isatty()

    def fileno(self) -> int:
        return self._to.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._to.encoding


@contextlib.contextmanager
def copied_to(path: Path, title: str) -> Iterator[None]:
    """Append `title` and everything that Python prints inside the block to a file, and the error that ends it."""
    log = _Log(path, sys.stderr)
    log.write(f"==== {title}\n")
    copies = (cast(TextIO, _Copy(stream, log)) for stream in (sys.stdout, sys.stderr))
    try:
        with contextlib.redirect_stdout(next(copies)), contextlib.redirect_stderr(next(copies)):
            yield
    except BaseException as error:
        # It is printed where it is caught, outside of the block.
        log.write(f"{error}\n" if isinstance(error, UserError) else traceback.format_exc())
        raise
    finally:
        log.close()
