"""Files of every format that is read, damaged: `python -m benchmarks.drills.malformed [--seed N] [--count N]`.

Each format gets crafted files and `--count` random ones: a good file with bits flipped, bytes replaced, removed,
inserted, repeated or cut off, or numbers replaced by extreme ones. An attempt held if it ended in a sentence for the
user (UserError), or in a result that is right: equal to that of the good file where the format has checksums, else a
well-formed one. It failed if it ended in another exception, in more than `SECONDS` or `MEGABYTES`, in the death of the
process, or in a file outside its folder.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import lzma
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.drills.crafted import CRAFTED
from benchmarks.drills.tally import Tally, arguments

SECONDS, MEGABYTES = 60.0, 1500
TEXTS = ["first\nwith lines", "na\u00efve \U0001f469", "plain words " * 40, "{}", "the end"]


class Format(NamedTuple):
    """How a kind of file is made and read."""

    make: Callable[[Path], Path]
    """Writes a good file, or files, into a folder; returns what `read` takes."""
    read: Callable[[Path], object]
    """Reads all of it; the result, of which equal ones compare equal."""
    exact: bool
    """Whether checksums promise that a result is that of the good file."""


def _lines() -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def _write(name: str, content: Callable[[], bytes]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content())
        return folder / name

    return make


def _read_texts(path: Path) -> object:
    from unipool_jax.data.readers import read_texts

    return [hashlib.sha256(text.encode()).digest() for text in read_texts([path])]


def _zstd() -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(write_checksum=True).compress(_lines())


def _make_parquet(folder: Path) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": TEXTS * 20}), folder / "a.parquet")
    return folder / "a.parquet"


def _tokenizer_json() -> bytes:
    from unipool_jax.data.train_tokenizer import train_tokenizer

    return train_tokenizer(TEXTS * 5, 300)


def _read_tokenizer(path: Path) -> object:
    from unipool_jax.data.losses import measure
    from unipool_jax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(path))
    texts = [*TEXTS, "<|endoftext|>", "a</s>b", ""]
    rows = tokenizer.encode_batch(texts)
    measure(tokenizer, texts, rows)
    for text, row in zip(texts, rows, strict=True):
        assert tokenizer.eod not in row, "a text made an end token"
        assert not len(row) or 0 <= row.min() <= row.max() < tokenizer.vocab_size, "an id outside of the vocabulary"
        table = tokenizer.token_bytes
        assert table is None or table[row].sum() == len(text.encode()), "byte counts are not exact"
        tokenizer.decode(row)
    return None


def _make_store(folder: Path) -> Path:
    from unipool_jax.data.token_store import build_store

    (folder / "a.jsonl").write_bytes(_lines() * 20)
    (folder / "t.json").write_bytes(_tokenizer_json())
    build_store([folder / "a.jsonl"], folder / "store", str(folder / "t.json"), (1, 0, 0), progress=False)
    (folder / "a.jsonl").unlink()
    (folder / "t.json").unlink()
    return folder / "store"


def _read_store(path: Path) -> object:
    from unipool_jax.data.opening import open_store

    store = open_store(path)
    store.verify()
    tokens = store.read(0, store.num_tokens)
    return tokens.tolist(), store.document_offsets.tolist(), store.tokenizer.decode(tokens)


def _make_megatron(folder: Path) -> Path:
    lengths = np.array([3, 5, 2], "<i4")
    pointers = (np.cumsum(lengths) - lengths).astype("<i8") * 2
    index = b"MMIDIDX\x00\x00" + np.array([1], "<u8").tobytes() + b"\x08" + np.array([3, 4], "<u8").tobytes()
    index += lengths.tobytes() + pointers.tobytes() + np.arange(4, dtype="<i8").tobytes()
    (folder / "m.idx").write_bytes(index)
    (folder / "m.bin").write_bytes(np.arange(10, dtype="<u2").tobytes())
    return folder / "m"


def _read_megatron(path: Path) -> object:
    from unipool_jax.data.opening import open_store

    store = open_store(path, "bytes", (1, 0, 0))
    documents = store.split_documents("train")
    lengths = store.document_lengths(documents)
    tokens = store.read(0, store.num_tokens)
    assert lengths.sum() == len(tokens), "documents and tokens disagree"
    assert 0 <= tokens.min() <= tokens.max() < 257, "ids outside of the vocabulary"
    return None


def _make_safetensors(folder: Path) -> Path:
    import jax

    from unipool_jax.config.compose import compose_config
    from unipool_jax.convert.files import write_file
    from unipool_jax.convert.weights import Weights, empty_weights

    width = ["num_layers=2", "hidden_size=8", "num_heads=2", "num_kv_heads=1", "ffn_size=8", "vocab_size=8192"]
    config = compose_config(["method=dense", *(f"model.{word}" for word in width)])
    weights = empty_weights(config)
    filled = Weights(jax.tree.map(np.zeros_like, weights.params), weights.expert_bias_GNE)
    write_file(folder / "m.safetensors", "twin", config, filled)
    return folder / "m.safetensors"


def _read_safetensors(path: Path) -> object:
    import jax

    from unipool_jax.config.errors import UserError
    from unipool_jax.config.rules import validate
    from unipool_jax.convert.files import read_description, read_file

    layout, config = read_description(path)[:2]
    if layout is None or config is None:
        raise UserError("the command asks for the layout and the settings")
    validate(config)
    weights = read_file(path, layout, config)
    return config, [leaf.tobytes() for leaf in jax.tree.leaves(weights)]


def _make_gguf(folder: Path) -> Path:
    from benchmarks.drills.crafted import tiny_gguf

    (folder / "m.gguf").write_bytes(tiny_gguf())
    return folder / "m.gguf"


def _read_gguf(path: Path) -> object:
    from unipool_jax.convert.gguf import read_gguf
    from unipool_jax.data.tokenizer import parse_tokenizer

    parse_tokenizer(str(path), read_gguf(path)[2])
    return None


def _npy() -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, np.arange(24, dtype=np.int64).reshape(4, 6))
    return buffer.getvalue()


def _read_npy(path: Path) -> object:
    from unipool_jax.config.files import read_array

    return isinstance(read_array(path), np.ndarray)


FORMATS = {
    "txt": Format(_write("a.txt", lambda: "\n".join(TEXTS).encode()), _read_texts, False),
    "jsonl": Format(_write("a.jsonl", _lines), _read_texts, False),
    "gz": Format(_write("a.jsonl.gz", lambda: gzip.compress(_lines())), _read_texts, True),
    "xz": Format(_write("a.jsonl.xz", lambda: lzma.compress(_lines())), _read_texts, True),
    "zst": Format(_write("a.jsonl.zst", _zstd), _read_texts, True),
    "parquet": Format(_make_parquet, _read_texts, False),
    "tokenizer": Format(_write("t.json", _tokenizer_json), _read_tokenizer, False),
    "store": Format(_make_store, _read_store, True),
    "megatron": Format(_make_megatron, _read_megatron, False),
    "safetensors": Format(_make_safetensors, _read_safetensors, True),
    "gguf": Format(_make_gguf, _read_gguf, False),
    "npy": Format(_write("a.npy", _npy), _read_npy, False),
}


def damaged(content: bytes, draw: random.Random) -> bytes:
    """`content` with one to three random changes."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(changed) + 1)
        size = draw.choice([1, 2, 8, 64])
        kind = draw.randrange(8)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[at : at + size] = draw.randbytes(size)
        elif kind == 2:
            del changed[at : at + size]
        elif kind == 3:
            changed[at:at] = draw.randbytes(size)
        elif kind == 4:
            changed[at:at] = changed[at : at + draw.randrange(1000)]
        elif kind == 5:
            del changed[at:]
        elif kind == 6:
            number = draw.choice([0, 1, 1 << 31, (1 << 31) - 1, (1 << 32) - 1, 1 << 62, 1 << 63, (1 << 64) - 1])
            changed[at : at + 8] = number.to_bytes(8, "little")
        else:
            changed[at : at + size] = bytes(size)
    return bytes(changed)


def _attempt(name: str, good: Path, folder: Path, seed: int | str) -> str:
    """What became of one attempt, in `folder`, which is empty: a random one, or the crafted one of that name."""
    from unipool_jax.config.errors import UserError

    kind = FORMATS[name]
    inside = folder / "inside"
    shutil.copytree(good, inside)
    path = inside / (good / "path.txt").read_text()
    if isinstance(seed, str):
        CRAFTED[name][seed](path)
    else:
        draw = random.Random(f"{name} {seed}")
        files = sorted(file for file in inside.rglob("*") if file.is_file() and file.name != "path.txt")
        file = draw.choice(files)
        file.write_bytes(damaged(file.read_bytes(), draw))
    try:
        found = kind.read(path)
    except UserError as error:
        outcome = "refused" if str(error).strip() else "FAILED: a refusal without a sentence"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        outcome = f"FAILED: {type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {error!s:.200}"
    else:
        same = not kind.exact or isinstance(seed, str) or found == kind.read(good / (good / "path.txt").read_text())
        outcome = "read" if same else "FAILED: another result, without a word"
    strangers = [entry.name for entry in folder.iterdir() if entry.name != "inside"]
    return f"FAILED: wrote {strangers}" if strangers else outcome


def _serve(pipe: connection.Connection, goods: Path) -> None:
    """Makes attempts in this process, which is watched, until the pipe ends."""
    from unipool_jax.data import tokenizer

    tokenizer._SECONDS = 6.0  # of encoding: the drill is about whether there is a limit
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)
    with contextlib.suppress(EOFError):
        while True:
            name, seed = pipe.recv()
            with tempfile.TemporaryDirectory() as folder:
                os.chdir(folder)
                pipe.send(_attempt(name, goods / name, Path(folder), seed))
                os.chdir("/")


def _memory(pid: int) -> float:
    """Megabytes that a process has in memory."""
    with contextlib.suppress(OSError, ValueError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    return 0.0


class _Watched:
    """A process that makes attempts, and is replaced when it does not come back from one."""

    def __init__(self, goods: Path):
        self._goods = goods
        self._process: BaseProcess | None = None

    def attempt(self, name: str, seed: int | str) -> str:
        """What became of one attempt."""
        if self._process is None:
            context = get_context("spawn")
            self._pipe, other = context.Pipe()
            self._process = context.Process(target=_serve, args=(other, self._goods), daemon=True)
            self._process.start()
            other.close()
            self._pipe.send((name, "good"))  # imports, and shows that the good file is read
            assert self._pipe.recv() == "read", f"the good file of {name} is not read"
            self._before = _memory(self._process.pid or 0)
        self._pipe.send((name, seed))
        start, most = time.monotonic(), 0.0
        while not self._pipe.poll(0.02):
            most = max(most, _memory(self._process.pid or 0) - self._before)
            if time.monotonic() - start > SECONDS:
                return self._end(f"FAILED: not back after {SECONDS:.0f} seconds")
            if most > MEGABYTES:
                return self._end(f"FAILED: {most:.0f} MB of memory")
            if not self._process.is_alive() and not self._pipe.poll():
                return self._end(f"FAILED: the process died ({self._process.exitcode})")
        try:
            return str(self._pipe.recv())
        except EOFError:
            return self._end("FAILED: the process died")

    def _end(self, outcome: str) -> str:
        assert self._process is not None
        self._process.kill()
        self._process.join()
        self._process = None
        return outcome

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._end("")


def attempts(goods: Path, count: int, first: int) -> Iterator[tuple[str, int | str, str]]:
    """Format, seed or name of a crafted file, and outcome, of all attempts."""
    for name, kind in FORMATS.items():
        (goods / name).mkdir()
        made = kind.make(goods / name)
        (goods / name / "path.txt").write_text(str(made.relative_to(goods / name)))
        watched = _Watched(goods)
        seeds = [seed for seed in CRAFTED[name] if seed != "good"]
        for seed in [*seeds, *range(first, first + count)]:
            yield name, seed, watched.attempt(name, seed)
        watched.close()


def main() -> int:
    """Make all attempts; the exit code."""
    draw, count = arguments(__doc__ or "", 100)
    tally = Tally("malformed")
    with tempfile.TemporaryDirectory() as goods:
        for name, seed, outcome in attempts(Path(goods), count, draw.randrange(1 << 30)):
            if outcome.startswith("FAILED"):
                tally.failed(f"{name} {seed}: {outcome.removeprefix('FAILED: ')}")
                print(f"{name} {seed}: {outcome}", file=sys.stderr, flush=True)
            else:
                tally.held(f"{name}, {outcome}")
    return tally.report()


if __name__ == "__main__":
    sys.exit(main())
