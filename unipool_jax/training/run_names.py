"""The name of a run that has none: from what it trains, so that two different runs do not share a folder by chance."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
from pathlib import Path

from unipool_jax.config.compose import compose_config, load_config
from unipool_jax.config.errors import UserError
from unipool_jax.config.schema import Config
from unipool_jax.config.settings_table import frozen_differences

CONFIG, CHECKPOINTS = "config.yaml", "checkpoints"
DEMO = "demo"
"""The run of `unipool train` without a word."""

_LONGEST = 40
_NAME, _UNFIT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*"), re.compile(r"[^A-Za-z0-9_-]+")


def run_name(config: Config) -> str:
    """`run.name`, or a name from scale, method, steps, seed, text and start; `demo` for the shipped demo as it is."""
    if config.run.name is not None:
        return config.run.name
    if (config.scale_name, config.data.source) == (DEMO, "demo") and not frozen_differences(_demo(), config):
        return DEMO
    start = "" if config.run.init_from is None else f"from-{_start(config.run.init_from)}"
    return "-".join(part for part in (_first_name(config), data_label(config), start) if part)


def run_folder(config: Config) -> Path:
    """The folder of a run, which need not exist.

    Where no run has its name yet, a run of the same settings under the name of version 0.1, without the text in it,
    is this run.
    """
    folder, before = Path(config.run.dir) / run_name(config), Path(config.run.dir) / _first_name(config)
    if config.run.name is None and folder != before and not (folder / CONFIG).exists():
        with contextlib.suppress(UserError, OSError):
            if (before / CONFIG).exists() and not frozen_differences(load_config(before / CONFIG), config):
                return before
    return folder


def data_label(config: Config) -> str:
    """A short name of the text: the file, folder or store if there is one whose name can stand in the name of a folder,
    else a part of it with a hash of all; empty for the demo corpus."""
    data = config.data
    if data.source == "demo":
        return ""
    paths = [os.path.normpath(path) for path in (data.stores if data.source == "stores" else data.files)]
    if len(paths) == 1 and len(paths[0]) <= _LONGEST and _NAME.fullmatch(paths[0]):
        return paths[0]
    # A pattern is called after the folder that it searches.
    parts = [part for part in Path(paths[0]).parts if not set("*?[") & set(part)] if paths else []
    readable = _UNFIT.sub("-", Path(parts[-1]).stem if parts else "").strip("-")[:_LONGEST] or "text"
    return f"{readable}-{hashlib.sha256(repr(paths).encode(errors='surrogateescape')).hexdigest()[:6]}"


def _start(init_from: str) -> str:
    """The run, and the step where one is named, of `run.init_from`."""
    parts = Path(os.path.abspath(init_from)).parts[-3:]
    named = (parts[0], parts[2]) if parts[1:-1] == (CHECKPOINTS,) else parts[-1:]
    return _UNFIT.sub("-", "-".join(named)).strip("-")[:_LONGEST]


def _first_name(config: Config) -> str:
    return f"{config.scale_name}-{config.method_name}-{config.train.steps}steps-seed{config.train.seed}"


@functools.cache
def _demo() -> Config:
    return compose_config()
