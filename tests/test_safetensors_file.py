"""Safetensors files whose headers or metadata do not mean what they say are refused before memory is taken for them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from test_convert import random_weights
from tiny import tiny_config
from unipool_jax.config.errors import UserError
from unipool_jax.config.schema import to_mapping
from unipool_jax.convert.errors import ConversionError
from unipool_jax.convert.files import read_description, read_file, write_file
from unipool_jax.convert.safetensors_file import StoredTensor, read_header

CONFIG = tiny_config("dense")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.safetensors"
    write_file(path, "twin", CONFIG, random_weights(CONFIG))
    return path


def with_metadata(path: Path, exported: Path, **metadata: str) -> Path:
    save_file(load_file(exported), path, metadata)
    return path


def raw(path: Path, header: Any, data: bytes = bytes(16)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(shape: list[Any], first: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, end]}


def test_a_header_is_read(tmp_path: Path) -> None:
    save_file({"a": np.zeros((2, 3), np.float32), "b": np.zeros(0, np.int8)}, tmp_path / "m", {"k": "v"})
    header = read_header(tmp_path / "m")
    assert header.tensors == {"a": StoredTensor("F32", (2, 3)), "b": StoredTensor("I8", (0,))}
    assert header.metadata == {"k": "v"}


A, B = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}', '{"dtype":"F32","shape":[2],"data_offsets":[8,16]}'


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        ([], "not a JSON object"),
        ({"__metadata__": {"a": 1}}, "metadata must be texts"),
        ({"__metadata__": [1]}, "metadata must be texts"),
        (f'{{"a":{A},"a":{B}}}'.encode(), "'a' is there twice"),
        ({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}, "tensor b starts at byte 0"),
        ({"a": entry([2], 0, 8), "b": entry([1], 12, 16)}, "tensor b starts at byte 12"),
        ({"a": entry([2], 0, 8)}, "take 8 bytes, and it holds 16"),
        ({"a": entry([8], 0, 32)}, "take 32 bytes, and it holds 16"),
        ({"a": entry([1 << 62, 1 << 62], 0, 16)}, "needs"),
        ({"a": entry([-4], 0, 16)}, "whole numbers"),
        ({"a": entry([4.0], 0, 16)}, "whole numbers"),
        ({"a": entry([4], 16, 0)}, "needs 16 bytes and has -16"),
        ({"a": entry([4], 0, 16, "F99")}, "known dtype"),
        ({"a": entry([4], 0, 16, [])}, "known dtype"),
        ({"a": 3}, "known dtype"),
        ({"a": {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}}, "known dtype"),
    ],
)
def test_headers_that_do_not_fit_their_file_are_refused(tmp_path: Path, header: Any, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        read_header(raw(tmp_path / "m", header))


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 8, (1 << 40).to_bytes(8, "little") + bytes(99)])
def test_lengths_of_headers_are_compared_with_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(ConversionError, match="does not fit into"):
        read_header(tmp_path / "m")


@pytest.mark.parametrize("text", ["", "3", "[]", "{", "[" * 100_000, '{"model": 3}', '{"colour": "red"}'])
def test_metadata_of_another_kind_is_refused(tmp_path: Path, exported: Path, text: str) -> None:
    with pytest.raises(UserError, match="metadata"):
        read_description(with_metadata(tmp_path / "m", exported, config=text))
    for experts in (text, '{"a.b": "c"}') if text != "{" else ():
        with pytest.raises(UserError, match=r"metadata|experts"):
            read_file(with_metadata(tmp_path / "m", exported, experts=experts), "twin", CONFIG)


def test_a_configuration_of_terabytes_takes_no_memory(exported: Path) -> None:
    large = dataclasses.replace(
        CONFIG, model=dataclasses.replace(CONFIG.model, num_layers=1024, hidden_size=65536, ffn_size=1 << 18)
    )
    large = dataclasses.replace(large, pool=dataclasses.replace(large.pool, groups=1024))
    with pytest.raises(ConversionError, match="model of its configuration has"):
        read_file(exported, "twin", large)


@pytest.mark.parametrize(
    "change",
    [{"rope_base": 7.0}, {"norm_epsilon": 1e-3}, {"num_heads": 2, "num_kv_heads": 1}],
    ids=["positions", "norm", "heads"],
)
def test_settings_that_contradict_the_file_are_refused(tmp_path: Path, exported: Path, change: dict[str, Any]) -> None:
    """The shapes are the same, the function is not."""
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **change))
    noted = with_metadata(tmp_path / "m", exported, config=json.dumps(to_mapping(CONFIG)))
    read_file(noted, "twin", CONFIG)
    with pytest.raises(ConversionError, match=rf"another model.*\n.*model\.{next(iter(change))}="):
        read_file(noted, "twin", other)


@pytest.mark.parametrize("needle", ["embedding", "config"])
def test_a_bit_outside_of_the_experts_is_noticed(tmp_path: Path, exported: Path, needle: str) -> None:
    changed = bytearray(exported.read_bytes())
    if needle == "config":
        changed[changed.index(b"rope_base") + 14] ^= 1
    else:
        weights = random_weights(CONFIG).params["embedding"]
        changed[changed.index(weights[5].tobytes()) + 6] ^= 1
    (tmp_path / "m").write_bytes(changed)
    config = read_description(tmp_path / "m")[1]
    assert config is not None
    with pytest.raises(ConversionError, match="are not those that were written"):
        read_file(tmp_path / "m", "twin", config)
    without = with_metadata(tmp_path / "n", tmp_path / "m")
    assert read_file(without, "twin", CONFIG)
