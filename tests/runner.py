"""Starts training runs for the tests: small ones, in this process or in processes that can be killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from types import TracebackType

import jax
import numpy as np

from unipool_jax.cli.guard import guarded
from unipool_jax.config.compose import compose_config
from unipool_jax.config.schema import Config
from unipool_jax.training.checkpoint import Checkpoints
from unipool_jax.training.entry import run
from unipool_jax.training.state import init_state

_TINY = (
    "method=unipool model.num_layers=2 model.hidden_size=16 model.num_heads=2 model.num_kv_heads=1 model.ffn_size=16 "
    "model.vocab_size=257 moe.experts_per_layer=2 model.init_std=0.1 data.source=files data.tokenizer=bytes "
    "data.sequence_length=16 data.split=[8,1,1] data.split_order=interleaved train.batch_size=4 "
    "train.microbatch_size=4 train.eval_batch_size=8 train.eval_batches=4 train.eval_every=0 train.log_every=20 "
    "train.checkpoint_every=5 loss.switch_group_sequences=4 run.tensorboard=false run.name=tiny mesh=single"
)


def write_text(path: Path, documents: int = 40) -> Path:
    """A file of JSON lines with random words."""
    random = np.random.default_rng(0)
    words = ["pool", "expert", "router", "depth", "layer", "token", "gate", "share", "naïve"]
    lines = [json.dumps({"text": " ".join(random.choice(words, size=30))}) for _ in range(documents)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def overrides(folder: Path, *more: str) -> list[str]:
    """Command line of a tiny run in `folder`."""
    text = folder / "text.jsonl"
    if not text.exists():
        write_text(text)
    places = [f"run.dir={folder / 'runs'}", f"data.cache_dir={folder / 'cache'}", f"data.files=[{text}]"]
    return [*_TINY.split(), *places, *more]


def final_state(config: Config, folder: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Every array of the newest (or given) checkpoint by name."""
    target = jax.eval_shape(lambda: init_state(config, jax.random.key(0)))
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        items = checkpoints.restore(target._asdict(), step).items
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(items)}


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """Bit for bit, NaN included."""
    assert a.keys() == b.keys()
    different = [name for name in a if a[name].tobytes() != b[name].tobytes()]
    assert not different, f"arrays differ: {different}"


class Runner:
    """Processes that train, forked from one that has imported everything and started nothing yet.

    A fork costs milliseconds where a fresh interpreter imports for seconds; each run is nevertheless a process of its
    own, with its own JAX runtime, that `kill -9` ends like any other.

    Args:
      cache: of compiled programs.
      devices: that each process has.
    """

    def __init__(self, cache: Path, devices: int = 8):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": os.environ["CPU_XLA_FLAGS"].replace("_device_count=8", f"_device_count={devices}"),
            # As `entry.run` sets it for several processes; here JAX is imported before.
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)]),
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, arguments: list[str], log: Path) -> int:
        """Start `train.py ARGUMENTS`, output to `log`; its process id."""
        return self.start_several([arguments], [log])[0]

    def start_several(self, arguments: list[list[str]], logs: list[Path]) -> list[int]:
        """Start several of them at once; their process ids."""
        assert self._process.stdin is not None
        runs = [{"arguments": each, "log": str(log)} for each, log in zip(arguments, logs, strict=True)]
        self._process.stdin.write(json.dumps(runs) + "\n")
        self._process.stdin.flush()
        return json.loads(self._line())

    def wait(self) -> int:
        """Exit code of the run started last; minus the signal number if one ended it."""
        return self.wait_for_several()[0]

    def wait_for_several(self) -> list[int]:
        """Exit codes of the runs started last, once all have ended."""
        return json.loads(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that starts runs has died"
        return line

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _child(arguments: list[str], log: str) -> int:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        return guarded(lambda: run(compose_config(arguments)))
    except BaseException:
        traceback.print_exc()
        return 99
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _serve() -> None:
    import unipool_jax.training.loop  # noqa: F401 - imported here so that no run has to

    while line := sys.stdin.readline():
        children = []
        for request in json.loads(line):
            child = os.fork()
            if child == 0:
                os._exit(_child(request["arguments"], request["log"]))
            children.append(child)
        print(json.dumps(children), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)


if __name__ == "__main__":
    _serve()
