"""Starts processes of one run that differ, miss each other, are killed or are stopped, and reads what they say.

Held: every process that is left ends with an error code, in time, with a message that names the cause, and without a
stack of Python or C++. First every mistake of the list once, then processes killed or stopped at random moments.

    python -m benchmarks.drills.processes --count 20
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.drills.tally import Tally, arguments

_ROOT = Path(__file__).parents[2]
_START, _TIMEOUT = 25, 5
"""`distributed.start_timeout_seconds` and `distributed.timeout_seconds`."""
_IMPORTS, _MARGIN = 60, 20
"""Seconds that a busy machine may take to import everything, and to end."""
_STACK = re.compile(r"Traceback|terminate called|\.cc:\d+\]|Segmentation|Fatal Python")
_RUN = (
    "model.num_layers=2 model.hidden_size=32 model.num_heads=2 model.num_kv_heads=2 model.ffn_size=48 "
    "model.vocab_size=257 data.sequence_length=48 moe.experts_per_layer=4 train.batch_size=12 train.microbatch_size=12 "
    "train.eval_batch_size=12 train.eval_every=0 train.checkpoint_every=20 train.log_every=1 run.tensorboard=false "
    "data.source=files data.tokenizer=bytes data.split=[8,1,1] mesh=auto mesh.data=-1 train.steps=2000 run.name=drill "
    f"distributed.timeout_seconds={_TIMEOUT} distributed.start_timeout_seconds={_START}"
)


@dataclasses.dataclass
class Mistake:
    """How processes are started, and what each must say."""

    name: str
    says: str
    """A regular expression."""
    each: Sequence[Sequence[str]]
    """Settings of every process, besides the common ones."""
    processes: int = 2
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """More variables of the last one."""
    within: float = _IMPORTS + _START + _MARGIN
    apart: bool = False
    """Each may say something else."""


class Place:
    """A folder with a text, an edited copy of the code, and the processes of one attempt."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.edited = folder / "edited"
        for name, documents in (("text", 40), ("other", 41)):
            lines = [f'{{"text": "hello world number {i}, a few words to read"}}\n' for i in range(documents)]
            (folder / f"{name}.jsonl").write_text("".join(lines))
        for name in ("unipool_jax", "configs"):
            shutil.copytree(_ROOT / name, self.edited / name, ignore=shutil.ignore_patterns("__pycache__"))
        with (self.edited / "unipool_jax" / "__init__.py").open("a") as file:
            file.write("# An edit that no commit knows.\n")
        self._started: list[subprocess.Popen[str]] = []
        self._attempts = 0

    def start(
        self, each: Sequence[Sequence[str]], processes: int, port: int, environment: Mapping[str, str]
    ) -> list[Path]:
        """Start one attempt; the logs of its processes."""
        self._attempts += 1
        logs = []
        for index, own in enumerate(each):
            place = f"distributed.coordinator=127.0.0.1:{port} distributed.num_processes={processes}"
            words = [*_RUN.split(), f"data.files=[{self.folder / 'text.jsonl'}]", *place.split()]
            words += [
                f"run.dir={self.folder / 'runs' / str(self._attempts)}",
                f"data.cache_dir={self.folder / 'cache'}",
            ]
            words += [f"distributed.process_id={index}", *own]
            variables = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "PYTHONPATH": str(_ROOT),
            }
            if index == len(each) - 1:
                variables |= environment
            logs.append(self.folder / f"log{self._attempts}.{index}")
            with logs[-1].open("w") as log:
                command = [sys.executable, "-m", "unipool_jax", "train", *words]
                self._started.append(
                    subprocess.Popen(command, env=variables, stdout=log, stderr=log, text=True, cwd=self.folder)
                )
        return logs

    def all_run(self) -> bool:
        """Whether none has ended."""
        return all(process.poll() is None for process in self._started)

    def send(self, index: int, number: signal.Signals) -> None:
        """Send a signal to one of the processes."""
        self._started[index].send_signal(number)

    def wait(self, seconds: float, apart_from: int | None = None) -> dict[int, int | None]:
        """Exit codes once all but one have ended; None of those that have not after `seconds`."""
        deadline = time.monotonic() + seconds
        codes: dict[int, int | None] = {}
        for index, process in enumerate(self._started):
            if index != apart_from:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
                codes[index] = process.poll()
        return codes

    def clear(self) -> None:
        """End what is left."""
        for process in self._started:
            process.kill()
            process.wait()
        self._started.clear()


def free_port() -> int:
    """A port that nothing uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wrong(codes: Mapping[int, int | None], logs: Sequence[Path], says: str, same: bool) -> str:
    """What is wrong with how processes ended; empty if nothing is."""
    texts = {index: logs[index].read_text() for index in codes}
    for index, code in codes.items():
        shown = f"process {index}, exit code {code}: ...{texts[index][-600:]!r}"
        if code is None:
            return f"did not end: {shown}"
        if code not in (1, 2):
            return f"exit code: {shown}"
        if _STACK.search(texts[index]):
            return f"a stack: {shown}"
        if not re.search(says, texts[index]):
            return f"does not say {says!r}: {shown}"
    said = {text[match.start() :] for text in texts.values() if (match := re.search(says, text))}
    return f"not the same sentence: {said}" if same and len(said) > 1 else ""


def mistakes(place: Place, taken: int) -> Iterator[Mistake]:
    """Every mistake; `taken` is a port that another program answers."""
    for setting, one, two in (
        ("optimizer.learning_rate", "0.003", "0.001"),
        ("train.seed", "1", "2"),
        ("train.steps", "30", "40"),
        ("train.eval_every", "5", "0"),
        ("train.batch_size", "12", "24"),
        ("train.checkpoint_every", "20", "10"),
        ("train.nonfinite", "stop", "skip"),
        ("moe.router", "softmax", "sigmoid"),
        ("run.name", "one", "two"),
        ("kernels.implementation", "xla", "reference"),
        ("mesh.capacity_factor", "2.0", "3.0"),
    ):
        text = f"{re.escape(setting)}: {re.escape(one)} in process 0, {re.escape(two)} in process 1"
        yield Mistake(setting, text, [[f"{setting}={one}"], [f"{setting}={two}"]])
    files = f"data.files=[{place.folder / 'other.jsonl'}]"
    yield Mistake("other text", "text of the run.*in process 1", [[], [files]])
    yield Mistake("a third with other text", "text of the run.*in process 2", [[], [], [files]], 3)
    yield Mistake("other folder", r"run\.dir: .* in process 0, .*/elsewhere in process 1", [[], ["run.dir=elsewhere"]])
    edited = {"PYTHONPATH": str(place.edited)}
    yield Mistake("other code", r"code of unipool_jax: .* in process 1", [[], []], environment=edited)
    for name, value in {
        "JAX_ENABLE_X64": "1",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "",
        "JAX_DEFAULT_PRNG_IMPL": "rbg",
    }.items():
        yield Mistake(name, f"environment {name}: .* in process 1", [[], []], environment={name: value})
    devices = "devices of each process: 1 x cpu in process 0, 2 x cpu in process 1"
    yield Mistake("more devices", devices, [[], []], environment={"JAX_NUM_CPU_DEVICES": "2"})
    missing = r"process 1 of 2 did not come to process 0 .* within distributed\.start_timeout_seconds"
    yield Mistake("a missing peer", missing, [[]])
    yield Mistake("two missing peers", "processes 2, 3 of 4 did not come", [[], []], 4)
    unreached = "did not reach process 0 within distributed.start_timeout_seconds"
    yield Mistake("no process 0", f"{unreached}.*refused", [["distributed.process_id=1"]])
    unknown = "distributed.coordinator=no-such-host.invalid:9999"
    yield Mistake(
        "an unknown host", f"no-such-host.invalid:9999: .*({unreached}|did not come)", [[unknown]] * 2, apart=True
    )
    other = f"distributed.coordinator=127.0.0.1:{free_port()}"
    yield Mistake("a wrong port", f"{unreached}|did not come", [[], [other]], apart=True)
    busy = f"distributed.coordinator=127.0.0.1:{taken}"
    yield Mistake(
        "a port in use",
        "cannot listen at port|no process 0 that waits|did not reach process 0",
        [[busy]] * 2,
        apart=True,
    )
    twice = "was given to two processes"
    yield Mistake("one number twice", f"process_id=1 {twice}", [[], [], ["distributed.process_id=1"]], 3)
    yield Mistake("two process 0s", f"process_id=0 {twice}", [[], [], ["distributed.process_id=0"]], 3)
    yield Mistake(
        "other num_processes", "num_processes: 2 in process 0, 3 in process 1", [[], ["distributed.num_processes=3"]]
    )
    for address in ("127.0.0.1", "127.0.0.1:", "127.0.0.1:port", "127.0.0.1:70000", ":9999", "http://127.0.0.1:9999"):
        given = f"distributed.coordinator={address}"
        yield Mistake(f"address {address}", re.escape(given), [[given]] * 2)
    high = [["distributed.process_id=2"]]
    yield Mistake("a number that is too high", "process_id=2: must be below distributed.num_processes=2", high)
    absent = "no-such-file.jsonl"
    # Its own check of settings ends the one without the file before it could call the others.
    lacks = f"{absent}|process 1 of 2 did not come"
    yield Mistake("a file that one has not", lacks, [[], [f"data.files=[{absent}]"]], apart=True)
    yield Mistake("a file that none has", absent, [[f"data.files=[{absent}]"]] * 2, apart=True)


def try_mistakes(tally: Tally, place: Place) -> None:
    """Every mistake once."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        for mistake in mistakes(place, server.getsockname()[1]):
            try:
                logs = place.start(mistake.each, mistake.processes, free_port(), mistake.environment)
                codes = place.wait(mistake.within)
                if problem := wrong(codes, logs, mistake.says, same=not mistake.apart):
                    tally.failed(f"{mistake.name}: {problem}")
                else:
                    tally.held("mistakes named")
            finally:
                place.clear()


def try_loss(tally: Tally, place: Place, chance: random.Random) -> None:
    """Kill or stop one process at a random moment, between its start and some steps of training."""
    processes, number = chance.choice((2, 3)), chance.choice((signal.SIGKILL, signal.SIGSTOP))
    victim = chance.randrange(processes)
    early = chance.random() < 0.4
    moment = chance.uniform(0, 12) if early else chance.randrange(1, 60)
    try:
        logs = place.start([[]] * processes, processes, free_port(), {})
        began = time.monotonic()
        while time.monotonic() - began < (moment if early else 300) and place.all_run():
            if not early and f"step {moment:>4}/" in logs[0].read_text():
                break
            time.sleep(0.02)
        what = f"{number.name} of process {victim} of {processes} after {moment:.1f} {'s' if early else 'steps'}"
        place.send(victim, number)
        sent = time.monotonic()
        # Before all have met, the time to wait is that of the start.
        codes = place.wait((_IMPORTS + _START if early else _TIMEOUT) + _MARGIN, apart_from=victim)
        says = rf"process {victim} \(.*(ended|not heard from)|did not (come|reach)"
        if problem := wrong(codes, logs, says, same=False):
            tally.failed(f"{what}: {problem}")
        else:
            tally.held(f"of {number.name} {'while starting' if early else 'in training'}")
        print(f"{what}: {time.monotonic() - sent:.1f} s", file=sys.stderr)
    finally:
        place.clear()


def main() -> int:
    """Run the drill; the exit code."""
    chance, count = arguments("processes that differ, are missing, killed or stopped", 20)
    tally = Tally("processes")
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        try_mistakes(tally, place)
        for _ in range(count):
            try_loss(tally, place, chance)
    return tally.report()


if __name__ == "__main__":
    sys.exit(main())
