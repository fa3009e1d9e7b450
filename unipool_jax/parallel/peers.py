"""Lines between process 0 and the others: who is there, what they decide together, and who was lost.

Every process holds a TCP connection to process 0, made on the coordinator's port before JAX's runtime takes it over.
JAX ends a process from C++, with its stack, where another one is missing, wrong or lost. These lines notice first,
because JAX is given more time, and say in a sentence which process it is. They import no JAX.
"""

from __future__ import annotations

import contextlib
import errno
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

from unipool_jax.config.addresses import split_address
from unipool_jax.config.errors import UserError
from unipool_jax.parallel.agreement import Facts, difference
from unipool_jax.parallel.launch import Place

RESUME = "Start all processes again with the same command; they resume from the newest complete checkpoint."
_MOST_BYTES = 16 * 2**20
"""Of one message; more is not from a process of this program."""
_FAREWELL_SECONDS = 3.0
"""That process 0, whose end takes JAX's service from the others, waits for them to end first."""
_REFUSAL_SECONDS = 10.0
"""That process 0, when something is wrong, waits for the rest to come and hear it."""
_NOTE_SECONDS = 10.0
"""After which a process that waits for others at the start says so."""


class PeerError(UserError, RuntimeError):
    """Another process failed, or runs something else, so this one stops too; the message says which and why."""


class _ForeignError(Exception):
    """What came is not from a process of this program."""


class _Line:
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
          _ForeignError: something else came.
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
            raise _ForeignError from error
        lists = all(isinstance(message, list) and message and isinstance(message[0], str) for message in messages)
        if not lists or self._received[:1] not in (b"", b"[") or len(self._received) > _MOST_BYTES:
            raise _ForeignError
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
        self._lines: dict[int, _Line] = {}
        self._selector = selectors.DefaultSelector()
        self._leaving = threading.Lock()
        self._stopping = False

    def decide(self, mine: str, rule: Callable[[list[str]], str]) -> str:
        """What process 0 makes, by `rule`, of the texts of all processes in their order. Every process must call it."""
        if self.number:
            self._lines[0].send("mine", mine)
            return self._lines[0].answers.get()
        texts = [mine, *(self._lines[number].answers.get() for number in range(1, self.count))]
        decided = rule(texts)
        for line in list(self._lines.values()):
            line.send("decided", decided)
        return decided

    def finish(self) -> None:
        """Say that this process ends because it has done its work."""
        for line in list(self._lines.values()):
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
            self._tell(f"process {self.number} ({_where()}) stopped: {reason}")
        self.farewell()

    def wait_for_verdict(self, seconds: float | None = None) -> None:
        """Give a loss time to be noticed here, by default the time it takes; if it is, this process ends."""
        time.sleep(self._timeout + 1 if seconds is None else seconds)

    def farewell(self) -> None:
        """Wait, in process 0, until the others have ended, but not for long."""
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while self.number == 0 and self._lines and time.monotonic() < deadline:
            time.sleep(0.01)

    def _tell(self, text: str, apart_from: _Line | None = None) -> None:
        for line in list(self._lines.values()):
            if line is not apart_from:
                line.send("stop", text)

    def _add(self, line: _Line) -> None:
        self._lines[line.number] = line
        line.stream.settimeout(self._timeout)
        line.heard = time.monotonic()

    def watch(self) -> None:
        """Listen to the other processes in a thread until this one ends."""
        for line in self._lines.values():
            self._selector.register(line.stream, selectors.EVENT_READ, line)
        if self._lines:
            threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def _watch(self) -> None:
        pause = self._timeout / 10
        turn = next_beat = time.monotonic()
        while self._lines:
            ready = self._selector.select(max(0.0, next_beat - time.monotonic()))
            for key, _ in ready:
                self._read(key.data)
            now = time.monotonic()
            if now >= next_beat:
                for line in list(self._lines.values()):
                    line.send("beat")
                next_beat = now + pause
            if now - turn > self._timeout / 2:
                # This process itself was stopped, perhaps with all the others: what they sent is still to be read.
                for line in self._lines.values():
                    line.heard = now
            turn = now
            for line in list(self._lines.values()):
                if now - line.heard > self._timeout:
                    self._lose(line, f"was not heard from for distributed.timeout_seconds={self._timeout:g}")

    def _read(self, line: _Line) -> None:
        try:
            messages = line.receive()
        except _ForeignError:
            messages = None
        if messages is None:
            if not line.finished:
                self._lose(line, "has ended without a word")
            else:
                self._remove(line)
            return
        for kind, *values in messages:
            if kind in ("mine", "decided"):
                line.answers.put(values[0])
            elif kind == "finished":
                line.finished = True
            elif kind == "stop":
                self._end(values[0], line)

    def _remove(self, line: _Line) -> None:
        del self._lines[line.number]
        self._selector.unregister(line.stream)

    def _lose(self, line: _Line, what: str) -> None:
        self._remove(line)
        self._end(f"{line.name} {what}; its output may say why.\n{RESUME}", line)

    def _end(self, text: str, source: _Line) -> None:
        if not self._leaving.acquire(blocking=False):
            return
        self._tell(text, source)
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


def _where() -> str:
    return f"{socket.gethostname()}, pid {os.getpid()}"


def connect(place: Place, facts: Facts, start_timeout: float, timeout: float) -> Peers:
    """Meet the other processes and compare `facts` with those of process 0.

    Args:
      place: of this process.
      facts: what must be the same in all processes.
      start_timeout: seconds to wait for the others.
      timeout: seconds without a sign of life after which a process counts as lost; all others end then.

    Raises:
      PeerError: a process is missing, runs something else, or there are two of one number; all that have met raise
        it with the same message. Or the coordinator's port is taken.
    """
    deadline = time.monotonic() + start_timeout
    peers = Peers(place, timeout)
    if place.number == 0:
        _gather(peers, place, facts, deadline, start_timeout)
    else:
        peers._add(_call(place, facts, deadline, start_timeout))
    peers.watch()
    return peers


def _gather(peers: Peers, place: Place, facts: Facts, deadline: float, start_timeout: float) -> None:
    """As process 0, let the others call until all have."""
    door = _open_door(place, facts)
    note = time.monotonic() + _NOTE_SECONDS
    came, problem = 0, ""
    with door, selectors.DefaultSelector() as selector:
        selector.register(door, selectors.EVENT_READ)
        while len(peers._lines) < place.processes - 1 or problem:
            now = time.monotonic()
            if problem and (came >= place.processes - 1 or now > deadline):
                raise PeerError(problem)
            if now > deadline:
                problem = _missing(place, peers, start_timeout)
                _refuse(selector, problem)
                raise PeerError(problem)
            if now > note:
                print(f"process 0 waits at {place.coordinator} for {_absent(place, peers)}", file=sys.stderr)
                note = deadline + 1
            for key, _ in selector.select(max(0.0, min(deadline, note) - now)):
                line = key.data
                if line is None:
                    stream, _ = door.accept()
                    stream.settimeout(5)
                    selector.register(stream, selectors.EVENT_READ, _Line(stream))
                    continue
                found = ""
                try:
                    messages = line.receive()
                    for message in messages or ():
                        found = found or _greeted(peers, line, message, facts)
                        came += 1
                except _ForeignError:
                    messages = None
                if messages is None:
                    selector.unregister(line.stream)
                    line.stream.close()
                    if line.number >= 0:
                        found = f"{line.name} has ended before all had started; its output may say why."
                if found and not problem:
                    # Those that are still to come hear it too.
                    problem, deadline = found, min(deadline, time.monotonic() + _REFUSAL_SECONDS)
                if problem:
                    _refuse(selector, problem)
                elif messages:
                    line.send("wait", deadline - time.monotonic())
    for line in peers._lines.values():
        line.send("go", _where())


def _refuse(selector: selectors.BaseSelector, problem: str) -> None:
    """Tell those that have said who they are what is wrong."""
    for key in list(selector.get_map().values()):
        # Closing a connection with something unread in it would discard what was sent.
        if isinstance(key.data, _Line) and key.data.number >= 0:
            key.data.send("stop", problem)
            selector.unregister(key.data.stream)
            key.data.stream.close()


def _greeted(peers: Peers, line: _Line, message: list[Any], facts: Facts) -> str:
    """Take in a process that calls; what is wrong with it.

    Raises:
      _ForeignError: it is not one of this program.
    """
    if len(message) != 4 or message[0] != "hello" or not isinstance(message[3], dict):
        raise _ForeignError
    _, line.number, line.where, theirs = message
    if line.number == 0 or line.number in peers._lines:
        first = _where() if line.number == 0 else peers._lines[line.number].where
        return (
            f"distributed.process_id={line.number} was given to two processes, ({first}) and ({line.where}); each "
            f"needs its own, from 0 to {peers.count - 1}"
        )
    if problem := difference([facts, *[None] * (line.number - 1), theirs]):
        return problem
    peers._add(line)
    return ""


def _absent(place: Place, peers: Peers) -> str:
    numbers = [str(number) for number in range(1, place.processes) if number not in peers._lines]
    shown = ", ".join(numbers[:8]) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"process{'es' if len(numbers) > 1 else ''} {shown} of {place.processes}"


def _missing(place: Place, peers: Peers, start_timeout: float) -> str:
    return (
        f"distributed.coordinator={place.coordinator}: {_absent(place, peers)} did not come to process 0 "
        f"({_where()}) within distributed.start_timeout_seconds={start_timeout:g}{_doubt(place)}; start all of them, "
        "each with this coordinator and its own distributed.process_id"
    )


def _doubt(place: Place) -> str:
    """What is suspicious about the coordinator's host, seen from process 0."""
    host, _ = split_address(place.coordinator)
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return f", and this machine knows no host {host}"
    for family, kind, _, _, address in found:
        with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
            probe.bind(address)
            return ""
    return f", and {host} is not an address of this machine"


def _open_door(place: Place, facts: Facts) -> socket.socket:
    """The coordinator's port, listening; like JAX's service at all addresses of this machine."""
    _, port = split_address(place.coordinator)
    given = f"distributed.coordinator={place.coordinator}"
    try:
        if socket.has_dualstack_ipv6():
            with contextlib.suppress(OSError):
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
        return socket.create_server(("", port), backlog=4096)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            # Perhaps by another process 0, which then says what is wrong.
            with contextlib.suppress(_UnreachableError, _ForeignError):
                _reach(place, facts, time.monotonic() + 5).stream.close()
        raise PeerError(
            f"{given}: process 0 cannot listen at port {port} of this machine ({error.strerror}); end the program "
            "that uses it, perhaps an earlier run, or choose another port"
        ) from error


class _UnreachableError(Exception):
    """Process 0 cannot be reached; the message says why."""


def _call(place: Place, facts: Facts, deadline: float, start_timeout: float) -> _Line:
    """As another process, call process 0 until it answers."""
    try:
        return _reach(place, facts, deadline)
    except _ForeignError as error:
        raise PeerError(
            f"distributed.coordinator={place.coordinator}: what answers there is no process 0 that waits for others, "
            "but a run that has started already or another program; choose another port"
        ) from error
    except _UnreachableError as error:
        raise PeerError(
            f"distributed.coordinator={place.coordinator}: process {place.number} of {place.processes} did not reach "
            f"process 0 within distributed.start_timeout_seconds={start_timeout:g} ({error}); check host and port, "
            "that process 0 runs there, and that all processes were started"
        ) from error


def _reach(place: Place, facts: Facts, deadline: float) -> _Line:
    reason, note = "no answer", time.monotonic() + _NOTE_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = _Line(socket.create_connection(split_address(place.coordinator), timeout=min(left, 10)), 0)
        except OSError as error:
            reason = f"{error.strerror or error}"
            line = None
        if line is not None and line.stream.getsockname() == line.stream.getpeername():
            # Where nothing listens at a port that is also free for callers, TCP may connect the caller to itself.
            line.stream.close()
            line = None
        if line is not None:
            line.send("hello", place.number, _where(), dict(facts))
            reason = "it took the call and did not answer"
            while (left := deadline - time.monotonic()) > 0:
                line.stream.settimeout(min(left, 1))
                messages = line.receive()
                if messages is None:
                    reason = "it ended the call"
                    break
                for kind, *values in messages:
                    if kind == "stop":
                        raise PeerError(values[0])
                    if kind == "wait":
                        # Process 0 is there, and it says whom it misses when its time is up.
                        deadline = time.monotonic() + values[0] + 5
                    if kind == "go":
                        line.where = values[0]
                if line.where:
                    return line
            line.stream.close()
        if time.monotonic() > note:
            print(f"process {place.number} waits for process 0 at {place.coordinator}: {reason}", file=sys.stderr)
            note = deadline + 1
        time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))
    raise _UnreachableError(reason)
