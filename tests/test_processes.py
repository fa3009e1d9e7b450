"""Real processes on this machine that train one model: two and four of them, killed and started again."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runner import Runner, assert_same, final_state, overrides
from unipool_jax.compose import compose_config

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


def start(runner: Runner, folder: Path, count: int, *more: str) -> tuple[list[int], list[Path]]:
    """Start `count` processes of one run; their ids and logs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    single = ["mesh=single"] if count == 1 else ["mesh.data=-1", f"mesh.expert={2 if count == 4 else 1}"]
    each = [
        [f"distributed.coordinator={address}", f"distributed.num_processes={count}", f"distributed.process_id={i}"]
        for i in range(count)
    ]
    lines = [arguments(folder, *single, *more, *(part if count > 1 else [])) for part in each]
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


def texts(logs: list[Path]) -> str:
    return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in logs)


@pytest.fixture(scope="module")
def whole(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """One process that nothing stopped: its run folder and final state."""
    folder = tmp_path_factory.mktemp("whole")
    _, logs = start(runner, folder, 1)
    assert runner.wait() == 0, texts(logs)
    run = folder / "runs" / "tiny"
    return run, final_state(compose_config(arguments(folder)), run)


def assert_same_training(run: Path, folder: Path, whole: tuple[Path, dict[str, np.ndarray]]) -> None:
    """The losses of every step, and the final state, of the run that nothing stopped."""
    mine, theirs = train_lines(run), train_lines(whole[0])
    assert [line["step"] for line in mine] == list(range(1, STEPS + 1))
    # Early losses show that the batches are the same; later rounding errors have grown.
    early = slice(0, 60)
    np.testing.assert_allclose(
        [line["loss/lm"] for line in mine][early], [line["loss/lm"] for line in theirs][early], rtol=1e-4
    )
    np.testing.assert_allclose([x["loss/lm"] for x in mine], [x["loss/lm"] for x in theirs], rtol=3e-2)
    assert final_state(compose_config(arguments(folder)), run).keys() == whole[1].keys()


@pytest.mark.parametrize(("first", "second"), [(2, 4), (4, 1)])
def test_kill_one_and_go_on_with_another_number_of_processes(
    runner: Runner, tmp_path: Path, whole: tuple[Path, dict[str, np.ndarray]], first: int, second: int
) -> None:
    run = tmp_path / "runs" / "tiny"
    children, logs = start(runner, tmp_path, first)
    wait_for_step(run, 20)
    os.kill(children[-1], signal.SIGKILL)
    killed = time.monotonic()
    codes = runner.wait_for_several()
    assert time.monotonic() - killed < ENDS_WITHIN, texts(logs)
    assert codes[-1] == -signal.SIGKILL
    assert all(code != 0 for code in codes), texts(logs)
    assert "step 1/" not in texts(logs[1:]), "only process 0 reports"
    for log in logs[:-1]:
        assert "lost another one" in log.read_text() or "Terminating process" in log.read_text(), texts(logs)

    _, logs = start(runner, tmp_path, second)
    assert runner.wait_for_several() == [0] * second, texts(logs)
    assert "going on after step" in logs[0].read_text()
    assert_same_training(run, tmp_path, whole)


def test_a_signal_to_one_process_stops_all_after_the_same_step(
    runner: Runner, tmp_path: Path, whole: tuple[Path, dict[str, np.ndarray]]
) -> None:
    run = tmp_path / "runs" / "tiny"
    children, logs = start(runner, tmp_path, 2)
    wait_for_step(run, 20)
    os.kill(children[1], signal.SIGTERM)
    assert runner.wait_for_several() == [128 + signal.SIGTERM] * 2, texts(logs)
    saved = max(int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit())
    assert saved == train_lines(run)[-1]["step"]
    _, logs = start(runner, tmp_path, 2)
    assert runner.wait_for_several() == [0, 0], texts(logs)
    assert f"going on after step {saved}" in logs[0].read_text()
    assert_same_training(run, tmp_path, whole)

    # The same with nothing stopped ends in the same bits.
    (tmp_path / "again").mkdir()
    _, logs = start(runner, tmp_path / "again", 2)
    assert runner.wait_for_several() == [0, 0], texts(logs)
    config = compose_config(arguments(tmp_path))
    assert_same(final_state(config, run), final_state(config, tmp_path / "again" / "runs" / "tiny"))


def test_what_process_0_refuses_stops_the_others_too(runner: Runner, tmp_path: Path) -> None:
    _, logs = start(runner, tmp_path, 2, "run.resume=required")
    assert runner.wait_for_several() == [1, 1], texts(logs)
    assert "holds no checkpoint" in logs[0].read_text()
    assert "process 0 stopped" in logs[1].read_text() or "lost another one" in logs[1].read_text(), texts(logs)
