"""Rows to the device that holds their expert, and back: three transports with one signature.

A transport is called on one device of a group that shares the experts of a pool, inside `shard_map` (or without any
mesh, for `local`). It brings (token, slot) pairs together by expert, lets `compute` work on the experts of this device,
and returns each token's gate-weighted sum. Experts never move.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from unipool_jax.kernels.group_plan import sort_by_group
from unipool_jax.kernels.grouped_ffn import Bank

Compute = Callable[[jax.Array, jax.Array], tuple[jax.Array, Bank | None]]
"""`(rows_RD sorted by expert, group_sizes_E) -> ([R, D], master)`; rows past the last group come back as zeros."""

Transport = Literal["local", "all_gather", "ragged"]


class Carried(NamedTuple):
    """What a transport returns."""

    output_ND: jax.Array
    """Sum over each token's experts of gate times output, in the dtype of the hidden states."""
    master: Bank | None
    """What `compute` returned."""
    arrived: jax.Array
    """Rows for the experts of this device, int32 scalar. Experts contribute nothing to those beyond `capacity`."""


class Carrier(Protocol):
    """The signature of the transports."""

    def __call__(
        self,
        hidden_ND: jax.Array,
        experts_NK: jax.Array,
        gates_NK: jax.Array,
        compute: Compute,
        num_experts: int,
        receive_factor: float | None,
    ) -> Carried:
        """Carry tokens to experts and back.

        Args:
          hidden_ND: tokens of this device.
          experts_NK: chosen experts among all `num_experts`, int32.
          gates_NK: factors, float32.
          compute: the experts of this device.
          num_experts: E, over all devices of the group.
          receive_factor: rows that fit on a device, over the mean N k; see `capacity`.
        """
        ...


def local(
    hidden_ND: jax.Array,
    experts_NK: jax.Array,
    gates_NK: jax.Array,
    compute: Compute,
    num_experts: int,
    receive_factor: float | None,
) -> Carried:
    """Every expert is here."""
    del receive_factor
    order_R, sizes_E = sort_by_group(experts_NK.reshape(-1), num_experts)
    inverse_R = _inverse(order_R, order_R.shape[0])
    expert_RD, master = compute(_pick(hidden_ND, order_R, inverse_R, experts_NK.shape[1]), sizes_E)
    output_ND = _combine(expert_RD, order_R, inverse_R, gates_NK, hidden_ND.dtype)
    return Carried(output_ND, master, jnp.sum(sizes_E))


def all_gather(
    hidden_ND: jax.Array,
    experts_NK: jax.Array,
    gates_NK: jax.Array,
    compute: Compute,
    num_experts: int,
    receive_factor: float | None,
) -> Carried:
    """Gather the tokens of all devices, take those of the own experts, sum outputs where their tokens came from."""
    (num_tokens, top_k), devices = experts_NK.shape, jax.lax.axis_size("expert")
    rows = capacity(num_tokens * top_k, devices, receive_factor)
    own = num_experts // devices
    hidden_MD, experts_MK, gates_MK = (
        jax.lax.all_gather(x, "expert", tiled=True) for x in (hidden_ND, experts_NK, gates_NK)
    )
    expert_S = experts_MK.reshape(-1) - jax.lax.axis_index("expert") * own
    order_S, sizes_E = sort_by_group(jnp.where((expert_S >= 0) & (expert_S < own), expert_S, own), own)
    # Slots of other devices' experts come last: products give zeros for them, and so does a slot beyond the buffer.
    order_R = order_S[:rows]
    inverse_S = _inverse(order_R, order_S.shape[0])
    expert_RD, master = compute(_pick(hidden_MD, order_R, inverse_S, top_k), _clipped(sizes_E, rows))
    wide = hidden_ND.dtype if top_k == 1 else jnp.float32
    partial_MD = _combine(expert_RD, order_R, inverse_S, gates_MK, wide)
    # With one expert a token all parts but one are zero, and their sum is exact in any dtype.
    output_ND = jax.lax.psum_scatter(partial_MD, "expert", scatter_dimension=0, tiled=True)
    return Carried(output_ND.astype(hidden_ND.dtype), master, jnp.sum(sizes_E))


def ragged(
    hidden_ND: jax.Array,
    experts_NK: jax.Array,
    gates_NK: jax.Array,
    compute: Compute,
    num_experts: int,
    receive_factor: float | None,
) -> Carried:
    """Send each row to its expert's device and back: two ragged all-to-alls.

    A slice is what one device sends to one expert, so rows arrive grouped by expert, ready for the products.
    """
    (num_tokens, top_k), devices = experts_NK.shape, jax.lax.axis_size("expert")
    rows = capacity(num_tokens * top_k, devices, receive_factor)
    order_R, sizes_E = sort_by_group(experts_NK.reshape(-1), num_experts)
    inverse_R = _inverse(order_R, order_R.shape[0])
    sorted_RD = _pick(hidden_ND, order_R, inverse_R, top_k)

    there, back, own_sizes_E, arrived = _slices(jax.lax.all_gather(sizes_E, "expert"), rows)
    arrived_RD = _exchange(sorted_RD, there, back, rows)
    expert_RD, master = compute(arrived_RD, own_sizes_E)
    returned_RD = _exchange(expert_RD, back, there, sorted_RD.shape[0])
    return Carried(_combine(returned_RD, order_R, inverse_R, gates_NK, hidden_ND.dtype), master, arrived)


CARRIERS: dict[Transport, Carrier] = {"local": local, "all_gather": all_gather, "ragged": ragged}


UNMEASURED_FACTOR = 3.0
"""Rows that a device can receive over the mean, before anybody has measured how many arrive."""


def capacity(rows: int, devices: int, receive_factor: float | None) -> int:
    """Rows that a device can receive in one layer: the mean times the factor, a multiple of 16, or all there are.

    Args:
      rows: N k, what each of the `devices` sends and what each receives on average.
      receive_factor: None is `UNMEASURED_FACTOR`.
    """
    factor = UNMEASURED_FACTOR if receive_factor is None else receive_factor
    return min(math.ceil(rows * min(factor, devices) / 16) * 16, rows * devices)


class _Slices(NamedTuple):
    """Arguments of `jax.lax.ragged_all_to_all` for one direction, int32 `[E]`: slice i concerns expert-slot i."""

    input_offsets: jax.Array
    send_sizes: jax.Array
    output_offsets: jax.Array
    recv_sizes: jax.Array


def _slices(sizes_PE: jax.Array, rows: int) -> tuple[_Slices, _Slices, jax.Array, jax.Array]:
    """From what each of P devices has for each of E experts: slices there and back, own group sizes, rows for them.

    Rows are received expert by expert, and for each expert device by device; what lies beyond `rows` is not sent,
    though it is counted among the last.
    """
    devices, num_experts = sizes_PE.shape
    own, me = num_experts // devices, jax.lax.axis_index("expert")
    # [receiver, expert of the receiver, sender]
    wanted_QeP = sizes_PE.T.reshape(devices, own, devices)
    ends_QeP = jnp.cumsum(wanted_QeP.reshape(devices, -1), axis=1).reshape(wanted_QeP.shape)
    starts_QeP = ends_QeP - wanted_QeP
    taken_QeP = jnp.minimum(ends_QeP, rows) - jnp.minimum(starts_QeP, rows)
    place_QeP = jnp.minimum(starts_QeP, rows)
    # Where each sender keeps its rows for each expert.
    kept_PE = jnp.cumsum(sizes_PE, axis=1) - sizes_PE

    mine_PeQ = jnp.swapaxes(taken_QeP, 0, 2)  # [sender, expert, receiver]
    sent_E = mine_PeQ[me].T.reshape(-1)
    arrive_E = jnp.swapaxes(place_QeP, 0, 2)[me].T.reshape(-1)
    received_E = taken_QeP[me].T.reshape(-1)
    received_at_E = place_QeP[me].T.reshape(-1)
    kept_at_sender_E = jax.lax.dynamic_slice_in_dim(kept_PE, me * own, own, axis=1).reshape(-1)
    there = _Slices(kept_PE[me], sent_E, arrive_E, received_E)
    back = _Slices(received_at_E, received_E, kept_at_sender_E, sent_E)
    return there, back, jnp.sum(taken_QeP[me], axis=1), jnp.sum(wanted_QeP[me])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _exchange(rows_RD: jax.Array, there: _Slices, back: _Slices, num_rows: int) -> jax.Array:
    """`[num_rows, D]` with the slices that arrive, zero elsewhere; the gradient takes the way back."""
    # Made from the rows, so that inside `shard_map` it varies over the mesh as they do.
    empty_RD = jnp.broadcast_to(jnp.zeros_like(rows_RD[:1]), (num_rows, rows_RD.shape[1]))
    return jax.lax.ragged_all_to_all(rows_RD, empty_RD, *there, axis_name="expert")


def _exchange_forward(
    rows_RD: jax.Array, there: _Slices, back: _Slices, num_rows: int
) -> tuple[jax.Array, tuple[_Slices, _Slices, jax.Array]]:
    # An array without elements remembers how many rows there were.
    return _exchange(rows_RD, there, back, num_rows), (there, back, rows_RD[:, :0])


def _exchange_backward(
    num_rows: int, saved: tuple[_Slices, _Slices, jax.Array], grad_RD: jax.Array
) -> tuple[jax.Array, None, None]:
    there, back, sent = saved
    return _exchange(grad_RD, back, there, sent.shape[0]), None, None


_exchange.defvjp(_exchange_forward, _exchange_backward)


def _clipped(sizes_E: jax.Array, rows: int) -> jax.Array:
    """Group sizes with what lies beyond `rows` cut off."""
    ends_E = jnp.minimum(jnp.cumsum(sizes_E), rows)
    return jnp.diff(ends_E, prepend=0)


def _inverse(order_R: jax.Array, num_slots: int) -> jax.Array:
    """Row of each slot, R for a slot without one; `order_R` holds each slot at most once."""
    rows = jnp.arange(order_R.shape[0], dtype=order_R.dtype)
    nowhere = jnp.full((num_slots,), order_R.shape[0], order_R.dtype)
    return nowhere.at[order_R].set(rows, unique_indices=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _pick(rows_RD: jax.Array, order_S: jax.Array, inverse: jax.Array, copies: int) -> jax.Array:
    """`rows[order // copies]`, zero where out of range: row r may go to `copies` places, its slots `r * copies ...`.

    `inverse` has the place of each slot, so the gradient is a gather too, where autodiff would scatter.
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


def _combine(
    expert_RD: jax.Array,
    order_R: jax.Array,
    inverse_S: jax.Array,
    gates_NK: jax.Array,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Sum over each token's slots of gate times the row computed for it, `[N, D]`, added in float32."""
    output_NKD = _pick(expert_RD, inverse_S, order_R, 1).reshape(*gates_NK.shape, -1)
    return jnp.sum(gates_NK[:, :, None] * output_NKD.astype(jnp.float32), axis=1).astype(dtype)
