"""Dispatch: rows to the device that holds their expert; combine: expert outputs back to their tokens.

Three transports, each a pair of functions with one signature. They run on one device of a group that shares the experts
of a pool, inside `shard_map` (or without a mesh, for `local`):

    dispatched = DISPATCH[transport](hidden_ND, experts_NK, num_experts, rows, nodes)
    expert_RD = products of dispatched.rows_RD with the experts of this device
    output_ND = COMBINE[transport](expert_RD, dispatched, gates_NK, dtype, nodes)

Experts never move. With several nodes tokens cross between them first (`moe.nodes`), and the transport works inside
each; with one it is the whole exchange. A device receives the same rows in the same order either way.

Suffixes besides those of the model: M tokens of several devices, R rows of a buffer, S (token, slot) pairs, P and Q
devices as senders and receivers, e experts of one device, J nodes whose tokens a sender has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from unipool_jax.config.chips import has_ragged
from unipool_jax.config.schema import MeshConfig
from unipool_jax.kernels.group_plan import sort_by_group
from unipool_jax.kernels.grouped_ffn import Bank
from unipool_jax.kernels.grouped_matmul import vary_alike
from unipool_jax.kernels.recompute import recompute
from unipool_jax.moe.nodes import devices_inside, gathered, gathered_numbers, inside, summed
from unipool_jax.moe.overlap import tied

Transport = Literal["local", "all_gather", "ragged"]


class Dispatched(NamedTuple):
    """The rows of one device, sorted by expert, and how they came."""

    rows_RD: jax.Array
    """Hidden states for the experts of this device, `[R, D]`; what lies past the last group is arbitrary."""
    sizes_E: jax.Array
    """Rows of each expert of this device, int32."""
    received: jax.Array
    """Rows sent to the experts of this device, int32 scalar, also those beyond R, which are dropped."""
    way: Any
    """How they came: what the transport's own `combine` needs to send outputs back."""


class _Order(NamedTuple):
    """A permutation of (token, slot) pairs into rows sorted by expert, and its inverse."""

    order_R: jax.Array
    inverse_S: jax.Array


class _Slices(NamedTuple):
    """Arguments of `jax.lax.ragged_all_to_all` for one direction, int32 `[E]`, one slice per (sender, expert) pair."""

    input_offsets: jax.Array
    send_sizes: jax.Array
    output_offsets: jax.Array
    recv_sizes: jax.Array


class _RaggedWay(NamedTuple):
    """The way there and back of `ragged`."""

    order: _Order
    there: _Slices
    back: _Slices


def dispatch_local(hidden_ND: jax.Array, experts_NK: jax.Array, num_experts: int, rows: int, nodes: int) -> Dispatched:
    """Sort rows by expert; every expert is on this device, and all N k rows are kept whatever `rows` says.

    Args:
      hidden_ND: tokens of this device.
      experts_NK: chosen experts among all `num_experts`, int32.
      num_experts: E, over all devices of the group.
      rows: R, the rows that this device can receive: see `capacity`.
      nodes: of the group.
    """
    del rows, nodes
    order_R, sizes_E = sort_by_group(experts_NK.reshape(-1), num_experts)
    order = _Order(order_R, _inverse(order_R, order_R.shape[0]))
    return Dispatched(_pick(hidden_ND, *order, experts_NK.shape[1]), sizes_E, jnp.sum(sizes_E), order)


def combine_local(
    expert_RD: jax.Array, dispatched: Dispatched, gates_NK: jax.Array, dtype: jax.typing.DTypeLike, nodes: int
) -> jax.Array:
    """Sum over each token's k experts of gate times output, `[N, D]` in `dtype`.

    Args:
      expert_RD: outputs for `dispatched.rows_RD`, zero past the last group.
      dispatched: what `dispatch_local` returned.
      gates_NK: factors, float32.
      dtype: of the result.
      nodes: of the group.
    """
    del nodes
    return _weighted_sum(expert_RD, dispatched.way, gates_NK, dtype)


def dispatch_all_gather(
    hidden_ND: jax.Array, experts_NK: jax.Array, num_experts: int, rows: int, nodes: int
) -> Dispatched:
    """Gather the tokens of all devices and keep the rows of this device's experts. Arguments: `dispatch_local`."""
    per_device = num_experts // jax.lax.axis_size("expert")
    hidden_MD = _gathered_inside(gathered(hidden_ND, nodes), nodes)
    experts_MK = _gathered_inside(gathered_numbers(experts_NK, nodes), nodes)
    expert_S = experts_MK.reshape(-1) - jax.lax.axis_index("expert") * per_device
    # Slots of other devices' experts are sorted last, past the last group: their outputs are zeros.
    order_S, sizes_E = sort_by_group(
        jnp.where((expert_S >= 0) & (expert_S < per_device), expert_S, per_device), per_device
    )
    order_R = order_S[:rows]
    order = _Order(order_R, _inverse(order_R, order_S.shape[0]))
    # Rows are dropped from the end: those of the last experts of the device.
    fitting_E = jnp.diff(jnp.minimum(jnp.cumsum(sizes_E), rows), prepend=0)
    return Dispatched(_pick(hidden_MD, *order, experts_NK.shape[1]), fitting_E, jnp.sum(sizes_E), order)


def combine_all_gather(
    expert_RD: jax.Array, dispatched: Dispatched, gates_NK: jax.Array, dtype: jax.typing.DTypeLike, nodes: int
) -> jax.Array:
    """Sum the outputs of all devices where their tokens came from. Arguments: `combine_local`."""
    gates_MK = _gathered_inside(gathered(gates_NK, nodes), nodes)
    # With one expert a token all parts but one are zero, and their sum is exact in any dtype.
    wide = dtype if gates_NK.shape[1] == 1 else jnp.float32
    partial_MD = _weighted_sum(expert_RD, dispatched.way, gates_MK, wide)
    return summed(_scattered_inside(partial_MD, nodes).astype(dtype), nodes)


def dispatch_ragged(hidden_ND: jax.Array, experts_NK: jax.Array, num_experts: int, rows: int, nodes: int) -> Dispatched:
    """Send each row to its expert's device with a ragged all-to-all. Arguments: `dispatch_local`.

    A slice is what one device has of one node's tokens for one expert, so rows are received grouped by expert, ready
    for the products.
    """
    per_node = num_experts // nodes
    hidden_MD, experts_MK = gathered(hidden_ND, nodes), gathered_numbers(experts_NK, nodes)
    sorted_RD, order, sizes_PJE = _to_send(hidden_MD, experts_MK, per_node, nodes)
    there, back, own_sizes_E, received = _slices(sizes_PJE, rows)
    received_RD = _exchange(sorted_RD, there, back, rows, nodes, True)
    return Dispatched(received_RD, own_sizes_E, received, _RaggedWay(order, there, back))


def dispatch_ragged_into(
    hidden_ND: jax.Array,
    experts_NK: jax.Array,
    num_experts: int,
    stack_LR2H: jax.Array,
    place: jax.Array,
    accumulator: Bank,
) -> tuple[Dispatched, jax.Array, Bank]:
    """`dispatch_ragged` of bfloat16 rows into a stack of what each layer received, at `place`; and that stack.

    Rows are exchanged as `[R, 2, D / 2]`, the layout in which XLA does so on a TPU, and the exchange writes them where
    they are to stay for the backward pass. The values of `rows_RD`, of that shape, are for nobody to read: who reads
    the stack in their place saves a copy. Their gradient is that of `hidden_ND`; the stack's cotangent is passed on.

    The accumulator is returned `tied` to the rows that are sent: a gather brings their gradients back to the tokens
    behind the last exchange, and the gradient of the bank would be computed beside that instead.
    """
    sorted_RD, order, sizes_PJE = _to_send(hidden_ND, experts_NK, num_experts, nodes=1)
    there, back, own_sizes_E, received = _slices(sizes_PJE, stack_LR2H.shape[1])
    halved, accumulator = tied(*vary_alike((sorted_RD.reshape(-1, *stack_LR2H.shape[2:]), accumulator)))
    stack_LR2H, received_RD = _exchange_into(*vary_alike((halved, stack_LR2H, place, there, back)))
    return Dispatched(received_RD, own_sizes_E, received, _RaggedWay(order, there, back)), stack_LR2H, accumulator


def combine_ragged(
    expert_RD: jax.Array, dispatched: Dispatched, gates_NK: jax.Array, dtype: jax.typing.DTypeLike, nodes: int
) -> jax.Array:
    """Send outputs back with a second ragged all-to-all and sum them per token. Arguments: `combine_local`."""
    way: _RaggedWay = dispatched.way
    # Halved gradients are for kernels alone, which read no rows of no expert.
    returned_RD = _exchange(expert_RD, way.back, way.there, way.order.order_R.shape[0], nodes, expert_RD.ndim == 2)
    returned_RD = returned_RD.reshape(returned_RD.shape[0], -1)
    return summed(_weighted_sum(returned_RD, way.order, gathered(gates_NK, nodes), dtype), nodes)


DISPATCH: dict[Transport, Callable[[jax.Array, jax.Array, int, int, int], Dispatched]] = {
    "local": dispatch_local,
    "all_gather": dispatch_all_gather,
    "ragged": dispatch_ragged,
}
COMBINE: dict[Transport, Callable[[jax.Array, Dispatched, jax.Array, jax.typing.DTypeLike, int], jax.Array]] = {
    "local": combine_local,
    "all_gather": combine_all_gather,
    "ragged": combine_ragged,
}


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
    """The transport on this many devices, of which `expert_devices` share experts; `auto` takes `ragged` if it can."""
    if expert_devices == 1:
        return "local"
    if config.transport != "auto":
        return config.transport
    return "ragged" if platform != "cpu" and has_ragged(device_kind, devices) else "all_gather"


def _gathered_inside(x_MD: jax.Array, nodes: int) -> jax.Array:
    """What all devices of the group have, in their order, from what one place of each node has."""
    if nodes == 1:
        return jax.lax.all_gather(x_MD, "expert", tiled=True)
    parts = x_MD.reshape(nodes, -1, *x_MD.shape[1:])
    everything = jax.lax.all_gather(parts, "expert", axis=1, axis_index_groups=inside(nodes), tiled=True)
    return everything.reshape(-1, *x_MD.shape[1:])


def _scattered_inside(x_MD: jax.Array, nodes: int) -> jax.Array:
    """The transpose of `_gathered_inside`."""
    if nodes == 1:
        return jax.lax.psum_scatter(x_MD, "expert", scatter_dimension=0, tiled=True)
    parts = x_MD.reshape(nodes, -1, *x_MD.shape[1:])
    own = jax.lax.psum_scatter(parts, "expert", scatter_dimension=1, axis_index_groups=inside(nodes), tiled=True)
    return own.reshape(-1, *x_MD.shape[1:])


def _sorted_inside(experts_MK: jax.Array, per_node: int, nodes: int) -> tuple[jax.Array, jax.Array]:
    """The order of (token, slot) pairs by the node of their token, then by expert, and sizes `[J, per_node]`, int32.

    Pairs whose expert is in another node come last.
    """
    if nodes == 1:
        order_R, sizes_E = sort_by_group(experts_MK.reshape(-1), per_node)
        return order_R, sizes_E[None]
    expert_JS = experts_MK.reshape(nodes, -1) - jax.lax.axis_index("expert") // devices_inside(nodes) * per_node
    group_JS = expert_JS + per_node * jnp.arange(nodes, dtype=expert_JS.dtype)[:, None]
    ours = (expert_JS >= 0) & (expert_JS < per_node)
    order_R, sizes_E = sort_by_group(jnp.where(ours, group_JS, nodes * per_node).reshape(-1), nodes * per_node)
    return order_R, sizes_E.reshape(nodes, per_node)


def _to_send(
    hidden_MD: jax.Array, experts_MK: jax.Array, per_node: int, nodes: int
) -> tuple[jax.Array, _Order, jax.Array]:
    """Rows in the order of `_sorted_inside`, that order, and the sizes of each device of the node, `[P, J, E]`."""
    order_R, sizes_JE = _sorted_inside(experts_MK, per_node, nodes)
    order = _Order(order_R, _inverse(order_R, order_R.shape[0]))
    sizes_PJE = jax.lax.all_gather(sizes_JE, "expert", axis_index_groups=inside(nodes))
    return _pick(hidden_MD, *order, experts_MK.shape[1]), order, sizes_PJE


def _slices(sizes_PJE: jax.Array, rows: int) -> tuple[_Slices, _Slices, jax.Array, jax.Array]:
    """From what P devices have of J nodes for each of E experts: slices there and back, own group sizes, rows for them.

    Rows are received expert by expert, and for each expert node by node and device by device. What lies beyond `rows`
    is not sent, but counted in the last value returned. A sender keeps rows node by node, those of a node by expert.
    """
    devices, nodes, num_experts = sizes_PJE.shape
    per_device, me = num_experts // devices, jax.lax.axis_index("expert") % devices
    # [receiver, expert of the receiver, node of the token, sender]
    wanted_QeJP = sizes_PJE.T.reshape(devices, per_device, nodes, devices)
    ends_QeJP = jnp.cumsum(wanted_QeJP.reshape(devices, -1), axis=1).reshape(wanted_QeJP.shape)
    starts_QeJP = ends_QeJP - wanted_QeJP
    taken_QeJP = jnp.minimum(ends_QeJP, rows) - jnp.minimum(starts_QeJP, rows)
    place_QeJP = jnp.minimum(starts_QeJP, rows)
    # Where each sender keeps its rows: [sender, node of the token, receiver, expert of the receiver].
    sizes_PS = sizes_PJE.reshape(devices, -1)
    kept_PJQe = (jnp.cumsum(sizes_PS, axis=1) - sizes_PS).reshape(devices, nodes, devices, per_device)

    # Slices are in the order of the other device, then of the node, then of the expert.
    kept_at = kept_PJQe[me].swapaxes(0, 1).reshape(-1)
    sent, arrive_at = (x_QeJP[..., me].swapaxes(1, 2).reshape(-1) for x_QeJP in (taken_QeJP, place_QeJP))
    received, received_at = (x_QeJP[me].T.reshape(-1) for x_QeJP in (taken_QeJP, place_QeJP))
    kept_at_sender = kept_PJQe[:, :, me].reshape(-1)
    there = _Slices(kept_at, sent, arrive_at, received)
    back = _Slices(received_at, received, kept_at_sender, sent)
    return there, back, jnp.sum(taken_QeJP[me], axis=(1, 2)), jnp.sum(wanted_QeJP[me])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _exchange(
    rows_RD: jax.Array, there: _Slices, back: _Slices, num_rows: int, nodes: int, clear_grad: bool
) -> jax.Array:
    """`[num_rows, D]` with the slices received, zero elsewhere; its gradient is the exchange in reverse.

    Without `clear_grad` the gradient of rows that were not sent is arbitrary.
    """
    return _sent(rows_RD, there, num_rows, nodes)


def _exchange_forward(
    rows_RD: jax.Array, there: _Slices, back: _Slices, num_rows: int, nodes: int, clear_grad: bool
) -> tuple[jax.Array, tuple[_Slices, jax.Array]]:
    # An array without elements remembers how many rows there were.
    return _sent(rows_RD, there, num_rows, nodes), (back, rows_RD[:, :0])


def _exchange_backward(
    num_rows: int, nodes: int, clear_grad: bool, saved: tuple[_Slices, jax.Array], grad_RD: jax.Array
) -> tuple[jax.Array, None, None]:
    back, sent = saved
    return _sent(grad_RD, back, sent.shape[0], nodes, clear_grad), None, None


_exchange.defvjp(_exchange_forward, _exchange_backward)


def _sent(rows_RD: jax.Array, slices: _Slices, num_rows: int, nodes: int, clear: bool = True) -> jax.Array:
    """`[num_rows, D]` with the slices received; others are zero, or what the memory holds."""
    shape = (num_rows, *rows_RD.shape[1:])
    if clear:
        # Made from the rows, so that inside `shard_map` it varies over the mesh as they do.
        buffer_RD = jnp.broadcast_to(jnp.zeros_like(rows_RD[:1]), shape)
    else:
        rows_RD, buffer_RD = vary_alike((rows_RD, jax.lax.empty(shape, rows_RD.dtype)))
    return jax.lax.ragged_all_to_all(rows_RD, buffer_RD, *slices, axis_name="expert", axis_index_groups=inside(nodes))


@jax.custom_vjp
def _exchange_into(
    rows_R2H: jax.Array, stack_LR2H: jax.Array, place: jax.Array, there: _Slices, back: _Slices
) -> tuple[jax.Array, jax.Array]:
    """The stack with the slices received at `place`, other rows as they were; and what is there of `[R, 2, H]`."""
    layers, rows, *row = stack_LR2H.shape
    there = there._replace(output_offsets=there.output_offsets + place * rows)
    stack_SD = jax.lax.ragged_all_to_all(rows_R2H, stack_LR2H.reshape(layers * rows, *row), *there, axis_name="expert")
    stack_LR2H = stack_SD.reshape(stack_LR2H.shape)
    return stack_LR2H, stack_LR2H[place]


def _into_forward(
    rows_R2H: jax.Array, stack_LR2H: jax.Array, place: jax.Array, there: _Slices, back: _Slices
) -> tuple[tuple[jax.Array, jax.Array], tuple[_Slices, jax.Array]]:
    return _exchange_into(rows_R2H, stack_LR2H, place, there, back), (back, rows_R2H[:, :, :0])


def _into_backward(
    saved: tuple[_Slices, jax.Array], grads: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, None, None]:
    back, sent = saved
    passed_on, grad_R2H = grads
    return _sent(grad_R2H, back, sent.shape[0], 1), passed_on, None, None, None


_exchange_into.defvjp(_into_forward, _into_backward)


def _inverse(order_R: jax.Array, num_slots: int) -> jax.Array:
    """Row of each slot, R for a slot without one; `order_R` holds each slot at most once."""
    rows = jnp.arange(order_R.shape[0], dtype=order_R.dtype)
    nowhere = jnp.full((num_slots,), order_R.shape[0], order_R.dtype)
    return nowhere.at[order_R].set(rows, unique_indices=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _pick(rows_RD: jax.Array, order_S: jax.Array, inverse: jax.Array, copies: int) -> jax.Array:
    """`rows[order // copies]`, zero where out of range: row r is the source of slots `r * copies ...`.

    With the inverse permutation the gradient is a gather too; autodiff would scatter.
    """
    return jnp.take(rows_RD, order_S // copies, axis=0, mode="fill", fill_value=0)


def _pick_forward(
    rows_RD: jax.Array, order_S: jax.Array, inverse: jax.Array, copies: int
) -> tuple[jax.Array, jax.Array]:
    return _pick(rows_RD, order_S, inverse, copies), inverse


def _pick_backward(copies: int, inverse: jax.Array, grad_SD: jax.Array) -> tuple[jax.Array, None, None]:
    grads_RD = jnp.take(grad_SD, inverse, axis=0, mode="fill", fill_value=0)
    if copies > 1:
        grads_RD = jnp.sum(grads_RD.reshape(-1, copies, grads_RD.shape[1]), axis=1)
    return grads_RD, None, None


_pick.defvjp(_pick_forward, _pick_backward)


def _weighted_sum(expert_RD: jax.Array, order: _Order, gates_NK: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Sum over each token's slots of gate times the row computed for it, `[N, D]`, added in float32.

    The backward pass keeps the rows in their own dtype, not the float32 values that are added.
    """

    @recompute
    def weighed(output_NKD: jax.Array, gates_NK: jax.Array) -> jax.Array:
        return jnp.sum(gates_NK[:, :, None] * output_NKD.astype(jnp.float32), axis=1).astype(dtype)

    return weighed(_pick(expert_RD, order.inverse_S, order.order_R, 1).reshape(*gates_NK.shape, -1), gates_NK)
