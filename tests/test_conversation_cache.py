"""Packed conversations on disk: read where nothing changed, made anew where anything did."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from unipool_jax.data import conversation_cache
from unipool_jax.data.conversation_cache import cached_conversations
from unipool_jax.data.conversation_store import Packed, pack_conversations
from unipool_jax.data.errors import DataError
from unipool_jax.data.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    pairs = [{"prompt": f"{a}+1=", "response": str(a + 1)} for a in range(20)] + [{"prompt": "x" * 30, "response": "y"}]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return path


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The templates with which conversations were tokenized, not read from the cache."""
    names = list[str]()

    def pack(files: list[Path], template: str, *rest: object) -> Packed:
        names.append(template)
        return pack_conversations(files, template, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(conversation_cache, "pack_conversations", pack)
    return names


def same(first: Packed, second: Packed) -> bool:
    pairs = [(np.asarray(one), np.asarray(other)) for one, other in zip(first, second, strict=True)]
    return all(np.array_equal(one, other) and one.dtype == other.dtype for one, other in pairs)


def test_the_second_time_they_are_read(chats: Path, made: list[str], tmp_path: Path) -> None:
    fresh = pack_conversations([chats], "prompt", 21, BYTES)
    assert fresh.left_out == 1
    moved = shutil.copy(chats, tmp_path / "moved.jsonl")
    for path in (chats, chats, moved):
        found = cached_conversations([Path(path)], "prompt", 21, BYTES, tmp_path / "cache")
        assert same(found, fresh)
    assert made == ["prompt"]
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_file()]) == 1


@pytest.mark.parametrize("change", ["text", "template", "size", "damage", "cut"])
def test_what_changed_is_made_anew(chats: Path, made: list[str], tmp_path: Path, change: str) -> None:
    cache, template = tmp_path / "cache", tmp_path / "t.jinja"
    template.write_text("{{ messages[-1].content }}?")
    cached_conversations([chats], str(template), 21, BYTES, cache)
    (file,) = cache.glob("*.npz")
    content = file.read_bytes()
    changes: dict[str, Callable[[], object]] = {
        "text": lambda: chats.write_text(chats.read_text().replace("7+1", "8+1")),
        "template": lambda: template.write_text("{{ messages[-1].content }}!"),
        "size": lambda: None,
        "damage": lambda: file.write_bytes(content.replace(b"1" + b"\0" * 3, b"2" + b"\0" * 3)),
        "cut": lambda: file.write_bytes(content[:300]),
    }
    changes[change]()
    size = 22 if change == "size" else 21
    found = cached_conversations([chats], str(template), size, BYTES, cache)
    assert same(found, pack_conversations([chats], str(template), size, BYTES))
    assert len(made) == 2
    assert len(list(cache.glob("*.npz"))) == (1 if change in ("damage", "cut") else 2)


def test_a_cache_that_cannot_be_written(chats: Path, made: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for _ in range(2):
        found = cached_conversations([chats], "prompt", 21, BYTES, tmp_path / "file" / "cache")
        assert same(found, pack_conversations([chats], "prompt", 21, BYTES))
    assert len(made) == 2


def test_errors_are_those_of_reading(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: cannot open"):
        cached_conversations([tmp_path / "none.jsonl"], "prompt", 21, BYTES, tmp_path / "cache")
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "x" * 30, "response": "y"}) + os.linesep)
    with pytest.raises(DataError, match=r"every response is longer, with its prompt, than data\.sequence_length=21"):
        cached_conversations([tmp_path / "long.jsonl"], "prompt", 21, BYTES, tmp_path / "cache")
    with pytest.raises(DataError, match=r"data\.template=alpaca: none of"):
        cached_conversations([tmp_path / "long.jsonl"], "alpaca", 21, BYTES, tmp_path / "cache")
