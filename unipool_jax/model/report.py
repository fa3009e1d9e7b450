"""Parameter report (method M1.9), from the real parameter tree by shape evaluation: nothing is allocated."""

from __future__ import annotations

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unipool_jax.config.schema import Config
from unipool_jax.model.transformer import LayerInputs, initial_parameters
from unipool_jax.moe.mixture import Selection

_ALWAYS_ACTIVE = ("embeddings", "attention", "norms", "shared_experts", "dense_blocks", "depth_vectors")
"""Kinds of parameters that every token uses."""


def count_parameters(config: Config) -> dict[str, int]:
    """Parameters by kind, their `total`, and the `active` ones: those a token uses, routers and scales left out."""
    params = jax.eval_shape(lambda: _initial_parameters(config))
    counts = dict.fromkeys(("embeddings", "attention", "experts", "routers", "norms", "scales"), 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        kind = _kind([str(entry.key) for entry in path])
        counts[kind] = counts.get(kind, 0) + math.prod(leaf.shape)
    if config.widths is not None:
        # Rows beyond a narrow window exist only because layers are stacked.
        counts["routers"] = sum(config.widths) * config.model.hidden_size
    per_expert = counts["experts"] // config.total_experts
    total = sum(counts.values())
    active_experts = per_expert * config.moe.top_k * config.mixture_layers
    active = active_experts + sum(counts.get(kind, 0) for kind in _ALWAYS_ACTIVE)
    return counts | {"total": total, "active": active}


def _initial_parameters(config: Config) -> Any:
    bias_GNE = jnp.zeros((config.pool.groups, config.layers_per_pool, config.experts_per_pool), jnp.float32)
    tokens_BS = jnp.zeros((1, config.data.sequence_length), jnp.int32)
    return initial_parameters(config, jax.random.key(0), tokens_BS, LayerInputs(Selection(bias_GNE)))


def _kind(path: list[str]) -> str:
    if path[0] in ("embedding", "output"):
        return "embeddings"
    if "bank" in path:
        return "experts"
    if "shared" in path:
        return "shared_experts"
    if "block" in path:
        return "dense_blocks"
    if path[-2:-1] == ["attention"]:
        return "attention"
    return {"router": "routers", "scale": "scales", "depth": "depth_vectors"}.get(path[-1], "norms")


def _windows(config: Config) -> list[str]:
    """A line for each layer: `#` for the experts that it sees, in at most 96 columns."""
    visible_LM = config.visible
    if visible_LM is None:
        return []
    columns = np.array_split(visible_LM, min(96, visible_LM.shape[1]), axis=1)
    rows = ["".join("#" if part[row].any() else "." for part in columns) for row in range(len(visible_LM))]
    first = config.moe.dense_layers
    starts = config.pool.starts if isinstance(config.pool.starts, str) else "given"
    return [
        f"  experts that each layer sees ({starts})",
        *(f"  {layer:>3}  {row}" for layer, row in enumerate(rows, first)),
    ]


def describe(config: Config) -> str:
    """The report as text; its last line is JSON `{"parameters": {...}, "experts": {...}}`."""
    counts = count_parameters(config)
    experts: dict[str, Any] = {
        "total": config.total_experts,
        "pools": config.pool.groups,
        "per_pool": config.experts_per_pool,
        "top_k": config.moe.top_k,
    }
    if config.windows is not None:
        experts |= {"starts": list(config.windows.starts), "widths": list(config.windows.widths)}
        exposure = config.windows.exposure()
        experts["layers_per_expert"] = [int(exposure.min()), float(exposure.mean()), int(exposure.max())]
    model, dense = config.model, config.moe.dense_layers
    first = f", the first {dense} dense of width {config.dense_width}" if dense else ""
    lines = [
        f"{config.scale_name} {config.method_name}: {model.num_layers} layers x {model.hidden_size}{first}, "
        f"{experts['total']} experts of width {model.ffn_size} in {experts['pools']} pool(s) of {experts['per_pool']}, "
        f"router {config.moe.router}, top-{config.moe.top_k}, vocabulary {model.vocab_size:,}",
        *_windows(config),
        *(f"  {kind:<12}{count:>16,}" for kind, count in counts.items()),
        json.dumps({"parameters": counts, "experts": experts}),
    ]
    return "\n".join(lines)
