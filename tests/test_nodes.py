"""The exchange in two stages, between nodes and inside them, against the flat one and NumPy: not a bit differs."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import oracles
from test_transport import all_to_all_by_definition
from unipool_jax.moe.dispatch import COMBINE, DISPATCH, Transport
from unipool_jax.planner.collectives import collectives, parse

DEVICES, EXPERTS, WIDTH, TOKENS, TOP_K = 8, 16, 4, 6, 3
ROOM = 32
"""Rows of a receive buffer; 18 are received on average."""
FACTORS = np.arange(EXPERTS) % 5 - 2
OVER_EXPERTS = PartitionSpec("expert")


class Exchanged(NamedTuple):
    """What all devices have after an exchange and its backward pass."""

    rows: np.ndarray
    sizes: np.ndarray
    received: np.ndarray
    output: np.ndarray
    hidden_gradient: np.ndarray
    gates_gradient: np.ndarray


@pytest.fixture(autouse=True)
def _ragged_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", all_to_all_by_definition)


@functools.cache
def program(name: Transport, nodes: int, dtype: str) -> Any:
    """The compiled exchange: `(hidden, experts, gates, gradient of the output) -> Exchanged`."""

    def exchanged(hidden: Any, experts: Any, gates: Any) -> tuple[Any, Any]:
        sent = DISPATCH[name](hidden, experts, EXPERTS, ROOM, nodes)
        own = jax.lax.axis_index("expert") * sent.sizes_E.size + jnp.arange(sent.sizes_E.size)
        # One factor of zero more, for the rows past the last group.
        factors = jnp.append(jnp.asarray(FACTORS, hidden.dtype)[own], jnp.zeros((1,), hidden.dtype))
        group_R = jnp.searchsorted(jnp.cumsum(sent.sizes_E), jnp.arange(ROOM), side="right")
        rows_RD = jnp.where(group_R[:, None] < sent.sizes_E.size, sent.rows_RD, 0)
        output = COMBINE[name](rows_RD * factors[group_R, None], sent, gates, hidden.dtype, nodes)
        return output, (rows_RD, sent.sizes_E, sent.received[None])

    def on_device(hidden: Any, experts: Any, gates: Any, gradient: Any) -> Exchanged:
        output, pullback, (rows, sizes, received) = jax.vjp(
            lambda hidden, gates: exchanged(hidden, experts, gates), hidden, gates, has_aux=True
        )
        return Exchanged(rows, sizes, received, output, *pullback(gradient))

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), ("expert",))
    sharded = jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=OVER_EXPERTS, out_specs=OVER_EXPERTS))
    rows = jax.ShapeDtypeStruct((DEVICES * TOKENS, WIDTH), jnp.dtype(dtype))
    pairs = (jax.ShapeDtypeStruct((DEVICES * TOKENS, TOP_K), kind) for kind in (jnp.int32, jnp.float32))
    return sharded.lower(rows, *pairs, rows).compile()


def operands(routing: str) -> tuple[np.ndarray, ...]:
    """Integers so small that no sum of them is rounded: hidden states, experts, gates, gradient of the output."""
    random, tokens = np.random.default_rng(0), DEVICES * TOKENS
    order = np.argsort(random.normal(size=(tokens, EXPERTS)), axis=1)
    # Experts 8 to 10 are those of two devices, whose buffers do not hold as many rows.
    experts = {"even": order[:, :TOP_K], "skewed": 8 + order[:, :TOP_K] % 3, "one": np.full((tokens, TOP_K), 5)}[
        routing
    ]
    hidden, gradient = (random.integers(-3, 4, (tokens, WIDTH)) for _ in range(2))
    return hidden, experts, random.integers(1, 3, (tokens, TOP_K)), gradient


def run(name: Transport, nodes: int, dtype: str, routing: str) -> Exchanged:
    hidden, experts, gates, gradient = operands(routing)
    wide, whole = jnp.dtype(dtype), (jnp.asarray(experts, jnp.int32), jnp.asarray(gates, jnp.float32))
    found = program(name, nodes, dtype)(jnp.asarray(hidden, wide), *whole, jnp.asarray(gradient, wide))
    return Exchanged(*(np.asarray(part, np.float64) for part in found))


@pytest.mark.parametrize("routing", ["even", "skewed", "one"])
@pytest.mark.parametrize(
    ("name", "nodes", "dtype"),
    [
        *(("all_gather", 2, "bfloat16"), ("all_gather", 4, "float32")),
        *(("ragged", 1, "bfloat16"), ("ragged", 2, "bfloat16"), ("ragged", 4, "float32")),
    ],
)
def test_two_stages_give_the_bits_of_one(name: Transport, nodes: int, dtype: str, routing: str) -> None:
    """Rows received and their order, those that are dropped, outputs and gradients."""
    found, flat = run(name, nodes, dtype, routing), run("all_gather", 1, dtype, routing)
    for field, ours, theirs in zip(Exchanged._fields, found, flat, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=field)


@pytest.mark.parametrize("routing", ["even", "skewed", "one"])
@pytest.mark.parametrize("name", ["all_gather", "ragged"])
def test_two_stages_are_the_exchange_by_hand(name: Transport, routing: str) -> None:
    hidden, experts, gates, gradient = operands(routing)
    found = run(name, 4, "float32", routing)
    arrived, outputs = oracles.exchange(hidden, experts, gates, FACTORS, DEVICES, ROOM)
    assert found.received.tolist() == [len(tokens) for tokens in arrived]
    assert bool(max(found.received) > ROOM) is (routing != "even")
    for device, tokens in enumerate(arrived):
        rows = found.rows[device * ROOM : (device + 1) * ROOM]
        np.testing.assert_array_equal(rows[: len(tokens)], hidden[tokens[:ROOM]])
        assert not rows[len(tokens) :].any()
    np.testing.assert_array_equal(found.output, outputs)
    # Outputs are linear in hidden states, and in gates.
    backward = oracles.exchange(gradient, experts, gates, FACTORS, DEVICES, ROOM)[1]
    np.testing.assert_array_equal(found.hidden_gradient, backward)
    for slot in range(TOP_K):
        only = np.where(np.arange(TOP_K) == slot, 1, 0) * np.ones_like(gates)
        alone = oracles.exchange(hidden, experts, only, FACTORS, DEVICES, ROOM)[1]
        np.testing.assert_array_equal(found.gates_gradient[:, slot], np.sum(alone * gradient, axis=1))


def test_a_token_crosses_to_each_other_node_once() -> None:
    """Bytes between nodes in the compiled program: tokens there and outputs back, and the gradients of both."""
    nodes = 4
    split = ("nodes", "inside"), (nodes, DEVICES // nodes)
    found = collectives(parse(program("all_gather", nodes, "float32").as_text()), *split)
    assert {item.axes for item in found} == {("nodes",), ("inside",)}
    crossing = [item for item in found if item.axes == ("nodes",) and f",{WIDTH}]" in str(item.shapes)]
    assert sum(item.total_bytes for item in crossing) == 4 * TOKENS * (nodes - 1) * WIDTH * 4
