"""What is evaluated: a checkpoint of a run, under the run's configuration with a few settings changed."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unipool_jax.config.parsing import from_mapping
from unipool_jax.config.rules import validate
from unipool_jax.config.schema import Config, ConfigError, MeshConfig, to_mapping
from unipool_jax.data.corpus import Corpus
from unipool_jax.data.identity import text_differences, text_identity
from unipool_jax.data.tokenizer import Tokenizer
from unipool_jax.evaluation.requests import EvalRequest
from unipool_jax.kernels.implementations import attention_problem, platform_problem
from unipool_jax.parallel.accelerators import check_platforms, warn_of_idle_accelerator
from unipool_jax.training.opening import opened_config
from unipool_jax.training.run_folder import CHECKPOINTS, RunError, find_run, known_text, named_checkpoint


def with_overrides(config: Config, overrides: Sequence[tuple[str, Any]]) -> Config:
    """`config` with settings replaced; raises ConfigError for a value of the wrong type."""
    mapping = to_mapping(config)
    for name, value in overrides:
        section, _, setting = name.partition(".")
        mapping[section][setting] = value
    return from_mapping(mapping)


def evaluated_config(
    run: Path, meta: Mapping[str, Any], overrides: Sequence[tuple[str, Any]], *, text: bool = True
) -> Config:
    """The configuration to evaluate a checkpoint with: that of its run on a single device, with overrides.

    Args:
      run: the folder of the run.
      meta: the checkpoint's meta document.
      overrides: settings that replace its own, by dotted name; they may set a mesh.
      text: whether its text is read; otherwise it need not be there.

    Raises:
      ConfigError: an invalid combination, or kernels of another platform.
    """
    alone = dataclasses.replace(opened_config(run, meta), mesh=MeshConfig(data=1))
    config = with_overrides(alone, overrides)
    if config.mesh != alone.mesh:
        # No step is trained, so neither its micro-batches nor their groups need to divide over the mesh.
        rows = config.train.eval_batch_size
        config = dataclasses.replace(
            config,
            train=dataclasses.replace(config.train, batch_size=rows, microbatch_size=rows),
            loss=dataclasses.replace(config.loss, switch_group_sequences=1),
        )
    validate(config if text else dataclasses.replace(config, mode="describe"))
    check_platforms()
    warn_of_idle_accelerator()
    found = platform_problem(config.kernels.implementation), attention_problem(config.kernels.attention)
    if problems := [problem for problem in found if problem is not None]:
        raise ConfigError(problems)
    return config


def locate(request: EvalRequest) -> tuple[Path, int | None]:
    """The folder of checkpoints and the requested step; raises RunError if there is no such run or checkpoint."""
    if request.checkpoint is None:
        return find_run(request.run) / CHECKPOINTS, request.step
    return named_checkpoint(request.checkpoint, "checkpoint")


def check_tokenizer(tokenizer: Tokenizer, meta: Mapping[str, Any], checkpoint: Path) -> None:
    """Raises RunError unless a checkpoint was trained with this tokenizer."""
    if tokenizer.sha256 != meta["tokenizer_sha256"]:
        raise RunError(
            f"data.tokenizer={tokenizer.name}: not the tokenizer that {checkpoint} was trained with; restore that one"
        )


def reads_own_text(run: Path, meta: Mapping[str, Any], corpus: Corpus) -> bool | None:
    """Whether a corpus is the text that a run was trained beside, and says so where it is not.

    Returns:
      None where a run of an earlier version does not know its text.
    """
    stored = known_text(run, meta)
    if stored is None:
        return None
    changed = text_differences(stored, text_identity(corpus))
    if changed:
        print(f"{run}: this is not the text that the run was trained beside:", file=sys.stderr)
        print("\n".join(f"  - {line}" for line in changed), file=sys.stderr)
    return not changed
