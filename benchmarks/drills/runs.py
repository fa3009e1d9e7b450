"""Small training runs in processes of their own, forked from one that has imported everything and started nothing."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before JAX is imported: a small model compiles faster so, and runs as fast.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

import jax
import numpy as np

from unipool_jax.cli.guard import guarded
from unipool_jax.config.compose import compose_config
from unipool_jax.config.files import write_text
from unipool_jax.config.schema import Config
from unipool_jax.moe.lock_lifecycle import structure
from unipool_jax.training.checkpoint import Checkpoints
from unipool_jax.training.entry import run
from unipool_jax.training.loop import train as _imported_before_any_fork  # noqa: F401
from unipool_jax.training.metrics import CLOCKED
from unipool_jax.training.run_folder import CHECKPOINTS, run_folder
from unipool_jax.training.state import state_shapes

METHODS = {
    "unipool": "method=unipool",
    "lock": "method=unipool_lock lock.lock_fraction=0.6 lock.anneal_fraction=0.3 lock.entropy_warmup_steps=9 "
    "lock.entropy_target=2",
    "expert bias": "method=vanilla_aux_free",
}
"""Settings of the kinds of run that are tried."""

_SMALL = (
    "model.num_layers=2 model.hidden_size=16 model.num_heads=2 model.num_kv_heads=1 model.ffn_size=16 "
    "model.vocab_size=257 moe.experts_per_layer=2 data.source=files data.tokenizer=bytes data.sequence_length=16 "
    "data.split=[8,1,1] data.split_order=interleaved train.batch_size=4 train.microbatch_size=4 "
    "train.eval_batch_size=8 train.eval_batches=4 loss.switch_group_sequences=4 run.name=small mesh=single"
)


def settings(folder: Path, method: str, *more: str) -> list[str]:
    """The command line of a run in `folder`, whose text is made if it is not there."""
    text = folder / "text.jsonl"
    if not text.exists():
        random = np.random.default_rng(0)
        words = ["pool", "expert", "router", "depth", "layer", "token", "gate", "share"]
        lines = [json.dumps({"text": " ".join(random.choice(words, size=30))}) for _ in range(40)]
        write_text(text, "\n".join(lines) + "\n")
    places = [f"run.dir={folder / 'runs'}", f"data.cache_dir={folder / 'cache'}", f"data.files=[{text}]"]
    return [*METHODS[method].split(), *_SMALL.split(), *places, *more]


def fork(action: Callable[[], int], log: Path) -> int:
    """Do something in a process of its own with its output in `log`; the number of the process."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = action()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int:
    """The exit code of a process; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(words: list[str], log: Path, cache: Path) -> int:
    """Start a run; the number of its process. Compiled programs are kept in `cache`."""

    def action() -> int:
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        return guarded(lambda: run(compose_config(words)))

    return fork(action, log)


def results(words: list[str], log: Path) -> Any:
    """What a finished run has computed: a hash of its newest checkpoint, and its metrics but for the time."""
    place = log.with_suffix(".results")
    place.unlink(missing_ok=True)
    if code := ended(fork(lambda: _write_results(compose_config(words), place), log)):
        raise AssertionError(f"its results cannot be read (exit code {code}): {log.read_text()[-500:]}")
    return json.loads(place.read_text())


def difference(code: int | None, words: list[str], log: Path, wanted: Any) -> str:
    """In what a run that ended with `code` is other than the `wanted` results; empty if in nothing."""
    if code != 0:
        return f"exit code {code}: {log.read_text()[-600:]}"
    try:
        return "" if results(words, log) == wanted else "other results"
    except AssertionError as error:
        return str(error)


def _write_results(config: Config, place: Path) -> int:
    folder = run_folder(config)
    with Checkpoints(folder / CHECKPOINTS, read_only=True) as checkpoints:
        step = checkpoints.find(None)
        target = state_shapes(structure(config, checkpoints.meta(step)))
        state = checkpoints.restore(target._asdict(), step).items
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if key not in CLOCKED} for line in lines]
    arrays = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}
    hashes = {name: f"{array.dtype}{array.shape} {array.tobytes().hex()}" for name, array in arrays.items()}
    write_text(place, json.dumps({"step": step, "arrays": hashes, "metrics": metrics}))
    return 0


def kill(child: int) -> None:
    """End a process as `kill -9` does."""
    os.kill(child, signal.SIGKILL)
