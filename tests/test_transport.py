"""Transports over eight simulated devices against a NumPy mixture, also with badly skewed routing and small buffers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import oracles
from unipool_jax.kernels.group_plan import make_group_plan
from unipool_jax.kernels.grouped_ffn import Bank, grouped_ffn
from unipool_jax.kernels.implementations import Implementation
from unipool_jax.moe import dispatch
from unipool_jax.moe.capacity import capacity
from unipool_jax.moe.dispatch import COMBINE, DISPATCH, Transport

DEVICES, EXPERTS, WIDTH, HIDDEN, TOKENS = 4, 8, 6, 5, 12
OVER_EXPERTS = PartitionSpec("expert")


def all_to_all_by_definition(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: str,
    axis_index_groups: list[list[int]] | None = None,
) -> jax.Array:
    """`jax.lax.ragged_all_to_all`, which does not exist on CPU, from the words of its documentation.

    Slice i of a device goes to device `i // slices_per_device`, to the place `output_offsets[i]` there; what a device
    expects (`recv_sizes`) must be what it is sent, or nothing arrives at all.
    """
    devices = jax.lax.axis_size(axis_name) // len(axis_index_groups or [0])
    # Groups are of consecutive devices.
    me = jax.lax.axis_index(axis_name) % devices
    per_device = send_sizes.shape[0] // devices
    operands, starts, sizes, places = (
        jax.lax.all_gather(x, axis_name, axis_index_groups=axis_index_groups)
        for x in (operand, input_offsets, send_sizes, output_offsets)
    )
    row = jnp.arange(output.shape[0])
    agreed = jnp.all(jax.lax.dynamic_slice_in_dim(sizes, me * per_device, per_device, 1).reshape(-1) == recv_sizes)
    for source in range(devices):
        for part in range(per_device):
            i = me * per_device + part
            at = row - places[source, i]
            arrives = agreed & (at >= 0) & (at < sizes[source, i])
            rows = jnp.take(operands[source], starts[source, i] + at, axis=0, mode="clip")
            output = jnp.where(arrives.reshape(-1, *(1,) * (rows.ndim - 1)), rows, output)
    return output


@pytest.fixture(autouse=True)
def _ragged_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", all_to_all_by_definition)


def operands(top_k: int, experts: np.ndarray | None = None) -> tuple[jax.Array, jax.Array, jax.Array, Bank]:
    random = np.random.default_rng(0)
    tokens = DEVICES * TOKENS
    if experts is None:
        experts = np.argsort(random.normal(size=(tokens, EXPERTS)), axis=1)[:, :top_k]
    shapes = ((EXPERTS, WIDTH, HIDDEN), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH))
    return (
        jnp.asarray(random.normal(size=(tokens, WIDTH)), jnp.float32),
        jnp.asarray(experts, jnp.int32),
        jnp.asarray(random.uniform(0.5, 1.5, size=(tokens, top_k)), jnp.float32),
        Bank(*(jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes)),
    )


def by_hand(hidden: Any, experts: Any, gates: Any, bank: Bank) -> np.ndarray:
    """The mixture, token by token."""
    weights = {name: np.asarray(w, np.float64) for name, w in zip(("gate", "up", "down"), bank, strict=True)}
    output = np.zeros(hidden.shape)
    for token, x in enumerate(np.asarray(hidden, np.float64)):
        for expert, factor in zip(np.asarray(experts[token]), np.asarray(gates[token]), strict=True):
            output[token] += factor * oracles.expert(x, weights, expert)
    return output


def mixed(
    name: Transport, hidden: Any, experts: Any, gates: Any, bank: Bank, rows: int, implementation: Implementation
) -> tuple[jax.Array, jax.Array]:
    """Dispatch, products and combine on one device: its output and the rows it received."""
    sent = DISPATCH[name](hidden, experts, EXPERTS, rows, 1)
    plan = make_group_plan(sent.sizes_E, sent.rows_RD.shape[0], implementation=implementation)
    output = COMBINE[name](grouped_ffn(sent.rows_RD, bank, plan), sent, gates, hidden.dtype, 1)
    return output, sent.received[None]


def transported_by(name: Transport, factor: float = 4.0) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """A transport over four devices: `(hidden, experts, gates, bank) -> (output, rows received by each device)`."""

    def on_device(hidden: Any, experts: Any, gates: Any, bank: Bank) -> tuple[jax.Array, jax.Array]:
        return mixed(name, hidden, experts, gates, bank, capacity(experts.size, DEVICES, factor), "auto")

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), ("expert",))
    return jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=OVER_EXPERTS, out_specs=OVER_EXPERTS))


ROUTINGS = {
    "one expert": np.full((DEVICES * TOKENS, 1), 5),
    "one device": 6 + np.arange(DEVICES * TOKENS)[:, None] % 2,
    "own experts": np.repeat(np.arange(DEVICES) * 2, TOKENS)[:, None],
    "backwards": (EXPERTS - 1 - np.arange(DEVICES * TOKENS) % EXPERTS)[:, None],
}


@pytest.mark.parametrize("name", ["all_gather", "ragged"])
@pytest.mark.parametrize("routing", [1, 3, *ROUTINGS])
def test_values_and_gradients_are_those_of_one_device(name: Transport, routing: int | str) -> None:
    top_k = routing if isinstance(routing, int) else 1
    hidden, experts, gates, bank = operands(top_k, ROUTINGS.get(str(routing)))
    transported = transported_by(name)
    output, received = transported(hidden, experts, gates, bank)
    np.testing.assert_allclose(output, by_hand(hidden, experts, gates, bank), rtol=2e-4, atol=2e-4)
    owners = np.asarray(experts).reshape(-1) // (EXPERTS // DEVICES)
    assert received.tolist() == np.bincount(owners, minlength=DEVICES).tolist()

    weights = jnp.cos(jnp.arange(output.size, dtype=jnp.float32)).reshape(output.shape)

    def alone(hidden: jax.Array, gates: jax.Array, bank: Bank) -> jax.Array:
        return jnp.sum(mixed("local", hidden, experts, gates, bank, experts.size, "reference")[0] * weights)

    def together(hidden: jax.Array, gates: jax.Array, bank: Bank) -> jax.Array:
        return jnp.sum(transported(hidden, experts, gates, bank)[0] * weights)

    ours = jax.jit(jax.grad(together, (0, 1, 2)))(hidden, gates, bank)
    plain = jax.jit(jax.grad(alone, (0, 1, 2)))(hidden, gates, bank)
    for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["all_gather", "ragged"])
@pytest.mark.parametrize(
    ("routing", "device", "kept"),
    # Room for 16: the first tokens of the one expert; of two experts on a device, those of the first.
    [("one expert", 2, range(16)), ("one device", 3, range(0, 32, 2))],
)
def test_rows_beyond_the_buffer_are_counted_and_lost_whole(
    name: Transport, routing: str, device: int, kept: range
) -> None:
    """The last rows in the order of experts, then of tokens, are dropped: they come back as zeros."""
    hidden, experts, gates, bank = operands(1, ROUTINGS[routing])
    output, received = transported_by(name, factor=1.0)(hidden, experts, gates, bank)
    assert received.tolist() == [DEVICES * TOKENS * (other == device) for other in range(DEVICES)]
    expected = by_hand(hidden, experts, gates, bank)
    lost = np.all(np.asarray(output) == 0, axis=1)
    assert np.flatnonzero(~lost).tolist() == list(kept)
    np.testing.assert_allclose(output[~lost], expected[~lost], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("factor", [4.0, 1.0])
def test_rows_received_into_a_stack_are_those_received_apart(factor: float) -> None:
    """Bit for bit, forward and backward, also where rows are lost; other layers of the stack stay as they are."""
    hidden, experts, _, _ = operands(1, ROUTINGS["one device"])
    rows = capacity(TOKENS, DEVICES, factor)
    weights = jnp.cos(jnp.arange(rows * WIDTH, dtype=jnp.float32)).reshape(rows, WIDTH)
    stack = jnp.asarray(np.random.default_rng(1).normal(size=(3, rows, 2, WIDTH // 2)), jnp.float32)

    nothing = Bank(*(jnp.zeros(()) for _ in Bank._fields))

    def on_device(hidden: jax.Array, experts: jax.Array, place: jax.Array, stack: jax.Array) -> Any:
        def apart(hidden: jax.Array) -> tuple[jax.Array, Any]:
            sent = dispatch.dispatch_ragged(hidden, experts, EXPERTS, rows, 1)
            return jnp.sum(sent.rows_RD * weights), (sent.rows_RD, sent.sizes_E, sent.received)

        def into(hidden: jax.Array) -> tuple[jax.Array, Any]:
            sent, filled, _ = dispatch.dispatch_ragged_into(hidden, experts, EXPERTS, stack, place, nothing)
            loss = jnp.sum(sent.rows_RD.reshape(rows, WIDTH) * weights)
            return loss, (filled, sent.sizes_E, sent.received)

        (_, one), one_grad = jax.value_and_grad(apart, has_aux=True)(hidden)
        (_, other), other_grad = jax.value_and_grad(into, has_aux=True)(hidden)
        return jax.tree.map(lambda x: x[None], (one, one_grad, other, other_grad))

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), ("expert",))
    specs = (OVER_EXPERTS, OVER_EXPERTS, PartitionSpec(), PartitionSpec())
    run = jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=OVER_EXPERTS))
    (received, *counts), grad, (filled, *other_counts), other_grad = run(hidden, experts, jnp.int32(1), stack)
    np.testing.assert_array_equal(filled[:, [0, 2]], jnp.broadcast_to(stack[jnp.array([0, 2])], filled[:, :2].shape))
    for device, size in enumerate(np.sum(counts[0], axis=1)):
        kept = filled[device, 1].reshape(rows, WIDTH)
        np.testing.assert_array_equal(kept[:size], received[device, :size])
        np.testing.assert_array_equal(filled[device, 1, size:], stack[1, size:])
    assert np.sum(counts[0]) == min(rows, DEVICES * TOKENS)
    for mine, theirs in zip((*other_counts, other_grad), (*counts, grad), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert np.any(np.asarray(grad))


def test_capacity_is_the_mean_times_the_factor_but_never_more_than_all() -> None:
    assert capacity(100, 8, 1.0) == 112
    assert capacity(100, 8, 2.5) == 256
    assert capacity(100, 8, 8.0) == 800
    assert capacity(100, 2, math.inf) == 200
    assert capacity(100, 8, None) == capacity(100, 8, 3.0) == 304


def test_slices_agree_on_both_sides() -> None:
    """What one device sends another expects, slice by slice, and slices of a receiver do not overlap."""
    random = np.random.default_rng(1)
    sizes_PE = random.integers(0, 9, (DEVICES, EXPERTS))

    def on_device(sizes: jax.Array) -> tuple[Any, Any, jax.Array, jax.Array]:
        there, back, own, received = dispatch._slices(jax.lax.all_gather(sizes, "expert"), 40)
        return jax.tree.map(lambda x: x[None], (there, back, own, received))

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), ("expert",))
    split = jax.shard_map(on_device, mesh=mesh, in_specs=OVER_EXPERTS, out_specs=OVER_EXPERTS)
    there, back, own, received = jax.tree.map(np.asarray, jax.jit(split)(jnp.asarray(sizes_PE, jnp.int32)))
    per_device = EXPERTS // DEVICES
    for receiver in range(DEVICES):
        taken: list[tuple[int, int]] = []
        for expert in range(per_device):
            for sender in range(DEVICES):
                slot = receiver * per_device + expert
                size, place = there.send_sizes[sender, slot], there.output_offsets[sender, slot]
                assert there.recv_sizes[receiver, sender * per_device + expert] == size
                assert back.send_sizes[receiver, sender * per_device + expert] == size
                assert back.input_offsets[receiver, sender * per_device + expert] == place
                assert back.output_offsets[receiver, sender * per_device + expert] == there.input_offsets[sender, slot]
                taken += [(row, expert) for row in range(place, place + size)]
        assert [row for row, _ in taken] == list(range(len(taken)))
        assert np.bincount([expert for _, expert in taken], minlength=per_device).tolist() == own[receiver].tolist()
        wanted = sizes_PE[:, receiver * per_device : (receiver + 1) * per_device].sum()
        assert len(taken) == min(wanted, 40)
        assert received[receiver] == wanted
