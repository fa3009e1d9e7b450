"""Reads and writes weights as safetensors files, verified expert by expert."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from unipool_jax.config.parsing import from_mapping
from unipool_jax.config.schema import Config, to_mapping
from unipool_jax.convert.errors import ConversionError
from unipool_jax.convert.layouts import LAYOUT_NAMES, Layout, LayoutName, make_layout
from unipool_jax.convert.weights import (
    ExpertHashes,
    Weights,
    check_same_experts,
    empty_weights,
    expert_hashes,
    hash_arrays,
)

_DTYPES = ("F32", "BF16", "F16")
_SHOWN = 12


def write_file(path: Path, layout_name: LayoutName, config: Config, weights: Weights) -> int:
    """Write all weights as float32.

    The file is written under a temporary name, read back, compared with `weights` expert by expert, and only then
    renamed. Its metadata holds the configuration and the hash of every expert.

    Returns:
      The number of experts.

    Raises:
      ConversionError: `path` exists, or reading back gives other weights.
    """
    if path.exists():
        raise ConversionError(f"{path}: already exists; choose another name or delete it")
    layout = make_layout(layout_name, config, weights)
    wanted = expert_hashes(weights)
    metadata = {
        "format": "pt",
        "layout": layout_name,
        "config": json.dumps(to_mapping(config)),
        "experts": json.dumps({f"{pool}.{expert}": value for (pool, expert), value in wanted.items()}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(to_tensors(layout), temporary, metadata)
        check_same_experts(wanted, expert_hashes(read_file(temporary, layout_name, config)), str(path))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(wanted)


def to_tensors(layout: Layout) -> dict[str, np.ndarray]:
    """The tensors of a file by name, float32, from the weights that `layout` views."""
    arrays = {name: np.empty(tensor.shape, np.float32) for name, tensor in layout.tensors.items()}
    for name, tensor in layout.tensors.items():
        for part in tensor.parts:
            part.view(arrays[name])[...] = part.ours
    return arrays


def read_file(path: Path, layout_name: LayoutName, config: Config) -> Weights:
    """The weights of the model of `config`, converted from float32, bfloat16 or float16 to float32.

    Raises:
      ConversionError: the file is not safetensors, has missing or unknown tensors, other shapes or dtypes, layers that
        do not share their pool, or experts whose hashes differ from its metadata.
    """
    weights = empty_weights(config)
    layout = make_layout(layout_name, config, weights)
    with _open(path) as file:
        names = set(file.keys())
        problems = _problems(file, names, layout)
        if problems:
            more = [f"  - and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
            raise ConversionError(
                f"{path} does not match the {layout_name} layout of this configuration "
                f"({config.scale_name} {config.method_name}, {config.total_experts} experts):\n"
                + "\n".join([f"  - {problem}" for problem in problems[:_SHOWN]] + more)
            )
        pieces: dict[tuple[int, int], list[np.ndarray]] = {}
        hashes: ExpertHashes = {}
        for name, tensor in layout.tensors.items():
            array = file.get_tensor(name).astype(np.float32)
            for part in tensor.parts:
                piece = part.view(array)
                part.ours[...] = piece
                if part.expert is not None:
                    pieces.setdefault(part.expert, []).append(piece)
                    if len(pieces[part.expert]) == 3:
                        hashes[part.expert] = hash_arrays(pieces.pop(part.expert))
        for copy, original in layout.copies.items():
            if copy in names and file.get_tensor(copy).tobytes() != file.get_tensor(original).tobytes():
                raise ConversionError(
                    f"{path}: {copy} differs from {original}, but these layers share one pool in the configuration; "
                    "check pool.groups"
                )
        metadata = file.metadata() or {}
    check_same_experts(hashes, expert_hashes(weights), str(path))
    if "experts" in metadata:
        check_same_experts(_parse_hashes(metadata["experts"]), hashes, str(path))
    return weights


def _parse_hashes(text: str) -> ExpertHashes:
    hashes = {}
    for key, value in json.loads(text).items():
        pool, _, expert = key.partition(".")
        hashes[int(pool), int(expert)] = value
    return hashes


def read_description(path: Path) -> tuple[LayoutName | None, Config | None]:
    """The layout and configuration that `write_file` stored in the file; None for files from elsewhere."""
    with _open(path) as file:
        metadata = file.metadata() or {}
    layout = metadata.get("layout")
    config = from_mapping(json.loads(metadata["config"])) if "config" in metadata else None
    return (layout if layout in LAYOUT_NAMES else None), config


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, "np")
    except (OSError, SafetensorError) as error:
        advice = " (a .pt file holds pickled objects; unipool_jax/convert/layouts.py shows how to re-save it)"
        raise ConversionError(f"{path}: not a readable safetensors file: {error}{advice}") from error


def _problems(file: safe_open, names: set[str], layout: Layout) -> list[str]:
    """One message for each tensor that is missing, unknown, or of another shape or dtype."""
    problems = [f"{name}: missing" for name in layout.tensors if name not in names]
    known = layout.tensors.keys() | layout.copies.keys()
    problems += [f"{name}: not part of this model" for name in sorted(names - known)]
    for name in sorted(names & known):
        wanted = layout.tensors[layout.copies.get(name, name)].shape
        found = file.get_slice(name)
        if tuple(found.get_shape()) != wanted:
            problems.append(f"{name}: shape {list(found.get_shape())}, expected {list(wanted)}")
        if found.get_dtype() not in _DTYPES:
            problems.append(f"{name}: dtype {found.get_dtype()}, expected one of {', '.join(_DTYPES)}")
    return problems
