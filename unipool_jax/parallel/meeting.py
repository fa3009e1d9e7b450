"""How the processes of a run meet: who comes, who is missing, and whether all run the same thing.

Process 0 listens at the coordinator's port and the others call. Once all have, it gives the port up to JAX's runtime;
the connections stay, see `peers`.
"""

from __future__ import annotations

import contextlib
import errno
import selectors
import socket
import sys
import time
from typing import Any

from unipool_jax.config.addresses import split_address
from unipool_jax.parallel.agreement import Facts, difference
from unipool_jax.parallel.launch import Place
from unipool_jax.parallel.peers import ForeignError, Line, PeerError, Peers, where

_REFUSAL_SECONDS = 10.0
"""That process 0, when something is wrong, waits for the rest to come and hear it."""
_NOTE_SECONDS = 10.0
"""After which a process that waits for others at the start says so."""


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
        peers.add(_call(place, facts, deadline, start_timeout))
    peers.watch()
    return peers


def _gather(peers: Peers, place: Place, facts: Facts, deadline: float, start_timeout: float) -> None:
    """As process 0, let the others call until all have."""
    door = _open_door(place, facts)
    note = time.monotonic() + _NOTE_SECONDS
    came, problem = 0, ""
    with door, selectors.DefaultSelector() as selector:
        selector.register(door, selectors.EVENT_READ)
        while len(peers.lines) < place.processes - 1 or problem:
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
                    selector.register(stream, selectors.EVENT_READ, Line(stream))
                    continue
                found = ""
                try:
                    messages = line.receive()
                    for message in messages or ():
                        found = found or _greeted(peers, line, message, facts)
                        came += 1
                except ForeignError:
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
    for line in peers.lines.values():
        line.send("go", where())


def _refuse(selector: selectors.BaseSelector, problem: str) -> None:
    """Tell those that have said who they are what is wrong."""
    for key in list(selector.get_map().values()):
        # Closing a connection with something unread in it would discard what was sent.
        if isinstance(key.data, Line) and key.data.number >= 0:
            key.data.send("stop", problem)
            selector.unregister(key.data.stream)
            key.data.stream.close()


def _greeted(peers: Peers, line: Line, message: list[Any], facts: Facts) -> str:
    """Take in a process that calls; what is wrong with it.

    Raises:
      ForeignError: it is not one of this program.
    """
    if len(message) != 4 or message[0] != "hello" or not isinstance(message[3], dict):
        raise ForeignError
    _, line.number, line.where, theirs = message
    if line.number == 0 or line.number in peers.lines:
        first = where() if line.number == 0 else peers.lines[line.number].where
        return (
            f"distributed.process_id={line.number} was given to two processes, ({first}) and ({line.where}); each "
            f"needs its own, from 0 to {peers.count - 1}"
        )
    if problem := difference([facts, *[None] * (line.number - 1), theirs]):
        return problem
    peers.add(line)
    return ""


def _absent(place: Place, peers: Peers) -> str:
    numbers = [str(number) for number in range(1, place.processes) if number not in peers.lines]
    shown = ", ".join(numbers[:8]) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"process{'es' if len(numbers) > 1 else ''} {shown} of {place.processes}"


def _missing(place: Place, peers: Peers, start_timeout: float) -> str:
    return (
        f"distributed.coordinator={place.coordinator}: {_absent(place, peers)} did not come to process 0 "
        f"({where()}) within distributed.start_timeout_seconds={start_timeout:g}{_doubt(place)}; start all of them, "
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
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise
            return socket.create_server(("", port), backlog=4096)  # without IPv6
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            # Perhaps by another process 0, which then says what is wrong.
            with contextlib.suppress(_UnreachableError, ForeignError):
                _reach(place, facts, time.monotonic() + 5).stream.close()
        raise PeerError(
            f"{given}: process 0 cannot listen at port {port} of this machine ({error.strerror}); end the program "
            "that uses it, perhaps an earlier run, or choose another port"
        ) from error


class _UnreachableError(Exception):
    """Process 0 cannot be reached; the message says why."""


def _call(place: Place, facts: Facts, deadline: float, start_timeout: float) -> Line:
    """As another process, call process 0 until it answers."""
    try:
        return _reach(place, facts, deadline)
    except ForeignError as error:
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


def _reach(place: Place, facts: Facts, deadline: float) -> Line:
    reason, note = "no answer", time.monotonic() + _NOTE_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        line = None
        try:
            stream = socket.create_connection(split_address(place.coordinator), timeout=min(left, 10))
            # Where nothing listens at a port that callers are given too, TCP may connect a caller to itself.
            if stream.getsockname() == stream.getpeername():
                stream.close()
            else:
                line = Line(stream, 0)
        except OSError as error:
            reason = f"{error.strerror or error}"
        if line is not None:
            line.send("hello", place.number, where(), dict(facts))
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
