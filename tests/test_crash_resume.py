"""kill -9 at random moments, training and saving: every resume ends at the same bits as the run never killed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runner import Runner, assert_same, final_state, overrides
from unipool_jax.config.compose import compose_config
from unipool_jax.training.metrics import CLOCKED


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with Runner(tmp_path_factory.mktemp("compiled")) as started:
        yield started


def _arguments(folder: Path, steps: int) -> list[str]:
    return overrides(folder, f"train.steps={steps}", "train.checkpoint_every=75", "train.eval_every=300")


def _metrics(run: Path) -> list[dict]:
    """The metrics file without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCKED} for line in lines]


def _saved(run: Path) -> set[int]:
    return {int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()}


def _kill_at_some_moment(runner: Runner, arguments: list[str], run: Path, aim: str, chance: random.Random) -> str:
    """Start a run, kill it at a random moment, and say what it was doing.

    Args:
      aim: `anywhere` from the start of the process on; `after` its first new checkpoint; `saving`, while the temporary
        folder of a save exists.
    """
    before, checkpoints = _saved(run), run / "checkpoints"
    child = runner.start(arguments, run.parent / "log")
    deadline = time.monotonic() + 120

    def wait_for(happened: Callable[[], object]) -> None:
        while not happened() and time.monotonic() < deadline:
            time.sleep(0.0005)

    if aim == "anywhere":
        time.sleep(chance.uniform(0.1, 3.0))
    else:
        wait_for(lambda: _saved(run) - before)
        if aim == "after":
            time.sleep(chance.uniform(0.0, 0.3))
        else:
            wait_for(lambda: list(checkpoints.glob("*orbax-checkpoint-tmp*")))
            time.sleep(chance.uniform(0.0, 0.05))
    os.kill(child, signal.SIGKILL)
    assert runner.wait() == -signal.SIGKILL, (run.parent / "log").read_text()
    if list(checkpoints.glob("*orbax-checkpoint-tmp*")):
        return "saving"
    return "training" if _saved(run) - before else "starting"


def _survives(runner: Runner, tmp_path: Path, kills: int, steps: int) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole, killed = (tmp_path / name / "runs" / "tiny" for name in ("whole", "killed"))
    whole_arguments, killed_arguments = (_arguments(tmp_path / name, steps) for name in ("whole", "killed"))
    for run in (whole, killed):
        run.parent.mkdir(parents=True)
    runner.start(whole_arguments, whole.parent / "log")
    assert runner.wait() == 0, (whole.parent / "log").read_text()

    chance = random.Random(kills)
    aims = [("after", "saving", "anywhere")[i % 3] for i in range(kills)]
    moments = [_kill_at_some_moment(runner, killed_arguments, killed, aim, chance) for aim in aims]
    print({moment: moments.count(moment) for moment in sorted(set(moments))}, "saved", sorted(_saved(killed)))
    assert "saving" in moments, "no kill hit a save"

    runner.start(killed_arguments, killed.parent / "log")
    assert runner.wait() == 0, (killed.parent / "log").read_text()
    assert (killed.parent / "log").read_text().count("resuming after step") > kills // 2
    config = compose_config(whole_arguments)
    assert_same(final_state(config, whole), final_state(config, killed))
    assert _metrics(whole) == _metrics(killed)
    assert not list((killed / "checkpoints").glob("*tmp*"))


def test_four_kills_do_not_change_a_bit(runner: Runner, tmp_path: Path) -> None:
    _survives(runner, tmp_path, kills=4, steps=1000)


@pytest.mark.slow
def test_twenty_kills_do_not_change_a_bit(runner: Runner, tmp_path: Path) -> None:
    _survives(runner, tmp_path, kills=20, steps=8000)
