"""Stopping a run by a signal to its process, or to any of its processes."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import jax

from unipool_jax.parallel.processes import Vote


class InterruptedRunError(RuntimeError):
    """A signal stopped the run; its state is saved."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopRequest:
    """Records the first SIGTERM or SIGINT; the second one ends the process immediately.

    With several processes, a signal to any of them stops all after the same step; see `agree`.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._agreed: int | None = None
        self._vote = Vote() if jax.process_count() > 1 else None

    @property
    def signum(self) -> int | None:
        """The signal that stops the run; None if there is none."""
        return self._received if self._vote is None else self._agreed

    def requested(self) -> bool:
        """Whether the run must stop."""
        return self.signum is not None

    def agree(self) -> None:
        """Share signals with the other processes; every process must call this once per step."""
        if self._vote is not None:
            self._agreed = self._vote.cast(self._received or 0) or None

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle the two signals inside the block."""

        def handle(signum: int, frame: Any) -> None:
            del frame
            self._received = signum
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            # os.write, because the signal may interrupt print, which is not reentrant.
            os.write(2, b"\nstopping after this step and saving; a second signal ends the process immediately\n")

        previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
