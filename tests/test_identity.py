"""Which text a run read: fingerprints of what stores hold, wherever it lies, and what is refused by them."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runner import overrides, write_text
from store_fixtures import SHARD, build
from test_megatron import documents, write_pair
from unipool_jax.config.compose import compose_config, load_config
from unipool_jax.data import hashing, store_format
from unipool_jax.data.corpus import open_corpus
from unipool_jax.data.errors import DataError
from unipool_jax.data.identity import text_differences, text_identity
from unipool_jax.data.pipeline import EvalWindows
from unipool_jax.data.store_reader import TokenStore
from unipool_jax.data.token_store import open_store
from unipool_jax.training import loop
from unipool_jax.training.checkpoint import Checkpoints
from unipool_jax.training.run_folder import RunError

pytestmark = pytest.mark.usefixtures("steps_are_shared")


def text_file(path: Path, word: str = "hello") -> Path:
    path.write_text("".join(json.dumps({"text": f"{word} world {i}, " * 40}) + "\n" for i in range(60)))
    return path


def test_a_fingerprint_is_of_content_not_of_files(tmp_path: Path) -> None:
    """The same documents, compressed or not, in shards of another size or from a Megatron pair: one content."""
    text = text_file(tmp_path / "a.jsonl")
    subprocess.run(["gzip", "-k", str(text)], check=True)
    first = build([text], tmp_path / "one", shard_tokens=1 << 24)
    again = build([Path(f"{text}.gz")], tmp_path / "two", shard_tokens=1 << 24)
    assert first.fingerprint() == again.fingerprint()
    tokens = [first.read(*first.document_offsets[i : i + 2].tolist()).tolist() for i in range(first.num_documents)]
    pair = open_store(write_pair(tmp_path / "pair", tokens, "int32"), "bytes", first.split)
    assert pair.content == first.content
    other = build([text_file(tmp_path / "b.jsonl", "jello")], tmp_path / "three", shard_tokens=1 << 24)
    assert other.num_tokens == first.num_tokens
    assert other.fingerprint() != first.fingerprint()
    # The same tokens in other documents.
    joined = open_store(
        write_pair(tmp_path / "joined", [list(itertools.chain(*tokens))], "int32"), "bytes", first.split
    )
    assert joined.content != first.content


def test_windows_know_their_text(tmp_path: Path) -> None:
    store = build([text_file(tmp_path / "a.jsonl")], tmp_path / "a", split=(8, 1, 1))
    other = build([text_file(tmp_path / "b.jsonl", "jello")], tmp_path / "b", split=(8, 1, 1))
    first = EvalWindows(store, "valid", 16, 4).fingerprint()
    assert EvalWindows(open_store(store.path), "valid", 16, 4).fingerprint() == first
    changed = [EvalWindows(other, "valid", 16, 4), EvalWindows(store, "test", 16, 4), EvalWindows(store, "valid", 8, 8)]
    assert len({first, EvalWindows(store, "valid", 16, 5).fingerprint(), *(w.fingerprint() for w in changed)}) == 5


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("small", [True, False])
def test_a_shard_edited_in_place_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bool, restored: bool
) -> None:
    """Two tokens of a shard change places: same size, right checksums, the same manifest; the times restored or not."""
    random = np.random.default_rng(0)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "".join(map(chr, random.integers(32, 96, 3 * SHARD)))}))
    store = build([tmp_path / "a.jsonl"], tmp_path / "a")
    monkeypatch.setattr(hashing, "SMALL", hashing.SMALL if small else 0)
    assert open_store(store.path).fingerprint() == store.fingerprint()
    shard = store.path / "tokens" / "c" / "1"
    before, tokens = shard.stat(), store.read(SHARD, 2 * SHARD)
    array = store_format.open_array(store.path, store.dtype, SHARD, write=True)
    for place in np.flatnonzero(np.diff(tokens)):
        tokens[[place, place + 1]] = tokens[[place + 1, place]]
        array[SHARD : 2 * SHARD].write(tokens.astype(store.dtype)).result()
        if shard.stat().st_size == before.st_size:
            break
    if restored:
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    np.testing.assert_array_equal(open_store(store.path).read(SHARD, 2 * SHARD), tokens)
    with pytest.raises(DataError, match=r"tokens/c/1: changed after its store was built; .* delete its folder"):
        open_store(store.path).fingerprint()


def test_document_offsets_are_always_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "SMALL", 0)
    store = build([text_file(tmp_path / "a.jsonl")], tmp_path / "a")
    path = store.path / "document_offsets.npy"
    content = bytearray(path.read_bytes())
    content[-16] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"document_offsets\.npy: sha256 differs"):
        open_store(store.path).fingerprint()


def test_a_large_store_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest of our own says what is in it; a pair is read once, and again after any change."""
    monkeypatch.setattr(hashing, "SMALL", 0)
    monkeypatch.setattr(hashing, "SETTLED", -1.0)
    own = build([text_file(tmp_path / "a.jsonl")], tmp_path / "own")
    prefix = write_pair(tmp_path / "pair", documents(), "uint16")
    read: list[Path] = []
    hash_block = TokenStore._hash_block

    def remember(store: TokenStore, start: int, stop: int) -> str:
        read.append(store.path)
        return hash_block(store, start, stop)

    monkeypatch.setattr(TokenStore, "_hash_block", remember)

    def fingerprint(path: Path) -> str:
        read.clear()
        store = open_store(path, "bytes", None if path == own.path else (8, 1, 1))
        store.memory = tmp_path / "memory"
        return store.fingerprint()

    fingerprint(own.path)
    assert read == []
    first = fingerprint(prefix)
    assert read == [prefix]
    assert fingerprint(prefix) == first
    assert read == []
    binary = Path(f"{prefix}.bin")
    content = binary.read_bytes()
    times = binary.stat()
    binary.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    os.utime(binary, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint(prefix) != first
    binary.write_bytes(content)
    assert fingerprint(prefix) == first
    for damaged in (tmp_path / "memory").iterdir():
        damaged.write_text("[")
    assert fingerprint(prefix) == first


def test_a_store_of_an_earlier_version_has_the_same_fingerprint(tmp_path: Path) -> None:
    store = build([text_file(tmp_path / "a.jsonl")], tmp_path / "a")
    path = store.path / "manifest.json"
    manifest = json.loads(path.read_text())
    for shard in manifest["shards"]:
        del shard["tokens_sha256"]
    del manifest[store_format.MANIFEST_HASH]
    path.write_text(json.dumps(manifest))
    assert open_store(store.path).fingerprint() == store.fingerprint()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a project with a finished run of four steps, and its command line, in relative paths."""
    folder = tmp_path_factory.mktemp("project")
    write_text(folder / "text.jsonl")
    words = [
        *(word for word in overrides(folder, "train.steps=4", "train.checkpoint_every=2") if "[" not in word),
        *("run.dir=runs", "data.cache_dir=cache", "data.files=[text.jsonl]", "data.split=[8,1,1]"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert loop.train(compose_config(words)) == 0
    return folder, words


@pytest.fixture
def project(trained: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """A copy of the project, as if it had been killed after step 2, as the working folder."""
    shutil.copytree(trained[0], tmp_path / "project")
    run = tmp_path / "project" / "runs" / "tiny"
    shutil.rmtree(run / "checkpoints" / "4")
    (run / "summary.json").unlink()
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project", trained[1]


def meta_of(run: Path) -> dict[str, Any]:
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.meta(checkpoints.find(None))


def other_text(path: Path) -> None:
    """As many documents, tokens and bytes as before."""
    path.write_bytes(path.read_bytes().replace(b"router", b"retuor"))


def test_everything_a_run_writes_knows_its_text(trained: tuple[Path, list[str]]) -> None:
    folder, _ = trained
    run = folder / "runs" / "tiny"
    summary = json.loads((run / "summary.json").read_text())
    text = json.loads((run / "text.json").read_text())
    assert meta_of(run)["text"] == summary["text"] == text
    (entry,) = text["texts"]
    assert (entry["name"], entry["documents"]) == ("text.jsonl", 40)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    valid = [line["text"] for line in lines if line["kind"] == "valid"]
    assert valid == [summary["results"]["valid"]["text"]]
    assert summary["results"]["test"]["text"] not in valid


def test_other_text_under_the_same_path_is_refused(project: tuple[Path, list[str]]) -> None:
    folder, words = project
    before = (folder / "runs" / "tiny" / "config.yaml").read_bytes()
    old = meta_of(folder / "runs" / "tiny")["text"]["texts"][0]["fingerprint"][:12]
    other_text(folder / "text.jsonl")
    with pytest.raises(RunError) as error:
        loop.train(compose_config(words))
    message = str(error.value)
    assert f"  - text.jsonl: fingerprint {old} (40 documents, " in message
    assert message.count("fingerprint") == 2
    assert "under another run.name" in message
    # Nothing of the run was changed by the attempt.
    with pytest.raises(RunError, match="another text"):
        loop.train(compose_config([*words, "train.log_every=7"]))
    assert (folder / "runs" / "tiny" / "config.yaml").read_bytes() == before


def test_text_that_moved_is_the_same_text(project: tuple[Path, list[str]]) -> None:
    folder, words = project
    (folder / "text.jsonl").rename(folder / "moved.jsonl")
    shutil.rmtree(folder / "cache")
    assert loop.train(compose_config([*words, "data.files=[moved.jsonl]"])) == 0
    assert load_config(folder / "runs" / "tiny" / "config.yaml").data.files == ("moved.jsonl",)
    # A finished run reads no text, so its paths are all that can be compared.
    write_text(folder / "third.jsonl")
    with pytest.raises(RunError, match=r"data\.files"):
        loop.train(compose_config([*words, "data.files=[third.jsonl]"]))


def test_a_run_of_an_earlier_version_is_told_once(
    project: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, words = project
    (folder / "runs" / "tiny" / "text.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(
            "unipool_jax.training.initial.known_text",
            lambda run, meta: None if not (run / "text.json").exists() else 1 / 0,
        )
        assert loop.train(compose_config(words)) == 0
    assert "did not record which text it read" in capsys.readouterr().out
    assert json.loads((folder / "runs" / "tiny" / "text.json").read_text())["texts"][0]["name"] == "text.jsonl"


def test_differences_of_identities_are_named(tmp_path: Path) -> None:
    def identity(*words: str) -> dict[str, Any]:
        config = compose_config(["data=text", "data.tokenizer=bytes", f"data.cache_dir={tmp_path}/cache", *words])
        return text_identity(open_corpus(config.data, 257))

    a, b = text_file(tmp_path / "a.jsonl"), text_file(tmp_path / "b.jsonl", "jello")
    first = identity(f"data.files=[{a}]")
    assert text_differences(first, identity(f"data.files=[{shutil.copy(a, tmp_path / 'c.jsonl')}]")) == []
    (line,) = text_differences(first, identity(f"data.files=[{b}]"))
    assert line.startswith(f"{b}: fingerprint ")
    assert f"there (of {a})" in line
    assert len(text_differences(first, identity(f"data.files=[{a}]", "data.split=[1,1,1]"))) == 1
    stores = [build([path], tmp_path / path.stem) for path in (a, b)]
    both = identity("data.source=stores", "data.files=[]", f"data.stores=[{stores[0].path},{stores[1].path}]")
    assert text_differences(first, both)[0] == "1 texts there, 2 now"
