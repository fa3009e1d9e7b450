"""Lines between process 0 and the others: who is there, what they decide together, and who was lost.

Every process holds a TCP connection to process 0, made on the coordinator's port before JAX's runtime takes it over.
JAX ends a process from C++, with its stack, where another one is missing, wrong or lost. These lines notice first,
because JAX is given more time, and say in a sentence which process it is. They import no JAX.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from unipool_jax.config.errors import UserError
from unipool_jax.parallel.launch import Place

RESUME = "Start all processes again with the same command; they resume from the newest complete checkpoint."
_MOST_BYTES = 16 * 2**20
"""Of one message; more is not from a process of this program."""
_FAREWELL_SECONDS = 3.0
"""That process 0, whose end takes JAX's service from the others, waits for them to end first."""


def where() -> str:
    """This process, for messages."""
    return f"{socket.gethostname()}, pid {os.getpid()}"


class PeerError(UserError, RuntimeError):
    """Another process failed, or runs something else, so this one stops too; the message says which and why."""


class ForeignError(Exception):
    """What came is not from a process of this program."""


class Line:
    """A connection to another process; `number` is -1 before it has said which."""

    def __init__(self, stream: socket.socket, number: int = -1):
        self.stream, self.number, self.where = stream, number, ""
        self.answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.heard = time.monotonic()
        self.finished = False
        self._received = b""
        self._sending = threading.Lock()

    def send(self, kind: str, *values: object) -> None:
        """Send a message. That the other one is gone is noticed in reading."""
        with self._sending, contextlib.suppress(OSError):
            self.stream.sendall(json.dumps([kind, *values]).encode() + b"\n")

    def receive(self) -> list[list[Any]] | None:
        """The messages that have come; None where the connection has ended.

        Raises:
          ForeignError: something else came.
        """
        try:
            data = self.stream.recv(1 << 16)
        except (BlockingIOError, TimeoutError):
            return []
        except OSError:
            return None
        if not data:
            return None
        self.heard = time.monotonic()
        *texts, self._received = (self._received + data).split(b"\n")
        try:
            messages = [json.loads(text) for text in texts]
        except ValueError as error:
            raise ForeignError from error
        lists = all(isinstance(message, list) and message and isinstance(message[0], str) for message in messages)
        if not lists or self._received[:1] not in (b"", b"[") or len(self._received) > _MOST_BYTES:
            raise ForeignError
        return messages

    @property
    def name(self) -> str:
        """The other process, for messages."""
        return f"process {self.number} ({self.where})"


class Peers:
    """The other processes, as this one knows them; made by `connect`."""

    def __init__(self, place: Place, timeout: float):
        self.number, self.count = place.number, place.processes
        self._timeout = timeout
        self.lines: dict[int, Line] = {}
        self._selector = selectors.DefaultSelector()
        self._leaving = threading.Lock()
        self._stopping = False

    def decide(self, mine: str, rule: Callable[[list[str]], str]) -> str:
        """What process 0 makes, by `rule`, of the texts of all processes in their order. Every process must call it."""
        if self.number:
            self.lines[0].send("mine", mine)
            return self.lines[0].answers.get()
        texts = [mine, *(self.lines[number].answers.get() for number in range(1, self.count))]
        decided = rule(texts)
        for line in list(self.lines.values()):
            line.send("decided", decided)
        return decided

    def finish(self) -> None:
        """Say that this process ends because it has done its work."""
        for line in list(self.lines.values()):
            line.send("finished")

    def stop(self, reason: str) -> None:
        """Say that this process ends, and why if the others do not know. The caller reports it and ends the process."""
        if self._stopping:
            return
        if not self._leaving.acquire(blocking=False):
            # The other thread is about to end this process.
            time.sleep(self._timeout)
        self._stopping = True
        if reason:
            self._tell(f"process {self.number} ({where()}) stopped: {reason}")
        self.farewell()

    def wait_for_verdict(self, seconds: float | None = None) -> None:
        """Give a loss time to be noticed here, by default the time it takes; if it is, this process ends."""
        time.sleep(self._timeout + 1 if seconds is None else seconds)

    def farewell(self) -> None:
        """Wait, in process 0, until the others have ended, but not for long."""
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while self.number == 0 and self.lines and time.monotonic() < deadline:
            time.sleep(0.01)

    def _tell(self, text: str) -> None:
        for line in list(self.lines.values()):
            line.send("stop", text)

    def add(self, line: Line) -> None:
        """Take in a process that has said who it is."""
        self.lines[line.number] = line
        line.stream.settimeout(self._timeout)
        line.heard = time.monotonic()

    def watch(self) -> None:
        """Listen to the other processes in a thread until this one ends."""
        for line in self.lines.values():
            self._selector.register(line.stream, selectors.EVENT_READ, line)
        if self.lines:
            threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def _watch(self) -> None:
        pause = self._timeout / 10
        turn = next_beat = time.monotonic()
        while self.lines:
            ready = self._selector.select(max(0.0, next_beat - time.monotonic()))
            for key, _ in ready:
                self._read(key.data)
            now = time.monotonic()
            if now >= next_beat:
                for line in list(self.lines.values()):
                    line.send("beat")
                next_beat = now + pause
            if now - turn > self._timeout / 2:
                # This process itself was stopped, perhaps with all the others: what they sent is still to be read.
                for line in self.lines.values():
                    line.heard = now
            turn = now
            for line in list(self.lines.values()):
                if now - line.heard > self._timeout:
                    self._lose(line, f"was not heard from for distributed.timeout_seconds={self._timeout:g}")

    def _read(self, line: Line) -> None:
        try:
            messages = line.receive()
        except ForeignError:
            messages = None
        if messages is None:
            if not line.finished:
                self._lose(line, "has ended without a word")
            else:
                self._remove(line)
            return
        for kind, *values in messages:
            if kind in ("mine", "decided"):
                line.finished = False  # it has begun another run
                line.answers.put(values[0])
            elif kind == "finished":
                line.finished = True
            elif kind == "stop":
                self._end(values[0])

    def _remove(self, line: Line) -> None:
        del self.lines[line.number]
        self._selector.unregister(line.stream)

    def _lose(self, line: Line, what: str) -> None:
        text = f"{line.name} {what}; its output may say why.\n{RESUME}"
        # One that was only stopped hears of it when it goes on.
        line.send("stop", text)
        self._remove(line)
        self._end(text)

    def _end(self, text: str) -> None:
        if not self._leaving.acquire(blocking=False):
            return
        self._tell(text)
        # In a thread of its own, so that this one goes on to notice who has ended.
        threading.Thread(target=self._exit, args=(text,)).start()

    def _exit(self, text: str) -> NoReturn:
        print(text, file=sys.stderr, flush=True)
        # The main thread may be stuck in writing to it.
        flushing = threading.Thread(target=sys.stdout.flush, daemon=True)
        flushing.start()
        flushing.join(1)
        self.farewell()
        os._exit(PeerError.exit_code)
