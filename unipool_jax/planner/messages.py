"""Messages: the collectives of a step by their kind, counted."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from unipool_jax.moe.dispatch import Transport
from unipool_jax.planner.attention import WIDE
from unipool_jax.planner.collectives import Collective
from unipool_jax.planner.nodes import BETWEEN, INSIDE
from unipool_jax.planner.sizes import Sizes, forward_passes
from unipool_jax.training.step import counts_before_gradient, shares_one_bank


class Message(NamedTuple):
    """All collectives of one kind in a step."""

    name: str
    kind: str
    axes: tuple[str, ...]
    times: int
    sent_bytes: float
    """Bytes a device sends per execution, as in `collectives.Collective`."""

    @property
    def total_bytes(self) -> float:
        """Bytes that a device sends in a step."""
        return self.sent_bytes * self.times


class Tokens(NamedTuple):
    """What a device exchanges in one mixture layer, and how often in a step."""

    transport: Transport
    devices: int
    """That share experts."""
    nodes: int
    """That they are in, 1 for the flat exchange."""
    tokens: float
    top_k: int
    token_bytes: float
    output_bytes: float
    """Of a sum of outputs that is not rounded yet."""
    layers: int
    """Layers and micro-batches of a step."""
    forward: int
    """Forward passes over each, recomputation among them."""
    counting: int
    """Of them, those that only count tokens."""


def exchanged(at: Tokens) -> list[Message]:
    """Messages of the exchange; sums of outputs are not recomputed."""
    inside = at.devices // at.nodes
    axes = ("expert",) if at.nodes == 1 else (INSIDE,)
    found = [] if at.nodes == 1 else _crossing(at)
    if at.transport == "ragged":
        # Rows come from all nodes and go to one: as many as a device's own tokens have experts.
        sent = at.tokens * at.top_k * at.token_bytes * (inside - 1) / inside
        found.append(Message("tokens", "ragged-all-to-all", axes, 2 * at.layers * (at.forward + 1), sent))
    elif at.transport == "all_gather":
        # Every device gets all tokens, and the outputs of their experts are summed.
        tokens = at.tokens * at.nodes * (inside - 1)
        there, outputs = tokens * at.token_bytes, tokens * at.output_bytes
        found += [
            Message("tokens, gathered", "all-gather", axes, at.layers * at.forward, there),
            Message("outputs, summed", "reduce-scatter", axes, at.layers * (1 + at.counting), outputs),
            Message("outputs, gradient gathered", "all-gather", axes, at.layers, outputs),
            Message("tokens, gradient summed", "reduce-scatter", axes, at.layers, there),
        ]
    return found


def balanced(found: Collective, counted: Iterable[Message]) -> Collective:
    """A compiled collective with the bytes of balanced routing, where its shapes do not tell them.

    Inside nodes the buffer of rows to send has room for those of all nodes, and its shape is not what is sent.
    """
    if found.kind != "ragged-all-to-all" or found.axes != (INSIDE,):
        return found
    return found._replace(sent_bytes=next(one.sent_bytes for one in counted if one.kind == found.kind))


def _crossing(at: Tokens) -> list[Message]:
    """Between nodes: each token to each other node, and a sum of outputs from each; forward and backward."""
    sent, axes = at.tokens * at.token_bytes * (at.nodes - 1), (BETWEEN,)
    choices = at.tokens * at.top_k * WIDE * (at.nodes - 1)
    return [
        Message("tokens, gathered between nodes", "all-gather", axes, at.layers * at.forward, sent),
        Message("experts and gates, gathered between nodes", "all-gather", axes, 2 * at.layers * at.forward, choices),
        Message("outputs, summed between nodes", "all-to-all", axes, at.layers * (1 + at.counting), sent),
        Message("outputs, gradient gathered between nodes", "all-gather", axes, at.layers, sent),
        Message("tokens, gradient summed between nodes", "all-to-all", axes, at.layers, sent),
        Message("gates, gradient summed between nodes", "all-to-all", axes, at.layers, choices),
    ]


def messages(at: Sizes) -> list[Message]:
    """Those of a step, also of groups of one device, whose messages have no bytes."""
    config, sizes, model = at.config, at.sizes, at.config.model
    micro, layers, mixtures = config.num_microbatches, config.model.num_layers, config.mixture_layers
    counting = int(counts_before_gradient(config))
    forward, mixture = forward_passes(at)
    shared = shares_one_bank(config)
    fsdp = _other(sizes, "fsdp")
    replicas = ("data", "fsdp", "expert") if config.moe.router == "none" else ("data",)
    # Several pools are gathered in the forward pass of every micro-batch, and again in the backward pass unless kept.
    gathers = 1 if shared else config.pool.groups * micro * (1 + counting + (model.remat != "none"))
    sums = 1 if shared else config.pool.groups * micro
    dense = at.attention_weights / sizes["tensor"] * at.narrow
    rows = 0 if config.moe.router == "none" else config.experts_per_pool
    routers = rows * model.hidden_size * at.narrow * mixtures / layers
    blocks = at.block_weights / sizes["tensor"] * at.narrow
    head = model.vocab_size * model.hidden_size * at.narrow
    tables = head + head / sizes["tensor"]
    again = 2 if model.remat == "full" or (model.remat != "none" and config.pool.groups > 1) else 1
    found = [
        Message("experts, gathered", "all-gather", ("fsdp",), gathers, at.narrow * at.bank * fsdp),
        Message("experts, gradient scattered", "reduce-scatter", ("fsdp",), sums, WIDE * at.bank * fsdp),
        Message(
            "experts, gradient summed",
            "all-reduce",
            replicas,
            sums,
            2 * WIDE * at.bank / sizes["fsdp"] * _other(sizes, *replicas),
        ),
        Message(
            "layers, gathered", "all-gather", ("fsdp",), layers * micro * (again + counting), (dense + routers) * fsdp
        ),
        *_reduced("layers", layers * micro, layers * micro, (dense + routers) / at.narrow, sizes),
        # A part of the mixture block, which remat=moe computes again.
        Message(
            "blocks of every token, gathered",
            "all-gather",
            ("fsdp",),
            layers * micro * (max(again, 1 + (model.remat == "moe")) + counting),
            blocks * fsdp,
        ),
        *_reduced("blocks of every token", layers * micro, layers * micro, blocks / at.narrow, sizes),
        Message("tables, gathered", "all-gather", ("fsdp",), micro, tables * fsdp),
        # The compiler hoists reductions of gradients that accumulate over micro-batches out of their loop, unless
        # another loop lies in between.
        *_reduced("tables", micro, 1, tables / at.narrow, sizes),
    ]
    if model.remat == "router" and again == 1:
        found.append(Message("routers, gathered again", "all-gather", ("fsdp",), layers * micro, routers * fsdp))
    if model.remat == "attention" and again == 1:
        found.append(Message("attention, gathered again", "all-gather", ("fsdp",), layers * micro, dense * fsdp))
    if config.moe.router != "none":
        found += exchanged(_tokens(at, mixture, counting))
    if sizes["tensor"] > 1:
        found += _tensor_sums(at, forward, mixture)
    return found


def _tokens(at: Sizes, forward: int, counting: int) -> Tokens:
    """What a device exchanges with so many passes over mixtures, and of them so many that only count tokens."""
    config, narrow = at.config, at.narrow
    width, layers = config.model.hidden_size, config.mixture_layers * config.num_microbatches
    # Sums of several outputs are rounded after the exchange.
    outputs = narrow if config.moe.top_k == 1 else WIDE
    nodes, devices = config.mesh.expert_nodes, at.sizes["expert"]
    return Tokens(
        at.transport, devices, nodes, at.tokens, config.moe.top_k, width * narrow, width * outputs, layers, forward,
        counting,
    )  # fmt: skip


def _tensor_sums(at: Sizes, forward: int, mixture: int) -> list[Message]:
    """Sums of outputs over a tensor group, and of gradients of inputs, with so many passes over layers and mixtures."""
    config, layers, mixtures = at.config, at.config.model.num_layers, at.config.mixture_layers
    micro, values = config.num_microbatches, 2 * config.model.hidden_size * at.narrow * _other(at.sizes, "tensor")
    always_on = mixtures if config.moe.shared_experts else 0
    times, found = (2 * layers + always_on) * (forward + 1), []
    if config.norms_experts:
        # A norm needs the sums: of each expert of a token, and again where a mixture is recomputed.
        times += always_on * (mixture - forward) - mixtures * (forward + 1)
        again = mixtures * (mixture + 1) * micro
        found.append(Message("outputs of experts, summed", "all-reduce", ("tensor",), again, values * at.received))
    return [*found, Message("tensor sums", "all-reduce", ("tensor",), times * micro, values * at.tokens)]


def _reduced(name: str, scattered: int, summed: int, weights: float, sizes: dict[str, int]) -> list[Message]:
    """Messages of a float32 matrix gradient: reduce-scattered over fsdp, the shards all-reduced over other devices."""
    part, others = WIDE * weights / sizes["fsdp"], ("data", "expert")
    return [
        Message(
            f"{name}, gradient scattered",
            "reduce-scatter",
            ("fsdp",),
            scattered,
            WIDE * weights * _other(sizes, "fsdp"),
        ),
        Message(f"{name}, gradient summed", "all-reduce", others, summed, 2 * part * _other(sizes, *others)),
    ]


def _other(sizes: dict[str, int], *axes: str) -> float:
    """(n - 1) / n for the n devices of a group: the fraction that are other devices."""
    devices = math.prod(sizes[axis] for axis in axes)
    return (devices - 1) / devices
