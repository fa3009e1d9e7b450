"""`python eval.py`: evaluate a checkpoint on the splits it was trained beside, or on any text.

python eval.py                                    the newest checkpoint of the run saved to last
python eval.py run=runs/NAME step=200 splits=[test]
python eval.py checkpoint=runs/NAME/checkpoints/200 data.files=[article.txt] train.eval_batch_size=8

`eval.py` with `tasks=` is another command: see `analysis.tasks_command`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import yaml
from jax.sharding import Mesh
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from unipool_jax.config.parsing import from_mapping
from unipool_jax.config.rules import validate
from unipool_jax.config.schema import Config, ConfigError, MeshConfig, settings, to_mapping
from unipool_jax.data.corpus import open_corpus, open_texts
from unipool_jax.data.splits import SPLIT_NAMES, SplitName
from unipool_jax.kernels.implementations import platform_problem
from unipool_jax.parallel.mesh import usable_mesh
from unipool_jax.training.checkpoint import Checkpoints, restore_model
from unipool_jax.training.evaluate import EvalResult, Evaluator, print_results
from unipool_jax.training.metrics import plain_json
from unipool_jax.training.run_folder import CHECKPOINTS, RunError, find_run

_OVERRIDES = ("data.", "kernels.", "mesh.")
_ALSO = ("train.eval_batch_size", "model.compute_dtype")


@dataclass(frozen=True)
class EvalRequest:
    """What to evaluate."""

    run: str = "latest"
    """Folder of a run, or `latest`."""
    checkpoint: str | None = None
    """Folder of one checkpoint; instead of `run` and `step`."""
    step: int | None = None
    """Which checkpoint of the run; None is the newest."""
    splits: tuple[SplitName, ...] | None = None
    """Splits to evaluate; None is valid and test, if they are not empty."""
    files: tuple[str, ...] = ()
    """Text files to evaluate instead of splits."""
    overrides: tuple[tuple[str, Any], ...] = ()
    """Settings that replace those of the checkpoint, by dotted name."""


def parse_request(arguments: Sequence[str]) -> EvalRequest:
    """The request that a command line of `NAME=VALUE` words makes.

    Raises:
      ConfigError: with every word that is not understood.
    """
    try:
        values = _dotted(OmegaConf.to_container(OmegaConf.from_cli(list(arguments)), resolve=True))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError([f"{' '.join(arguments)}: {' '.join(str(error).split())}"]) from error
    problems: list[str] = []
    request: dict[str, Any] = {}
    overrides: list[tuple[str, Any]] = []
    known = settings(Config())
    for name, value in values.items():
        if name in ("run", "checkpoint") and isinstance(value, str | int):
            request[name] = str(value)
        elif name == "step" and isinstance(value, int) and not isinstance(value, bool):
            request[name] = value
        elif name == "splits" and isinstance(value, list) and value and all(v in SPLIT_NAMES for v in value):
            request[name] = tuple(dict.fromkeys(value))
        elif name == "data.files" and isinstance(value, list) and value:
            request["files"] = tuple(str(file) for file in value)
        elif name in known and name != "data.files" and (name.startswith(_OVERRIDES) or name in _ALSO):
            overrides.append((name, value))
        else:
            problems.append(
                f"{name}={value!r}: not understood; use run=latest or run=FOLDER, checkpoint=FOLDER, step=NUMBER, "
                "splits=[valid,test], data.files=[FILE], a setting of data, kernels or mesh, train.eval_batch_size or "
                "model.compute_dtype"
            )
    if "checkpoint" in request and ("run" in request or "step" in request):
        problems.append("checkpoint=...: names a run and a step already; leave run= and step= out")
    if "files" in request and "splits" in request:
        problems.append("data.files=...: files are evaluated whole; leave splits= out")
    if problems:
        raise ConfigError(problems)
    return EvalRequest(**request, overrides=tuple(overrides))


def _dotted(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names of a nested mapping."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            found |= _dotted(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


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


def evaluate_command(arguments: Sequence[str]) -> int:
    """Evaluate as the command line says; prints a table and, last, one line of JSON.

    Raises:
      ConfigError, RunError, CheckpointError, DataError: with what to do about it.
    """
    request = parse_request(arguments)
    folder, step = locate(request)
    with Checkpoints(folder, read_only=True) as checkpoints:
        step = checkpoints.find(step)
        meta = checkpoints.meta(step)
        config = evaluated_config(meta["config"], request.overrides)
        mesh = usable_mesh(config)
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            results = _evaluate(config, request, checkpoints, step, meta, mesh)
    table = {name: result.as_json() for name, result in results.items()}
    print_results(table, title=f"{checkpoints.path(step)}: {config.scale_name} {config.method_name}")
    print(json.dumps({"results": plain_json(table)}))
    return 0


def _evaluate(
    config: Config,
    request: EvalRequest,
    checkpoints: Checkpoints,
    step: int,
    meta: Mapping[str, Any],
    mesh: Mesh | None,
) -> dict[str, EvalResult]:
    vocab_size = config.model.vocab_size
    splits: dict[str, SplitName]
    if request.files:
        corpus, splits = open_texts(config.data, request.files, vocab_size), {"text": "test"}
    else:
        corpus = open_corpus(config.data, vocab_size)
        present = [split for split in corpus.splits() if split != "train"]
        splits = {split: split for split in request.splits or present}
    if not splits:
        raise RunError(f"data.split={config.data.split}: valid and test are empty; use splits=[train]")
    if corpus.tokenizer.sha256 != meta["tokenizer_sha256"]:
        raise RunError(
            f"data.tokenizer={config.data.tokenizer}: not the tokenizer that {checkpoints.path(step)} was trained with"
        )
    config, params, balance = restore_model(checkpoints, config, step, mesh)
    evaluator = Evaluator(config, corpus, splits=list(splits.values()), limited=False, mesh=mesh)
    results = {name: evaluator.evaluate(params, balance, evaluator.fixed(split)) for name, split in splits.items()}
    return {name: result for name, result in results.items() if result is not None}
