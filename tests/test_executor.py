"""Programs in a process of their own: what they may do, and that they cannot do more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from unipool_jax.aptitude import executor
from unipool_jax.aptitude.executor import Execution, Limits, bootstrap, execute
from unipool_jax.config.errors import UserError

pytestmark = pytest.mark.skipif(executor.unavailable() is not None, reason=str(executor.unavailable()))


def run(source: str, seconds: float = 5.0, memory_mib: int = 512, characters: int = 400) -> Execution:
    return execute(source, Limits(seconds, memory_mib, characters))


def test_a_program_answers() -> None:
    found = run("import math, numpy\nprint(math.comb(5, 2), numpy.ones(2).sum())")
    assert found[:2] == ("ok", "10 2.0\n")
    assert run("print('ä', __name__)").output == "ä __main__\n"


def test_an_error_is_its_last_line() -> None:
    found = run("print('before')\n1 / 0")
    assert (found.status, found.output) == ("error", "before\nZeroDivisionError: division by zero")
    assert run("x = (").output.startswith("SyntaxError")
    assert run("raise SystemExit(3)").status == "error"
    assert run("import os\nos.abort()").status == "killed"


def test_an_endless_loop_ends() -> None:
    assert run("print(7, flush=True)\nwhile True: pass", seconds=0.4)[:2] == ("time", "7\n")
    assert run("import time\ntime.sleep(60)", seconds=0.4).status == "time"
    assert run("import os\nos.close(1); os.close(2)\nwhile True: pass", seconds=0.4).status == "time"
    # A program that ignores signals is killed all the same.
    source = "import signal\nfor n in (2, 15, 24): signal.signal(n, signal.SIG_IGN)\nwhile True: pass"
    assert run(source, seconds=0.4).seconds < 5


def test_processor_time_is_limited_too() -> None:
    """Where the parent is gone, the kernel ends a loop."""
    command = [sys.executable, "-I", "-c", bootstrap(Limits(seconds=0.5))]
    assert subprocess.run(command, input=b"while True: pass", timeout=60).returncode in (
        -signal.SIGXCPU,
        -signal.SIGKILL,
    )


@pytest.mark.parametrize("source", ["x = bytearray(1 << 40)", "x = []\nwhile True: x.append(bytearray(1 << 24))"])
def test_memory_is_limited(source: str) -> None:
    assert run(source).status == "memory"


@pytest.mark.parametrize("stream", [1, 2])
def test_a_flood_is_not_kept(stream: int) -> None:
    found = run(f"import os\nfor _ in range(1000): os.write({stream}, b'x' * 10**5)")
    assert (found.status, len(found.output)) == (("output", 400) if stream == 1 else ("ok", 0))
    assert run("print('x' * 450)")[:2] == ("output", "x" * 400)


FORBIDDEN = {
    "network": "import socket\nsocket.socket()",
    "local sockets": "import socket\nsocket.socketpair()",
    "writing": "open({path!r}, 'w')",
    "writing in its folder": "open('here', 'w')",
    "changing": "open({path!r}, 'r+')",
    "appending": "open({path!r}, 'ab')",
    "a file without a name": "import os\nos.open('/tmp', os.O_TMPFILE | os.O_RDWR)",
    "a folder": "import os\nos.mkdir({path!r} + 'x')",
    "deleting": "import os\nos.unlink({path!r})",
    "renaming": "import os\nos.rename({path!r}, {path!r} + 'x')",
    "cutting": "import os\nos.truncate({path!r}, 0)",
    "links": "import os\nos.symlink('/', {path!r} + 'x')",
    "rights": "import os\nos.chmod({path!r}, 0)",
    "fork": "import os\nos.fork()",
    "other programs": "import os\nos.execv('/bin/true', ['true'])",
    "a shell": "import subprocess\nsubprocess.run(['true'])",
    "a process by the shell": "import os\nassert os.system('true') == 0",
    "threads": "import _thread\n_thread.start_new_thread(print, ())",
    "signals": "import os\nos.kill({pid}, 0)",
    "signals by descriptors": "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, {pid})",
    "more memory": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
    "other processes": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, {pid}, 0, 0) == 0",
    "memory that is run by name": "import os\nos.memfd_create('x')",
    "an asynchronous ring": "import ctypes\nassert ctypes.CDLL(None).syscall(425, 1, bytes(120)) >= 0",
}


@pytest.mark.parametrize("source", FORBIDDEN.values(), ids=FORBIDDEN)
def test_what_a_program_may_not(source: str, tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_text("as it was", encoding="utf-8")
    found = run(source.format(path=str(path), pid=os.getpid()))
    assert found.status == "error"
    assert any(word in found.output for word in ("Operation not permitted", "AssertionError", "thread", "limit"))
    assert [one.name for one in tmp_path.iterdir()] == ["kept"]
    assert path.read_text(encoding="utf-8") == "as it was"


def test_each_of_these_works_without_the_filter(tmp_path: Path) -> None:
    """So it is the filter that the test above sees, not a mistake in a program."""
    path = tmp_path / "kept"
    for name, source in FORBIDDEN.items():
        if name in ("more memory", "other processes", "an asynchronous ring"):  # what a machine may forbid anyway
            continue
        path.write_text("as it was", encoding="utf-8")
        found = subprocess.run(
            [sys.executable, "-I", "-c", source.format(path=str(path), pid=os.getpid())], cwd=tmp_path, timeout=60
        )
        assert found.returncode == 0, name
        for one in tmp_path.iterdir():
            one.rmdir() if one.is_dir() and not one.is_symlink() else one.unlink()


def test_nothing_of_the_parent_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    found = run("import os, sys\nprint('SECRET' in os.environ, os.listdir('.'), sys.stdin.read() == '', len(sys.argv))")
    assert found.output == "False [] True 1\n"


def test_a_machine_without_a_filter_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor.platform, "machine", lambda: "riscv64")
    with pytest.raises(UserError, match="nothing would contain them"):
        run("print(1)")
