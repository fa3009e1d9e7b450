"""The loss of the output head against NumPy in float64, and that the logits of a full batch are never in memory."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unipool_jax.config.schema import MeshConfig
from unipool_jax.parallel import head
from unipool_jax.parallel.head import Head
from unipool_jax.parallel.mesh import make_mesh, spec

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
    monkeypatch.setattr(head, "CHUNK", 8)
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
    """32,768 positions and 4,096 tokens: all logits would be 537 MB, and a training step would hold several."""
    shapes = Head._make(jax.ShapeDtypeStruct(size, jnp.float32) for size in ((32, 1024, WIDTH), (4096, WIDTH)))
    targets = jax.ShapeDtypeStruct((32, 1024), jnp.int32)
    weights = jax.ShapeDtypeStruct((32, 1024), jnp.float32)
    step = jax.jit(jax.value_and_grad(lambda h, t, w: h.weighted_loss(t, w)))
    memory = step.lower(shapes, targets, weights).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 64e6


@pytest.mark.parametrize(
    ("sizes", "length"), [((2, 2, 2, 1), 16), ((8, 1, 1, 1), 7), ((1, 2, 2, 2), 7)], ids=["even", "uneven", "tensor"]
)
def test_losses_over_a_mesh(sizes: tuple[int, int, int, int], length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 4 positions a device: two of each of its two sequences, or one of each of four."""
    monkeypatch.setattr(head, "CHUNK", 4)
    given, targets, weights = example(16, length)
    losses, *_ = oracle(given, targets, weights)
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:8])
    places = (jax.P(spec("batch")[0]), spec("vocab", "embed"))
    with jax.set_mesh(mesh):
        placed = Head(*(jax.device_put(x, jax.NamedSharding(mesh, p)) for x, p in zip(given, places, strict=True)))
        found = jax.jit(Head.token_losses)(placed, targets)
    np.testing.assert_allclose(found, losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [(1, 4, 2, 1), (1, 2, 2, 2)], ids=["whole vocabulary", "split vocabulary"])
def test_no_device_of_a_mesh_holds_the_logits_of_its_batch(sizes: tuple[int, int, int, int]) -> None:
    """Evaluation of 131,072 positions and 4,096 tokens: all logits would be 268 MB per device and more."""
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:8])

    def shape(dtype: jax.typing.DTypeLike, *size: int, logical: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, dtype, sharding=jax.NamedSharding(mesh, spec(*logical)))

    shapes = Head._make(
        [
            shape(jnp.float32, 128, 1024, WIDTH, logical=("batch",)),
            shape(jnp.float32, 4096, WIDTH, logical=("vocab", "embed")),
        ]
    )
    targets = shape(jnp.int32, 128, 1024, logical=("batch",))
    with jax.set_mesh(mesh):
        compiled = jax.jit(Head.token_losses).lower(shapes, targets).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    assert memory.temp_size_in_bytes < 64e6
    # What crosses devices is the matrix, not positions.
    moved = re.findall(r" = (\S+) (?:all-gather|all-to-all|collective-permute)\(", text)
    assert len(moved) == 1
    assert str(WIDTH) in moved[0]
