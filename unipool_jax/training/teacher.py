"""Opens the teacher of a run (`distill.teacher`) and notes which checkpoint it is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from unipool_jax.config import mesh_rules
from unipool_jax.config.files import check_fields, read_json, write_json
from unipool_jax.config.parsing import from_mapping
from unipool_jax.config.schema import Config
from unipool_jax.parallel.processes import is_process_0, process_0_first
from unipool_jax.training.checkpoint import Checkpoints, restore_model
from unipool_jax.training.distillation import Teacher
from unipool_jax.training.run_folder import RunError, find_checkpoint

TEACHER = "teacher.json"
"""In the folder of a run: the teacher's run, step, and the hash of its checkpoint's description."""

_FIELDS = {"teacher": str, "run": str, "step": int, "sha256": str}


def teachers_of(
    config: Config, folder: Path, resumes: bool, tokenizer_sha256: str, mesh: Mesh | None = None
) -> tuple[Teacher, ...]:
    """The teacher of the run in `folder`, which is noted there, as the further arguments of its training step; none
    without distill.teacher. Arguments and errors are those of `open_teacher`."""
    if config.distill.teacher is None:
        return ()
    teacher, facts = open_teacher(config, folder, resumes, tokenizer_sha256, mesh)
    process_0_first(lambda: _note(folder, facts))
    return (teacher,)


def open_teacher(
    config: Config, folder: Path, resumes: bool, tokenizer_sha256: str, mesh: Mesh | None = None
) -> tuple[Teacher, dict[str, Any]]:
    """The teacher of the run in `folder`, which is new or resumes, and what is noted of it.

    A run goes on with the checkpoint that it began with, also where the teacher has been trained further.

    Raises:
      RunError: there is no such run, it has another tokenizer or vocabulary, reads shorter sequences, does not divide
        over the mesh, or its checkpoint is not the one that this run began with.
      CheckpointError: the checkpoint cannot be read.
    """
    wanted = config.distill.teacher
    assert wanted is not None
    checkpoints_folder, step = find_checkpoint(wanted, "distill.teacher")
    known = _known(folder) if resumes else None
    with Checkpoints(checkpoints_folder, read_only=True) as checkpoints:
        step = checkpoints.find(step if known is None else known["step"])
        meta = checkpoints.meta(step)
        place = checkpoints.path(step)
        digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
        if known is not None and known["sha256"] != digest:
            raise RunError(
                f"distill.teacher={wanted}: {place} is not the checkpoint that this run began to learn from; restore "
                "that one, or start a new run"
            )
        taught = from_mapping(meta["config"])
        if problems := list(_problems(config, taught, str(meta["tokenizer_sha256"]), tokenizer_sha256, mesh)):
            raise RunError(
                f"distill.teacher={wanted}: cannot teach this run:\n" + "\n".join(f"  - {line}" for line in problems)
            )
        model = restore_model(checkpoints, dataclasses.replace(taught, mesh=config.mesh), step, mesh)
    # Its numbers are its own; where they are computed is the run's.
    own = dataclasses.replace(model.config, kernels=config.kernels)
    facts = {"teacher": wanted, "run": str(checkpoints_folder.parent), "step": step, "sha256": digest}
    return Teacher(own, model.params, model.balance), facts


def _note(folder: Path, facts: dict[str, Any]) -> None:
    if is_process_0():
        write_json(folder / TEACHER, facts, indent=2)


def _known(folder: Path) -> dict[str, Any]:
    document = read_json(folder / TEACHER)
    check_fields(document, folder / TEACHER, _FIELDS)
    return document


def _problems(
    config: Config, teacher: Config, its_tokenizer: str, our_tokenizer: str, mesh: Mesh | None
) -> Iterator[str]:
    if its_tokenizer != our_tokenizer:
        yield (
            f"data.tokenizer: {teacher.data.tokenizer} (sha256 {its_tokenizer[:12]}) there, {config.data.tokenizer} "
            f"({our_tokenizer[:12]}) here"
        )
    if teacher.model.vocab_size != config.model.vocab_size:
        yield f"model.vocab_size: {teacher.model.vocab_size} there, {config.model.vocab_size} here"
    if teacher.positions < config.data.sequence_length:
        yield f"data.sequence_length={config.data.sequence_length}: it reads {teacher.positions} positions"
    if teacher.data.document_mask != config.data.document_mask:
        yield f"data.document_mask: {teacher.data.document_mask} there, {config.data.document_mask} here"
    sizes = {} if mesh is None else dict(mesh.shape)
    places = dataclasses.replace(config.mesh, **{axis: sizes[axis] for axis in mesh_rules.AXES if axis in sizes})
    placed = dataclasses.replace(teacher, mesh=places, train=config.train)
    yield from (f"its {problem}" for problem in mesh_rules.problems(placed))
