"""Asynchronous checkpoints of a whole run, complete or absent, never half.

Layout of one checkpoint, `checkpoints/<step>/`: one item per field of the training state (`params`, `opt_state`,
`balance`, `step`), so that evaluation reads only the parameters, and `meta`, a JSON document with the step (which is
also the data position: batches are a pure function of seed and step), the configuration, library versions and the
shape and dtype of every array. Orbax writes into a temporary folder and renames it when everything is on disk; a
process killed while saving leaves only a temporary folder behind, which the next manager removes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import platform
import subprocess
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from unipool_jax.config.schema import Config, to_mapping
from unipool_jax.moe.lock_lifecycle import structure
from unipool_jax.parallel.processes import all_agree, told_by_main
from unipool_jax.training.state import BalanceState, state_shapes

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# What a damaged checkpoint raises when it is read; anything else (out of memory, a lost device) is not its fault.
_DAMAGED = (ValueError, KeyError, FileNotFoundError)


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved, read or used; the message says which one and what to do."""


class Restored(NamedTuple):
    """What `Checkpoints.restore` found."""

    step: int
    items: dict[str, Any]
    meta: dict[str, Any]


Target = Mapping[str, Any]
"""Item name -> pytree of `jax.ShapeDtypeStruct` (with shardings, or for the default device)."""


def make_meta(config: Config, step: int, tokenizer_sha256: str | None) -> dict[str, Any]:
    """The JSON document stored beside the arrays."""
    return {
        "step": step,
        "data_position": {"step": step, "sequences": step * config.train.batch_size, "seed": config.train.seed},
        "tokenizer_sha256": tokenizer_sha256,
        "config": json.loads(json.dumps(to_mapping(config))),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES}
        | {"python": platform.python_version()},
        "git_commit": _git_commit(),
    }


@functools.cache
def _git_commit() -> str | None:
    """Commit of the source tree, with `-dirty` for uncommitted changes; None outside a repository."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by dotted name. Arrays without elements are left out: Orbax refuses them and they hold nothing."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator=".") or "value": leaf for path, leaf in leaves}
    return {name: leaf for name, leaf in named.items() if np.prod(leaf.shape, dtype=np.int64) > 0}


def unflatten(target: Any, values: Mapping[str, Any]) -> Any:
    """`target` with the leaves of `values`; the inverse of `flatten`."""

    def pick(path: tuple[Any, ...], leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "value"
        return values[name] if name in values else jax.numpy.zeros(leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(pick, target)


def _layout(items: Mapping[str, Any]) -> dict[str, str]:
    """`item.name -> dtype[shape]` of every stored array."""
    return {
        f"{item}.{name}": f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        for item, tree in items.items()
        for name, leaf in flatten(tree).items()
    }


class Checkpoints:
    """The checkpoints of one run folder; use as a context manager.

    Args:
      directory: made if missing (not when `read_only`).
      keep: newest checkpoints kept; older ones are deleted after a newer one is complete.
      read_only: neither create, clean up, set aside nor delete anything (evaluation beside a running training).
    """

    def __init__(self, directory: Path, keep: int | None = None, *, read_only: bool = False):
        self.directory = directory.absolute()
        self.read_only = read_only
        if read_only and not self.directory.is_dir():
            raise CheckpointError(f"{directory}: no such folder of checkpoints")
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            enable_async_checkpointing=True,
            read_only=read_only,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=self._options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._manager.close()
        except Exception:
            # An error that is already on its way out says more than a second one about closing.
            if error is None:
                raise

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def find(self, step: int | None) -> int:
        """`step`, or for None the newest; raises CheckpointError where there is no complete checkpoint of it."""
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.directory}: no complete checkpoint here")
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.directory}: no complete checkpoint of step {step}; there are {steps}")
        return steps[-1] if step is None else step

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of `step`."""
        return self.directory / str(step)

    def save(self, step: int, items: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Start saving; returns once the arrays are copied to the host, so that they may be donated.

        Args:
          step: completed optimiser steps.
          items: name -> pytree of arrays.
          meta: JSON document, from `make_meta`.

        Raises:
          CheckpointError: if this save cannot start or the one before failed.
        """
        arrays = {name: leaves for name, tree in items.items() if (leaves := flatten(tree))}
        arguments = {name: ocp.args.StandardSave(leaves) for name, leaves in arrays.items()}
        document = ocp.args.JsonSave({**meta, "layout": _layout(items)})
        try:
            self._manager.save(step, args=ocp.args.Composite(**arguments, meta=document))
        except Exception as error:
            raise self._failure(error) from error

    def check(self) -> None:
        """Raise `CheckpointError` if a save in the background has failed; costs nothing otherwise.

        Not `CheckpointManager.check_for_errors`: that call takes the error away from Orbax's own finalising thread,
        which then believes that the save succeeded and deletes the older checkpoints.
        """
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Return when the last save is complete on disk; raises like `check`."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> CheckpointError:
        # Reload: after a failed commit the manager may still list the step it failed to write.
        self._manager.reload()
        left = self.steps()
        kept = f"the newest complete checkpoint is step {left[-1]}" if left else "there is no complete checkpoint"
        return CheckpointError(
            f"saving a checkpoint into {self.directory} failed: {type(error).__name__}: {_first_line(error)}; {kept}. "
            "Check free space and permissions, then start the same command again to resume."
        )

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON document of one checkpoint.

        Raises:
          CheckpointError: if it cannot be read.
        """
        try:
            return dict(self._document(step))
        except (*_DAMAGED, TypeError) as error:
            raise CheckpointError(f"{self.path(step)}: damaged checkpoint: {_first_line(error)}") from error

    def restore(self, target: Target | Callable[[Mapping[str, Any]], Target], step: int | None = None) -> Restored:
        """Read one checkpoint.

        Args:
          target: what to read, or a function from the checkpoint's document to it, where that decides the structure.
          step: which one; None is the newest that every process can read. A newest checkpoint that turns out damaged (a
            disk that lied about its writes) is then set aside as `<step>.damaged` with a warning, once an older one is
            read.

        Raises:
          CheckpointError: if there is none, if `step` is missing or damaged, if all are damaged, or if the arrays have
            other names, shapes or dtypes than `target`.
        """
        self.find(step)
        # A shared file system may show other processes another list for a while.
        steps = [int(word) for word in told_by_main(" ".join(map(str, self.steps()))).split()]
        damaged: dict[int, Exception] = {}
        for candidate in [step] if step is not None else reversed(steps):
            restored = None
            try:
                restored = self._read(candidate, target)
            except Exception as error:
                damaged[candidate] = _damage(error)
            # Damage may lie in the part of one process alone.
            if all_agree(restored is not None) and restored is not None:
                self._set_aside(damaged, candidate)
                return restored
            damaged.setdefault(candidate, ValueError("another process could not read its part"))
        details = "\n".join(f"  - {self.path(s)}: {_first_line(error)}" for s, error in damaged.items())
        others = [s for s in steps if s not in damaged]
        advice = (
            f"Try step {others[-1]} instead." if others else "Start a new run, or restore the folder from a backup."
        )
        raise CheckpointError(f"damaged checkpoint:\n{details}\n{advice}")

    def _document(self, step: int) -> Any:
        with contextlib.closing(ocp.JsonCheckpointHandler()) as handler:
            return handler.restore(self.path(step) / "meta")

    def _read(self, step: int, target: Target | Callable[[Mapping[str, Any]], Target]) -> Restored:
        # By Orbax's handlers, not its manager: the manager ends a restore with a barrier, at which the other processes
        # would wait for one that has found damage.
        document = self._document(step)
        if not isinstance(document, dict) or not isinstance(document.get("layout"), dict):
            raise ValueError("its meta document is empty or unreadable")
        if callable(target):
            target = target(document)
        self._compare(step, document["layout"], target)
        arrays = {name: leaves for name, tree in target.items() if (leaves := _placed(flatten(tree)))}
        with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
            values = {
                name: handler.restore(self.path(step) / name, args=ocp.args.StandardRestore(leaves))
                for name, leaves in arrays.items()
            }
        items = {name: unflatten(tree, values[name] if name in arrays else {}) for name, tree in target.items()}
        return Restored(step, items, {key: value for key, value in document.items() if key != "layout"})

    def _compare(self, step: int, stored: Mapping[str, str], target: Mapping[str, Any]) -> None:
        wanted = _layout(target)
        present = {name: layout for name, layout in stored.items() if name.split(".")[0] in target}
        problems = [
            f"  - {name}: {present.get(name, 'absent')} in the checkpoint, {wanted.get(name, 'absent')} in this program"
            for name in sorted(present.keys() | wanted.keys())
            if present.get(name) != wanted.get(name)
        ]
        if problems:
            raise CheckpointError(
                f"{self.path(step)} holds another model than the configuration describes:\n"
                + "\n".join(problems)
                + "\nUse the configuration of that run (its config.yaml), or start a new run under another run.name."
            )

    def _set_aside(self, damaged: Mapping[int, Exception], used: int) -> None:
        for step, error in damaged.items():
            message = f"{self.path(step)} is damaged ({_first_line(error)}); going on from step {used}"
            if not self.read_only and jax.process_index() == 0:
                renamed = self.path(step).with_name(f"{step}.damaged")
                self.path(step).rename(renamed)
                message += f", the damaged one is now {renamed.name}"
            warnings.warn(message, stacklevel=3)
        if damaged:
            multihost_utils.sync_global_devices("damaged checkpoints set aside")
            self._manager.reload()


class Model(NamedTuple):
    """A model to be used, not trained."""

    config: Config
    """Of the run, or of the structure after its lock."""
    params: Any
    balance: BalanceState


def restore_model(checkpoints: Checkpoints, config: Config, step: int, mesh: Mesh | None = None) -> Model:
    """The model of one checkpoint, without its optimiser state; raises like `restore`."""
    config = structure(config, checkpoints.meta(step))
    target = state_shapes(config, mesh)
    items = checkpoints.restore({"params": target.params, "balance": target.balance}, step).items
    return Model(config, items["params"], items["balance"])


def _placed(leaves: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Targets with a sharding each: without one Orbax would look for the devices of the machine that saved."""
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default)
        for name, leaf in leaves.items()
    }


def _damage(error: Exception) -> Exception:
    """What an error says about a damaged checkpoint; one that has another reason is raised again."""
    # Orbax hides what reading a part of a sharded array raises behind an exception without a class of its own.
    found = error.__cause__ if type(error) is Exception else error
    if not isinstance(found, _DAMAGED):
        raise error
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
