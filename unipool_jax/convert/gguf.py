"""Reads LLaMA-style models from GGUF files as dense models. Dequantization needs the `gguf` package."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from unipool_jax.config.schema import Config, DataConfig, LossConfig, ModelConfig, MoEConfig, PoolConfig
from unipool_jax.convert.errors import ConversionError
from unipool_jax.convert.layouts import FileTensor, Layout, Part, View
from unipool_jax.convert.weights import Weights, empty_weights


def read_gguf(path: Path) -> tuple[Config, Weights, bytes]:
    """The configuration, weights (float32) and tokenizer.json of a GGUF file of the `llama` architecture.

    Raises:
      ConversionError: the `gguf` package is missing; an unsupported architecture or tokenizer; or tensors that are
        missing, unknown or of another shape.
    """
    try:
        import gguf
    except ImportError as error:
        raise ConversionError("reading GGUF files needs the gguf package: pip install gguf") from error
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: not a readable GGUF file: {error}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        raise ConversionError(f"{path}: architecture {fields.get('general.architecture')}; only llama is supported")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise ConversionError(f"{path}: missing tensors ['token_embd.weight']")
    try:
        config = _config(fields, vocab_size=int(tensors["token_embd.weight"].shape[1]))
        tokenizer = _tokenizer(fields)
    except KeyError as error:
        raise ConversionError(f"{path}: field {error} is missing, which describes the model") from error
    weights = empty_weights(config)
    layout = _layout(config, weights)
    tied = "output.weight" not in tensors
    wanted = layout.tensors.keys() - ({"output.weight"} if tied else set())
    if wanted != tensors.keys():
        missing, surplus = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
        raise ConversionError(f"{path}: missing tensors {missing}, unknown tensors {surplus}")
    for name, entry in layout.tensors.items():
        tensor = tensors["token_embd.weight" if tied and name == "output.weight" else name]
        array = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        if array.shape != entry.shape:
            raise ConversionError(f"{path}: {name} has shape {list(array.shape)}, expected {list(entry.shape)}")
        for part in entry.parts:
            part.ours[...] = part.view(array)
    return config, weights, tokenizer


def _config(fields: dict[str, Any], vocab_size: int) -> Config:
    layers = int(fields["llama.block_count"])
    heads = int(fields["llama.attention.head_count"])
    head_size = int(fields["llama.embedding_length"]) // heads
    if fields.get("llama.rope.scaling.type", "none") != "none" or (
        int(fields.get("llama.rope.dimension_count", head_size)) != head_size
    ):
        raise ConversionError("llama.rope: scaled positions and partial rotary embeddings are not supported")
    model = ModelConfig(
        num_layers=layers,
        hidden_size=int(fields["llama.embedding_length"]),
        num_heads=heads,
        num_kv_heads=int(fields.get("llama.attention.head_count_kv", heads)),
        ffn_size=int(fields["llama.feed_forward_length"]),
        vocab_size=vocab_size,
        rope_base=float(fields.get("llama.rope.freq_base", 10_000.0)),
        # Stored as float32; its shortest decimal is the intended value.
        norm_epsilon=float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
    )
    return Config(
        model=model,
        moe=MoEConfig(router="none", experts_per_layer=1),
        pool=PoolConfig(groups=layers),
        loss=LossConfig(balance="none"),
        data=dataclasses.replace(DataConfig(), sequence_length=min(1024, int(fields["llama.context_length"]))),
        scale_name="gguf",
        method_name="dense",
    )


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


def _tokenizer(fields: dict[str, Any]) -> bytes:
    """The tokenizer.json with the vocabulary and merges of the file."""
    kind, before = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or before not in _SPLITS:
        raise ConversionError(f"tokenizer {kind} ({before}): only gpt2 with one of {', '.join(_SPLITS)} is supported")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    control = 3
    special = [
        {"id": index, "content": token, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == control
    ]
    bytelevel = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    document = {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*_SPLITS[before], bytelevel]},
        "decoder": bytelevel,
        "model": {
            "type": "BPE",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": fields["tokenizer.ggml.merges"],
        },
    }
    return json.dumps(document).encode()
