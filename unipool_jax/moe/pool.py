"""The expert bank: one set of SwiGLU experts per pool, and its layout over a device mesh."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from unipool_jax.kernels.grouped_ffn import Bank
from unipool_jax.parallel.mesh import active_mesh, constrain, gathered, gathered_axes, num_shards, spec

BANK_AXES = {
    "gate": ("experts", "embed", "ffn"),
    "up": ("experts", "embed", "ffn"),
    "down": ("experts", "ffn", "embed"),
}
"""Logical axes (see `mesh.RULES`) of the parameters of a bank, in the order of the fields of `Bank`."""


class ExpertPool(nn.Module):
    """Holds the parameters of one pool (float32) and hands them out as arrays.

    The transformer passes the arrays, never this module, into its scan over layers: a module given to a scan over the
    parameter axis is silently copied per layer, which would un-share the pool.
    """

    num_experts: int
    hidden_size: int
    ffn_size: int
    init_std: float
    num_layers: int
    """L, the depth of the whole model: the down projection starts at init_std / sqrt(2 L) (spec A.3)."""

    @nn.compact
    def __call__(self) -> Bank:
        wide = (self.num_experts, self.hidden_size, self.ffn_size)
        narrow = (self.num_experts, self.ffn_size, self.hidden_size)
        init = nn.initializers.normal(self.init_std)
        init_down = nn.initializers.normal(self.init_std / math.sqrt(2 * self.num_layers))
        return Bank(
            self.param("gate", init, wide, jnp.float32),
            self.param("up", init, wide, jnp.float32),
            self.param("down", init_down, narrow, jnp.float32),
        )


def gathered_bank(bank: Bank, dtype: jax.typing.DTypeLike) -> Bank:
    """The experts as products use them, without a gradient: in `dtype`, whole along the fsdp axis.

    Over a mesh this is the one collective that moves experts forward: an all-gather of each device's own experts.
    """
    narrow = jax.lax.stop_gradient(bank.astype(dtype))
    return Bank(*(gathered(weights, *axes) for weights, axes in zip(narrow, BANK_AXES.values(), strict=True)))


@jax.custom_vjp
def gradient_master(bank: Bank) -> Bank:
    """The `master` of `moe_ffn` for the layers that use `bank`: through it their gradients reach the parameters.

    On one device it is the bank itself. Over a mesh each device needs a place of its own where the gradients of its
    rows add up over layers: arrays `[C, E, ...]` with one copy for each of the C devices that share an expert, of
    value zero, as nobody reads them. The derivative sums over the copies, scattering over the fsdp axis: one
    collective for all layers, where differentiating the bank itself would need one for each.
    """
    mesh = active_mesh()
    if mesh is None:
        return bank
    copies = num_shards(mesh, "replica")
    zeros = Bank(*(jnp.zeros((copies, *weights.shape), jnp.float32) for weights in bank))
    return Bank(*(constrain(z, "replica", *gathered_axes(a)) for z, a in zip(zeros, BANK_AXES.values(), strict=True)))


def _master_forward(bank: Bank) -> tuple[Bank, None]:
    return gradient_master(bank), None


def _master_backward(_: None, grads: Bank) -> tuple[Bank]:
    mesh = active_mesh()
    if mesh is None:
        return (grads,)

    def total(grad: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        def on_device(local: jax.Array) -> jax.Array:
            part = jax.lax.psum_scatter(local[0], "fsdp", scatter_dimension=axes.index("embed"), tiled=True)
            return jax.lax.psum(part, "data")

        return jax.shard_map(
            on_device, mesh=mesh, in_specs=spec("replica", *gathered_axes(axes)), out_specs=spec(*axes)
        )(grad)

    return (Bank(*(total(grad, axes) for grad, axes in zip(grads, BANK_AXES.values(), strict=True))),)


gradient_master.defvjp(_master_forward, _master_backward)
