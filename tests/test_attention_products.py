"""Attention by libraries: splash attention interpreted against NumPy and compiled for TPU; what cuDNN is asked for."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from planned import needs_compiler, small
from unipool_jax.config.schema import MeshConfig
from unipool_jax.kernels import attention, implementations
from unipool_jax.kernels.attention import cudnn_attention, splash_attention, splash_tile, splash_tiles
from unipool_jax.kernels.causal import causal_attention
from unipool_jax.model.attention import sequence_product
from unipool_jax.parallel.mesh import make_mesh
from unipool_jax.planner import compilation


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("window", [None, 130])
def test_splash_attention_against_numpy(monkeypatch: pytest.MonkeyPatch, window: int | None, apart: bool) -> None:
    """Three tiles of 128, the last of them padded; a window that ends inside a tile; heads that share keys."""
    monkeypatch.setattr(attention, "_LARGEST_TILE", 128)
    length, random = 300, np.random.default_rng(0)
    wide = [random.normal(size=(1, length, heads, 16)) for heads in (2, 1, 1)]
    upstream = random.normal(size=wide[0].shape)
    segments = np.sort(random.integers(0, 4, (1, length)).astype(np.int32)) if apart else None

    @jax.jit
    def both(*operands: jax.Array) -> Any:
        numbers = None if segments is None else jnp.asarray(segments)
        product = functools.partial(splash_attention, segments_BS=numbers, window=window)
        found, pullback = jax.vjp(product, *operands)
        return found, pullback(jnp.asarray(upstream, jnp.float32))

    found, gradients = both(*(jnp.asarray(array, jnp.float32) for array in wide))
    query, key, value = (array[0] for array in wide)
    seen = oracles.visible(length, window, None if segments is None else segments[0])
    np.testing.assert_allclose(found[0], oracles.product(query, key, value, seen), rtol=1e-3, atol=1e-4)
    expected = oracles.product_gradients(query, key, value, seen, upstream[0])
    for mine, theirs in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(mine[0], theirs, rtol=1e-3, atol=1e-4)


def test_tiles_are_those_that_the_mask_leaves() -> None:
    """Counted in a mask that is written out."""
    for length, window in ((1024, None), (1024, 256), (1024, 257), (1024, 258), (640, 1), (640, 129), (640, 130)):
        tile = splash_tile(length)
        tiles = oracles.visible(length, window).reshape(length // tile, tile, length // tile, tile).any((1, 3))
        assert splash_tiles(length, window) == tiles.sum(), (length, window)


def test_each_device_attends_with_its_rows_and_heads() -> None:
    config = small("dense", "kernels.attention=splash")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    random = np.random.default_rng(0)
    operands = [jnp.asarray(random.normal(size=(4, 10, heads, 8)), jnp.float32) for heads in (4, 2, 2)]
    segments = jnp.asarray(np.sort(random.integers(0, 3, (4, 10))), jnp.int32)

    def loss(product: Any, *operands: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(product(*operands, segments, window=3)))

    gradient = jax.grad(loss, argnums=(1, 2, 3))
    with jax.set_mesh(mesh):
        found = jax.jit(gradient, static_argnums=0)(sequence_product(config), *operands)
    expected = jax.jit(gradient, static_argnums=0)(causal_attention, *operands)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@needs_compiler
def test_a_step_compiles_for_tpu() -> None:
    """Splash attention of each device's rows and heads, below the conditional of alternating layers, with segments."""
    config = small(
        "dense",
        *("kernels.attention=auto", "model.remat=moe", "mesh.fsdp=2", "mesh.expert=1", "mesh.tensor=2"),
        *("model.num_layers=2", "model.num_kv_heads=2", "data.sequence_length=1024", "data.document_mask=true"),
        *("attention.kind=alternating", "attention.window=100", "attention.full_layers=2"),
    )
    program = compilation.compile_step(config, compilation.topology_mesh(config))
    for kernel in ("fwd", "dq", "dkv"):
        assert f"splash_mha_{kernel}" in program.text


@pytest.mark.parametrize(
    ("platform", "dtype", "head_size", "chosen"),
    [
        ("cpu", "bfloat16", 64, "blocks"),
        ("tpu", "float32", 64, "splash"),
        ("gpu", "bfloat16", 64, "cudnn"),
        ("gpu", "bfloat16", 128, "cudnn"),
        ("gpu", "bfloat16", 256, "blocks"),
        ("gpu", "bfloat16", 4, "blocks"),
        ("gpu", "float32", 64, "blocks"),
    ],
)
def test_one_table_chooses(
    monkeypatch: pytest.MonkeyPatch, platform: str, dtype: str, head_size: int, chosen: str
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert implementations.resolve_attention("auto", dtype, head_size) == chosen
    assert implementations.resolve_attention("blocks", dtype, head_size) == "blocks"


def test_a_library_of_another_platform_is_refused() -> None:
    assert implementations.attention_problem("auto") is None
    assert implementations.attention_problem("blocks") is None
    for name, home in (("splash", "tpu"), ("cudnn", "gpu")):
        problem = implementations.attention_problem(name)  # type: ignore[arg-type]
        assert problem == f"kernels.attention={name}: made for {home}, not cpu; set it to auto"


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("apart", [False, True])
def test_what_cudnn_is_asked_for_is_our_product(
    monkeypatch: pytest.MonkeyPatch, apart: bool, window: int | None
) -> None:
    """The library's own reference of the same call; no GPU is here."""
    library = jax.nn.dot_product_attention

    def elsewhere(*operands: Any, implementation: str, **options: Any) -> jax.Array:
        assert implementation == "cudnn"
        assert options["mask"] is None or operands[0].shape[1] % 2 == 0
        return library(*operands, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", elsewhere)
    length, random = 21, np.random.default_rng(0)
    wide = [random.normal(size=(1, length, heads, 8)) for heads in (4, 2, 2)]
    segments = np.sort(random.integers(0, 3, (1, length)).astype(np.int32)) if apart else None
    numbers = None if segments is None else jnp.asarray(segments)
    product = functools.partial(cudnn_attention, segments_BS=numbers, window=window)
    found = product(*(jnp.asarray(array, jnp.float32) for array in wide))
    query, key, value = (array[0] for array in wide)
    seen = oracles.visible(length, window, None if segments is None else segments[0])
    np.testing.assert_allclose(found[0], oracles.product(query, key, value, seen), rtol=1e-4, atol=1e-5)
