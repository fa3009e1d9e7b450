"""One mixture layer: tokens to their experts and back, on one device or over a mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from unipool_jax.config.chips import has_ragged
from unipool_jax.config.schema import Config, MeshConfig
from unipool_jax.kernels.group_plan import make_group_plan
from unipool_jax.kernels.grouped_ffn import Bank, accumulating_ffn, grouped_ffn
from unipool_jax.kernels.implementations import Implementation
from unipool_jax.moe.pool import BANK_AXES
from unipool_jax.moe.routing import Routing
from unipool_jax.moe.transport import CARRIERS, Transport, capacity
from unipool_jax.parallel.linear import linear
from unipool_jax.parallel.mesh import active_mesh, gathered_axes, num_shards, spec


def transport_for(config: MeshConfig, expert_devices: int) -> Transport:
    """The transport of the current mesh, whose expert axis has this many devices."""
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    if device is None:
        return chosen_transport(config, expert_devices, jax.default_backend(), "", 1)
    return chosen_transport(config, expert_devices, device.platform, device.device_kind, mesh.size)


def chosen_transport(
    config: MeshConfig, expert_devices: int, platform: str, device_kind: str, devices: int
) -> Transport:
    """The transport on this many devices, of which `expert_devices` share experts; `auto` goes by what can be had."""
    if expert_devices == 1:
        return "local"
    if config.transport != "auto":
        return config.transport
    return "ragged" if platform != "cpu" and has_ragged(device_kind, devices) else "all_gather"


def moe_ffn(
    hidden_ND: jax.Array,
    routing: Routing,
    bank: Bank,
    master: Bank | None = None,
    implementation: Implementation = "auto",
    mesh_config: MeshConfig | None = None,
) -> tuple[jax.Array, Bank | None, jax.Array]:
    """Sum over each token's k experts of gate times expert output, and `master` for the next layer of the pool.

    The N k (token, slot) pairs are sorted by expert, pass through the grouped feed-forward, and are put back; an expert
    with no token, or with all of them, is legal. Over a mesh, tokens and experts are dealt out over devices, tokens
    travel (see `transport`), and expert width is split over the tensor axis.

    Args:
      hidden_ND: router input.
      routing: experts and gates of each token.
      bank: the experts, in the dtype of `hidden_ND`, or in float32 where there is no `master`.
      master: where layers share the bank, and over a mesh always, what carries gradients to its float32 parameters
        (`bank` then has none): see `accumulating_ffn` and `pool.gradient_master`.
      implementation: see `kernels.implementations`.
      mesh_config: transport and size of receive buffers; None is the default.

    Returns:
      `[N, D]` in the dtype of `hidden_ND`; `master`; and the rows that arrived at each device for its experts, int32,
      one number for each part of the batch; those beyond `transport.capacity` got nothing from them.
    """
    config = mesh_config or MeshConfig()
    num_experts = bank.gate_EDF.shape[0]
    mesh = active_mesh()

    def layer(
        hidden_ND: jax.Array, experts_NK: jax.Array, gates_NK: jax.Array, bank: Bank, master: Bank | None
    ) -> tuple[jax.Array, Bank | None, jax.Array]:
        def compute(rows_RD: jax.Array, sizes_E: jax.Array) -> tuple[jax.Array, Bank | None]:
            # A receive buffer is larger than what arrives on average, which is what this device sends out.
            plan = make_group_plan(
                sizes_E, rows_RD.shape[0], implementation=implementation, expected_rows=experts_NK.size
            )
            if master is None:
                return grouped_ffn(rows_RD, bank, plan), None
            return accumulating_ffn(rows_RD, bank, master, plan)

        carrier = CARRIERS[transport_for(config, 1 if mesh is None else mesh.shape["expert"])]
        carried = carrier(hidden_ND, experts_NK, gates_NK, compute, num_experts, config.receive_factor)
        return carried.output_ND, carried.master, carried.arrived[None]

    if mesh is None:
        return layer(hidden_ND, routing.experts_NK, routing.gates_NK, bank, master)
    if master is None:
        raise ValueError("over a mesh the bank needs a master: see pool.gradient_master")

    def on_device(
        hidden_ND: jax.Array, experts_NK: jax.Array, gates_NK: jax.Array, bank: Bank, master: Bank
    ) -> tuple[jax.Array, Bank, jax.Array]:
        own = Bank(*(copies[0] for copies in master))
        output_ND, carried, arrived = layer(hidden_ND, experts_NK, gates_NK, bank, own)
        assert carried is not None
        return jax.lax.psum(output_ND, "tensor"), Bank(*(leaf[None] for leaf in carried)), arrived

    tokens = spec("batch")
    banks = Bank._make(spec(*gathered_axes(axes)) for axes in BANK_AXES.values())
    masters = Bank._make(spec("replica", *gathered_axes(axes)) for axes in BANK_AXES.values())
    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(tokens, tokens, tokens, banks, masters), out_specs=(tokens, masters, tokens)
    )(hidden_ND, routing.experts_NK, routing.gates_NK, bank, master)


def rows_per_device(config: Config, mesh: Mesh | None) -> int:
    """(token, slot) pairs of a device in one layer of a micro-batch: what it sends out, and receives on average."""
    tokens = config.train.microbatch_size * config.data.sequence_length
    return tokens * config.moe.top_k // (1 if mesh is None else num_shards(mesh, "batch"))


def overflow(config: Config, mesh: Mesh | None, arrived: jax.Array) -> jax.Array:
    """Rows that found no place on their device, int32 scalar: what is beyond the capacity in `arrived`, any shape."""
    devices = 1 if mesh is None else mesh.shape["expert"]
    room = capacity(rows_per_device(config, mesh), devices, config.mesh.receive_factor)
    return jnp.sum(jnp.maximum(arrived - room, 0))


def dense_ffn(hidden_ND: jax.Array, bank: Bank) -> jax.Array:
    """The feed-forward block of the dense model: a bank of one expert that every token visits, `[N, D]`."""
    (gate_DF, gate_axes), (up_DF, up_axes), (down_FD, down_axes) = (
        (weights[0], (axes[1], axes[2])) for weights, axes in zip(bank, BANK_AXES.values(), strict=True)
    )
    gated_NF = jax.nn.silu(linear(hidden_ND, gate_DF, gate_axes).astype(jnp.float32)).astype(hidden_ND.dtype)
    return linear(gated_NF * linear(hidden_ND, up_DF, up_axes), down_FD, down_axes)
