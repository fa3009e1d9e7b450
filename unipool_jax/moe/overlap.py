"""Order that the compiler may not change, so that collectives have arithmetic to hide behind."""

from __future__ import annotations

from typing import TypeVar

import jax

Tree = TypeVar("Tree")


@jax.custom_vjp
def tied(hidden: jax.Array, others: Tree) -> tuple[jax.Array, Tree]:
    """The two arguments unchanged; in the backward pass, no gradient goes on before all are there.

    The last exchange of a layer's backward pass carries the gradient of the tokens home. Nothing in the layer needs
    the gradient of the bank, so the TPU compiler would put it behind the backward pass of attention, and the exchange
    would run alone. Tied, it has to be there before attention goes on, and the place left is beside the exchange.

    Args:
      hidden: what the layer goes on with: the tokens of a mixture, `[N, D]`, or what it sends to other devices.
      others: what it needs nothing of, such as the accumulator of `moe.bank.Experts`.
    """
    return hidden, others


def _forward(hidden: jax.Array, others: Tree) -> tuple[tuple[jax.Array, Tree], None]:
    return (hidden, others), None


def _backward(_: None, gradients: tuple[jax.Array, Tree]) -> tuple[jax.Array, Tree]:
    hidden, others = jax.lax.optimization_barrier(gradients)
    return hidden, others


tied.defvjp(_forward, _backward)


@jax.custom_vjp
def awaited(hidden: jax.Array, others: Tree) -> tuple[jax.Array, Tree]:
    """The two arguments unchanged; neither is used before both are there. The backward pass has no such order.

    Args:
      hidden: what the layer goes on with.
      others: what is to be there by then, such as gathered weights.
    """
    return _awaited_forward(hidden, others)[0]


def _awaited_forward(hidden: jax.Array, others: Tree) -> tuple[tuple[jax.Array, Tree], None]:
    # Not the other way round: policies of rematerialization are asked about the barrier (`model.remat`).
    hidden, others = jax.lax.optimization_barrier((hidden, others))
    return (hidden, others), None


def _awaited_backward(_: None, gradients: tuple[jax.Array, Tree]) -> tuple[jax.Array, Tree]:
    return gradients


awaited.defvjp(_awaited_forward, _awaited_backward)
