"""Asynchronous, atomic checkpoints.

A checkpoint `checkpoints/<step>/` has one item per field of the training state (`params`, `opt_state`, `balance`,
`step`), so that evaluation reads only the parameters, and `meta`, a JSON document with the step (which is also the data
position: batches are a pure function of seed and step), the configuration, library versions, and the shape and dtype of
every array. What is read is checked: every chunk of an array by its checksum (`checked_arrays`), the document by its
hash, and that all are of one save by the number that it drew.

Orbax writes into a temporary folder and renames it when everything is on disk; a process that is killed while saving
leaves only a temporary folder, which the next manager removes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import platform
import uuid
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

from unipool_jax.config.errors import UserError
from unipool_jax.config.files import FileError, check_name, read_json
from unipool_jax.config.schema import Config, to_mapping
from unipool_jax.config.version import VERSION, git_commit
from unipool_jax.moe.lock_lifecycle import structure
from unipool_jax.parallel.processes import PeerError, all_agree, broadcast_from_process_0, lost_peer
from unipool_jax.training.checked_arrays import CheckedSave
from unipool_jax.training.late_errors import hush_late_errors
from unipool_jax.training.state import BalanceState, state_shapes

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# Raised when a damaged checkpoint is read. Other errors (out of memory, a lost device) have other causes.
_DAMAGED = (
    ValueError,
    KeyError,
    RecursionError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    FileError,
)


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be saved, read or used; the message says which one and what to do."""


class Restored(NamedTuple):
    """The result of `Checkpoints.restore`."""

    step: int
    items: dict[str, Any]
    meta: dict[str, Any]


_HASH, _ITEM_METADATA = "sha256", "_METADATA"
_OWN = ("layout", "save", _HASH)
"""What `Checkpoints` adds to a meta document."""

Target = Mapping[str, Any]
"""Item name -> pytree of `jax.ShapeDtypeStruct` (with shardings, or for the default device)."""


def make_meta(
    config: Config, step: int, tokenizer_sha256: str | None, text: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The JSON document stored beside the arrays; `text` is the identity of the text (`data/identity.py`), if known."""
    return {
        "step": step,
        "data_position": {"step": step, "sequences": step * config.train.batch_size, "seed": config.train.seed},
        "tokenizer_sha256": tokenizer_sha256,
        **({} if text is None else {"text": dict(text)}),
        # Relative paths in the configuration are relative to it.
        "started_in": str(Path.cwd()),
        "config": json.loads(json.dumps(to_mapping(config))),
        "versions": {"unipool_jax": VERSION}
        | {name: importlib.metadata.version(name) for name in LIBRARIES}
        | {"python": platform.python_version()},
        "git_commit": git_commit(),
    }


def _hash_of(document: Mapping[str, Any]) -> str:
    """sha256 of a meta document without its own hash, independent of the order of keys."""
    rest = {key: value for key, value in document.items() if key != _HASH}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by dotted name, without empty arrays, which Orbax rejects."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator=".") or "value": leaf for path, leaf in leaves}
    return {name: leaf for name, leaf in named.items() if np.prod(leaf.shape, dtype=np.int64) > 0}


def unflatten(target: Any, values: Mapping[str, Any]) -> Any:
    """`target` with the leaves of `values`; the inverse of `flatten`."""

    def pick(path: tuple[Any, ...], leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "value"
        return values[name] if name in values else jax.numpy.zeros(leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(pick, target)


def layout(items: Mapping[str, Any]) -> dict[str, str]:
    """`item.name -> dtype[shape]` of every stored array."""
    return {
        f"{item}.{name}": f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        for item, tree in items.items()
        for name, leaf in flatten(tree).items()
    }


def layout_differences(stored: Mapping[str, str], target: Target) -> list[str]:
    """One line for each array of the items of `target` whose shape or dtype is another in a checkpoint's `layout`."""
    wanted = layout(target)
    present = {name: layout for name, layout in stored.items() if name.split(".")[0] in target}
    return [
        f"{name}: {present.get(name, 'absent')} in the checkpoint, {wanted.get(name, 'absent')} expected"
        for name in sorted(present.keys() | wanted.keys())
        if present.get(name) != wanted.get(name)
    ]


class Checkpoints:
    """The checkpoints of one run folder; use as a context manager.

    Args:
      directory: created if it does not exist (unless `read_only`).
      keep: number of most recent checkpoints to keep; older ones are deleted after a newer one is complete.
      read_only: create, rename and delete nothing, so that a run can be evaluated while it trains.
    """

    def __init__(self, directory: Path, keep: int | None = None, *, read_only: bool = False):
        self.directory = directory.absolute()
        check_name(self.directory)
        hush_late_errors()
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
            # An error that is already being raised is more useful than one from closing.
            if error is None:
                raise

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def find(self, step: int | None) -> int:
        """`step`, or the newest for None; raises CheckpointError if there is no complete checkpoint of it."""
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.directory}: no complete checkpoint")
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.directory}: no complete checkpoint of step {step}; choose one of {steps}")
        return steps[-1] if step is None else step

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of `step`."""
        return self.directory / str(step)

    def save(self, step: int, items: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Start saving; returns when the arrays are copied to the host, after which they may be donated.

        Args:
          step: completed optimizer steps.
          items: name -> pytree of arrays.
          meta: JSON document, from `make_meta`.

        Raises:
          CheckpointError: this save cannot start, or the previous one failed.
        """
        arrays = {name: leaves for name, tree in items.items() if (leaves := flatten(tree))}
        belongs = {"step": step, "save": broadcast_from_process_0(uuid.uuid4().hex)}
        arguments = {name: CheckedSave(leaves, custom_metadata=belongs) for name, leaves in arrays.items()}
        document = {**meta, **belongs, "layout": layout(items)}
        document[_HASH] = _hash_of(document)
        try:
            self._manager.save(step, args=ocp.args.Composite(**arguments, meta=ocp.args.JsonSave(document)))
        except Exception as error:
            raise self._failure(error) from error

    def check(self) -> None:
        """Raise `CheckpointError` if a save in the background has failed; does not wait."""
        # Not `CheckpointManager.check_for_errors`: it clears the error before Orbax's finalizing thread sees it, which
        # then takes the save for complete and deletes the older checkpoints.
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is complete on disk; raises like `check`."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> CheckpointError | PeerError:
        if lost := lost_peer(error):
            return lost
        # After a failed commit the manager may still list the step that it failed to write.
        self._manager.reload()
        left = self.steps()
        kept = f"the newest complete checkpoint is step {left[-1]}" if left else "there is no complete checkpoint"
        return CheckpointError(
            f"saving a checkpoint into {self.directory} failed: {type(error).__name__}: {_first_line(error)}; {kept}. "
            "Check free space and permissions, then repeat the command to resume."
        )

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON document of one checkpoint.

        Raises:
          CheckpointError: it cannot be read.
        """
        try:
            return self._document(step)
        except _DAMAGED as error:
            raise CheckpointError(f"{self.path(step)}: damaged checkpoint: {_first_line(error)}") from error

    def restore(self, target: Target | Callable[[Mapping[str, Any]], Target], step: int | None = None) -> Restored:
        """Read one checkpoint.

        Args:
          target: what to read, or a function that returns it for the checkpoint's meta document.
          step: which checkpoint; None is the newest that every process can read. Damaged checkpoints newer than that
            one are renamed to `<step>.damaged`, with a warning.

        Raises:
          CheckpointError: there is no checkpoint, `step` is missing or damaged, all are damaged, or the arrays have
            other names, shapes or dtypes than `target`.
        """
        self.find(step)
        # On a shared file system, processes may see different lists for a while.
        steps = [int(word) for word in broadcast_from_process_0(" ".join(map(str, self.steps()))).split()]
        damaged: dict[int, Exception] = {}
        for candidate in [step] if step is not None else reversed(steps):
            restored = None
            try:
                restored = self._read(candidate, target)
            except Exception as error:
                damaged[candidate] = _damage(error)
            # The damage may be in one process's shards only.
            if all_agree(restored is not None) and restored is not None:
                self._set_aside(damaged, candidate)
                return restored
            damaged.setdefault(candidate, ValueError("another process could not read its shards"))
        details = "\n".join(f"  - {self.path(s)}: {_first_line(error)}" for s, error in damaged.items())
        others = [s for s in steps if s not in damaged]
        advice = (
            f"Try step {others[-1]} instead." if others else "Start a new run, or restore the folder from a backup."
        )
        raise CheckpointError(f"damaged checkpoint:\n{details}\n{advice}")

    def _document(self, step: int) -> dict[str, Any]:
        with contextlib.closing(ocp.JsonCheckpointHandler()) as handler:
            document: Any = handler.restore(self.path(step) / "meta")
        if not isinstance(document, dict) or not isinstance(document.get("layout"), dict):
            raise ValueError("the meta document is empty or unreadable")
        # Checkpoints of earlier versions have neither a hash nor the number of a save.
        if _HASH in document and document[_HASH] != _hash_of(document):
            raise ValueError("the meta document differs from its hash")
        if document["step"] != step:
            raise ValueError(f"the meta document is of step {document['step']}")
        return document

    def _check_item(self, step: int, name: str, document: Mapping[str, Any]) -> None:
        """Raise an error of damage if an item is not of the same save as the meta document."""
        # Not `StandardCheckpointHandler.metadata`, which opens every array and reads the shardings at the save.
        found = read_json(self.path(step) / name / _ITEM_METADATA).get("custom_metadata") or {}
        for key in ("step", "save"):
            wanted = document.get("save") and document[key]
            if found.get(key) != wanted:
                raise ValueError(f"{name} is not of the same save as meta: its {key} is {found.get(key)}, not {wanted}")

    def _read(self, step: int, target: Target | Callable[[Mapping[str, Any]], Target]) -> Restored:
        # Through Orbax's handlers, because its manager ends a restore with a barrier, at which the other processes
        # would wait for one that has found damage.
        document = self._document(step)
        if callable(target):
            target = target(document)
        self._compare(step, document["layout"], target)
        arrays = {name: leaves for name, tree in target.items() if (leaves := _placed(flatten(tree)))}
        with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
            for name in arrays:
                self._check_item(step, name, document)
            values = {name: self._restore_item(handler, step, name, leaves) for name, leaves in arrays.items()}
        items = {name: unflatten(tree, values[name] if name in arrays else {}) for name, tree in target.items()}
        return Restored(step, items, {key: value for key, value in document.items() if key not in _OWN})

    def _restore_item(self, handler: ocp.StandardCheckpointHandler, step: int, name: str, leaves: Target) -> Any:
        try:
            return handler.restore(self.path(step) / name, args=ocp.args.StandardRestore(leaves))
        except (KeyError, TypeError, AttributeError, NotImplementedError) as error:
            # Orbax reads its own files without checking them.
            raise ValueError(f"{name}: unreadable metadata ({type(error).__name__}: {error})") from error

    def _compare(self, step: int, stored: Mapping[str, str], target: Mapping[str, Any]) -> None:
        if problems := layout_differences(stored, target):
            raise CheckpointError(
                f"{self.path(step)} does not match the model of this configuration:\n"
                + "\n".join(f"  - {problem}" for problem in problems)
                + "\nUse that run's config.yaml, or start a new run under another run.name."
            )

    def _set_aside(self, damaged: Mapping[int, Exception], used: int) -> None:
        for step, error in damaged.items():
            message = f"{self.path(step)} is damaged ({_first_line(error)}); resuming from step {used}"
            if not self.read_only and jax.process_index() == 0:
                renamed = self._damaged_name(step)
                self.path(step).rename(renamed)
                message += f"; the damaged checkpoint was renamed to {renamed.name}"
            warnings.warn(message, stacklevel=3)
        if damaged:
            multihost_utils.sync_global_devices("damaged checkpoints set aside")
            self._manager.reload()

    def _damaged_name(self, step: int) -> Path:
        """`<step>.damaged`, or with a number behind it if there are damaged checkpoints of this step already."""
        names = itertools.chain([f"{step}.damaged"], (f"{step}.damaged.{count}" for count in itertools.count(2)))
        return next(path for name in names if not (path := self.directory / name).exists())


class Model(NamedTuple):
    """A model for evaluation."""

    config: Config
    """The configuration of the run, or that after its lock."""
    params: Any
    balance: BalanceState


def restore_model(checkpoints: Checkpoints, config: Config, step: int, mesh: Mesh | None = None) -> Model:
    """The model of one checkpoint, without its optimizer state; raises like `restore`."""
    config = structure(config, checkpoints.meta(step))
    # Checkpoints hold experts in their own order.
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, expert_placement="contiguous"))
    target = state_shapes(config, mesh)
    items = checkpoints.restore({"params": target.params, "balance": target.balance}, step).items
    return Model(config, items["params"], items["balance"])


def _placed(leaves: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Targets with a sharding each; without one, Orbax would look for the devices that saved the array."""
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default)
        for name, leaf in leaves.items()
    }


def _damage(error: Exception) -> Exception:
    """The error that shows that a checkpoint is damaged; re-raises an error with another cause."""
    # Orbax wraps errors from reading a shard in a bare Exception.
    found = error.__cause__ if type(error) is Exception else error
    if not isinstance(found, _DAMAGED):
        raise error
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
