"""Real processes on this machine that train one model: two and four of them, killed and started again."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runner import Runner, assert_same, final_state, overrides, write_text
from unipool_jax.config.compose import compose_config

STEPS = 48
TIMEOUT = 10
"""`distributed.timeout_seconds` of these runs."""
ENDS_WITHIN = 3 * TIMEOUT


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with Runner(tmp_path_factory.mktemp("compiled"), devices=1) as started:
        yield started


def arguments(folder: Path, *more: str) -> list[str]:
    settings = (
        "train.batch_size=8 train.microbatch_size=8 train.checkpoint_every=8 train.eval_every=24 train.log_every=1 "
        f"train.steps={STEPS} model.compute_dtype=float32 moe.experts_per_layer=4 "
        f"distributed.timeout_seconds={TIMEOUT} distributed.start_timeout_seconds=60"
    )
    return overrides(folder, *settings.split(), *more)


def start(
    runner: Runner, folder: Path, count: int, *more: str, each: list[list[str]] | None = None
) -> tuple[list[int], list[Path]]:
    """Start `count` processes of one run, `each` with settings of its own; their ids and logs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    single = ["mesh=single"] if count == 1 else ["mesh.data=-1", f"mesh.expert={2 if count == 4 else 1}"]
    parts = [
        [f"distributed.coordinator={address}", f"distributed.num_processes={count}", f"distributed.process_id={i}"]
        for i in range(count)
    ]
    lines = [
        arguments(folder, *single, *more, *(part if count > 1 else []), *own)
        for part, own in zip(parts, each or [[]] * count, strict=True)
    ]
    logs = [folder / f"log{i}" for i in range(count)]
    for log in logs:
        log.unlink(missing_ok=True)
    return runner.start_several(lines, logs), logs


def train_lines(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == "train"]


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and len(train_lines(run)) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def wait_for_checkpoint(run: Path) -> None:
    """Checkpoints are written beside the training: one is complete some time after its step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(path.name.isdigit() for path in (run / "checkpoints").glob("*")):
            return
        time.sleep(0.02)
    raise AssertionError("no checkpoint was completed")


def texts(logs: list[Path]) -> str:
    return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in logs)


def assert_sentence(log: Path, sentence: str) -> None:
    """That a process said this, and that neither Python nor C++ added a stack."""
    said = log.read_text()
    assert sentence in said, said
    assert not re.search(r"Traceback|terminate called|\.cc:\d+\]", said), said


@pytest.fixture(scope="module")
def uninterrupted(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """One process that nothing stopped: its run folder and final state."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    _, logs = start(runner, folder, 1)
    assert runner.wait() == 0, texts(logs)
    run = folder / "runs" / "tiny"
    return run, final_state(compose_config(arguments(folder)), run)


def assert_same_training(run: Path, folder: Path, uninterrupted: tuple[Path, dict[str, np.ndarray]]) -> None:
    """The losses of every step, and the final state, of the run that nothing stopped."""
    mine, theirs = train_lines(run), train_lines(uninterrupted[0])
    assert [line["step"] for line in mine] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([x["loss/lm"] for x in mine], [x["loss/lm"] for x in theirs], rtol=1e-4)
    for name, value in final_state(compose_config(arguments(folder)), run).items():
        np.testing.assert_allclose(value, uninterrupted[1][name], rtol=2e-3, atol=2e-4, err_msg=name)


def last_saved(run: Path) -> int:
    return max(int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit())


def test_two_processes_lose_one_four_get_a_signal_and_one_finishes(
    runner: Runner, tmp_path: Path, uninterrupted: tuple[Path, dict[str, np.ndarray]]
) -> None:
    run = tmp_path / "runs" / "tiny"
    children, logs = start(runner, tmp_path, 2)
    wait_for_step(run, 12)
    wait_for_checkpoint(run)
    os.kill(children[1], signal.SIGSTOP)
    stopped = time.monotonic()
    while (
        not logs[0].read_text().endswith("newest complete checkpoint.\n") and time.monotonic() - stopped < ENDS_WITHIN
    ):
        time.sleep(0.1)
    os.kill(children[1], signal.SIGCONT)
    assert runner.wait_for_several() == [1, 1], texts(logs)
    for log in logs:  # what was stopped hears of it
        assert_sentence(log, f"pid {children[1]}) was not heard from for distributed.timeout_seconds={TIMEOUT}")
    assert "loss" not in logs[1].read_text(), "only process 0 reports"

    children, logs = start(runner, tmp_path, 4)
    wait_for_step(run, 24)
    os.kill(children[3], signal.SIGTERM)
    assert runner.wait_for_several() == [128 + signal.SIGTERM] * 4, texts(logs)
    assert "resuming after step" in logs[0].read_text()
    saved = last_saved(run)
    assert saved == train_lines(run)[-1]["step"]

    _, logs = start(runner, tmp_path, 1)
    assert runner.wait() == 0, texts(logs)
    assert f"resuming after step {saved}" in logs[0].read_text()
    assert_same_training(run, tmp_path, uninterrupted)


@pytest.mark.slow
def test_two_processes_stopped_and_started_again_end_in_the_same_bits(runner: Runner, tmp_path: Path) -> None:
    for name in ("stopped", "uninterrupted"):
        (tmp_path / name).mkdir()
    stopped, uninterrupted = (tmp_path / name / "runs" / "tiny" for name in ("stopped", "uninterrupted"))
    children, logs = start(runner, tmp_path / "stopped", 2)
    wait_for_step(stopped, 20)
    os.kill(children[1], signal.SIGTERM)
    assert runner.wait_for_several() == [128 + signal.SIGTERM] * 2, texts(logs)
    for name in ("stopped", "uninterrupted"):
        _, logs = start(runner, tmp_path / name, 2)
        assert runner.wait_for_several() == [0, 0], texts(logs)
    config = compose_config(arguments(tmp_path / "uninterrupted"))
    assert_same(final_state(config, stopped), final_state(config, uninterrupted))


def test_a_lost_process_0_which_all_report_to_stops_the_others(runner: Runner, tmp_path: Path) -> None:
    children, logs = start(runner, tmp_path, 2)
    wait_for_step(tmp_path / "runs" / "tiny", 3)
    os.kill(children[0], signal.SIGKILL)
    killed = time.monotonic()
    assert runner.wait_for_several() == [-signal.SIGKILL, 1], texts(logs)
    assert time.monotonic() - killed < ENDS_WITHIN, texts(logs)
    assert_sentence(logs[1], f"process 0 ({socket.gethostname()}, pid {children[0]}) has ended without a word")


def test_processes_that_differ_stop_before_the_first_step_and_say_in_what(runner: Runner, tmp_path: Path) -> None:
    """In settings, which are compared first, and in the text under one path, which is read late."""
    _, logs = start(runner, tmp_path, 2, each=[["optimizer.learning_rate=3e-3"], ["optimizer.learning_rate=1e-3"]])
    assert runner.wait_for_several() == [1, 1], texts(logs)
    for log in logs:
        assert_sentence(log, "optimizer.learning_rate: 0.003 in process 0, 0.001 in process 1")
    (tmp_path / "other").mkdir()
    write_text(tmp_path / "other" / "text.jsonl", documents=41)
    _, logs = start(runner, tmp_path, 2, each=[[], [f"data.files=[{tmp_path / 'other' / 'text.jsonl'}]"]])
    assert runner.wait_for_several() == [1, 1], texts(logs)
    for log in logs:
        assert_sentence(log, "text of the run")
    assert not (tmp_path / "runs" / "tiny" / "metrics.jsonl").exists()


def test_what_process_0_refuses_stops_the_others_too(runner: Runner, tmp_path: Path) -> None:
    _, logs = start(runner, tmp_path, 2, "run.resume=required")
    assert runner.wait_for_several() == [1, 1], texts(logs)
    assert_sentence(logs[0], "holds no checkpoint")
    assert_sentence(logs[1], "stopped: run.resume=required, but")
