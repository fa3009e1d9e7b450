"""Trains on a disk that becomes full after a random number of bytes, makes room, and trains on.

Held: the full disk ends the run with a message and without a traceback, within the time limit, and the same command,
once there is room, ends with every bit of the state and every number of the metrics of a run that had it. The disk is a
`tmpfs` of this process alone, so that the token store, the configuration, metrics, events and checkpoints all hit its
end somewhere.

    python -m benchmarks.drills.full_disk --count 20
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.drills.runs import difference, ended, kill, results, settings, train
from benchmarks.drills.tally import Tally, arguments

_STEPS = "train.steps=40 train.eval_every=10 train.checkpoint_every=10 train.log_every=1"
_DISK_KIB = 4096
_SECONDS = 120
_INSIDE = "UNIPOOL_DRILL_INSIDE"


def enter_namespace() -> None:
    """Start again in a namespace of mounts of its own, where `mount` is allowed and seen by nobody else."""
    if _INSIDE not in os.environ:
        words = ["unshare", "--map-root-user", "--mount", sys.executable, "-m", "benchmarks.drills.full_disk"]
        os.execvpe(words[0], [*words, *sys.argv[1:]], os.environ | {_INSIDE: "yes"})


def waited(child: int) -> int | None:
    """The exit code of a process; None if it hung and was killed."""
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return ended(child)
        time.sleep(0.01)
    kill(child)
    ended(child)
    return None


def attempt(tally: Tally, disk: Path, log: Path, free_kib: int, wanted: object, cache: Path) -> None:
    """Train with so much room, then with all of it."""
    log.write_text("")
    words = settings(disk, "unipool", *_STEPS.split())
    ballast = disk / "ballast"
    free = shutil.disk_usage(disk).free
    with ballast.open("wb") as file:
        file.write(bytes(max(0, free - free_kib * 1024)))
    code = waited(train(words, log, cache))
    said = log.read_text()
    ballast.unlink()
    where = f"{free_kib} KiB free"
    if code is None:
        tally.failed(f"{where}: hung: {said[-400:]}")
    elif "Traceback" in said or (
        code and "Check free space" not in said and "make room" not in said and "free some" not in said
    ):
        tally.failed(f"{where}: exit code {code}: {said[-600:]}")
    else:
        if other := difference(waited(train(words, log, cache)), words, log, wanted):
            tally.failed(f"{where}: then {other}")
        else:
            tally.held("had room enough" if code == 0 else "stopped with a message and went on")


def main() -> int:
    """Run the drill; the exit code."""
    enter_namespace()
    chance, count = arguments(__doc__ or "", 20)
    tally = Tally("full_disk")
    with tempfile.TemporaryDirectory() as name:
        whole, disk, cache = Path(name) / "whole", Path(name) / "disk", Path(name) / "compiled"
        whole.mkdir()
        disk.mkdir()
        words = settings(whole, "unipool", *_STEPS.split())
        if code := ended(train(words, Path(name) / "log", cache)):
            tally.failed(f"exit code {code} with room: {(Path(name) / 'log').read_text()[-400:]}")
            return tally.report()
        wanted = results(words, Path(name) / "log")
        used = sum(path.stat().st_blocks // 2 for path in whole.rglob("*"))
        for _ in range(count):
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK_KIB}k", "none", str(disk)], check=True)
            try:
                # The smaller the room, the earlier a write that fails; the square hits the many early ones more often.
                free_kib = int(used * chance.random() ** 2 * 1.1)
                attempt(tally, disk, Path(name) / "log", free_kib, wanted, cache)
            finally:
                subprocess.run(["umount", "--lazy", str(disk)], check=True)
    return tally.report()


if __name__ == "__main__":
    sys.exit(main())
