"""The state a run starts with: new, or that of its newest complete checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from unipool_jax.config.growth_schedule import grows, with_layers
from unipool_jax.config.parsing import from_mapping
from unipool_jax.config.schema import Config, ConfigError
from unipool_jax.config.settings_table import drops
from unipool_jax.data.corpus import Corpus
from unipool_jax.data.identity import SHOWN, text_differences, text_identity
from unipool_jax.moe.lock_lifecycle import structure
from unipool_jax.parallel.processes import is_process_0
from unipool_jax.training.checkpoint import Checkpoints
from unipool_jax.training.growing import first_stage
from unipool_jax.training.lineage import record
from unipool_jax.training.run_folder import RunError, known_text
from unipool_jax.training.sharding import memory_problem
from unipool_jax.training.state import TrainState, init_state, state_shapes
from unipool_jax.training.warm_start import warm_state


def initial_state(config: Config, checkpoints: Checkpoints, corpus: Corpus, mesh: Mesh | None = None) -> TrainState:
    """The state of the newest complete checkpoint, or a new one from `run.init_from` or `train.seed`.

    Raises:
      RunError: the checkpoint was trained with another tokenizer or on another text, or there is none and
        `run.resume=required`.
      CheckpointError: the checkpoint cannot be used.
      ConfigError: the state exceeds the memory of the devices.
    """
    shapes = state_shapes(config, mesh)
    if problem := memory_problem(shapes, jax.local_devices()[0]):
        raise ConfigError([problem])
    if not checkpoints.steps():
        if config.run.resume == "required":
            raise RunError(f"run.resume=required, but {checkpoints.directory} holds no complete checkpoint")
        if config.run.init_from is not None:
            state, parent = warm_state(config, shapes, corpus.tokenizer.sha256, mesh)
            if is_process_0():
                record(checkpoints.directory.parent, "started", 0, **parent)
                begun = f"parameters of {parent['parent']} after step {parent['parent_step']}"
                print(f"{begun}; optimizer, schedule and data begin anew")
                if new := parent.get("new_parameters"):
                    print(f"not in the parent, initialized as in a new run: {', '.join(new)}")
            return state
        return _new_state(config, mesh)
    restored = checkpoints.restore(lambda meta: state_shapes(structure(config, meta), mesh)._asdict())
    trained_with = restored.meta["tokenizer_sha256"]
    if trained_with != corpus.tokenizer.sha256:
        raise RunError(
            f"data.tokenizer={config.data.tokenizer}: its definition (sha256 {corpus.tokenizer.sha256[:12]}) differs "
            f"from the one this run was trained with ({str(trained_with)[:12]}); restore that one or start a new run"
        )
    check_mesh(config, restored.meta, mesh)
    _check_text(checkpoints.directory.parent, restored.meta, corpus, config)
    return TrainState(**restored.items)


def _new_state(config: Config, mesh: Mesh | None) -> TrainState:
    """The state of a run before its first step, from `train.seed`."""
    first = with_layers(config, config.growth.layers[0]) if grows(config) else config
    shardings = None if mesh is None else jax.tree.map(lambda leaf: leaf.sharding, state_shapes(first, mesh))

    def make() -> TrainState:
        state = init_state(config, jax.random.key(config.train.seed))
        return first_stage(config, state) if grows(config) else state

    made: TrainState = jax.jit(make, out_shardings=shardings)()
    return made


def mesh_document(mesh: Mesh | None) -> dict[str, Any]:
    """What the meta document of a checkpoint holds of the mesh: the sizes of its axes, also those that were -1."""
    return {} if mesh is None else {"mesh": dict(mesh.shape)}


def check_mesh(config: Config, meta: Mapping[str, Any], mesh: Mesh | None) -> None:
    """Raise RunError for another mesh than that of the checkpoint where rows are dropped by device."""
    before, now = meta.get("mesh"), mesh_document(mesh).get("mesh")
    if drops(config) and before is not None and before != now:
        raise RunError(
            f"mesh {now}: the run was trained on {before}, which decides the rows that mesh.overflow=drop drops; use "
            "as many devices, or start a new run under another run.name"
        )


def _check_text(run: Path, meta: Mapping[str, Any], corpus: Corpus, config: Config) -> None:
    """Refuse another text than that of the checkpoint; a converted model may go on with one that is named."""
    found = text_identity(corpus)
    stored = known_text(run, meta)
    if stored is None:
        if is_process_0() and meta["step"]:
            print(
                f"{run}: saved by a version that did not record which text it read, so it cannot be told whether this "
                f"is the same; from now on it is (fingerprint {found['fingerprint'][:SHOWN]})"
            )
        return
    if changed := text_differences(stored, found):
        data = from_mapping(meta["config"]).data
        inherited = (data.source, data.files, data.stores)
        if meta["step"] == 0 and (config.data.source, config.data.files, config.data.stores) != inherited:
            if is_process_0():
                names = ", ".join(text["name"] for text in stored["texts"])
                print(f"{run}: made of a model that was trained on another text, {names}")
            return
        raise RunError(
            f"{run} was trained on another text:\n"
            + "\n".join(f"  - {line}" for line in changed)
            + "\nRestore that text to resume the run, or train on this one under another run.name."
        )
