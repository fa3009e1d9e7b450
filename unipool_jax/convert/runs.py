"""Reads weights from a run's checkpoint; writes a run folder that starts from given weights."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unipool_jax.config.compose import save_config
from unipool_jax.config.files import write_atomically, write_json
from unipool_jax.config.growth_schedule import saved_model
from unipool_jax.config.schema import Config
from unipool_jax.convert.errors import ConversionError
from unipool_jax.convert.inheritance import Origin
from unipool_jax.convert.weights import Weights, check_same_experts, expert_hashes
from unipool_jax.data.tokenizer import load_tokenizer, parse_tokenizer
from unipool_jax.moe.lock_lifecycle import LockRecord, from_document, structure, to_document
from unipool_jax.training.checkpoint import Checkpoints, make_meta, restore_model
from unipool_jax.training.lineage import record
from unipool_jax.training.opening import TOKENIZER, opened_config
from unipool_jax.training.run_folder import CHECKPOINTS, CONFIG, find_run
from unipool_jax.training.state import new_state
from unipool_jax.training.warm_start import is_partitioned


def read_run(run: str, step: int | None = None) -> tuple[Config, Weights]:
    """The configuration and weights of one checkpoint.

    Args:
      run: folder of a run, or `latest`.
      step: which checkpoint; None is the newest.

    Raises:
      RunError, CheckpointError: no such checkpoint, or it cannot be read.
      ConversionError: the checkpoint holds a partition of UniPool-lock.
    """
    folder = find_run(run)
    with Checkpoints(folder / CHECKPOINTS, read_only=True) as checkpoints:
        step = checkpoints.find(step)
        meta = checkpoints.meta(step)
        config = opened_config(folder, meta)
        return saved_model(config, meta), _restore(checkpoints, config, step)


def read_locked(run: str, step: int | None = None) -> tuple[Config, Weights, LockRecord] | None:
    """As `read_run`, for a checkpoint after a lock: weights are those of `config.after_lock()`; None for others."""
    folder = find_run(run)
    with Checkpoints(folder / CHECKPOINTS, read_only=True) as checkpoints:
        step = checkpoints.find(step)
        meta = checkpoints.meta(step)
        config = opened_config(folder, meta)
        if not structure(config, meta).locked:
            return None
        record = from_document(config, meta["lock"], step)
        return saved_model(config, meta), _restore(checkpoints, config, step, locked=True), record


def _restore(checkpoints: Checkpoints, config: Config, step: int, locked: bool = False) -> Weights:
    model = restore_model(checkpoints, config, step)
    if is_partitioned(model) and not locked:
        raise ConversionError(
            f"{checkpoints.path(step)}: its experts are partitioned among layers (UniPool-lock), which no other "
            "layout can represent; convert a checkpoint from before the freeze"
        )
    return as_numpy(model.params, model.balance.expert_bias_GNE)


def as_numpy(params: Any, expert_bias_GNE: Any) -> Weights:
    """`Weights` from a parameter tree and a selection bias, copied from any device."""
    return Weights(jax.tree.map(np.array, jax.device_get(params)), np.array(expert_bias_GNE))


def check_new(folder: Path) -> None:
    """Raises ConversionError if `folder` exists."""
    if folder.exists():
        raise ConversionError(f"{folder}: already exists; choose another name or delete it")


def write_run(
    folder: Path,
    config: Config,
    weights: Weights,
    origin: Origin | None = None,
    documents: Mapping[str, Any] | None = None,
    lock: LockRecord | None = None,
) -> int:
    """Write a run folder with a checkpoint of step 0: `weights` and a new optimizer state.

    `unipool eval FOLDER` evaluates it; `unipool train` with the settings of `config` and this `run.dir` and `run.name`
    resumes from it. The folder is written under a temporary name, read back, compared with `weights` expert by expert,
    and only then renamed.

    Args:
      folder: must not exist.
      config: of the model; its run.dir and run.name are replaced by those of `folder`. It forgets what a run that it is
        taken from was started from and extended by.
      weights: of the model.
      origin: of the weights: a tokenizer to use in place of data.tokenizer, and the text they were trained on.
      documents: JSON to write beside the checkpoint, by name of the file.
      lock: of a model that is locked from the start, whose weights are those of `config.after_lock()`.

    Returns:
      The number of experts.

    Raises:
      ConversionError: `folder` exists, or reading back gives other weights.
    """
    check_new(folder)
    place = dataclasses.replace(config.run, dir=str(folder.parent), name=folder.name, init_from=None, allow_new=())
    config = dataclasses.replace(config, run=place, train=dataclasses.replace(config.train, earlier_steps=()))
    origin, name = origin or Origin(), str(folder / TOKENIZER)
    if origin.tokenizer is None:
        tokenizer = load_tokenizer(config.data.tokenizer)
    else:
        tokenizer = parse_tokenizer(name, origin.tokenizer)
    if tokenizer.definition is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=name))
    params = jax.tree.map(jnp.asarray, weights.params)
    structured = config if lock is None else config.after_lock()
    state = new_state(structured, params, jnp.asarray(weights.expert_bias_GNE))
    meta = make_meta(config, 0, tokenizer.sha256, origin.text)
    if lock is not None:
        meta["lock"] = to_document(config, lock, 0)
    wanted = expert_hashes(weights)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        with Checkpoints(temporary / CHECKPOINTS) as checkpoints:
            checkpoints.save(0, state._asdict(), meta)
            checkpoints.wait()
            found = _restore(checkpoints, config, 0, locked=lock is not None)
            check_same_experts(wanted, expert_hashes(found), str(folder))
        save_config(config, temporary / CONFIG)
        for name, document in (documents or {}).items():
            write_json(temporary / name, document, indent=2)
        if origin.parent is not None:
            record(temporary, "converted", 0, **origin.parent)
        if tokenizer.definition is not None:
            write_atomically(temporary / TOKENIZER, tokenizer.definition)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return len(wanted)
