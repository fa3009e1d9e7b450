"""Dispatch against a loop over tokens: values and every gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unipool_jax.config.schema import MeshConfig
from unipool_jax.kernels.grouped_ffn import Bank
from unipool_jax.kernels.implementations import Implementation
from unipool_jax.moe.bank import Experts
from unipool_jax.moe.dispatch import chosen_transport
from unipool_jax.moe.mixture import dense_ffn, moe_ffn
from unipool_jax.moe.routing import Routing, RoutingStats
from unipool_jax.parallel.mesh import make_mesh

TOKENS, WIDTH, HIDDEN, EXPERTS = 20, 6, 5, 4
UNUSED = RoutingStats(
    *(jnp.zeros((1, EXPERTS), jnp.int32), jnp.zeros((1, EXPERTS)), jnp.zeros((1,))),
    *(jnp.zeros((1,), jnp.int32), jnp.zeros((1,), jnp.int32)),
)


def _operands(top_k: int, experts: np.ndarray | None = None) -> tuple[jax.Array, Bank, jax.Array, np.ndarray]:
    """Hidden states, bank, gates `[N, k]` and experts `[N, k]`; expert 2 gets no token."""
    random = np.random.default_rng(top_k)
    if experts is None:
        experts = np.stack([random.permutation([0, 1, 3])[:top_k] for _ in range(TOKENS)])
    shapes = ((TOKENS, WIDTH), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH))
    hidden, *bank = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes)
    return hidden, Bank(*bank), jnp.asarray(random.uniform(size=experts.shape), jnp.float32), experts


def _loop(hidden: jax.Array, bank: Bank, gates: jax.Array, experts: np.ndarray) -> jax.Array:
    """Token by token, choice by choice."""
    rows = []
    for token, chosen in enumerate(experts):
        x = hidden[token]
        outputs = [(jax.nn.silu(x @ bank.gate_EDF[e]) * (x @ bank.up_EDF[e])) @ bank.down_EFD[e] for e in chosen]
        rows.append(sum(gate * output for gate, output in zip(gates[token], outputs, strict=True)))
    return jnp.stack(rows)


def _output_and_accumulator(
    hidden: jax.Array, routing: Routing, weights: Bank, accumulator: Bank
) -> tuple[jax.Array, Bank | None]:
    output, experts, _ = moe_ffn(hidden, routing, Experts(weights, accumulator))
    return output, experts.accumulator


def _compare(found: Any, expected: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_values_and_gradients_match_the_loop(top_k: int, implementation: Implementation) -> None:
    hidden, bank, gates, experts = _operands(top_k)

    def dispatched(hidden: jax.Array, bank: Bank, gates: jax.Array) -> jax.Array:
        routing = Routing(jnp.asarray(experts, jnp.int32), gates, UNUSED)
        return moe_ffn(hidden, routing, Experts(bank, None), implementation)[0]

    _compare(dispatched(hidden, bank, gates), _loop(hidden, bank, gates, experts))
    cotangent = jax.random.normal(jax.random.key(0), hidden.shape)
    found = jax.vjp(dispatched, hidden, bank, gates)[1](cotangent)
    expected = jax.vjp(lambda hidden, bank, gates: _loop(hidden, bank, gates, experts), hidden, bank, gates)[1](
        cotangent
    )
    _compare(found, expected)


def test_an_accumulator_takes_the_gradient_of_the_bank_and_is_passed_on() -> None:
    hidden, bank, gates, experts = _operands(3)
    routing = Routing(jnp.asarray(experts, jnp.int32), gates, UNUSED)
    above = jax.tree.map(jnp.ones_like, bank)
    (_, passed_on), pullback = jax.vjp(lambda *experts: _output_and_accumulator(hidden, routing, *experts), bank, bank)
    bank_grad, accumulated = pullback((jnp.ones_like(hidden), above))
    expected = jax.grad(lambda bank: jnp.sum(_loop(hidden, bank, gates, experts)))(bank)
    _compare(passed_on, bank)
    _compare(bank_grad, jax.tree.map(jnp.zeros_like, bank))
    _compare(accumulated, jax.tree.map(jnp.add, above, expected))


def test_one_expert_may_take_every_token_as_the_dense_block_does() -> None:
    hidden, bank, _, experts = _operands(1, np.zeros((TOKENS, 1), np.int64))
    routing = Routing(jnp.asarray(experts, jnp.int32), jnp.ones((TOKENS, 1)), UNUSED)
    _compare(moe_ffn(hidden, routing, Experts(bank, None))[0], dense_ffn(hidden, bank))


def test_the_dtype_of_the_hidden_states_is_kept() -> None:
    hidden, bank, gates, experts = _operands(1)
    routing = Routing(jnp.asarray(experts, jnp.int32), gates, UNUSED)
    narrow, *_ = moe_ffn(hidden.astype(jnp.bfloat16), routing, Experts(bank, None))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        narrow.astype(jnp.float32), moe_ffn(hidden, routing, Experts(bank, None))[0], rtol=0.1, atol=0.3
    )


def test_over_a_mesh_experts_need_an_accumulator() -> None:
    hidden, bank, gates, experts = _operands(1)
    routing = Routing(jnp.asarray(experts), gates, UNUSED)
    mesh = make_mesh(MeshConfig(1, 1, 2, 1), jax.devices()[:2])
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="over a mesh the experts need an accumulator"):
        moe_ffn(hidden, routing, Experts(bank, None))


def test_the_transport_of_a_platform() -> None:
    asked, auto = MeshConfig(transport="all_gather"), MeshConfig()
    assert chosen_transport(asked, 1, "tpu", "TPU v5p", 8) == "local"
    assert chosen_transport(asked, 4, "tpu", "TPU v5p", 8) == "all_gather"
    assert chosen_transport(auto, 4, "tpu", "TPU v5p", 8) == "ragged"
    assert chosen_transport(auto, 4, "cpu", "cpu", 8) == "all_gather"
