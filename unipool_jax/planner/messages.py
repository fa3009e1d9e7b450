"""Collectives of a step by their kind, and those that carry tokens to experts and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from unipool_jax.moe.dispatch import Transport
from unipool_jax.planner.attention import WIDE
from unipool_jax.planner.collectives import Collective
from unipool_jax.planner.nodes import BETWEEN, INSIDE


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
