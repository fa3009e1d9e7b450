"""Trains for thousands of steps with many evaluations and saves, and watches memory, descriptors and threads.

Held: between a quarter of the run, when everything has been compiled and used, and its end, there are no more
descriptors and threads but those of pools that fill late, and the resident memory grows by at most 0.25 MiB for each
save. Steps and evaluations keep nothing; TensorStore keeps about 0.1 MiB of its own descriptions at each save. An
attempt is one of the three.

    python -m benchmarks.drills.growth --count 2000
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.drills.runs import ended, settings, train
from benchmarks.drills.tally import Tally, arguments

_EVERY = 50
_RHYTHM = f"train.eval_every=25 train.checkpoint_every={_EVERY} train.log_every=1"
_KIB_PER_SAVE = 256
_POOLED = 4
"""Descriptors or threads that a pool may still add; what a save or an evaluation left behind would be tens."""


def measured(child: int) -> tuple[int, int, int]:
    """Resident memory in KiB, open descriptors and threads of a process."""
    status = Path(f"/proc/{child}/status").read_text()
    numbers = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.startswith(("VmRSS", "Thr"))}
    return int(numbers["VmRSS"]), len(os.listdir(f"/proc/{child}/fd")), int(numbers["Threads"])


def newest_step(metrics: Path) -> int:
    """Step of the last line of a metrics file; 0 without one."""
    return metrics.read_bytes().count(b'"kind": "train"') if metrics.exists() else 0


def main() -> int:
    """Run the drill; the exit code."""
    _, steps = arguments(__doc__ or "", 2000)
    tally = Tally("growth")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = settings(folder, "unipool", f"train.steps={steps}", *_RHYTHM.split())
        child = train(words, folder / "log", folder / "compiled")
        found: list[tuple[int, tuple[int, int, int]]] = []
        code: list[int] = []
        waiting = threading.Thread(target=lambda: code.append(ended(child)))
        waiting.start()
        while waiting.is_alive():
            step = newest_step(folder / "runs" / "small" / "metrics.jsonl")
            try:
                found.append((step, measured(child)))
            except (FileNotFoundError, ProcessLookupError, KeyError):
                break  # it has ended
            time.sleep(0.5)
        waiting.join()
        if code != [0]:
            tally.failed(f"exit code {code}: {(folder / 'log').read_text()[-400:]}")
            return tally.report()
    for index, what in enumerate(("memory", "descriptors", "threads")):
        early = [numbers[index] for step, numbers in found if steps // 4 <= step < steps // 2]
        late = [numbers[index] for step, numbers in found if steps * 3 // 4 <= step < steps]
        allowed = _KIB_PER_SAVE * (steps // 2) // _EVERY if what == "memory" else _POOLED
        # Saves come and go, and with them descriptors and threads for a moment: what stays is the least of a quarter.
        kept = max if what == "memory" else min
        grown = kept(late) - kept(early)
        text = f"{what}: {kept(early):,} to {kept(late):,}" + (" KiB" if what == "memory" else "")
        if grown > allowed:
            tally.failed(text)
        else:
            tally.held(text)
    return tally.report()


if __name__ == "__main__":
    sys.exit(main())
