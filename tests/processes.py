"""Runs a test file as a program in two processes of one JAX runtime, each with some CPU devices."""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
from pathlib import Path

from unipool_jax.config.schema import Config, DistributedConfig
from unipool_jax.parallel.processes import joined


def run_two(file: str, devices: int, *arguments: str) -> None:
    """Run `file` in two processes until both have ended well; each calls `join` and then checks what it is about."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": os.environ["CPU_XLA_FLAGS"].replace("_device_count=8", f"_device_count={devices}"),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    started = [
        subprocess.Popen([sys.executable, file, address, str(process), *arguments], env=environment)
        for process in range(2)
    ]
    try:
        assert [process.wait(timeout=300) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()


def join() -> list[str]:
    """Become one of the two processes; the other arguments of `run_two`."""
    address, process, *arguments = sys.argv[1:]
    distributed = DistributedConfig(coordinator=address, num_processes=2, process_id=int(process))
    connection = joined(Config(distributed=distributed))
    connection.__enter__()
    atexit.register(connection.__exit__, None, None, None)
    return arguments
