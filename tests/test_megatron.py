"""Megatron `.bin`/`.idx` pairs, written here from the public description of the format."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unipool_jax.data.errors import DataError
from unipool_jax.data.pipeline import EvalWindows, WindowSource
from unipool_jax.data.splits import PILE_SPLIT, SPLIT_NAMES
from unipool_jax.data.token_store import build_store, open_store

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}


def write_pair(
    prefix: Path, documents: list[list[int]], dtype: str = "uint16", magic: bytes = b"MMIDIDX\x00\x00", version: int = 1
) -> Path:
    """Writes `documents` (lists of ids) as one sequence each."""
    sizes = np.array([len(document) for document in documents], "<i4")
    item = np.dtype(dtype).itemsize
    pointers = np.array([item * sizes[:i].sum() for i in range(len(sizes))], "<i8")
    index = np.arange(len(documents) + 1, dtype="<i8")
    header = magic + struct.pack("<QBQQ", version, CODES[dtype], len(sizes), len(index))
    prefix.with_name(prefix.name + ".idx").write_bytes(header + sizes.tobytes() + pointers.tobytes() + index.tobytes())
    content = np.concatenate(documents).astype(dtype).tobytes()
    prefix.with_name(prefix.name + ".bin").write_bytes(content)
    return prefix


def documents(count: int = 40, vocab: int = 256, eod: int = 256) -> list[list[int]]:
    random = np.random.RandomState(0)
    return [[*random.randint(0, vocab, random.randint(1, 60)).tolist(), eod] for _ in range(count)]


@pytest.mark.parametrize("dtype", ["uint16", "int16", "int32", "int64"])
def test_pairs_are_read(tmp_path: Path, dtype: str) -> None:
    made = documents()
    prefix = write_pair(tmp_path / "pile.00_text_document", made, dtype)
    for path in (str(prefix), f"{prefix}.bin", f"{prefix}.idx"):
        store = open_store(path, "bytes", PILE_SPLIT)
        flat = np.concatenate(made)
        assert (store.num_tokens, store.num_documents) == (len(flat), 40)
        np.testing.assert_array_equal(store.read(0, store.num_tokens), flat)
        assert store.read(3, 9).dtype == np.int32
        np.testing.assert_array_equal(store.document_offsets, np.cumsum([0, *map(len, made)]))
        assert store.split_documents("train").tolist() == list(range(39))
        assert (store.tokenizer.name, store.eod, store.text_bytes) == ("bytes", 256, None)
        np.testing.assert_array_equal(store.document_starts(np.arange(40)), store.document_offsets[:-1])
        assert store.manifest == {}
        store.verify()
        assert store.fingerprint() != open_store(path, "bytes", (1, 1, 1)).fingerprint()


def test_same_batches_as_our_own_store(tmp_path: Path) -> None:
    texts = [f"document number {i} " * (i % 7 + 1) for i in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    own = build_store([tmp_path / "a.jsonl"], tmp_path / "own", "gpt2", (80, 15, 5), progress=False)
    made = [[*ids, 50256] for ids in own.tokenizer.encode_batch(texts)]
    pair = open_store(write_pair(tmp_path / "pair", made), "gpt2", (80, 15, 5))
    for split in SPLIT_NAMES:
        ours, theirs = (WindowSource(store, split, 8, 50, 3).batch(range(50)) for store in (own, pair))
        np.testing.assert_array_equal(ours.inputs, theirs.inputs)
        windows = [EvalWindows(store, split, 8) for store in (own, pair)]
        ours, theirs = (source.batch(range(len(source))) for source in windows)
        np.testing.assert_array_equal(ours.targets, theirs.targets)
    # One tokenizer, so they may also be blended.
    assert WindowSource([own, pair], "train", 8, 20, 3).batch(range(20)).inputs.shape == (20, 8)


def test_tokenizer_and_split_must_be_named(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "pair", documents())
    for options in ({}, {"tokenizer": "bytes"}, {"split": PILE_SPLIT}):
        with pytest.raises(DataError, match="record neither their tokenizer nor a split"):
            open_store(prefix, **options)
    with pytest.raises(DataError, match="split_order='random'"):
        open_store(prefix, "bytes", PILE_SPLIT, "random")


def test_ids_outside_the_vocabulary_are_found(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "pair", documents(eod=300))
    with pytest.raises(DataError, match=r"pair\.bin: tokens 0\.\..* have ids .*300, but tokenizer 'bytes' has 257"):
        open_store(prefix, "bytes", PILE_SPLIT)
    late = [[1] * 70_000, [2, 257]]
    store = open_store(write_pair(tmp_path / "late", late), "bytes", PILE_SPLIT)
    with pytest.raises(DataError, match=r"ids 2\.\.257"):
        store.read(70_000, 70_002)
    with pytest.raises(DataError, match=r"ids 1\.\.257"):
        store.verify()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"magic": b"NOTANIDX\x00"}, r"pair\.idx: starts with b'NOTANIDX"),
        ({"version": 2}, "version 2; expected"),
        ({"dtype": "float32"}, "dtype code 7 is not an integer type"),
    ],
)
def test_other_formats_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_store(write_pair(tmp_path / "pair", documents(), **options), "bytes", PILE_SPLIT)


def test_cut_off_pairs_are_refused(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "pair", documents())
    index, data = prefix.with_name("pair.idx"), prefix.with_name("pair.bin")
    whole_index, whole_data = index.read_bytes(), data.read_bytes()
    for content in (b"", whole_index[:20]):
        index.write_bytes(content)
        with pytest.raises(DataError, match=rf"pair\.idx: {len(content)} bytes, too short"):
            open_store(prefix, "bytes", PILE_SPLIT)
    index.write_bytes(whole_index[:-8])
    with pytest.raises(DataError, match="do not match 40 sequences"):
        open_store(prefix, "bytes", PILE_SPLIT)
    index.write_bytes(whole_index)
    data.write_bytes(whole_data[:-2])
    with pytest.raises(DataError, match=r"pair\.bin: \d+ bytes, but its index lists \d+ tokens"):
        open_store(prefix, "bytes", PILE_SPLIT)
    swapped = bytearray(whole_index)
    swapped[34 + 4 * 40 : 34 + 4 * 40 + 8] = struct.pack("<q", 2)
    index.write_bytes(swapped)
    data.write_bytes(whole_data)
    with pytest.raises(DataError, match="not contiguous"):
        open_store(prefix, "bytes", PILE_SPLIT)
    data.unlink()
    with pytest.raises(DataError, match="neither a token store nor"):
        open_store(prefix, "bytes", PILE_SPLIT)


def test_no_sequences(tmp_path: Path) -> None:
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 0, 1) + bytes(8)
    (tmp_path / "pair.idx").write_bytes(header)
    (tmp_path / "pair.bin").write_bytes(b"")
    with pytest.raises(DataError, match="holds no sequences"):
        open_store(tmp_path / "pair", "bytes", PILE_SPLIT)
