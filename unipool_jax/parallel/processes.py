"""Training in several processes: connecting them, and decisions that all of them must share.

All run the same program; only process 0 prints and writes files, but for shards of checkpoints. What they say to each
other outside of computations goes over the lines of `peers`; JAX's distributed runtime serves computations and
checkpoints.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np

from unipool_jax.config.errors import UserError
from unipool_jax.config.schema import Config
from unipool_jax.parallel.accelerators import check_platforms
from unipool_jax.parallel.agreement import Facts, difference, facts
from unipool_jax.parallel.launch import find_place, one_of_several
from unipool_jax.parallel.meeting import connect
from unipool_jax.parallel.peers import RESUME, PeerError, Peers

Found = TypeVar("Found")

_JAX_WAITS = 30
"""Seconds by which JAX's own limits exceed ours, so that a sentence comes before its stack."""

_JAX_GRACE = 3.0
"""Seconds that an error of JAX's client waits for the sentence."""

_peers: Peers | None = None
"""The other processes; None in a process alone."""


@contextlib.contextmanager
def joined(config: Config) -> Iterator[None]:
    """Connect to the other processes, if any, and tell them how the block ended.

    Must be entered before JAX initializes its devices. A process is connected until it ends.

    Raises:
      ConfigError: the settings or the launcher do not say where the other processes are.
      PeerError: they cannot be reached, or run something else.
    """
    if not one_of_several(config.distributed):
        yield
        return
    try:
        _start(config)
        yield
    except BaseException as error:
        if lost := lost_peer(error):
            raise lost from error
        if _peers is not None:
            # A PeerError is known to all.
            _peers.stop("" if isinstance(error, PeerError) else _reason(error))
        raise
    if _peers is not None:
        _peers.finish()


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".splitlines()[0]


def _start(config: Config) -> None:
    global _peers
    own = facts(config)
    if _peers is None:
        limits, place = config.distributed, find_place(config.distributed)
        _peers = connect(place, own, limits.start_timeout_seconds, limits.timeout_seconds)
        try:
            with _losses_reported():
                jax.distributed.initialize(
                    coordinator_address=place.coordinator,
                    num_processes=place.processes,
                    process_id=place.number,
                    initialization_timeout=limits.start_timeout_seconds + _JAX_WAITS,
                    heartbeat_timeout_seconds=limits.timeout_seconds + _JAX_WAITS,
                )
        except (RuntimeError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise PeerError(f"JAX cannot connect process {place.number} to {place.coordinator}: {reason}") from error
    else:
        must_agree(own)
    must_agree(_devices())


def _devices() -> dict[str, str]:
    check_platforms()
    local = jax.local_devices()
    kinds = sorted({device.device_kind for device in local})
    return {"devices of each process": f"{len(local)} x {', '.join(kinds)}"}


def must_agree(own: Facts) -> None:
    """Compare facts of this process with those of the others; every process must call it.

    Raises:
      PeerError: in all processes, naming the facts that differ.
    """
    if _peers is None:
        return
    text = _peers.decide(json.dumps(dict(own)), lambda texts: difference([json.loads(text) for text in texts]))
    if text:
        raise PeerError(text)


@contextlib.contextmanager
def _losses_reported() -> Iterator[None]:
    """Let a loss that JAX's client notices end this process with our message instead of a stack.

    `jax.distributed.initialize` does not pass on the callback for losses. Up to 0.12, calling it fails besides, because
    its argument has no type in Python, which ends in C++'s handler for uncaught exceptions: so that is set too.
    """
    from jax._src.lib import _jax

    make_client = _jax.get_distributed_runtime_client
    _jax.get_distributed_runtime_client = functools.partial(make_client, missed_heartbeat_callback=_lost)
    with contextlib.suppress(OSError, AttributeError):  # another library of C++
        set_handler = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
        set_handler.argtypes, set_handler.restype = [_Handler], _Handler
        _handlers.append(_Handler(_lost))
        _handlers.append(set_handler(_handlers[0]))
    try:
        yield
    finally:
        _jax.get_distributed_runtime_client = make_client


_Handler = ctypes.CFUNCTYPE(None)
_handlers: list[Callable[[], None]] = []
"""Ours, which C++ holds, and the one before it."""


def _lost(*status: object) -> None:
    """Called from a thread of C++ when JAX's client lost the others, or for any uncaught exception of C++."""
    assert _peers is not None
    # A loss is noticed on our lines too, which end this process.
    _peers.wait_for_verdict(_JAX_GRACE)
    reason = "JAX's runtime ended it" + "".join(f": {text}" for text in status)
    print(f"process {_peers.number} stops because {reason}\n{RESUME}", file=sys.stderr, flush=True)
    _peers.stop(reason)
    if not status and len(_handlers) == 2:
        _handlers[1]()
    os._exit(PeerError.exit_code)


def is_process_0() -> bool:
    """Whether this is process 0, which writes files and prints."""
    return jax.process_index() == 0


def broadcast_from_process_0(text: str) -> str:
    """The `text` of process 0, in every process. All processes must call it."""
    return text if _peers is None else _peers.decide(text, lambda texts: texts[0])


def all_agree(mine: bool) -> bool:
    """Whether `mine` is True in every process. All processes must call it."""
    if _peers is None:
        return mine
    return bool(_peers.decide("yes" if mine else "", lambda texts: "yes" if all(texts) else ""))


def process_0_first(action: Callable[[], Found]) -> Found:
    """Run `action` in process 0 and, when it has finished, in the others, which may read the files it wrote.

    An error in process 0 ends the others, see `joined`.
    """
    if is_process_0():
        result = action()
        broadcast_from_process_0("")
        return result
    broadcast_from_process_0("")
    return action()


def lost_peer(error: BaseException) -> PeerError | None:
    """What to report instead of `error` if it looks as if another process was lost, else None.

    If the lines between the processes notice which one it was, this process ends with that message instead.

    JAX has no exception type for this: the text of its backends' errors is all there is. From within a save it comes as
    a ValueError that begins with the status ("UNKNOWN: Gloo AllGather failed").
    """
    signs = ("gloo", "nccl", "connection", "peer", "coordination", "heartbeat", "unavailable", "deadline")
    text = str(error).strip()
    status = isinstance(error, ValueError) and re.match(r"[A-Z_]+: ", text)
    if _peers is None or not (status or isinstance(error, jax.errors.JaxRuntimeError)):
        return None
    if not any(sign in text.lower() for sign in signs):
        return None
    _peers.wait_for_verdict()
    reason = f"it lost another process, whose output may say why: {text.splitlines()[0]}"
    _peers.stop(reason)
    return PeerError(f"process {_peers.number} stopped because {reason}\n{RESUME}")


class Vote:
    """The maximum of a number over all processes, one step late so that no step waits for it."""

    def __init__(self) -> None:
        self._pending: jax.Array | None = None
        mesh = jax.sharding.Mesh(np.array(jax.devices()), ("processes",))
        self._place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("processes"))
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self._largest = jax.jit(jax.numpy.max, out_shardings=everywhere)

    def cast(self, number: int) -> int:
        """Submit `number` for this step; return the largest submitted for the previous step, 0 at first."""
        decided = 0 if self._pending is None else int(jax.device_get(self._pending))
        mine = np.full(jax.local_device_count(), number, np.int32)
        self._pending = self._largest(jax.make_array_from_process_local_data(self._place, mine))
        return decided
