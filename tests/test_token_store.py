"""Token stores: contents, refusal of anything unfinished or unsuitable, and the cache."""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from store_fixtures import SHARD, Corpus, build, make_corpus, tree
from unipool_jax.data import store_format, token_store
from unipool_jax.data.errors import DataError
from unipool_jax.data.token_store import cached_store, demo_corpus_path, open_store
from unipool_jax.data.tokenizer import load_tokenizer
from unipool_jax.data.train_tokenizer import train_tokenizer


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return make_corpus(tmp_path)


def test_store_holds_the_documents(corpus: Corpus, tmp_path: Path) -> None:
    files, texts = corpus
    store = build(files, tmp_path / "out", split=(8, 1, 1))
    expected = np.concatenate([[*text.encode(), 256] for text in texts])
    np.testing.assert_array_equal(store.read(0, store.num_tokens), expected)
    assert store.read(5, 9).dtype == np.int32
    assert store.dtype == np.uint16
    np.testing.assert_array_equal(store.document_offsets, np.cumsum([0] + [len(t) + 1 for t in texts]))
    assert store.document_offsets.dtype == np.int64
    assert (store.num_documents, store.text_bytes) == (len(texts), sum(map(len, texts)))
    assert [entry["documents"] for entry in store.manifest["inputs"]] == [6, 4, 1]
    assert [entry["empty_documents"] for entry in store.manifest["inputs"]] == [4, 2, 1]
    assert store.manifest["inputs"][0]["bytes"] == files[0].stat().st_size
    assert len(store.manifest["shards"]) == -(-store.num_tokens // SHARD)
    assert store.split_documents("train").tolist() == list(range(9))
    for d, text in enumerate(texts):
        assert store.tokenizer.decode(store.read(*store.document_offsets[d : d + 2])) == text + "<|endoftext|>"
    store.verify()


def test_random_reads(corpus: Corpus, tmp_path: Path) -> None:
    store = build(corpus[0], tmp_path / "out")
    everything = store.read(0, store.num_tokens)
    ends = np.sort(np.random.RandomState(1).randint(0, store.num_tokens + 1, (200, 2)), axis=1)
    for (start, stop), piece in zip(ends, store.read_many(*ends.T), strict=True):
        np.testing.assert_array_equal(piece, everything[start:stop])
    for start, stop in ((-1, 3), (4, 3), (0, store.num_tokens + 1)):
        with pytest.raises(DataError, match="are out of range"):
            store.read(start, stop)


def test_gpt2_store_appends_end_of_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "Hello world"}\n{"text": ""}\n{"text": "<|endoftext|>"}\n')
    store = build([tmp_path / "a.jsonl"], tmp_path / "out", "gpt2")
    tokens = store.read(0, store.num_tokens)
    assert tokens[:3].tolist() == [15496, 995, 50256]
    assert (tokens == 50256).sum() == 2
    assert store.dtype == np.uint16


def test_large_vocabularies_are_stored_as_uint32() -> None:
    assert store_format.token_dtype(65_536) == np.uint16
    assert store_format.token_dtype(65_537) == np.uint32


def test_uint32_store_and_shards_of_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Byte 0 is id 0, the fill value of the array: such chunks must be stored all the same.
    monkeypatch.setattr(store_format, "token_dtype", lambda vocab_size: np.dtype(np.uint32))
    (tmp_path / "a.txt").write_bytes(bytes(3 * SHARD))
    store = build([tmp_path / "a.txt"], tmp_path / "out")
    assert store.dtype == np.uint32
    assert store.read(0, store.num_tokens).tolist() == [0] * (3 * SHARD) + [256]
    store.verify()


def test_workers_and_shards_do_not_change_the_tokens(corpus: Corpus, tmp_path: Path) -> None:
    one, two = build(corpus[0], tmp_path / "one"), build(corpus[0], tmp_path / "two", workers=2)
    assert tree(one.path) == tree(two.path)
    large = build(corpus[0], tmp_path / "large", shard_tokens=SHARD * 1024)
    assert len(large.manifest["shards"]) == 1
    np.testing.assert_array_equal(large.read(0, large.num_tokens), one.read(0, one.num_tokens))


def test_demo_store_is_always_the_same(tmp_path: Path) -> None:
    store = build([demo_corpus_path()], tmp_path / "out", "demo", workers=2, shard_tokens=SHARD * 32)
    assert (store.num_documents, store.num_tokens, store.text_bytes) == (233, 2_208_704, 10_761_158)
    tokens = store.read(0, store.num_tokens)
    token_bytes = store.tokenizer.token_bytes
    assert token_bytes is not None
    assert token_bytes[tokens].sum() == store.text_bytes
    assert hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()[:16] == "50e42ecf8746e3f0"


def test_own_tokenizer_travels_with_the_store(corpus: Corpus, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(train_tokenizer(corpus[1], 300))
    store = build(corpus[0], tmp_path / "out", str(path))
    path.unlink()
    again = open_store(tmp_path / "out")
    assert again.tokenizer.decode(again.read(0, store.num_tokens)).split("<|endoftext|>")[:-1] == corpus[1]
    (tmp_path / "out" / "tokenizer.json").write_bytes(train_tokenizer(corpus[1][:2], 300))
    with pytest.raises(DataError, match="built with tokenizer"):
        open_store(tmp_path / "out").tokenizer.decode([1])
    (tmp_path / "out" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json: missing"):
        open_store(tmp_path / "out").tokenizer.decode([1])


# --------------------------------------------------------------------------- refusals


def test_existing_output(corpus: Corpus, tmp_path: Path) -> None:
    files, _ = corpus
    first = build(files, tmp_path / "out")
    stamp = (first.path / "manifest.json").stat().st_mtime_ns
    assert build(files, tmp_path / "out").manifest == first.manifest  # the same: opened
    assert (first.path / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match="was not built from these inputs"):
        build(files[:1], tmp_path / "out")
    with pytest.raises(DataError, match="built with tokenizer 'bytes'"):
        build(files, tmp_path / "out", "demo")
    with pytest.raises(DataError, match="built with split"):
        build(files, tmp_path / "out", split=(1, 1, 1))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("keep me")
    with pytest.raises(DataError, match="choose another folder"):
        build(files, tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "keep me"
    (tmp_path / "empty").mkdir()
    assert build(files, tmp_path / "empty").num_tokens == first.num_tokens


def test_no_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": ""}\n')
    with pytest.raises(DataError, match="every document is empty"):
        build([tmp_path / "a.jsonl"], tmp_path / "out")
    with pytest.raises(DataError, match="no input files"):
        build([], tmp_path / "out")
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
        build([tmp_path / "gone.jsonl"], tmp_path / "out")
    with pytest.raises(DataError, match="workers=0"):
        build([tmp_path / "a.jsonl"], tmp_path / "out", workers=0)
    with pytest.raises(DataError, match="cannot be a store"):
        build([tmp_path / "a.jsonl"], "/")
    assert not (tmp_path / "out").exists()


def test_opening_something_else(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a token store nor"):
        open_store(tmp_path / "nothing")
    for path in (tmp_path, "/", "."):
        with pytest.raises(DataError, match="neither a token store nor"):
            open_store(path)


def test_output_named_relative_to_the_working_folder(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    store = build(corpus[0], "sub/../../out/")
    assert store.path == tmp_path / "out"
    with pytest.raises(DataError, match="choose another folder"):
        build(corpus[0], "..")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert build(corpus[0], tmp_path / "link").path == tmp_path / "elsewhere"
    assert open_store(tmp_path / "link").num_tokens == store.num_tokens


def test_wrong_tokenizer_and_split_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    build(corpus[0], tmp_path / "out")
    assert open_store(tmp_path / "out", "bytes", (969, 30, 1), "contiguous").eod == 256
    with pytest.raises(DataError, match=r"built with tokenizer 'bytes'.*not 'gpt2'"):
        open_store(tmp_path / "out", "gpt2")
    with pytest.raises(DataError, match=r"built with split=.*, not split="):
        open_store(tmp_path / "out", split=(1, 1, 1))
    with pytest.raises(DataError, match=r"built with split=.*, not split="):
        open_store(tmp_path / "out", split_order="interleaved")


def _edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    manifest["manifest_sha256"] = store_format.manifest_sha256(manifest)
    path.write_text(json.dumps(manifest))


def _flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "tokens/c/1").unlink(), r"tokens/c/1: missing, expected \d+ bytes"),
        (lambda f: os.truncate(f / "tokens/c/1", 100), "tokens/c/1: 100 bytes, expected"),
        (lambda f: (f / "document_offsets.npy").unlink(), r"document_offsets\.npy: missing"),
        (lambda f: (f / "tokens/zarr.json").unlink(), r"tokens/zarr\.json: cannot be read"),
        (lambda f: (f / "tokens/zarr.json").write_text("{"), r"tokens/zarr\.json: sha256 differs"),
        (lambda f: _flip(f / "document_offsets.npy", 140), r"document_offsets\.npy: sha256 differs"),
        (lambda f: _flip(f / "manifest.json", 300), r"manifest\.json: (differs from its own hash|not JSON)"),
        (lambda f: _edit_manifest(f, tokens="many"), r"manifest\.json: incomplete"),
        (lambda f: (f / "manifest.json").write_text("{"), r"manifest\.json: not JSON"),
        (lambda f: (f / "manifest.json").write_text("[]"), r"manifest\.json: expected a JSON object"),
        (lambda f: _edit_manifest(f, version=99), "version 99; expected"),
        (lambda f: _edit_manifest(f, format="other"), "format 'other'"),
        (lambda f: _edit_manifest(f, tokens=5), "manifest and contents disagree"),
        (lambda f: _edit_manifest(f, dtype="uint32"), "damaged store"),
        (lambda f: _edit_manifest(f, tokenizer={}), r"manifest\.json: incomplete"),
        (lambda f: _edit_manifest(f, tokens="5"), "tokens is '5', expected a whole number"),
        (lambda f: _edit_manifest(f, split=["a", 1, 2]), r"manifest\.json: incomplete"),
        (lambda f: _edit_manifest(f, dtype="no type"), r"manifest\.json: incomplete"),
        (lambda f: _edit_manifest(f, shards=[1, 2]), r"manifest\.json: incomplete"),
        (lambda f: _edit_manifest(f, shard_tokens=0), r"manifest\.json: incomplete"),
        (
            lambda f: _edit_manifest(f, tokenizer={"name": "a", "sha256": "b", "vocab_size": 1 << 62, "eod": 0}),
            "4611686018427387904 ids",
        ),
    ],
)
def test_damaged_stores_are_refused_when_opened(
    corpus: Corpus, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    store = build(corpus[0], tmp_path / "out")
    damage(store.path)
    with pytest.raises(DataError, match=message):
        open_store(store.path)


def test_flipped_byte_is_found_by_reading_and_by_verify(corpus: Corpus, tmp_path: Path) -> None:
    store = build(corpus[0], tmp_path / "out")
    path = store_format.shard_path(store.path, 2)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    reopened = open_store(store.path)  # same size: not seen when opened
    with pytest.raises(DataError, match="tokens/c/2: sha256 differs"):
        reopened.verify()
    with pytest.raises(DataError, match="damaged store"):
        reopened.read(0, reopened.num_tokens)


# --------------------------------------------------------------------------- cache


def test_finished_store_is_opened_without_writing(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cached_store(corpus[0], tmp_path / "cache", "bytes")

    def read_only(path: Path) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(store_format, "exclusive_lock", read_only)
    assert cached_store(corpus[0], tmp_path / "cache", "bytes").path == first.path
    with pytest.raises(DataError, match="cannot be written"):
        cached_store(corpus[0], tmp_path / "cache", "demo")


def test_cached_store_depends_on_content_only(corpus: Corpus, tmp_path: Path) -> None:
    files, _ = corpus
    cache = tmp_path / "cache"
    first = cached_store(files, cache, "bytes", (8, 1, 1), "interleaved")
    moved = [Path(shutil.copy(path, tmp_path / f"copy{path.name}")) for path in files]
    assert cached_store(moved, cache, "bytes", (8, 1, 1), "interleaved").path == first.path
    others = [
        cached_store(files, cache, "bytes", (8, 1, 1)),
        cached_store(files, cache, "demo", (8, 1, 1), "interleaved"),
        cached_store(files, cache, "bytes", (9, 1, 1), "interleaved"),
        cached_store(files[::-1], cache, "bytes", (8, 1, 1), "interleaved"),
    ]
    assert len({first.path, *(store.path for store in others)}) == 5
    assert len(list(cache.iterdir())) == 5
    with pytest.raises(DataError, match=r"gone\.txt: cannot open"):
        cached_store([tmp_path / "gone.txt"], cache, "bytes")


def test_cache_is_built_once_by_processes_that_ask_together(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # flock works between open files, so threads with their own descriptors stand for processes.
    files, _ = corpus
    encoded, barrier, real = [], threading.Barrier(4), token_store._encode

    def counting(*args: Any) -> Any:
        encoded.append(args)
        return real(*args)

    monkeypatch.setattr(token_store, "_encode", counting)

    def ask(_: int) -> np.ndarray:
        barrier.wait()
        return cached_store(files, tmp_path / "cache", "bytes").read(0, 100)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(ask, range(4)))
    assert len(encoded) == len(files)
    assert all((result == results[0]).all() for result in results)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_lock_admits_one_holder(tmp_path: Path) -> None:
    inside, most = [0], [0]

    def hold(_: int) -> None:
        for _ in range(20):
            with store_format.exclusive_lock(tmp_path / "lock"):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hold, range(8)))
    assert most == [1]
    assert not (tmp_path / "lock").exists()


def test_lock_on_a_removed_file_admits_nobody(tmp_path: Path) -> None:
    # One holder leaves (and removes the file) while a second waits and a third makes a new file.
    path, entered = tmp_path / "lock", threading.Event()

    def wait_and_enter() -> None:
        with store_format.exclusive_lock(path):
            entered.set()

    with path.open("w") as old:
        fcntl.flock(old, fcntl.LOCK_EX)
        waiter = threading.Thread(target=wait_and_enter)
        waiter.start()
        time.sleep(0.2)  # until it waits for the old file
        path.unlink()
        new = path.open("w")
        fcntl.flock(new, fcntl.LOCK_EX)
    assert not entered.wait(0.3)
    new.close()
    assert entered.wait(10)
    waiter.join()


def test_processes_that_start_together_share_one_store(corpus: Corpus, tmp_path: Path) -> None:
    code = (
        "import sys; from unipool_jax.data.token_store import cached_store\n"
        "store = cached_store(sys.argv[2:], sys.argv[1], 'bytes'); store.verify(); print(store.num_tokens)"
    )
    command: list[str | Path] = [sys.executable, "-c", code, tmp_path / "cache", *corpus[0]]
    environment = os.environ | {"PYTHONPATH": str(Path(token_store.__file__).parents[2])}
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = [process.communicate(timeout=60)[0] for process in running]
    assert printed == [f"{sum(len(text) + 1 for text in corpus[1])}\n"] * 3
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_demo_corpus_splits_span_the_centuries(tmp_path: Path) -> None:
    with_years = []
    store = cached_store([demo_corpus_path()], tmp_path, "bytes", (18, 1, 1), "interleaved")
    for name in ("train", "valid", "test"):
        documents = store.split_documents(name)
        with_years.append((len(documents), documents.min(), documents.max()))
    assert with_years == [(211, 0, 232), (11, 18, 218), (11, 19, 219)]
    assert load_tokenizer("bytes").sha256 == store.tokenizer_sha256
