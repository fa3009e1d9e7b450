"""Tokens to experts and back, without dropping any."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from unipool_jax.kernels.group_plan import make_group_plan, sort_by_group
from unipool_jax.kernels.grouped_ffn import Bank, accumulating_ffn, grouped_ffn
from unipool_jax.kernels.implementations import Implementation
from unipool_jax.moe.routing import Routing


@jax.custom_vjp
def _permute_rows(rows_RD: jax.Array, order_R: jax.Array, inverse_R: jax.Array) -> jax.Array:
    """`rows[order]` for a permutation; its gradient is a gather too, where autodiff would scatter."""
    return rows_RD[order_R]


def _permute_forward(
    rows_RD: jax.Array, order_R: jax.Array, inverse_R: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return rows_RD[order_R], (order_R, inverse_R)


def _permute_backward(saved: tuple[jax.Array, jax.Array], grad_RD: jax.Array) -> tuple[jax.Array, None, None]:
    _, inverse_R = saved
    return grad_RD[inverse_R], None, None


_permute_rows.defvjp(_permute_forward, _permute_backward)


def moe_ffn(
    hidden_ND: jax.Array,
    routing: Routing,
    bank: Bank,
    master: Bank | None = None,
    implementation: Implementation = "auto",
) -> tuple[jax.Array, Bank | None]:
    """Sum over each token's k experts of gate times expert output, and `master` for the next layer of the pool.

    The N k (token, slot) pairs are sorted by expert, pass through the grouped feed-forward, and are put back; an expert
    with no token, or with all of them, is legal.

    Args:
      hidden_ND: router input.
      routing: experts and gates of each token.
      bank: the experts, in the dtype of `hidden_ND`, or in float32 where there is no `master`.
      master: where layers share the bank, the float32 parameters behind it. They receive the gradient, and `bank`
        none: see `accumulating_ffn`.
      implementation: see `kernels.implementations`.

    Returns:
      `[N, D]` in the dtype of `hidden_ND`, and `master`.
    """
    num_tokens, top_k = routing.experts_NK.shape
    num_experts = bank.gate_EDF.shape[0]
    num_rows = num_tokens * top_k

    order_R, group_sizes_E = sort_by_group(routing.experts_NK.reshape(num_rows), num_experts)
    inverse_R = jnp.zeros_like(order_R).at[order_R].set(jnp.arange(num_rows, dtype=order_R.dtype), unique_indices=True)
    plan = make_group_plan(group_sizes_E, num_rows, implementation=implementation)

    slots_RD = jnp.repeat(hidden_ND, top_k, axis=0) if top_k > 1 else hidden_ND
    sorted_RD = _permute_rows(slots_RD, order_R, inverse_R)
    if master is None:
        expert_RD = grouped_ffn(sorted_RD, bank, plan)
    else:
        expert_RD, master = accumulating_ffn(sorted_RD, bank, master, plan)
    output_NKD = _permute_rows(expert_RD, inverse_R, order_R).reshape(num_tokens, top_k, -1)
    weighted_NKD = routing.gates_NK[:, :, None] * output_NKD.astype(jnp.float32)
    return jnp.sum(weighted_NKD, axis=1).astype(hidden_ND.dtype), master


def dense_ffn(hidden_ND: jax.Array, bank: Bank) -> jax.Array:
    """The feed-forward block of the dense model: a bank of one expert that every token visits, `[N, D]`."""
    gate_DF, up_DF, down_FD = (weights[0].astype(hidden_ND.dtype) for weights in bank)
    gated_NF = jax.nn.silu((hidden_ND @ gate_DF).astype(jnp.float32)).astype(hidden_ND.dtype)
    return (gated_NF * (hidden_ND @ up_DF)) @ down_FD
