"""The output head and its loss. The logits of a full batch are in memory only if the caller requests them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from unipool_jax.parallel.linear import linear
from unipool_jax.parallel.mesh import active_mesh, constrain, gathered, num_shards

CHUNK = 512
"""Positions of a device whose logits are made at once: enough rows for a product at full speed, few enough to stay in
cache."""


class Head(NamedTuple):
    """Normed output of the last layer, `[B, S, D]` in the compute dtype, and the output matrix, float32 `[V, D]`."""

    hidden_BSD: jax.Array
    output_VD: jax.Array

    def logits(self) -> jax.Array:
        """Logits of the next token at every position, float32 `[B, S, V]` over the padded vocabulary."""
        logits_BSV = linear(self.hidden_BSD, self.output_VD, ("vocab", "embed"), transposed=True, wide=True)
        return constrain(logits_BSV, "batch", None, "vocab")

    def token_losses(self, targets_BS: ArrayLike) -> jax.Array:
        """Cross-entropy of every position, in nats, float32 `[B, S]`; to be evaluated, not differentiated."""
        batch, length, _ = self.hidden_BSD.shape
        mesh = active_mesh()
        rows = batch if mesh is None else -(-batch // num_shards(mesh, "batch"))
        positions = min(length, max(1, CHUNK // rows))

        def split(array: jax.Array) -> jax.Array:
            """Chunks of the sequence axis, first: rows stay on the devices that have them."""
            array = jnp.pad(array, [(0, 0), (0, -length % positions), *[(0, 0)] * (array.ndim - 2)])
            array = jnp.moveaxis(array.reshape(batch, -1, positions, *array.shape[2:]), 1, 0)
            return constrain(array, None, "batch", *[None] * (array.ndim - 2))

        # Gathered before the loop, once.
        used_VD = gathered(self.output_VD.astype(self.hidden_BSD.dtype), "vocab", "embed")

        def losses_of(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
            hidden_BCD, targets_BC = chunk
            return cross_entropy(constrain(_logits(hidden_BCD, used_VD), "batch", None, "vocab"), targets_BC)

        losses_XBC = lax.map(losses_of, (split(self.hidden_BSD), split(jnp.asarray(targets_BS))))
        return jnp.moveaxis(losses_XBC, 0, 1).reshape(batch, -1)[:, :length]

    def weighted_loss(self, targets_BS: ArrayLike, weights_BS: ArrayLike) -> jax.Array:
        """Sum over positions of weight times cross-entropy in nats, float32 scalar; its gradient takes no second pass.

        Over a mesh the logits are made whole: each chunk would add up a weight gradient of full size over the devices.
        """
        if active_mesh() is not None:
            return jnp.sum(cross_entropy(self.logits(), targets_BS) * weights_BS)
        return _weighted_loss(self.output_VD, *self._chunks(targets_BS, weights_BS))

    def distilled_loss(
        self, teacher: Head, targets_BS: ArrayLike, weights_BS: ArrayLike, weight: float, temperature: float
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A loss with a teacher, and its two parts, which are only to be reported; float32 scalars.

        Weighted sums over positions of cross-entropy, and of `divergence` from the teacher; the loss is
        (1 - weight) x the first + weight x the second. Logits of both are made chunk by chunk, those of the teacher
        without a gradient; over a mesh whole, as in `weighted_loss`.
        """
        fixed = Head(*lax.stop_gradient(tuple(teacher)))
        if active_mesh() is not None:
            ours, theirs = self.logits(), fixed.logits()
            text = jnp.sum(cross_entropy(ours, targets_BS) * weights_BS)
            apart = jnp.sum(divergence(ours, theirs, temperature) * weights_BS)
            return (1 - weight) * text + weight * apart, text, apart
        chunks, (theirs_XCD,) = self._chunks(targets_BS, weights_BS), fixed._chunks()
        return _distilled_loss(weight, temperature, self.output_VD, *chunks, fixed.output_VD, theirs_XCD)

    def _chunks(self, *values_BS: ArrayLike) -> tuple[jax.Array, ...]:
        """Hidden states and values of all positions, `[X, C, ...]`; zeros behind the last."""

        def split(array: jax.Array, positions: int) -> jax.Array:
            array = array.reshape(positions, *array.shape[2:])
            padding = -positions % min(positions, CHUNK)
            array = jnp.pad(array, [(0, padding), *[(0, 0)] * (array.ndim - 1)])
            return array.reshape(-1, min(positions, CHUNK), *array.shape[1:])

        batch, length, _ = self.hidden_BSD.shape
        return tuple(split(jnp.asarray(array), batch * length) for array in (self.hidden_BSD, *values_BS))


def cross_entropy(logits: jax.Array, targets: ArrayLike) -> jax.Array:
    """Cross-entropy in nats over the last axis of the logits: `[..., V]` and int `[...]` -> float32 `[...]`."""
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(_chosen(logits, targets), logits, 0.0), axis=-1)


def divergence(logits: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
    """T^2 KL(softmax(teacher / T) || softmax(logits / T)) in nats over the last axis, float32 (arXiv 1503.02531).

    The square makes up for gradients that shrink by it, so that a weight means the same at every temperature.
    """
    ours, theirs = (jax.nn.log_softmax(array / temperature, axis=-1) for array in (logits, teacher))
    return temperature**2 * jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)


def _chosen(logits: jax.Array, targets: ArrayLike) -> jax.Array:
    """Mask of the targets: a masked sum, not a gather, because over a mesh the vocabulary may be split."""
    return jnp.arange(logits.shape[-1]) == jnp.asarray(targets)[..., None]


def _logits(hidden: jax.Array, used_VD: jax.Array) -> jax.Array:
    return jnp.einsum("...d,vd->...v", hidden, used_VD, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _weighted_loss(
    output_VD: jax.Array, hidden_XCD: jax.Array, targets_XC: jax.Array, weights_XC: jax.Array
) -> jax.Array:
    return _loss_and_gradients(output_VD, hidden_XCD, targets_XC, weights_XC)[0]


def _loss_and_gradients(
    output_VD: jax.Array, hidden_XCD: jax.Array, targets_XC: jax.Array, weights_XC: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The loss, and what its gradients are for a cotangent of one.

    The gradient of the logits of a position is known as soon as they are: weight x (softmax - one-hot).
    """
    used_VD = output_VD.astype(hidden_XCD.dtype)

    def add_chunk(
        grad_VD: jax.Array, chunk: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        hidden_CD, targets_C, weights_C = chunk
        logits_CV = _logits(hidden_CD, used_VD)
        total_C1 = jax.nn.logsumexp(logits_CV, axis=-1, keepdims=True)
        grad_CV = (jnp.exp(logits_CV - total_C1) - _chosen(logits_CV, targets_C)) * weights_C[:, None]
        grad_VD = grad_VD + jnp.einsum("cv,cd->vd", grad_CV, hidden_CD, preferred_element_type=jnp.float32)
        hidden_grad_CD = jnp.einsum("cv,vd->cd", grad_CV, used_VD, preferred_element_type=jnp.float32)
        return grad_VD, (cross_entropy(logits_CV, targets_C), hidden_grad_CD)

    zeros_VD = jnp.zeros(output_VD.shape, jnp.float32)
    grad_VD, (losses_XC, hidden_grad_XCD) = lax.scan(add_chunk, zeros_VD, (hidden_XCD, targets_XC, weights_XC))
    # Arrays without elements remember the dtype of the hidden states.
    return jnp.sum(losses_XC * weights_XC), (grad_VD, hidden_grad_XCD, losses_XC, hidden_XCD[:0])


def _scaled_gradients(saved: tuple[jax.Array, ...], grad: jax.Array) -> tuple[jax.Array | None, ...]:
    grad_VD, hidden_grad_XCD, losses_XC, like_hidden = saved
    return grad * grad_VD, (grad * hidden_grad_XCD).astype(like_hidden.dtype), None, grad * losses_XC


_weighted_loss.defvjp(_loss_and_gradients, _scaled_gradients)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _distilled_loss(
    weight: float,
    temperature: float,
    output_VD: jax.Array,
    hidden_XCD: jax.Array,
    targets_XC: jax.Array,
    weights_XC: jax.Array,
    teacher_VD: jax.Array,
    teacher_XCD: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    operands = output_VD, hidden_XCD, targets_XC, weights_XC, teacher_VD, teacher_XCD
    return _distilled_loss_and_gradients(weight, temperature, *operands)[0]


def _distilled_loss_and_gradients(
    weight: float,
    temperature: float,
    output_VD: jax.Array,
    hidden_XCD: jax.Array,
    targets_XC: jax.Array,
    weights_XC: jax.Array,
    teacher_VD: jax.Array,
    teacher_XCD: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]]:
    """As `_loss_and_gradients`. The gradient of T^2 KL(p || q) by the student's logits is T (q - p)."""
    used_VD, teacher_VD = output_VD.astype(hidden_XCD.dtype), teacher_VD.astype(teacher_XCD.dtype)

    def add_chunk(
        grad_VD: jax.Array, chunk: tuple[jax.Array, jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
        hidden_CD, targets_C, weights_C, teacher_CD = chunk
        logits_CV, theirs_CV = _logits(hidden_CD, used_VD), _logits(teacher_CD, teacher_VD)
        of_text_CV = jax.nn.softmax(logits_CV) - _chosen(logits_CV, targets_C)
        apart_CV = jax.nn.softmax(logits_CV / temperature) - jax.nn.softmax(theirs_CV / temperature)
        grad_CV = ((1 - weight) * of_text_CV + weight * temperature * apart_CV) * weights_C[:, None]
        grad_VD = grad_VD + jnp.einsum("cv,cd->vd", grad_CV, hidden_CD, preferred_element_type=jnp.float32)
        hidden_grad_CD = jnp.einsum("cv,vd->cd", grad_CV, used_VD, preferred_element_type=jnp.float32)
        apart_C = divergence(logits_CV, theirs_CV, temperature)
        return grad_VD, (cross_entropy(logits_CV, targets_C), apart_C, hidden_grad_CD)

    zeros_VD = jnp.zeros(output_VD.shape, jnp.float32)
    chunks = hidden_XCD, targets_XC, weights_XC, teacher_XCD
    grad_VD, (text_XC, apart_XC, hidden_grad_XCD) = lax.scan(add_chunk, zeros_VD, chunks)
    text, apart = jnp.sum(text_XC * weights_XC), jnp.sum(apart_XC * weights_XC)
    by_weight_XC = (1 - weight) * text_XC + weight * apart_XC
    # An array without elements remembers the dtype of the hidden states.
    saved = grad_VD, hidden_grad_XCD, by_weight_XC, hidden_XCD[:0]
    return ((1 - weight) * text + weight * apart, text, apart), saved


def _scaled_distilled_gradients(
    weight: float, temperature: float, saved: tuple[jax.Array, ...], grads: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    return *_scaled_gradients(saved, grads[0]), None, None


_distilled_loss.defvjp(_distilled_loss_and_gradients, _scaled_distilled_gradients)
