"""What the backward pass recomputes: the same on every mesh."""

from __future__ import annotations

import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiny import batch_shapes, tiny_batch, tiny_config
from unipool_jax.config.schema import MeshConfig, Remat
from unipool_jax.kernels.recompute import recompute
from unipool_jax.parallel.mesh import make_mesh
from unipool_jax.training.state import state_shapes
from unipool_jax.training.step import make_train_step


def _products(function: Any, *arguments: Any) -> int:
    return jax.jit(jax.value_and_grad(function)).lower(*arguments).as_text().count("dot_general")


def test_a_policy_around_it_does_not_reach_into_a_recomputed_function() -> None:
    """Plain `jax.checkpoint` fails this: the outer policy keeps what the inner one drops."""

    def block(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.sin(jnp.sin(x @ weights) @ weights)

    def loss(inner: Any) -> Any:
        keep_all = jax.checkpoint_policies.everything_saveable
        return jax.checkpoint(lambda weights: jnp.sum(inner(jnp.ones((2, 3)), weights)), policy=keep_all)

    weights = jnp.eye(3)
    plain, recomputed = _products(loss(block), weights), _products(loss(recompute(block)), weights)
    # Both products again; of the plain function everything was kept.
    assert recomputed - plain == 2
    np.testing.assert_allclose(jax.grad(loss(recompute(block)))(weights), jax.grad(loss(block))(weights), rtol=1e-6)


@pytest.mark.parametrize(
    ("policies", "more"),
    [
        (("none", "experts", "moe"), ("unipool",)),
        pytest.param(typing.get_args(Remat), ("unipool",), marks=pytest.mark.slow),
        pytest.param(typing.get_args(Remat), ("vanilla",), marks=pytest.mark.slow),
        pytest.param(typing.get_args(Remat), ("unipool", "pool.groups=2"), marks=pytest.mark.slow),
    ],
)
def test_a_mesh_recomputes_what_one_device_does(policies: tuple[Remat, ...], more: tuple[str, ...]) -> None:
    """Products of the traced step over fsdp 2, where pools are gathered again, and on one device."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2])
    products: dict[str, tuple[int, int]] = {}
    for remat in policies:
        config = tiny_config(*more, "moe.experts_per_layer=8", f"model.remat={remat}")
        single: Any = make_train_step(config)
        alone = single.lower(state_shapes(config), tiny_batch(config))
        with jax.set_mesh(mesh):
            step: Any = make_train_step(config, mesh)
            lowered = step.lower(state_shapes(config, mesh), batch_shapes(config, mesh))
        products[remat] = (lowered.as_text().count("dot_general"), alone.as_text().count("dot_general"))
    rising = [products[remat][0] for remat in ("none", "router", "experts", "moe", "full") if remat in products]
    assert rising == sorted(set(rising))
    assert "attention" not in products or products["none"][0] < products["attention"][0] < products["full"][0]
    # The head is made in chunks on one device, so only differences compare.
    for remat in policies:
        assert products[remat][0] - products["none"][0] == products[remat][1] - products["none"][1]
