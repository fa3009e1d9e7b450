"""Reads LLaMA-style models from GGUF files as dense models. Dequantization needs the `gguf` package."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from unipool_jax.config.rules import validate
from unipool_jax.config.schema import Config, ConfigError, DataConfig, LossConfig, ModelConfig, MoEConfig, PoolConfig
from unipool_jax.convert import gguf_rope
from unipool_jax.convert.errors import ConversionError
from unipool_jax.convert.gguf_file import BlockSize, StoredTensor, read_gguf_file
from unipool_jax.convert.gguf_keys import key_problems
from unipool_jax.convert.layouts import FileTensor, Layout, Part, View
from unipool_jax.convert.weights import Weights, check_count, empty_weights, unallocated_weights


def read_gguf(path: Path) -> tuple[Config, Weights, bytes]:
    """The configuration, weights (float32) and tokenizer.json of a GGUF file of the `llama` architecture.

    Everything is compared with what the file holds before memory is taken for it.

    Raises:
      ConversionError: the `gguf` package is missing; a damaged header; an unsupported architecture or tokenizer; fields
        that may change what the model computes; or tensors that are missing, unknown or of another shape.
    """
    try:
        import gguf
    except ImportError as error:
        raise ConversionError("reading GGUF files needs the gguf package: pip install gguf") from error
    plain = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
    readable = {int(kind): BlockSize(*gguf.GGML_QUANT_SIZES[kind]) for kind in (*gguf.quants._type_traits, *plain)}
    fields, tensors = read_gguf_file(path, readable)
    if fields.get("general.architecture") != "llama":
        raise ConversionError(f"{path}: architecture {fields.get('general.architecture')}; only llama is supported")
    if "token_embd.weight" not in tensors:
        raise ConversionError(f"{path}: missing tensors ['token_embd.weight']")
    config = _config(path, fields, vocab_size=tensors["token_embd.weight"].shape[0])
    tokenizer = _tokenizer(path, fields, config.model.vocab_size)
    tied = "output.weight" not in tensors
    _check_tensors(path, config, tensors, tied)
    weights = empty_weights(config)
    for name, entry in _layout(config, weights).tensors.items():
        tensor = tensors["token_embd.weight" if tied and name == "output.weight" else name]
        kind = gguf.GGMLQuantizationType(tensor.kind)
        array = np.asarray(gguf.quants.dequantize(tensor.data, kind), np.float32).reshape(tensor.shape)
        for part in entry.parts:
            part.ours[...] = part.view(array)
    return config, weights, tokenizer


def _check_tensors(path: Path, config: Config, tensors: dict[str, StoredTensor], tied: bool) -> None:
    """Raises ConversionError unless the file has exactly the tensors of the model, in their shapes."""
    expected = unallocated_weights(config)
    check_count(expected, sum(math.prod(tensor.shape) for tensor in tensors.values()), str(path))
    layout = _layout(config, expected).tensors
    wanted = layout.keys() - ({"output.weight"} if tied else set())
    if wanted != tensors.keys():
        missing, surplus = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
        raise ConversionError(f"{path}: missing tensors {missing[:12]}, unknown tensors {surplus[:12]}")
    for name in wanted:
        if tensors[name].shape != layout[name].shape:
            raise ConversionError(
                f"{path}: {name} has shape {list(tensors[name].shape)}, expected {list(layout[name].shape)}"
            )


def _number(path: Path, fields: dict[str, Any], name: str, default: float | None = None) -> float:
    """The field `name`, a positive number."""
    value = fields.get(name, default)
    if value is None:
        raise ConversionError(f"{path}: field {name!r} is missing, which describes the model")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        shown = f"a list of {len(value)}" if isinstance(value, list) else repr(value)
        raise ConversionError(f"{path}: field {name} is {shown}; one positive number is supported")
    return value


def _config(path: Path, fields: dict[str, Any], vocab_size: int) -> Config:
    number = functools.partial(_number, path, fields)
    layers, heads = int(number("llama.block_count")), int(number("llama.attention.head_count"))
    width = int(number("llama.embedding_length"))
    sequence_length = min(1024, int(number("llama.context_length")))
    problems = key_problems(
        fields, head_size=max(width // heads, 1), vocab_size=vocab_size, sequence_length=sequence_length
    )
    if problems:
        raise ConversionError(
            "\n".join([f"{path}: its fields describe another model:", *map("  - {}".format, problems)])
        )
    model = ModelConfig(
        num_layers=layers,
        hidden_size=width,
        num_heads=heads,
        num_kv_heads=int(number("llama.attention.head_count_kv", heads)),
        ffn_size=int(number("llama.feed_forward_length")),
        vocab_size=vocab_size,
        rope_base=float(number("llama.rope.freq_base", 10_000.0)),
        **gguf_rope.scaling(fields, number),
        # Stored as float32; its shortest decimal is the intended value.
        norm_epsilon=float(str(np.float32(number("llama.attention.layer_norm_rms_epsilon")))),
    )
    config = Config(
        model=model,
        moe=MoEConfig(router="none", experts_per_layer=1),
        pool=PoolConfig(groups=layers),
        loss=LossConfig(balance="none"),
        data=dataclasses.replace(DataConfig(), sequence_length=sequence_length, tokenizer=str(path)),
        scale_name="gguf",
        method_name="dense",
    )
    try:
        validate(config)
    except ConfigError as error:
        raise ConversionError(f"{path}: its fields describe a model that is not supported:\n{error}") from error
    return config


def _layout(config: Config, weights: Weights) -> Layout:
    params, model = weights.params, config.model
    layers, bank = params["pools"]["layers"], params["pools"]["bank"]

    def unchanged(array: np.ndarray) -> FileTensor:
        return FileTensor(array.shape, [Part(lambda t: t, array)])

    def linear(array: np.ndarray) -> FileTensor:
        return FileTensor(array.shape[::-1], [Part(lambda t: t.T, array)])

    def rotary(array: np.ndarray, heads: int) -> FileTensor:
        """GGUF rotates channel 2 i with 2 i + 1, we rotate i with i + C/2: the same pairs in another order."""
        width, half = array.shape[0], config.head_size // 2
        view: View = lambda t: t.reshape(heads, half, 2, width).transpose(3, 0, 2, 1)  # noqa: E731
        return FileTensor(array.shape[::-1], [Part(view, array.reshape(width, heads, 2, half))])

    tensors = {
        "token_embd.weight": unchanged(params["embedding"]),
        "output_norm.weight": unchanged(params["final_norm"]),
        "output.weight": unchanged(params["output"]),
    }
    for layer in range(model.num_layers):
        name, attention = f"blk.{layer}", {key: value[layer, 0] for key, value in layers["attention"].items()}
        tensors |= {
            f"{name}.attn_norm.weight": unchanged(layers["attention_norm"][layer, 0]),
            f"{name}.attn_q.weight": rotary(attention["query"], model.num_heads),
            f"{name}.attn_k.weight": rotary(attention["key"], model.num_kv_heads),
            f"{name}.attn_v.weight": linear(attention["value"]),
            f"{name}.attn_output.weight": linear(attention["output"]),
            f"{name}.ffn_norm.weight": unchanged(layers["ffn_norm"][layer, 0]),
            f"{name}.ffn_gate.weight": linear(bank["gate"][layer, 0]),
            f"{name}.ffn_up.weight": linear(bank["up"][layer, 0]),
            f"{name}.ffn_down.weight": linear(bank["down"][layer, 0]),
        }
    return Layout(tensors, {})


_SPLITS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [],
    "smollm": [{"type": "Digits", "individual_digits": True}],
}
"""Pre-tokenizers before the byte-level one, by `tokenizer.ggml.pre`."""


_NORMAL, _CONTROL, _USER = 1, 3, 4
_TOKEN_TYPES = range(1, 7)


def _tokenizer(path: Path, fields: dict[str, Any], rows: int) -> bytes:
    """The tokenizer.json with the vocabulary and merges of the file.

    Control tokens are never found in texts. User-defined tokens always are, before anything else.
    """
    kind, before = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or before not in _SPLITS:
        raise ConversionError(
            f"{path}: tokenizer {kind} ({before}): only gpt2 with one of {', '.join(_SPLITS)} is supported"
        )
    tokens, merges = (_list(path, fields, f"tokenizer.ggml.{name}", str) for name in ("tokens", "merges"))
    types = _list(path, fields, "tokenizer.ggml.token_type", int, [_NORMAL] * len(tokens))
    if len(tokens) > rows:
        raise ConversionError(f"{path}: {len(tokens)} tokens, but the embedding has {rows} rows")
    if len(types) != len(tokens) or not set(types) <= set(_TOKEN_TYPES):
        raise ConversionError(f"{path}: tokenizer.ggml.token_type: expected {len(tokens)} numbers from 1 to 6")
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocab[token] != index)
        raise ConversionError(f"{path}: tokenizer.ggml.tokens: {twice!r} is there twice")
    added = [
        {"id": index, "content": token, "special": kind == _CONTROL}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER)
    ]
    bytelevel = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    document = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*_SPLITS[before], bytelevel]},
        "decoder": bytelevel,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    return json.dumps(document).encode()


def _list(path: Path, fields: dict[str, Any], name: str, kind: type, default: Any = None) -> list[Any]:
    """The field `name`, a list of `kind`."""
    value = fields.get(name, default)
    if value is None:
        raise ConversionError(f"{path}: field {name!r} is missing, which describes the tokenizer")
    if not isinstance(value, list) or not all(type(entry) is kind for entry in value):
        raise ConversionError(f"{path}: field {name}: expected a list of {'texts' if kind is str else 'whole numbers'}")
    return value
