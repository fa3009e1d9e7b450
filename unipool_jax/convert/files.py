"""Reads and writes weights as safetensors files, verified expert by expert."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from unipool_jax.config.parsing import from_mapping
from unipool_jax.config.schema import Config, ConfigError, ModelConfig, MoEConfig, to_mapping
from unipool_jax.convert.errors import ConversionError
from unipool_jax.convert.inheritance import Origin, noted_origin
from unipool_jax.convert.layouts import LAYOUT_NAMES, FileTensor, Layout, LayoutName, make_layout
from unipool_jax.convert.safetensors_file import Header, read_header
from unipool_jax.convert.weights import (
    ExpertHashes,
    Weights,
    check_count,
    check_same_experts,
    empty_weights,
    expert_hashes,
    hash_arrays,
    unallocated_weights,
)

_FREE = {
    *("model.init", "model.init_std", "model.embedding_std", "model.post_norm_attention", "model.post_norm_ffn"),
    *("model.compute_dtype", "model.remat", "moe.experts_per_layer", "moe.router_dtype"),
}
"""Settings of the model that do not say what its weights compute, or that their shapes show."""

_REST = "rest"
"""Metadata: the hash of what is not hashed expert by expert."""

_DTYPES = ("F32", "BF16", "F16")
_SHOWN = 12


def write_file(
    path: Path, layout_name: LayoutName, config: Config, weights: Weights, origin: Origin | None = None
) -> int:
    """Write all weights as float32.

    The file is written under a temporary name, read back, compared with `weights` expert by expert, and only then
    renamed. Its metadata holds the configuration, the origin of the weights and the hash of every expert.

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
        **(origin or Origin()).notes(),
    }
    arrays = to_tensors(layout)
    metadata[_REST] = _hash_rest(metadata["config"], layout, arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(arrays, temporary, metadata)
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
    header = read_header(path)
    expected = unallocated_weights(config)
    check_count(expected, sum(math.prod(tensor.shape) for tensor in header.tensors.values()), str(path))
    problems = _problems(header, make_layout(layout_name, config, expected))
    if problems:
        more = [f"  - and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise ConversionError(
            f"{path} does not match the {layout_name} layout of this configuration "
            f"({config.scale_name} {config.method_name}, {config.total_experts} experts):\n"
            + "\n".join([f"  - {problem}" for problem in problems[:_SHOWN]] + more)
        )
    _check_same_model(path, _noted_config(path, header), config)
    names = header.tensors.keys()
    weights = empty_weights(config)
    layout = make_layout(layout_name, config, weights)
    with _open(path) as file:
        pieces: dict[tuple[int, int], list[np.ndarray]] = {}
        hashes: ExpertHashes = {}
        rest: dict[str, np.ndarray] = {}
        for name, tensor in layout.tensors.items():
            array = file.get_tensor(name).astype(np.float32)
            if not _has_experts(tensor):
                rest[name] = array
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
    check_same_experts(hashes, expert_hashes(weights), str(path))
    if "experts" in header.metadata:
        check_same_experts(_noted_hashes(path, header), hashes, str(path))
    noted = header.metadata.get(_REST)
    if noted not in (None, _hash_rest(header.metadata.get("config", ""), layout, rest)):
        raise ConversionError(
            f"{path}: its configuration, or weights outside of the experts, are not those that were written; nothing "
            "was kept"
        )
    return weights


def _has_experts(tensor: FileTensor) -> bool:
    return any(part.expert is not None for part in tensor.parts)


def _hash_rest(config: str, layout: Layout, arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of the configuration and of all tensors but those of experts, which have hashes of their own."""
    digest = hashlib.sha256(config.encode())
    for name, tensor in layout.tensors.items():
        if not _has_experts(tensor):
            digest.update(name.encode() + b"\0" + np.ascontiguousarray(arrays[name], np.float32).tobytes())
    return digest.hexdigest()


def _noted_hashes(path: Path, header: Header) -> ExpertHashes:
    hashes = {}
    noted = _json(path, header, "experts")
    try:
        for key, value in noted.items():
            pool, _, expert = key.partition(".")
            hashes[int(pool), int(expert)] = str(value)
    except (AttributeError, ValueError) as error:
        raise ConversionError(f"{path}: its metadata 'experts' must be hashes by POOL.EXPERT") from error
    return hashes


def _noted_config(path: Path, header: Header) -> Config | None:
    if "config" not in header.metadata:
        return None
    try:
        return from_mapping(_json(path, header, "config"))
    except ConfigError as error:
        raise ConversionError(f"{path}: its metadata holds a configuration that cannot be used:\n{error}") from error


def _json(path: Path, header: Header, name: str) -> Any:
    try:
        return json.loads(header.metadata[name])
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: its metadata {name!r} is not JSON ({error})") from error


def _check_same_model(path: Path, noted: Config | None, config: Config) -> None:
    """Raises ConversionError if the file says that its weights are of a model that computes something else.

    Shapes agree in many settings that matter: the base of the positions, the number of heads, the router.
    """
    if noted is None:
        return
    theirs, ours = _settings_of_function(noted), _settings_of_function(config)
    different = [f"  - {name}={ours[name]}, in the file {theirs[name]}" for name in ours if ours[name] != theirs[name]]
    if different:
        raise ConversionError(
            "\n".join([f"{path}: its weights are of another model; leave these settings out:", *different])
        )


def _settings_of_function(config: Config) -> dict[str, Any]:
    """The settings, by name, that say what a model computes from its weights."""
    sections: dict[str, ModelConfig | MoEConfig] = {"model": config.model, "moe": config.moe}
    values = {
        f"{section}.{field.name}": getattr(part, field.name)
        for section, part in sections.items()
        for field in dataclasses.fields(part)
        if f"{section}.{field.name}" not in _FREE
    }
    biased = config.loss.balance == "expert_bias"
    return values | {"pool.groups": config.pool.groups, "loss.balance=expert_bias": biased}


def read_description(path: Path) -> tuple[LayoutName | None, Config | None, Origin]:
    """The layout, configuration and origin that `write_file` stored in the file; None for files from elsewhere."""
    header = read_header(path)
    layout = next((name for name in LAYOUT_NAMES if name == header.metadata.get("layout")), None)
    return layout, _noted_config(path, header), noted_origin(header.metadata, str(path))


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, "np")
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"{path}: not a readable safetensors file: {error}") from error


def _problems(header: Header, layout: Layout) -> list[str]:
    """One message for each tensor that is missing, unknown, or of another shape or dtype."""
    names = header.tensors.keys()
    problems = [f"{name}: missing" for name in layout.tensors if name not in names]
    known = layout.tensors.keys() | layout.copies.keys()
    problems += [f"{name}: not part of this model" for name in sorted(names - known)]
    for name in sorted(names & known):
        wanted = layout.tensors[layout.copies.get(name, name)].shape
        found = header.tensors[name]
        if found.shape != wanted:
            problems.append(f"{name}: shape {list(found.shape)}, expected {list(wanted)}")
        if found.dtype not in _DTYPES:
            problems.append(f"{name}: dtype {found.dtype}, expected one of {', '.join(_DTYPES)}")
    return problems
