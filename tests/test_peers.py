"""The lines between processes: who is missing, who differs, who was lost. No JAX, so these processes start quickly."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from unipool_jax.parallel.launch import Place
from unipool_jax.parallel.meeting import connect
from unipool_jax.parallel.peers import PeerError, Peers

FACTS = {"optimizer.learning_rate": "0.001", "train.seed": "1"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def meet(
    *numbers: int,
    processes: int = 2,
    host: str = "127.0.0.1",
    patience: float = 20,
    port: int | None = None,
    facts: dict[int, dict[str, str]] | None = None,
) -> list[Peers | str]:
    """What became of these processes, here threads: connected, or what they say."""
    address = f"{host}:{port or free_port()}"

    def one(number: int) -> Peers | str:
        try:
            own = FACTS | (facts or {}).get(number, {})
            return connect(Place(address, number, processes), own, patience, 10)
        except PeerError as error:
            return str(error)

    with ThreadPoolExecutor(len(numbers)) as pool:
        found: list[Future[Peers | str]] = [pool.submit(one, number) for number in numbers]
        return [each.result() for each in found]


def same_sentence(found: list[Peers | str]) -> str:
    assert len(set(found)) == 1, found
    assert isinstance(found[0], str), "connected"
    return found[0]


def test_processes_decide_together_in_order() -> None:
    all_peers = [found for found in meet(2, 0, 1, processes=3) if isinstance(found, Peers)]
    assert [peers.number for peers in all_peers] == [2, 0, 1]

    def decide(peers: Peers) -> list[str]:
        return [peers.decide(f"{word}{peers.number}", " ".join) for word in ("a", "b")]

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(decide, all_peers)) == [["a0 a1 a2", "b0 b1 b2"]] * 3
    # A process that has said so may go.
    for peers in all_peers:
        peers.finish()


def test_all_stop_with_the_same_sentence_that_names_the_setting_and_both_values() -> None:
    said = same_sentence(meet(0, 1, facts={1: {"optimizer.learning_rate": "0.003"}}))
    assert "optimizer.learning_rate: 0.001 in process 0, 0.003 in process 1" in said
    assert "train.seed" not in said


def test_a_difference_stops_those_that_wait_though_another_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unipool_jax.parallel.meeting._REFUSAL_SECONDS", 1)
    began = time.monotonic()
    said = same_sentence(meet(0, 1, 3, processes=4, facts={3: {"train.seed": "2"}}))
    assert "train.seed: 1 in process 0, 2 in process 3" in said
    assert time.monotonic() - began < 10


def test_the_missing_are_named() -> None:
    began = time.monotonic()
    said = same_sentence(meet(0, 2, processes=5, patience=1))
    assert "processes 1, 3, 4 of 5 did not come" in said
    assert "start_timeout_seconds=1" in said
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("numbers", [(0, 1, 1), (0, 0, 2), (0, 2, 0)])
def test_one_number_given_twice(numbers: tuple[int, ...]) -> None:
    said = same_sentence(meet(*numbers, processes=3))
    twice = max(numbers, key=numbers.count)
    assert f"distributed.process_id={twice} was given to two processes" in said
    assert said.count(f"pid {os.getpid()}") == 2


@pytest.mark.parametrize(
    ("host", "reason"),
    [("no-such-host.invalid", "Name or service not known|resolution|No address"), ("127.0.0.1", "Connection refused")],
)
def test_process_0_is_not_there(host: str, reason: str) -> None:
    (said,) = meet(1, host=host, patience=1)
    assert isinstance(said, str)
    assert "did not reach process 0 within distributed.start_timeout_seconds=1" in said
    assert any(part in said for part in reason.split("|")), said


def test_process_0_doubts_a_host_that_is_not_its_own() -> None:
    assert "192.0.2.1 is not an address of this machine" in str(meet(0, host="192.0.2.1", patience=0.1)[0])
    assert "knows no host no-such-host.invalid" in str(meet(0, host="no-such-host.invalid", patience=0.1)[0])


@pytest.fixture
def stranger() -> Iterator[int]:
    """The port of a program that answers something else."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:

        def answer() -> None:
            while True:
                try:
                    call, _ = server.accept()
                except OSError:
                    return
                with call:
                    call.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        pool.submit(answer)
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def test_another_program_has_the_port(stranger: int) -> None:
    assert f"cannot listen at port {stranger}" in str(meet(0, port=stranger)[0])
    assert "choose another port" in str(meet(1, port=stranger)[0])


def test_calls_of_strangers_do_no_harm() -> None:
    port = free_port()

    def strange() -> None:
        for text in (b"GET / HTTP/1.1\r\n\r\n", b'["hello"]\n', b"[]\n", b"\xff\n", b'["hello", "1", 2, 3]\n', b""):
            with socket.create_connection(("127.0.0.1", port), timeout=5) as call:
                call.sendall(text)

    with ThreadPoolExecutor(2) as pool:
        process_0 = pool.submit(meet, 0, port=port)
        time.sleep(0.2)
        strange()
        assert all(isinstance(found, Peers) for found in [*meet(1, port=port), *process_0.result()])


PROGRAM = """
import sys, time
from unipool_jax.parallel.launch import Place
from unipool_jax.parallel.meeting import connect
address, number, end = sys.argv[1], int(sys.argv[2]), sys.argv[3]
peers = connect(Place(address, number, 3), {}, 20, 1.0)
print("connected", flush=True)
sys.stdin.read()
if end == "finish":
    peers.finish()
elif end == "stop":
    peers.stop("DataError: text.jsonl: no such file")
time.sleep(0.2)
"""


class Three:
    """Three processes that are connected until their input ends."""

    def __init__(self, end: str = "finish"):
        address = f"127.0.0.1:{free_port()}"
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        self.each = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, address, str(number), end],
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for number in range(3)
        ]
        for process in self.each:
            assert process.stdout is not None
            assert process.stdout.readline() == "connected\n"

    def ends(self, *numbers: int) -> list[tuple[int, str]]:
        """Exit codes and errors of these."""
        found = [(self.each[number], self.each[number].communicate(timeout=20)[1]) for number in numbers]
        return [(process.returncode, text) for process, text in found]


@pytest.fixture
def three() -> Iterator[Callable[[str], Three]]:
    made: list[Three] = []

    def make(end: str) -> Three:
        made.append(Three(end))
        return made[-1]

    yield make
    for process in (process for three in made for process in three.each):
        process.kill()
        process.communicate()


def test_who_finishes_is_not_lost(three: Callable[[str], Three]) -> None:
    assert three("finish").ends(1, 0, 2) == [(0, "")] * 3


@pytest.mark.parametrize("lost", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_others_say_who_was_lost(three: Callable[[str], Three], lost: int, number: signal.Signals) -> None:
    processes = three("finish")
    processes.each[lost].send_signal(number)
    began = time.monotonic()
    rest = [other for other in range(3) if other != lost]
    # Their input stays open: they are ended, and do not end by themselves.
    for other in rest:
        processes.each[other].wait(timeout=10)
    assert time.monotonic() - began < 5
    (code, said), (other_code, other_said) = processes.ends(*rest)
    assert code == other_code == 1
    what = (
        "ended without a word" if number == signal.SIGKILL else "was not heard from for distributed.timeout_seconds=1"
    )
    for text in (said, other_said):
        assert f"process {lost} (" in text
        assert f"pid {processes.each[lost].pid}" in text
        assert what in text
        assert text.count("\n") == 2, text
    if number == signal.SIGSTOP and lost:
        # What was only stopped hears of it from process 0 when it goes on.
        processes.each[lost].send_signal(signal.SIGCONT)
        assert processes.ends(lost) == [(1, said)]


def test_why_one_stops_is_told_to_all(three: Callable[[str], Three]) -> None:
    processes = three("stop")
    assert processes.each[2].stdin is not None
    processes.each[2].stdin.close()
    processes.each[2].stdin = None
    assert [processes.each[other].wait(timeout=10) for other in (0, 1)] == [1, 1]
    (_, said), (_, also) = processes.ends(0, 1)
    assert said == also
    assert f"pid {processes.each[2].pid}) stopped: DataError: text.jsonl: no such file" in said


def test_all_may_be_suspended_at_once(three: Callable[[str], Three]) -> None:
    processes = three("finish")
    for process in processes.each:
        process.send_signal(signal.SIGSTOP)
    time.sleep(2)
    for process in processes.each:
        process.send_signal(signal.SIGCONT)
    time.sleep(0.5)
    assert processes.ends(0, 1, 2) == [(0, "")] * 3
