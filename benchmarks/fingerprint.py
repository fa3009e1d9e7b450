"""What it costs a run to know its text: `python -m benchmarks.fingerprint [--tokens 500000000]`.

Builds a token store and a Megatron pair of random tokens, and prints how long their fingerprints take: of the store by
its manifest and by reading, of the pair when it is read and when it is remembered.
"""

from __future__ import annotations

import argparse
import json
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from unipool_jax.data import hashing
from unipool_jax.data.opening import open_store
from unipool_jax.data.token_store import build_store

_DOCUMENT = 1000


def write_pair(prefix: Path, tokens: np.ndarray) -> None:
    """The Megatron pair of uint16 tokens in documents of `_DOCUMENT`."""
    count = len(tokens) // _DOCUMENT
    sizes, index = np.full(count, _DOCUMENT, "<i4"), np.arange(count + 1, dtype="<i8")
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, count, count + 1)
    pointers = 2 * _DOCUMENT * np.arange(count, dtype="<i8")
    Path(f"{prefix}.idx").write_bytes(header + sizes.tobytes() + pointers.tobytes() + index.tobytes())
    tokens.astype("<u2").tofile(f"{prefix}.bin")


def timed(what: str, action: Callable[[], object]) -> None:
    """Print the seconds of one call."""
    start = time.perf_counter()
    action()
    print(f"{what}: {time.perf_counter() - start:.2f} s", flush=True)


def main() -> None:
    """Build both and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=500_000_000)
    tokens = parser.parse_args().tokens // _DOCUMENT * _DOCUMENT
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        letters = np.random.default_rng(0).integers(97, 123, tokens, np.uint8)
        write_pair(place / "pair", letters)
        with (place / "text.jsonl").open("w") as file:
            for start in range(0, tokens, _DOCUMENT):
                file.write(json.dumps({"text": letters[start : start + _DOCUMENT].tobytes().decode()}) + "\n")
        build = lambda: build_store([place / "text.jsonl"], place / "store", "bytes", progress=False)  # noqa: E731
        timed(f"building a store of {tokens:,} tokens", build)
        timed("store, by its manifest", lambda: open_store(place / "store").fingerprint())
        hashing.SMALL = 1 << 62
        timed("store, read", lambda: open_store(place / "store").fingerprint())
        hashing.SMALL = 0
        hashing.SETTLED = -1.0
        for how in ("read", "remembered"):
            pair = open_store(place / "pair", "bytes", (969, 30, 1))
            pair.memory = place / "memory"
            timed(f"Megatron pair, {how}", pair.fingerprint)


if __name__ == "__main__":
    main()
