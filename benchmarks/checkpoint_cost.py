"""What the checksums of a checkpoint cost: saves with and without them, one after the other, in one process.

    python -m benchmarks.checkpoint_cost --scale demo --rounds 15

Prints the medians of the paired ratios with / without, and their quartiles, of the time of a save from its call until
it is complete on disk, and of the processor time of all threads meanwhile, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import orbax.checkpoint as ocp

from unipool_jax.config.compose import compose_config
from unipool_jax.config.schema import Config
from unipool_jax.training import checkpoint
from unipool_jax.training.state import TrainState, init_state


def seconds(config: Config, state: TrainState, folder: Path, with_checksums: bool) -> tuple[float, float]:
    """Time and processor time of one save."""

    def plain(leaves: Any, custom_metadata: Any) -> ocp.args.StandardSave:
        del custom_metadata
        return ocp.args.StandardSave(leaves)

    save = checkpoint.CheckedSave if with_checksums else plain
    meta = checkpoint.make_meta(config, 1, None)
    with mock.patch.object(checkpoint, "CheckedSave", save), checkpoint.Checkpoints(folder) as checkpoints:
        wall, busy = time.perf_counter(), time.process_time()
        checkpoints.save(1, state._asdict(), meta)
        checkpoints.wait()
        found = time.perf_counter() - wall, time.process_time() - busy
    shutil.rmtree(folder)
    return found


def main() -> int:
    """Measure; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", default="demo")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("overrides", nargs="*", help="settings, such as model.num_layers=2")
    given = parser.parse_args()
    config = compose_config([f"scale={given.scale}", *given.overrides])
    state = jax.block_until_ready(jax.jit(init_state, static_argnums=0)(config, jax.random.key(0)))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    print(f"{given.scale}: {size / 2**20:,.0f} MiB, {given.rounds} rounds after one to warm up")
    ratios: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as name:
        for number in range(given.rounds + 1):
            # Which comes first alternates, for the second save of a pair may find a warmer or a fuller disk.
            order = (False, True) if number % 2 else (True, False)
            found = {kind: seconds(config, state, Path(name) / "checkpoints", kind) for kind in order}
            if number:
                ratios.append((found[True][0] / found[False][0], found[True][1] / found[False][1]))
                print(f"  without {found[False][0]:.3f} s, with {found[True][0]:.3f} s", flush=True)
    for what, values in zip(("time", "processor time"), zip(*ratios, strict=True), strict=True):
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"{what} of a save with checksums / without: {middle:.3f} (quartiles {low:.3f} to {high:.3f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
