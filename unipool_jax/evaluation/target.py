"""What is evaluated: a checkpoint of a run, under the run's configuration with a few settings changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unipool_jax.config.parsing import from_mapping
from unipool_jax.config.rules import validate
from unipool_jax.config.schema import Config, ConfigError, MeshConfig, to_mapping
from unipool_jax.evaluation.requests import EvalRequest
from unipool_jax.kernels.implementations import platform_problem
from unipool_jax.parallel.accelerators import check_platforms, warn_of_idle_accelerator
from unipool_jax.training.run_folder import CHECKPOINTS, RunError, find_run


def with_overrides(config: Config, overrides: Sequence[tuple[str, Any]]) -> Config:
    """`config` with settings replaced; raises ConfigError for a value of the wrong type."""
    mapping = to_mapping(config)
    for name, value in overrides:
        section, _, setting = name.partition(".")
        mapping[section][setting] = value
    return from_mapping(mapping)


def evaluated_config(trained: Mapping[str, Any], overrides: Sequence[tuple[str, Any]]) -> Config:
    """The configuration to evaluate a checkpoint with: that of its run on a single device, with overrides.

    Args:
      trained: `config` of the checkpoint's meta document.
      overrides: settings that replace its own, by dotted name; they may set a mesh.

    Raises:
      ConfigError: an invalid combination, or kernels of another platform.
    """
    alone = dataclasses.replace(from_mapping(trained), mesh=MeshConfig(data=1))
    config = with_overrides(alone, overrides)
    validate(config)
    check_platforms()
    warn_of_idle_accelerator()
    if problem := platform_problem(config.kernels.implementation):
        raise ConfigError([problem])
    return config


def locate(request: EvalRequest) -> tuple[Path, int | None]:
    """The folder of checkpoints and the requested step; raises RunError if there is no such run or checkpoint."""
    if request.checkpoint is None:
        return find_run(request.run) / CHECKPOINTS, request.step
    path = Path(request.checkpoint)
    if not path.is_dir() or not path.name.isdigit():
        raise RunError(
            f"checkpoint={request.checkpoint}: not a checkpoint; give its folder, for example runs/NAME/checkpoints/200"
        )
    return path.parent, int(path.name)
