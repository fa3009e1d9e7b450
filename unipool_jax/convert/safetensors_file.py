"""The header of a safetensors file, checked against the file before anything is read or allocated by it.

Format: 8 bytes with the length of the header, the header in JSON, the bytes of all tensors without gaps.
https://huggingface.co/docs/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from unipool_jax.convert.errors import ConversionError

_MAX_HEADER = 100_000_000  # the limit of the format
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8} | {
    name: 8 * size for name, size in {"U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1}.items()
}


class StoredTensor(NamedTuple):
    """What the header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]


class Header(NamedTuple):
    """Tensors by name, and metadata."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a file.

    Raises:
      ConversionError: not a safetensors file, or a header that does not fit it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise _error(path, f"its header of {length} bytes does not fit into {size} bytes")
            text = file.read(length)
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        content = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _error(path, f"its header is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise _error(path, "its header is not a JSON object")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _error(path, "its metadata must be texts by name")
    tensors: dict[str, StoredTensor] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, entry in content.items():
        tensor, first, end = _parse_tensor(path, name, entry)
        tensors[name] = tensor
        ranges.append((first, end, name))
    position = 0
    for first, end, name in sorted(ranges):
        if first != position:
            raise _error(path, f"tensor {name} starts at byte {first}, and the one before ends at byte {position}")
        position = end
    if position != size - 8 - length:
        raise _error(path, f"its tensors take {position} bytes, and it holds {size - 8 - length}")
    return Header(tensors, metadata)


def _parse_tensor(path: Path, name: str, entry: Any) -> tuple[StoredTensor, int, int]:
    """The tensor, its first byte, and the byte after its last."""
    try:
        dtype, shape, (first, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        bits = _BITS[dtype]
        numbers = [*shape, first, end]
    except (TypeError, KeyError, ValueError) as error:
        raise _error(path, f"tensor {name} must have a known dtype, a shape and two data_offsets") from error
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise _error(
            path, f"tensor {name}: shape {shape} and data_offsets {[first, end]} must be whole numbers from 0 on"
        )
    needed = math.prod(shape) * bits // 8
    if end - first != needed:
        raise _error(path, f"tensor {name}: {dtype} of shape {shape} needs {needed} bytes and has {end - first}")
    return StoredTensor(dtype, tuple(shape)), first, end


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice!r} is there twice")
    return names


def _error(path: Path, problem: str) -> ConversionError:
    return ConversionError(
        f"{path}: not a readable safetensors file: {problem} (a .pt file holds pickled objects; "
        "unipool_jax/convert/layouts.py shows how to re-save it)"
    )
