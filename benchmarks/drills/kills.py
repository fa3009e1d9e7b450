"""Kills runs with `kill -9` at random moments, and resumes them, for each kind of run.

Held: every killed run, resumed until it is finished, ends with every bit of the state and every number of the metrics
of a run that nobody killed. An attempt is one kill.

    python -m benchmarks.drills.kills --count 45
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.drills.runs import METHODS, difference, ended, kill, results, settings, train
from benchmarks.drills.tally import Tally, arguments

_STEPS = "train.steps=800 train.eval_every=40 train.checkpoint_every=20 train.log_every=10 run.tensorboard=false"


def killed_run(
    tally: Tally, folder: Path, method: str, kills: int, wanted: object, chance: random.Random, cache: Path
) -> None:
    """Kill a run `kills` times, let it finish, and compare what it computed with `wanted`."""
    words, log = settings(folder, method, *_STEPS.split()), folder / "log"
    checkpoints = folder / "runs" / "small" / "checkpoints"
    moments: list[str] = []
    while len(moments) < kills:
        child = train(words, log, cache)
        deadline = time.monotonic() + chance.uniform(0.2, 5.0)
        if saving := chance.random() < 0.4:  # while a save is in progress, which no clock would hit often
            while not list(checkpoints.glob("*.orbax-checkpoint-tmp*")) and time.monotonic() < deadline:
                time.sleep(0.0005)
            time.sleep(chance.uniform(0, 0.05))
        else:
            time.sleep(deadline - time.monotonic())
        kill(child)
        if ended(child) == 0:
            break  # it was finished
        moments.append("while saving" if saving else "at any time")
    if other := difference(ended(train(words, log, cache)), words, log, wanted):
        tally.failed(f"{method} after {len(moments)} kills: {other}")
        return
    for moment in moments:
        tally.held(f"{method}, killed {moment}")


def main() -> int:
    """Run the drill; the exit code."""
    chance, count = arguments(__doc__ or "", 24)
    tally = Tally("kills")
    with tempfile.TemporaryDirectory() as name:
        for number, method in enumerate(METHODS):
            whole, killed = Path(name) / f"whole-{number}", Path(name) / f"killed-{number}"
            for folder in (whole, killed):
                folder.mkdir()
            words = settings(whole, method, *_STEPS.split())
            if code := ended(train(words, whole / "log", Path(name) / "compiled")):
                tally.failed(f"{method}: exit code {code} without a kill: {(whole / 'log').read_text()[-400:]}")
                continue
            kills = count // len(METHODS) + (number < count % len(METHODS))
            wanted = results(words, whole / "log")
            killed_run(tally, killed, method, kills, wanted, chance, Path(name) / "compiled")
    return tally.report()


if __name__ == "__main__":
    sys.exit(main())
