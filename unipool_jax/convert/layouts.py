"""Layouts of weight files, each defined once, by a table for both directions.

A tensor of a file consists of parts. A part is a pair of NumPy views of one shape, one of the file's tensor and one of
our arrays. Writing copies from ours to the file's, reading from the file's to ours, so the two cannot disagree.

`twin` is the state_dict of `benchmarks/pytorch_baseline`. `megatron` is the model state of the published PyTorch code
(a Megatron-LM fork: Transformer Engine layers with grouped expert matmuls, without model parallelism, as in its launch
scripts). That code registers a shared pool under every layer that uses it; a file has it under the first of them, and
equal copies under the others are accepted. Its `.pt` files hold pickled Python objects, which this package never opens.
Re-save one in the environment that wrote it, from a source you trust:

    import torch
    from safetensors.torch import save_file

    model = torch.load("iter_0060000/mp_rank_00/model_optim_rng.pt", map_location="cpu", weights_only=False)["model"]
    kept, seen = {}, set()
    for name, value in model.items():
        if isinstance(value, torch.Tensor) and not name.endswith("_extra_state") and value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            kept[name] = value.contiguous()
    save_file(kept, "model.safetensors")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import numpy as np

from unipool_jax.config.parsing import as_written
from unipool_jax.config.schema import Config
from unipool_jax.convert.errors import ConversionError
from unipool_jax.convert.requests import LayoutName
from unipool_jax.convert.weights import Weights

LAYOUT_NAMES: tuple[LayoutName, ...] = get_args(LayoutName)

View = Callable[[np.ndarray], np.ndarray]


class Part(NamedTuple):
    """Part of a file's tensor, and the same values in our arrays."""

    view: View
    """File's tensor -> the part, as a view."""
    ours: np.ndarray
    """The part as a view of our weights."""
    expert: tuple[int, int] | None = None
    """(pool, expert) that the part belongs to, if any."""


class FileTensor(NamedTuple):
    """One tensor of a file."""

    shape: tuple[int, ...]
    parts: list[Part]


class Layout(NamedTuple):
    """All tensors of a file for one model."""

    tensors: dict[str, FileTensor]
    copies: dict[str, str]
    """Optional tensors that repeat another one: name -> the tensor that it must equal."""


def make_layout(name: LayoutName, config: Config, weights: Weights) -> Layout:
    """The table of one layout; its parts are views of `weights`.

    Raises:
      ConversionError: the layout has no place for windows over a bank, for the routers of Switch Attention, or for
        norms of what blocks computed.
    """
    if name == "megatron" and config.attention.kind == "switch":
        raise ConversionError(f"layout={name}: has no place for the routers of attention.kind=switch")
    if name == "megatron" and config.model.norm != "pre":
        raise ConversionError(
            f"model.norm={config.model.norm}: the published code has no norms behind its blocks, and the megatron "
            "layout no place for them; use layout=twin"
        )
    if name == "megatron" and config.windows is not None:
        raise ConversionError(
            f"pool.starts={as_written(config.pool.starts)}: the published code trains no windows, and the megatron "
            "layout has no place for them; use layout=twin"
        )
    return {"twin": _twin, "megatron": _megatron}[name](config, weights)


def _unchanged(array: np.ndarray, shape: tuple[int, ...] | None = None) -> FileTensor:
    """A tensor that equals one of our arrays, reshaped to `shape` if given."""
    return FileTensor(array.shape if shape is None else shape, [Part(lambda t: t.reshape(array.shape), array)])


def _transposed(array: np.ndarray, expert: tuple[int, int] | None = None) -> FileTensor:
    """A tensor stored output-major, where ours is input-major."""
    return FileTensor(array.shape[::-1], [Part(lambda t: t.T, array, expert)])


def _gate_up(gate_DF: np.ndarray, up_DF: np.ndarray, expert: tuple[int, int] | None) -> FileTensor:
    """Gate rows, then up rows, output-major: `[2 F, D]`."""
    width, size = gate_DF.shape
    return FileTensor(
        (2 * size, width),
        [Part(lambda t: t[:size].T, gate_DF, expert), Part(lambda t: t[size:].T, up_DF, expert)],
    )


def _expert_columns(expert: int, columns: slice) -> View:
    """Columns of one expert's matrix in a stack of them, `[E, D, F]`."""
    return lambda t: t[expert, :, columns]


def _head_rows(shape: tuple[int, ...], index: int) -> View:
    """One head of every key-value group of a fused projection, input-major: `[D, groups, C]`."""
    return lambda t: t.reshape(shape)[:, index].transpose(2, 0, 1)


def _twin(config: Config, weights: Weights) -> Layout:
    params, model = weights.params, config.model
    bank = params["pools"]["bank"]
    query_end = model.num_heads * config.head_size
    key_end = query_end + model.num_kv_heads * config.head_size
    tensors = {
        "embedding.weight": _unchanged(params["embedding"]),
        "norm.weight": _unchanged(params["final_norm"]),
        "output.weight": _unchanged(params["output"]),
    }
    for layer in range(model.num_layers):
        own, name = _own(config, weights, layer), f"layers.{layer}"
        attention = own["attention"]
        tensors |= {
            f"{name}.attention_norm.weight": _unchanged(own["attention_norm"]),
            f"{name}.attention.qkv.weight": FileTensor(
                (2 * key_end - query_end, model.hidden_size),
                [
                    Part(lambda t: t[:query_end].T, attention["query"]),
                    Part(lambda t: t[query_end:key_end].T, attention["key"]),
                    Part(lambda t: t[key_end:].T, attention["value"]),
                ],
            ),
            f"{name}.attention.out.weight": _transposed(attention["output"]),
            f"{name}.ffn_norm.weight": _unchanged(own["ffn_norm"]),
        }
        if "switch" in attention:
            tensors[f"{name}.attention.switch"] = _unchanged(attention["switch"])
        for norm in ("attention_post_norm", "ffn_post_norm"):
            if norm in own:
                tensors[f"{name}.{norm}.weight"] = _unchanged(own[norm])
        if "mixture" not in own:
            tensors |= _block(config, weights, layer, f"{name}.ffn.gate_up.weight", f"{name}.ffn.down.weight")
            continue
        tensors |= _router(config, weights, layer, f"{name}.ffn.router", scale="scale", scale_shape=())
        if "depth" in own:
            tensors[f"{name}.depth"] = _unchanged(own["depth"])
        if "shared" in own:
            there = f"{name}.ffn.shared"
            fc1, fc2 = f"{there}.block.gate_up.weight", f"{there}.block.down.weight"
            tensors |= _shared(own["shared"], fc1, fc2, f"{there}.gate.weight")
    if config.moe.router == "none":
        return Layout(tensors, {})
    size = model.ffn_size
    for pool in range(config.pool.groups):
        gate_up, down = [], []
        for e in range(config.experts_per_pool):
            gate_up.append(Part(_expert_columns(e, slice(size)), bank["gate"][pool, e], (pool, e)))
            gate_up.append(Part(_expert_columns(e, slice(size, None)), bank["up"][pool, e], (pool, e)))
            down.append(Part(_expert_columns(e, slice(None)), bank["down"][pool, e], (pool, e)))
        shape = bank["gate"].shape[1:]
        tensors[f"experts.{pool}.gate_up"] = FileTensor((*shape[:2], 2 * size), gate_up)
        tensors[f"experts.{pool}.down"] = FileTensor(bank["down"].shape[1:], down)
    return Layout(tensors, {})


def _megatron(config: Config, weights: Weights) -> Layout:
    if config.moe.depth_vectors:
        raise ConversionError("moe.depth_vectors=true: the published PyTorch code has no such vectors; use layout=twin")
    params, model = weights.params, config.model
    bank = params["pools"]["bank"]
    width, kv_heads, size = model.hidden_size, model.num_kv_heads, config.head_size
    per_group = model.num_heads // kv_heads
    qkv_shape = (kv_heads, per_group + 2, size, width)
    tensors = {
        "embedding.word_embeddings.weight": _unchanged(params["embedding"]),
        "decoder.final_layernorm.weight": _unchanged(params["final_norm"]),
        "output_layer.weight": _unchanged(params["output"]),
    }
    copies: dict[str, str] = {}
    for layer in range(model.num_layers):
        own, name = _own(config, weights, layer), f"decoder.layers.{layer}"
        attention = own["attention"]
        # Rows run over key-value groups; each holds its queries, then its key, then its value.
        tensors |= {
            f"{name}.self_attention.linear_qkv.layer_norm_weight": _unchanged(own["attention_norm"]),
            f"{name}.self_attention.linear_qkv.weight": FileTensor(
                (kv_heads * (per_group + 2) * size, width),
                [
                    Part(
                        lambda t: t.reshape(qkv_shape)[:, :per_group].transpose(3, 0, 1, 2),
                        attention["query"].reshape(width, kv_heads, per_group, size),
                    ),
                    Part(_head_rows(qkv_shape, per_group), attention["key"].reshape(width, kv_heads, size)),
                    Part(_head_rows(qkv_shape, per_group + 1), attention["value"].reshape(width, kv_heads, size)),
                ],
            ),
            f"{name}.self_attention.linear_proj.weight": _transposed(attention["output"]),
        }
        if "mixture" not in own:
            tensors[f"{name}.mlp.linear_fc1.layer_norm_weight"] = _unchanged(own["ffn_norm"])
            fc1, fc2 = f"{name}.mlp.linear_fc1.weight", f"{name}.mlp.linear_fc2.weight"
            tensors |= _block(config, weights, layer, fc1, fc2)
            continue
        tensors[f"{name}.pre_mlp_layernorm.weight"] = _unchanged(own["ffn_norm"])
        tensors |= _router(config, weights, layer, f"{name}.mlp.router", scale="norm_scale", scale_shape=(1,))
        if "shared" in own:
            there = f"{name}.mlp.shared_experts"
            fc1, fc2 = f"{there}.linear_fc1.weight", f"{there}.linear_fc2.weight"
            tensors |= _shared(own["shared"], fc1, fc2, f"{there}.gate_weight")
        pool, inner = divmod(layer - config.moe.dense_layers, config.layers_per_pool)
        first = f"decoder.layers.{config.moe.dense_layers + pool * config.layers_per_pool}"
        for e in range(config.experts_per_pool):
            fc1, fc2 = f"mlp.experts.linear_fc1.weight{e}", f"mlp.experts.linear_fc2.weight{e}"
            if inner:
                copies |= {f"{name}.{fc1}": f"{first}.{fc1}", f"{name}.{fc2}": f"{first}.{fc2}"}
            else:
                tensors[f"{name}.{fc1}"] = _gate_up(bank["gate"][pool, e], bank["up"][pool, e], (pool, e))
                tensors[f"{name}.{fc2}"] = _transposed(bank["down"][pool, e], (pool, e))
    return Layout(tensors, copies)


def _own(config: Config, weights: Weights, layer: int) -> dict[str, Any]:
    """What layer `layer` has to itself, as views: without the experts of its pool."""
    first = config.moe.dense_layers
    if layer < first:
        return _taken(weights.params["dense"], (layer, ...))
    return _taken(weights.params["pools"]["layers"], (*divmod(layer - first, config.layers_per_pool), ...))


def _taken(tree: dict[str, Any], at: tuple[Any, ...]) -> dict[str, Any]:
    return {key: _taken(value, at) if isinstance(value, dict) else value[at] for key, value in tree.items()}


def _block(config: Config, weights: Weights, layer: int, gate_up: str, down: str) -> dict[str, FileTensor]:
    """The one block of a dense layer, which in the dense model is an expert, under the names of a file."""
    expert = None if config.moe.dense_layers else (layer, 0)
    block = weights.params["pools"]["bank"] if expert else weights.params["dense"]["block"]
    gate_DF, up_DF, down_FD = (block[key][expert or layer] for key in ("gate", "up", "down"))
    return {gate_up: _gate_up(gate_DF, up_DF, expert), down: _transposed(down_FD, expert)}


def _shared(shared: dict[str, Any], gate_up: str, down: str, sigmoid_gate: str) -> dict[str, FileTensor]:
    """The always-on experts of one layer under the names of a file."""
    block = shared["block"]
    tensors = {gate_up: _gate_up(block["gate"], block["up"], None), down: _transposed(block["down"])}
    if "sigmoid_gate" in shared:
        tensors[sigmoid_gate] = _unchanged(shared["sigmoid_gate"])
    return tensors


def _router(
    config: Config, weights: Weights, layer: int, name: str, *, scale: str, scale_shape: tuple[int, ...]
) -> dict[str, FileTensor]:
    """Router weight, and NormRouter's scale and the selection bias if the model has them, of one layer."""
    at = (*divmod(layer - config.moe.dense_layers, config.layers_per_pool), ...)
    mixture = weights.params["pools"]["layers"]["mixture"]
    # Rows past a narrow window have no expert.
    width = mixture["router"].shape[2] if config.widths is None else config.widths[layer - config.moe.dense_layers]
    tensors = {f"{name}.weight": _unchanged(mixture["router"][at][:width])}
    if "scale" in mixture:
        tensors[f"{name}.{scale}"] = _unchanged(mixture["scale"][at], scale_shape)
    if config.loss.balance == "expert_bias":
        tensors[f"{name}.expert_bias"] = _unchanged(weights.expert_bias_GNE[at])
    return tensors
