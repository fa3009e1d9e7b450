"""Arrays in which layers leave products of their experts, and rows they received, for the backward pass.

On TPUs a scan over layers copies what it keeps into arrays of all layers, and out of them again. Here such arrays are
made before the layers, and kernels and exchanges write and read them in place (`kernels.grouped_ffn.stacking_ffn`).
"""

from __future__ import annotations

import jax

from unipool_jax.config.schema import Config
from unipool_jax.kernels.deferred import Pending, added, nothing_left
from unipool_jax.kernels.grouped_ffn import Bank, Products
from unipool_jax.kernels.implementations import Implementation, resolve
from unipool_jax.kernels.tpu_layouts import can_be_halved, stack_shape
from unipool_jax.moe.bank import BANK_AXES
from unipool_jax.moe.capacity import capacity, rows_per_device
from unipool_jax.moe.dispatch import Transport, transport_for
from unipool_jax.parallel.mesh import active_mesh, constrain, gathered_axes, num_shards, spec

PRODUCT_AXES = (("batch", None, None, "ffn"), ("batch", None, None, "ffn"), ("device",), ("device",))
"""Logical axes of `Experts.products`, in the order of its fields, or the first of them."""


def kept_products(config: Config) -> Products | None:
    """The products of `Experts` for a micro-batch of a training step; None where the kernels do not keep them so.

    That is on TPUs, where what a scan over layers keeps is copied into arrays of all layers and out of them again, and
    for the values of model.remat that keep products.
    """
    if not keeps_products(config, resolve(config.kernels.implementation), active_mesh() is not None):
        return None
    # The layer below a pool's first has other experts, and none of its kernels adds to theirs.
    return _products(config, config.mixture_layers, leaves=config.pool.groups == 1)


def scratch_products(config: Config) -> Products | None:
    """The products of `Experts` for one layer that the backward pass recomputes; None where they would save no copies.

    They save some where the exchange between devices can put rows into them as the kernels read them.
    """
    if resolve(config.kernels.implementation) != "pallas_tpu":
        return None
    products = _products(config, 1, leaves=False)
    return None if products.rows_LR2H is None else products


def _products(config: Config, layers: int, *, leaves: bool) -> Products:
    """Arrays for the products of so many layers, where each leaves something to the one below, or does not."""
    mesh, model = active_mesh(), config.model
    parts, devices, tensor = (1, 1, 1)
    if mesh is not None:
        parts, devices, tensor = num_shards(mesh, "batch"), mesh.shape["expert"], mesh.shape["tensor"]
    sent = rows_per_device(config, mesh)
    received = sent if devices == 1 else capacity(sent, devices, config.mesh.capacity_factor)
    rows, columns = stack_shape(received, model.ffn_size // tensor)
    gate, up = (
        constrain(jax.lax.empty((parts, layers, rows, columns * tensor), model.compute_dtype), *axes)
        for axes in PRODUCT_AXES[:2]
    )
    into_stacks = exchanges_into_stacks(config, transport_for(config.mesh, devices), tensor)
    if not into_stacks or not can_be_halved(received, model.hidden_size, model.ffn_size, model.compute_dtype):
        return Products(gate, up)
    shape = (parts, layers, received, 2, model.hidden_size // 2)
    nothing = None
    if leaves:
        own = config.experts_per_pool // devices
        nothing = nothing_left(parts, received, model.ffn_size, own, model.compute_dtype, sent)
    rows_LR2H, pending = jax.tree.map(
        lambda x: constrain(x, "device", *(None,) * (x.ndim - 1)),
        (jax.lax.empty(shape, model.compute_dtype), nothing),
    )
    return Products(gate, up, rows_LR2H, pending)


def keeps_products(config: Config, implementation: Implementation, on_mesh: bool) -> bool:
    """Whether a step keeps products as `kept_products` says, with kernels of this implementation.

    Not without an accumulator.
    """
    accumulates = config.moe.router != "none" and (on_mesh or config.layers_per_pool > 1)
    return implementation == "pallas_tpu" and config.model.remat in ("none", "attention") and accumulates


def exchanges_into_stacks(config: Config, transport: Transport, tensor: int) -> bool:
    """Whether a step that keeps products so receives rows into an array of all layers too, if they can be halved.

    A norm behind the experts would have to lay out halved rows anew.
    """
    return transport == "ragged" and tensor == 1 and not config.norms_experts and config.mesh.expert_nodes == 1


def settled(gradient: Bank, products: Products | None) -> Bank:
    """The bank's gradient behind its first layer, with what that layer left: see `kernels.deferred`.

    Args:
      gradient: float32 `[1, C, E, ...]`, as the accumulator of `Experts` with an axis of pools.
      products: cotangent of what layers kept.
    """
    if products is None or products.pending is None or products.rows_LR2H is None:
        return gradient
    replicas = spec(None, "replica", *gathered_axes(BANK_AXES["gate"]))
    parts = spec("device")

    def on_device(gate_sum_EDF: jax.Array, pending: Pending, rows_LR2H: jax.Array) -> jax.Array:
        left = jax.tree.map(lambda x: x[0], pending)
        return added(left, rows_LR2H[0], gate_sum_EDF[0, 0])[None, None]

    on_devices = jax.shard_map(on_device, mesh=active_mesh(), in_specs=(replicas, parts, parts), out_specs=replicas)
    return gradient._replace(gate_EDF=on_devices(gradient.gate_EDF, products.pending, products.rows_LR2H))
