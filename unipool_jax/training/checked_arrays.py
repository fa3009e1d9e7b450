"""Arrays of a checkpoint with a checksum per stored chunk, computed when it is written and compared when it is read.

Orbax stores arrays with TensorStore, by default in a format without checksums: a flipped bit comes back as another
number. Here they are stored as Zarr version 3, whose codec `crc32c` appends a CRC-32C to every chunk, that is, to every
shard of an array. TensorStore computes it in the threads that compress and write, a reader with other shardings, or of
some arrays only, checks exactly what it reads, and arrays in the old format are read as before. The index of an item
(OCDBT) has checksums of its own.
"""

from __future__ import annotations

from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint._src.serialization import tensorstore_utils


def _chunks_with_checksum(global_shape: Any, chunk_shape: Any, use_compression: bool) -> dict[str, Any]:
    """Metadata of an array: little-endian, compressed as in Orbax's default format, then the checksum."""
    compression = [{"name": "zstd", "configuration": {"level": 1}}] if use_compression else []
    return {
        "shape": global_shape,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, *compression, {"name": "crc32c"}],
    }


# Orbax has no setting for codecs. Its own metadata of version 3 protects the index of a shard, not the numbers.
tensorstore_utils._build_zarr3_metadata = _chunks_with_checksum


class CheckedHandler(ocp.PyTreeCheckpointHandler):
    """Writes and reads arrays as Zarr version 3."""

    def __init__(self) -> None:
        super().__init__(use_zarr3=True)


@ocp.args.register_with_handler(CheckedHandler, for_save=True)
class CheckedSave(ocp.args.PyTreeSave):
    """What to save: a pytree of arrays, and `custom_metadata`, a JSON object stored with it."""


@ocp.args.register_with_handler(CheckedHandler, for_restore=True)
class CheckedRestore(ocp.args.PyTreeRestore):
    """Orbax asks for it; checkpoints are read with its standard handler, which reads every format."""
