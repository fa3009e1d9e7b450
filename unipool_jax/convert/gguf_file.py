"""Reads the header of a GGUF file, version 2 or 3, and finds its tensors.

Every count, length and offset is compared with the length of the file before anything is read or allocated by it.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unipool_jax.convert.errors import ConversionError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4

# Kinds of values by their number.
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _TEXT, _ARRAY = 7, 8, 9
_SMALLEST = {_BOOL: 1, _TEXT: 8} | {kind: np.dtype(name).itemsize for kind, name in _NUMBERS.items()}


class StoredTensor(NamedTuple):
    """A tensor as it is stored."""

    shape: tuple[int, ...]
    """Row-major; the file lists dimensions in the opposite order."""
    kind: int
    """Number of its type in ggml."""
    data: np.ndarray
    """uint8 `[..., bytes of a row]`, mapped."""


class BlockSize(NamedTuple):
    """Of a type of tensor: values in a block, and its bytes."""

    values: int
    bytes: int


def read_gguf_file(path: Path, block_sizes: Mapping[int, BlockSize]) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The fields and tensors of a file, by name.

    Args:
      path: of the file.
      block_sizes: of the types that can be read, by number.

    Raises:
      ConversionError: not a GGUF file, or its header does not fit the file.
    """
    try:
        if path.stat().st_size == 0:
            raise ConversionError(f"{path}: not a readable GGUF file: it is empty")
        content = np.memmap(path, np.uint8, "r").view(np.ndarray)
    except OSError as error:
        raise ConversionError(f"{path}: not a readable GGUF file: {error.strerror}") from error
    return _Header(path, content).read(block_sizes)


class _Header:
    """Reads from the start of a file to the end of its header."""

    def __init__(self, path: Path, content: np.ndarray):
        self._path = path
        self._content = content
        self._position = 0

    def read(self, block_sizes: Mapping[int, BlockSize]) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        if self._take(4) != _MAGIC:
            raise ConversionError(f"{self._path}: not a readable GGUF file: it does not start with {_MAGIC.decode()}")
        version = self._number("<u4")
        if version not in _VERSIONS:
            raise self._error(f"version {version}; versions 2 and 3, little-endian, can be read")
        num_tensors, num_fields = self._number("<u8"), self._number("<u8")
        self._check_count(num_fields, 8 + 4 + 1, "fields")
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            name = self._text()
            if name in fields:
                raise self._error(f"field {name} is there twice")
            fields[name] = self._value(self._number("<u4"), name)
        self._check_count(num_tensors, 8 + 4 + 8 + 4 + 8, "tensors")
        infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(num_tensors):
            name = self._text()
            if name in infos:
                raise self._error(f"tensor {name} is there twice")
            num_dims = self._number("<u4")
            if not 1 <= num_dims <= _MAX_DIMS:
                raise self._error(f"tensor {name} has {num_dims} dimensions; 1 to {_MAX_DIMS} can be read")
            dims = tuple(self._number("<u8") for _ in range(num_dims))
            infos[name] = dims[::-1], self._number("<u4"), self._number("<u8")
        alignment = fields.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._error(f"general.alignment={alignment}: must be a power of two")
        start = -(-self._position // alignment) * alignment
        return fields, self._tensors(infos, start, alignment, block_sizes)

    def _tensors(
        self,
        infos: Mapping[str, tuple[tuple[int, ...], int, int]],
        start: int,
        alignment: int,
        block_sizes: Mapping[int, BlockSize],
    ) -> dict[str, StoredTensor]:
        tensors: dict[str, StoredTensor] = {}
        ranges: list[tuple[int, int, str]] = []
        for name, (shape, kind, offset) in infos.items():
            if kind not in block_sizes:
                raise self._error(f"tensor {name} is of type {kind}, which cannot be read")
            block = block_sizes[kind]
            if min(shape) < 1 or shape[-1] % block.values:
                raise self._error(f"tensor {name}: shape {list(shape)} is not made of blocks of {block.values} values")
            row = shape[-1] // block.values * block.bytes
            size = math.prod(shape[:-1]) * row
            if offset % alignment:
                raise self._error(f"tensor {name}: offset {offset} is not a multiple of {alignment}")
            first, end = start + offset, start + offset + size
            if end > len(self._content):
                raise self._error(
                    f"tensor {name}: shape {list(shape)} needs bytes {first} to {end}, "
                    f"and the file has {len(self._content)}"
                )
            ranges.append((first, end, name))
            tensors[name] = StoredTensor(shape, kind, self._content[first:end].reshape(*shape[:-1], row))
        ranges.sort()
        for (_, end, name), (first, _, other) in itertools.pairwise(ranges):
            if first < end:
                raise self._error(f"tensors {name} and {other} overlap")
        return tensors

    def _value(self, kind: int, name: str) -> Any:
        if kind == _TEXT:
            return self._text()
        if kind in (_BOOL, *_NUMBERS):
            return self._numbers(kind, 1)[0]
        if kind != _ARRAY:
            raise self._error(f"field {name} is of unknown kind {kind}")
        of, count = self._number("<u4"), self._number("<u8")
        if of not in _SMALLEST:
            raise self._error(f"field {name} is a list of kind {of}; lists of numbers or texts can be read")
        self._check_count(count, _SMALLEST[of], f"entries of {name}")
        return [self._text() for _ in range(count)] if of == _TEXT else self._numbers(of, count)

    def _numbers(self, kind: int, count: int) -> list[Any]:
        dtype = np.dtype(_NUMBERS.get(kind, "u1"))
        values: list[Any] = np.frombuffer(self._take(dtype.itemsize * count), dtype).tolist()
        return [value != 0 for value in values] if kind == _BOOL else values

    def _number(self, dtype: str) -> int:
        return int(np.frombuffer(self._take(np.dtype(dtype).itemsize), dtype)[0])

    def _text(self) -> str:
        start, content = self._position, self._take(self._number("<u8"))
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise self._error(f"the text at byte {start} is not UTF-8") from error

    def _take(self, size: int) -> bytes:
        end = self._position + size
        if end > len(self._content):
            raise self._error(f"ends within its header, which asks for {size} bytes at byte {self._position}")
        taken = self._content[self._position : end].tobytes()
        self._position = end
        return taken

    def _check_count(self, count: int, smallest: int, what: str) -> None:
        if count * smallest > len(self._content) - self._position:
            raise self._error(f"{count} {what} do not fit into its {len(self._content)} bytes")

    def _error(self, problem: str) -> ConversionError:
        return ConversionError(f"{self._path}: damaged or unsupported GGUF file: {problem}")
