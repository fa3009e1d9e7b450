"""The exchange in two stages, between nodes and inside them, against the flat one and NumPy: not a bit differs."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import oracles
from test_transport import all_to_all_by_definition
from unipool_jax.config.chips import parse_topology
from unipool_jax.config.compose import compose_config
from unipool_jax.config.mesh_rules import nodes_of_experts
from unipool_jax.config.rules import problems
from unipool_jax.config.schema import Config, MeshConfig
from unipool_jax.moe.dispatch import COMBINE, DISPATCH, Transport
from unipool_jax.planner import links, report, search
from unipool_jax.planner.collectives import Collective, collectives, parse
from unipool_jax.planner.messages import Message, Tokens, exchanged
from unipool_jax.planner.nodes import BETWEEN, INSIDE, parts_of, split, whole

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


def by_kind(items: Sequence[Collective | Message]) -> dict[tuple[str, ...], float]:
    """Bytes that a device sends, by kind and axes."""
    return {
        key: sum(item.total_bytes for item in items if (item.kind, *item.axes) == key)
        for key in sorted({(item.kind, *item.axes) for item in items})
    }


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
    axes = split({"expert": DEVICES}, MeshConfig(expert_nodes=nodes))
    found = collectives(parse(program("all_gather", nodes, "float32").as_text()), tuple(axes), tuple(axes.values()))
    assert {item.axes for item in found} == {(BETWEEN,), (INSIDE,)}
    crossing = [item for item in found if item.axes == (BETWEEN,) and f",{WIDTH}]" in str(item.shapes)]
    assert sum(item.total_bytes for item in crossing) == 4 * TOKENS * (nodes - 1) * WIDTH * 4


@pytest.mark.parametrize("nodes", [1, 4])
def test_counted_messages_are_those_compiled(nodes: int) -> None:
    """Bytes of a forward and a backward pass. Inside nodes what tells rows their experts and gates is not counted."""
    axes = split({"expert": DEVICES}, MeshConfig(expert_nodes=nodes))
    found = collectives(parse(program("all_gather", nodes, "float32").as_text()), tuple(axes), tuple(axes.values()))
    compiled = by_kind([item for item in found if item.axes == (BETWEEN,) or f",{WIDTH}]" in str(item.shapes)])
    at = Tokens("all_gather", DEVICES, nodes, TOKENS, TOP_K, 4 * WIDTH, 4 * WIDTH, layers=1, forward=1, counting=0)
    assert compiled == by_kind(exchanged(at))
    assert set(compiled) == (
        {("all-gather", "expert"), ("reduce-scatter", "expert")}
        if nodes == 1
        else {
            *(("all-gather", BETWEEN), ("all-to-all", BETWEEN)),
            *(("all-gather", INSIDE), ("reduce-scatter", INSIDE)),
        }
    )


def test_devices_of_both_stages() -> None:
    """64 GPUs in nodes of eight, four of which share experts, and two devices of each expert."""
    sizes, config = {"data": 1, "fsdp": 2, "expert": 16, "tensor": 2}, MeshConfig(expert_nodes=4)
    axes, topology = split(sizes, config), parse_topology("h100:64")
    assert axes == {"data": 1, "fsdp": 2, BETWEEN: 4, INSIDE: 4, "tensor": 2}
    assert links.span(None, topology, (BETWEEN,), axes) == links.Span(4, (), 4)
    assert links.span(None, topology, (INSIDE,), axes) == links.Span(4, (), 1)
    for flat in (("expert",), ("fsdp", "expert"), ("data",)):
        assert whole(parts_of(flat, axes)) == flat
        assert links.span(None, topology, parts_of(flat, axes), axes) == links.span(None, topology, flat, sizes)
    assert split(sizes, MeshConfig()) == sizes


@pytest.mark.parametrize(
    ("expert", "tensor", "nodes"), [(32, 1, 4), (16, 2, 4), (8, 1, 1), (12, 1, 1), (4, 8, 1), (8, 4, 4), (4, 3, 1)]
)
def test_nodes_of_experts(expert: int, tensor: int, nodes: int) -> None:
    """By where devices are: nodes of eight must have as many of the group, at least two."""
    assert nodes_of_experts(expert, tensor, 8) == nodes
    inside = Counter(place * tensor // 8 for place in range(expert))
    alike = len(set(inside.values())) == 1 and min(inside.values()) > 1 and 8 % tensor == 0
    assert nodes == (len(inside) if alike else 1)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("mesh=h100_64", "mesh.expert_nodes=4"), None),
        (("mesh=h100_64", "mesh.expert=-1", "mesh.expert_nodes=4"), None),
        (("mesh=h100_64", "mesh.expert_nodes=2"), r"mesh.topology=h100:64; set it to 4, or to 1 for the flat exchange"),
        (("mesh=v5p_64", "mesh.expert_nodes=2"), r"mesh.topology=v5p:4x4x4; set it to 1"),
        (("mesh=h100_64", "mesh.expert_nodes=5"), "must divide mesh.expert=32 into nodes of at least two devices"),
        (("mesh=h100_64", "mesh.expert_nodes=32"), "must divide mesh.expert=32 into nodes of at least two devices"),
        (("mesh.expert=1", "mesh.expert_nodes=2", "mode=describe"), "with mesh.expert=1 no token leaves its device"),
        (("mesh=h100_64", "mesh.expert_nodes=0"), "must be at least 1"),
    ],
)
def test_nodes_that_cannot_be_are_refused(words: tuple[str, ...], found: str | None) -> None:
    said = problems(compose_config(["scale=182m", "mode=plan", *words]))
    assert len(said) == (found is not None)
    assert all(line.startswith("mesh.expert_nodes=") and found is not None and found in line for line in said)


def of_sixteen(*words: str) -> Config:
    """Two nodes of eight; one sequence on a device."""
    batch = ("train.batch_size=16", "train.microbatch_size=16", "train.eval_batch_size=16")
    return compose_config(["scale=182m", "mesh=h100_64", "mesh.topology=h100:16", "mode=plan", *batch, *words])


@pytest.mark.usefixtures("gpus_are_counted")
@pytest.mark.parametrize(("top_k", "nodes"), [(1, 1), (8, 2)])
def test_a_search_takes_two_stages_where_they_model_faster(top_k: int, nodes: int) -> None:
    """With one expert a token sends half of itself to the other node in the flat exchange, with eight four times."""
    config = of_sixteen(f"moe.top_k={top_k}")
    found, _ = search._of_shape(config, (1, 1, 16, 1), parse_topology("h100:16"), compiled=False)
    assert {candidate.config.mesh.expert_nodes for candidate in found} == {1, 2}
    best = min(found, key=lambda candidate: candidate.estimate.seconds)
    assert best.config.mesh.expert_nodes == nodes
    assert ("two stages" in search._name(best)) is (nodes == 2)
    assert ("mesh.expert_nodes=2" in search.command(best.config)) is (nodes == 2)


@pytest.mark.usefixtures("gpus_are_counted")
def test_a_plan_names_the_exchange_and_the_time_of_the_other() -> None:
    lines = {}
    for nodes in (1, 2):
        config = of_sixteen("moe.top_k=8", "mesh.fsdp=1", "mesh.expert=16", f"mesh.expert_nodes={nodes}")
        plan = report.make_plan(config)
        said = next(line for line in report.text(plan).splitlines() if line.startswith("exchange of tokens"))
        lines[nodes] = said, f"{1e3 * plan.estimate.seconds:.1f} ms"
    (flat, flat_time), (staged, staged_time) = lines[1], lines[2]
    start = "exchange of tokens over 2 nodes: "
    assert flat == f"{start}flat, counted {flat_time}; in two stages, with mesh.expert_nodes=2, {staged_time}"
    assert staged == f"{start}in two stages, counted {staged_time}; flat, with mesh.expert_nodes=1, {flat_time}"
