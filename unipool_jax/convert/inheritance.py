"""What a converted run takes over from its parent: everything that the new architecture does not decide."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from unipool_jax.config.compose import Choices, Folder, choice_files, compose_config, differences
from unipool_jax.config.schema import Config, DataConfig
from unipool_jax.convert.errors import ConversionError
from unipool_jax.data.tokenizer import load_tokenizer
from unipool_jax.training.checkpoint import Checkpoints
from unipool_jax.training.lineage import parent_of
from unipool_jax.training.opening import opened_config
from unipool_jax.training.run_folder import CHECKPOINTS, find_run, known_text

ARCHITECTURE = ("model.", "attention.", "moe.", "pool.", "loss.", "lock.")
"""Sections that decide what a model is; a file that describes its model decides them all."""


class Origin(NamedTuple):
    """What goes with the weights of a model wherever they are converted to."""

    tokenizer: bytes | None = None
    """Its tokenizer.json; None for a built-in one."""
    text: dict[str, Any] | None = None
    """Identity of the text it was trained on (`data/identity.py`), if that is known."""
    parent: dict[str, Any] | None = None
    """What `lineage.json` records of the run they are taken from; None for those of a file."""

    def notes(self) -> dict[str, str]:
        """The same as texts by name, for the metadata of a file."""
        found = {} if self.tokenizer is None else {"tokenizer": self.tokenizer.decode()}
        return found if self.text is None else found | {"text": json.dumps(self.text)}


def origin_of(run: str, step: int | None = None) -> Origin:
    """What goes with a checkpoint's weights; raises as `read_run`, and DataError without its tokenizer."""
    folder = find_run(run)
    with Checkpoints(folder / CHECKPOINTS, read_only=True) as checkpoints:
        step = checkpoints.find(step)
        meta = checkpoints.meta(step)
    tokenizer = load_tokenizer(opened_config(folder, meta).data.tokenizer).definition
    return Origin(tokenizer, known_text(folder, meta), parent_of(folder, step, meta))


def noted_origin(metadata: Mapping[str, str], where: str) -> Origin:
    """The origin that a file of `convert export` holds.

    Raises:
      ConversionError: it is damaged.
    """
    try:
        text = json.loads(metadata["text"]) if "text" in metadata else None
    except ValueError as error:
        raise ConversionError(f"{where}: its metadata 'text' is not JSON ({error})") from error
    tokenizer = metadata["tokenizer"].encode() if "tokenizer" in metadata else None
    return Origin(tokenizer, text)


def upcycled_config(parent: Config, choices: Choices) -> Config:
    """The configuration of a model made of one of `parent`: the parent's, with these choices and settings.

    What the parent's own architecture decided does not outlive it. A method is chosen without the lock and the
    statistics of the one before. A dense model has no experts, so their number is that of its scale.
    """
    base, usual = parent, _of_scale(parent.scale_name, choices.config_dir)
    if choices.names("method"):
        loss = dataclasses.replace(base.loss, pool_statistics=usual.loss.pool_statistics)
        base = dataclasses.replace(base, lock=usual.lock, loss=loss)
    if parent.moe.router == "none":
        moe = dataclasses.replace(base.moe, experts_per_layer=usual.moe.experts_per_layer, top_k=usual.moe.top_k)
        base = dataclasses.replace(base, moe=moe)
    return choices.onto(base)


def imported_config(described: Config, choices: Choices | None, where: str) -> Config:
    """The configuration of a model that a file describes, with choices and settings of everything else.

    Raises:
      ConversionError: they change the model.
    """
    if choices is None:
        return described
    found = choices.onto(described)
    changed = [name for name in differences(described, found) if name.startswith(ARCHITECTURE)]
    if changed:
        raise ConversionError(f"{where} describes its model; leave out what changes {', '.join(changed)}")
    return found


def same_text(a: DataConfig, b: DataConfig) -> bool:
    """Whether two configurations name the same text, split in the same way."""

    def text(data: DataConfig) -> tuple[Any, ...]:
        return data.source, data.files, data.stores, data.tokenizer, data.split, data.split_order

    return text(a) == text(b)


def _of_scale(name: str, config_dir: Folder | None) -> Config:
    known = name in choice_files(config_dir)["scale"]
    return compose_config([f"scale={name}"], config_dir) if known else Config()
