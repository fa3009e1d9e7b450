"""The expert bank of a pool: its parameters, and the experts as the layers that share them use them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from unipool_jax.config.schema import Config, ModelConfig
from unipool_jax.kernels.grouped_ffn import Bank, Products
from unipool_jax.parallel.mesh import (
    active_mesh,
    constrain,
    gathered,
    gathered_axes,
    num_shards,
    scattered_dimension,
    spec,
)

BANK_AXES = {
    "gate": ("experts", "embed", "ffn"),
    "up": ("experts", "embed", "ffn"),
    "down": ("experts", "ffn_rows", None),
}
"""Logical axes (see `mesh.RULES`) of the parameters of a bank, in the order of the fields of `Bank`."""


class ExpertPool(nn.Module):
    """Creates the parameters of one pool, float32.

    The transformer passes the arrays, never this module, into its scan over layers: a module given to a scan over the
    parameter axis is silently copied per layer, which would un-share the pool.
    """

    config: ModelConfig
    """Its standard deviations depend on L, the depth of the whole model (method M1.6)."""
    num_experts: int

    @nn.compact
    def __call__(self) -> Bank:
        model = self.config
        wide = (self.num_experts, model.hidden_size, model.ffn_size)
        narrow = (self.num_experts, model.ffn_size, model.hidden_size)
        init, init_down = nn.initializers.normal(model.matrix_std), nn.initializers.normal(model.output_std)
        return Bank(
            self.param("gate", init, wide, jnp.float32),
            self.param("up", init, wide, jnp.float32),
            self.param("down", init_down, narrow, jnp.float32),
        )


class Experts(NamedTuple):
    """The experts of a pool as its layers use them. A layer takes the value and passes it to the next layer.

    Derived by autodiff, the gradient of a bank that L layers share is L arrays of the bank's size and their sum. The
    accumulator avoids that: its values are never read, but a layer's output accumulator depends on its input
    accumulator, so in the backward pass one float32 gradient travels from the last layer to the first and each layer
    adds its share in place.
    """

    weights: Bank
    """`[E, ...]` in the compute dtype, gathered over fsdp, without a gradient. Without an accumulator: the float32
    parameters, with one."""
    accumulator: Bank | None
    """Float32 `[E, ...]`; over a mesh `[C, E, ...]` with one replica for each of the C devices that share an expert."""
    products: Products | None = None
    """`[X, L, ...]`, for each of the X devices that have tokens of their own and the layers of all pools: see
    `moe.products`. What is pending has no axis of layers; who differentiates through the layers gives their gradient
    to `settled`."""
    place: jax.Array | None = None
    """Which of the L layers the products are to be of, int32 scalar."""


def pool_experts(config: Config, bank: Bank) -> Experts:
    """The experts of a pool from its parameters `[E, ...]`."""
    # On one device, adding the gradient of a single layer to zeros costs more than writing it.
    plain = config.layers_per_pool == 1 and active_mesh() is None
    if plain or config.moe.router == "none" or gathered_by_layer(config):
        return Experts(bank, None)
    return Experts(gathered_bank(bank, config.model.compute_dtype), gradient_accumulator(bank))


def gathered_by_layer(config: Config) -> bool:
    """Whether a pool leaves its experts to its only layer to gather: see `moe.beside_attention`."""
    mesh = active_mesh()
    over_fsdp = mesh is not None and mesh.shape["fsdp"] > 1
    return over_fsdp and config.layers_per_pool == 1 and config.moe.router != "none"


def gathered_bank(bank: Bank, dtype: jax.typing.DTypeLike) -> Bank:
    """The weights of `Experts`: in `dtype`, gathered over the fsdp axis, without a gradient.

    Over a mesh this is the one collective that moves experts in the forward pass: an all-gather of each device's own.
    """
    narrow = jax.lax.stop_gradient(bank.astype(dtype))
    return Bank(*(gathered(weights, *axes) for weights, axes in zip(narrow, BANK_AXES.values(), strict=True)))


@jax.custom_vjp
def gradient_accumulator(bank: Bank) -> Bank:
    """The accumulator of `Experts`: its cotangent becomes the gradient of the parameters `bank`.

    On one device it is the bank itself. Over a mesh it is zeros `[C, E, ...]`, one replica for each of the C devices
    that share an expert, so that each device adds up the gradients of its own rows over all layers. Its derivative sums
    over the replicas and scatters over the fsdp axis: one collective for all layers instead of one for each.
    """
    mesh = active_mesh()
    if mesh is None:
        return bank
    replicas = num_shards(mesh, "replica")
    zeros = Bank(*(jnp.zeros((replicas, *weights.shape), jnp.float32) for weights in bank))
    return Bank(*(constrain(z, "replica", *gathered_axes(a)) for z, a in zip(zeros, BANK_AXES.values(), strict=True)))


def _accumulator_forward(bank: Bank) -> tuple[Bank, None]:
    return gradient_accumulator(bank), None


def _accumulator_backward(_: None, grads: Bank) -> tuple[Bank]:
    if active_mesh() is None:
        return (grads,)
    return (Bank(*(_sum_replicas(grad, axes) for grad, axes in zip(grads, BANK_AXES.values(), strict=True))),)


def _sum_replicas(grad: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """`[C, E, ...]` to `[E, ...]`, reduced over data and fsdp and scattered over fsdp."""

    def on_device(replica: jax.Array) -> jax.Array:
        part = jax.lax.psum_scatter(replica[0], "fsdp", scatter_dimension=scattered_dimension(axes), tiled=True)
        return jax.lax.psum(part, "data")

    return jax.shard_map(
        on_device, mesh=active_mesh(), in_specs=spec("replica", *gathered_axes(axes)), out_specs=spec(*axes)
    )(grad)


gradient_accumulator.defvjp(_accumulator_forward, _accumulator_backward)
