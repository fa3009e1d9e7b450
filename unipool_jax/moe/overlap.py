"""Order of the backward pass, so that an exchange of rows between devices has arithmetic to hide behind."""

from __future__ import annotations

import jax

from unipool_jax.kernels.grouped_ffn import Bank


@jax.custom_vjp
def tied(hidden_ND: jax.Array, accumulator: Bank) -> tuple[jax.Array, Bank]:
    """The two arguments unchanged; in the backward pass, neither gradient goes on before both are there.

    The last exchange of a layer's backward pass carries the gradient of `hidden_ND` home. Nothing in the layer needs
    the gradient of the bank, so the TPU compiler would put it behind the backward pass of attention, and the exchange
    would run alone. Tied, it has to be there before attention goes on, and the place left is beside the exchange.

    Args:
      hidden_ND: the tokens of a mixture, `[N, D]`, or what it sends to other devices, of any shape.
      accumulator: of the bank's gradient: see `moe.bank.Experts`.
    """
    return hidden_ND, accumulator


def _forward(hidden_ND: jax.Array, accumulator: Bank) -> tuple[tuple[jax.Array, Bank], None]:
    return (hidden_ND, accumulator), None


def _backward(_: None, gradients: tuple[jax.Array, Bank]) -> tuple[jax.Array, Bank]:
    hidden_ND, accumulator = jax.lax.optimization_barrier(gradients)
    return hidden_ND, accumulator


tied.defvjp(_forward, _backward)
