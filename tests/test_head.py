"""The loss of the output head against NumPy in float64, and that logits of a whole batch are never in memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unipool_jax.model import head
from unipool_jax.model.head import Head

VOCABULARY, WIDTH = 40, 8


def example(batch: int, length: int) -> tuple[Head, np.ndarray, np.ndarray]:
    """A head, targets, and weights of which some are zero."""
    random = np.random.default_rng(0)
    hidden = random.normal(size=(batch, length, WIDTH)).astype(np.float32)
    output = random.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
    targets = random.integers(0, VOCABULARY, (batch, length), dtype=np.int32)
    return Head(jnp.asarray(hidden), jnp.asarray(output)), targets, random.integers(0, 3, (batch, length)) / 2


def oracle(example_head: Head, targets: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses `[B, S]`, and gradients of their weighted sum to the hidden states and the output matrix, float64."""
    hidden, output = (np.asarray(array, np.float64) for array in example_head)
    logits = hidden @ output.T
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = exponentials / exponentials.sum(-1, keepdims=True)
    one_hot = np.eye(VOCABULARY)[targets]
    grad = (probabilities - one_hot) * weights[..., None]
    losses = -np.log((probabilities * one_hot).sum(-1))
    return losses, grad @ output, np.einsum("bsv,bsd->vd", grad, hidden)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 4), (2, 8), (3, 7)], ids=["one", "chunk", "two", "uneven"])
def test_losses_and_gradients(batch: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With chunks of 8: a single position, one chunk, two, and 21 positions, which leave the last chunk part empty."""
    monkeypatch.setattr(head, "_CHUNK", 8)
    given, targets, weights = example(batch, length)
    losses, hidden_grad, output_grad = oracle(given, targets, weights)

    np.testing.assert_allclose(given.token_losses(targets), losses, rtol=1e-5, atol=1e-6)
    # A factor on the loss: what is saved belongs to a cotangent of one.
    value, (grads, by_weight) = jax.value_and_grad(lambda h, w: 3 * h.weighted_loss(targets, w), (0, 1))(
        given, jnp.asarray(weights, jnp.float32)
    )
    np.testing.assert_allclose(value, 3 * (losses * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(grads.hidden_BSD, 3 * hidden_grad, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads.output_VD, 3 * output_grad, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_weight, 3 * losses, rtol=1e-5, atol=1e-6)


def test_gradients_have_the_dtypes_of_their_arrays() -> None:
    given, targets, weights = example(2, 4)
    narrow = given._replace(hidden_BSD=given.hidden_BSD.astype(jnp.bfloat16))
    grads = jax.grad(lambda h: h.weighted_loss(targets, weights.astype(np.float32)))(narrow)
    assert grads.hidden_BSD.dtype == jnp.bfloat16
    assert grads.output_VD.dtype == jnp.float32
    _, hidden_grad, output_grad = oracle(narrow, targets, weights)
    np.testing.assert_allclose(grads.hidden_BSD.astype(jnp.float32), hidden_grad, rtol=0.05, atol=0.05)
    np.testing.assert_allclose(grads.output_VD, output_grad, rtol=0.05, atol=0.05)


def test_large_logits_do_not_overflow() -> None:
    given, targets, weights = example(2, 4)
    large = given._replace(output_VD=given.output_VD * 1000)
    loss, grads = jax.value_and_grad(lambda h: h.weighted_loss(targets, weights.astype(np.float32)))(large)
    assert np.isfinite(loss)
    assert all(np.isfinite(grad).all() for grad in grads)


def test_no_array_holds_the_logits_of_a_batch() -> None:
    """32,768 positions and 4,096 tokens: whole logits would be 537 MB, and a training step would hold several."""
    shapes = Head(
        jax.ShapeDtypeStruct((32, 1024, WIDTH), jnp.float32), jax.ShapeDtypeStruct((4096, WIDTH), jnp.float32)
    )
    targets = jax.ShapeDtypeStruct((32, 1024), jnp.int32)
    weights = jax.ShapeDtypeStruct((32, 1024), jnp.float32)
    step = jax.jit(jax.value_and_grad(lambda h, t, w: h.weighted_loss(t, w)))
    assert step.lower(shapes, targets, weights).compile().memory_analysis().temp_size_in_bytes < 64e6
