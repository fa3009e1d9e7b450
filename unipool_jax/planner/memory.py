"""Memory of a step and of an evaluation on one device, counted. Of temporaries these are estimates."""

from __future__ import annotations

import dataclasses
import math

from unipool_jax.parallel.head import CHUNK
from unipool_jax.planner.attention import WIDE
from unipool_jax.planner.sizes import Sizes
from unipool_jax.training.step import shares_one_bank


def parameters(at: Sizes) -> tuple[float, float]:
    """Parameters per device outside and inside the pools, without vectors."""
    config, sizes, model = at.config, at.sizes, at.config.model
    experts = 1 if config.moe.router == "none" else sizes["expert"]
    matrices: float = 2 * model.vocab_size * model.hidden_size
    matrices += model.num_layers * (at.attention_weights + at.block_weights)
    rows = 0 if config.moe.router == "none" else config.router_width + config.moe.shared_expert_gate
    routers = config.mixture_layers * rows * model.hidden_size
    bank = 3 * model.hidden_size * model.ffn_size * config.total_experts
    split = sizes["fsdp"] * sizes["tensor"]
    return matrices / split + routers / sizes["fsdp"], bank / (split * experts)


def kept(at: Sizes) -> float:
    """Bytes of a layer that the backward pass finds as the forward pass left them."""
    model, tensor, hidden = at.config.model, at.sizes["tensor"], at.tokens * at.config.model.hidden_size * at.narrow
    if model.remat == "full":
        return hidden
    # Of attention the backward pass needs its input, queries, keys, values and result.
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * at.config.head_size / tensor
    scores = at.attention().kept_bytes
    if model.remat == "moe":
        return 8 * hidden + scores
    # Rows as they came and as they went, and two products of each; with several nodes the rows of all of them.
    rows, products = (
        (2 * at.received + at.sent - at.rows) * model.hidden_size,
        2 * at.received * model.ffn_size / tensor,
    )
    mixture = rows + (0 if model.remat == "experts" else products) + 2 * at.tokens * at.block_width / tensor
    attention = 0 if model.remat == "attention" else scores
    less = at.tokens * heads * at.narrow if model.remat == "attention" else 0
    if model.remat == "router" and at.config.moe.router != "none":
        # Five arrays of logits and scores, and masks: of what is positive, visible and chosen in each slot.
        less = at.tokens * at.config.experts_per_pool * (5 * WIDE + 2 + at.config.moe.top_k)
    return 10 * hidden + attention - less + mixture * at.narrow


def temporaries(at: Sizes) -> float:
    """Of a training step, to choose what to compile."""
    config, sizes, model, n = at.config, at.sizes, at.config.model, at.tokens
    shared = shares_one_bank(config)
    pools = 1 if shared else config.pool.groups
    outside, in_pools = parameters(at)
    # The gathered bank and its float32 gradient, not sharded over fsdp; of the gradients of per-layer pools one at a
    # time, plus the sharded ones of all.
    gathered = at.narrow * at.bank * (1 if at.regathers else pools)
    gathered += WIDE * at.bank * (pools if sizes["fsdp"] == 1 else 1)
    gradient = WIDE * (in_pools if not shared and sizes["fsdp"] > 1 else 0)
    dense = WIDE * outside * (1 if config.num_microbatches == 1 else 2)
    tables = 2 * at.narrow * model.vocab_size * model.hidden_size
    hidden = n * model.hidden_size * at.narrow
    scores = at.attention()
    mixture = at.received * (model.ffn_size / sizes["tensor"] * 8 + model.hidden_size * 4) * at.narrow
    mixture += 2 * (at.sent - at.rows) * model.hidden_size * at.narrow
    mixture += 8 * n * at.block_width / sizes["tensor"] * at.narrow
    working = 10 * hidden + scores.working_bytes + mixture
    # One device makes them in chunks.
    rows = n if math.prod(sizes.values()) > 1 else min(n, CHUNK)
    logits = rows * model.vocab_size / sizes["tensor"] * (WIDE + at.narrow)
    return gathered + gradient + dense + tables + model.num_layers * kept(at) + max(working, logits)


def evaluation(at: Sizes) -> float:
    """Gathered bfloat16 weights and the temporaries of one layer; receive buffers hold every row."""
    config, sizes, model = at.config, at.sizes, at.config.model
    batches = dataclasses.replace(config.train, microbatch_size=config.train.eval_batch_size)
    mesh = dataclasses.replace(config.mesh, capacity_factor=math.inf)
    at = dataclasses.replace(at, config=dataclasses.replace(config, train=batches, mesh=mesh))
    hidden = at.tokens * model.hidden_size * at.narrow
    rows = at.received * (model.ffn_size / sizes["tensor"] + 2 * model.hidden_size) * at.narrow
    rows += (2 * (at.sent - at.rows) * model.hidden_size + at.tokens * at.block_width / sizes["tensor"]) * at.narrow
    tables = 2 * at.narrow * model.vocab_size * model.hidden_size
    gathered = at.narrow * at.bank * (config.pool.groups if sizes["fsdp"] == 1 else 1)
    return gathered + tables + 6 * hidden + max(rows, at.attention().evaluation_bytes)
