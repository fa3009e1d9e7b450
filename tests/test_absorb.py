"""Norms behind blocks in the weights of the blocks: exact where what they divide by is constant."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import oracles
from test_upcycle import scaled
from tiny import tiny_batch, tiny_config
from unipool_jax.config.rules import validate
from unipool_jax.convert.absorb import absorb, absorbed_config
from unipool_jax.convert.errors import ConversionError
from unipool_jax.convert.weights import empty_weights

pytestmark = pytest.mark.filterwarnings("ignore:NormRouter over")

AROUND = (
    *("model.num_layers=3", "moe.dense_layers=1", "pool.groups=2", "moe.top_k=2"),
    *("moe.shared_experts=1", "moe.shared_expert_gate=true"),
)


@pytest.mark.parametrize(
    ("method", "norm"),
    [
        (("dense", "model.num_layers=2"), "norm_then_gate"),
        (("vanilla", *AROUND), "norm_then_gate"),
        (("vanilla", *AROUND), "post"),
        (("unipool", "model.num_layers=2"), "none"),
    ],
    ids=str,
)
def test_absorbed_norms_of_constant_size_change_nothing(method: tuple[str, ...], norm: str) -> None:
    """On a text of one token all positions are the same, and so is what a norm divides by at each of them."""
    config = tiny_config(*method, "model.norm=sandwich", f"model.post_norm_experts={norm}")
    target = absorbed_config(config)
    validate(dataclasses.replace(target, mode="describe"))
    weights, batch = scaled(config), tiny_batch(config)
    batch = batch._replace(inputs=np.full_like(batch.inputs, 7))
    found = absorb(config, weights, [batch, batch])
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), found, empty_weights(target))
    before = oracles.Forward(config, weights.params, batch.inputs[:1])
    after = oracles.Forward(target, found.params, batch.inputs[:1])
    np.testing.assert_allclose(after.logits, before.logits, rtol=1e-3, atol=1e-4)
    # Another token has other sizes.
    other = np.full_like(batch.inputs[:1], 9)
    apart = oracles.Forward(target, found.params, other).logits - oracles.Forward(config, weights.params, other).logits
    assert np.abs(apart).max() > 1e-2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), r"model\.norm=pre: the run has no norms"),
        (("model.norm=sandwich",), "4 layers share each expert"),
    ],
)
def test_what_cannot_be_absorbed_is_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        absorbed_config(tiny_config("unipool", *words))
