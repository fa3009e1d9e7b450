"""Norms behind blocks and small first weights, against their formulas (arXiv 2504.07866)."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from oracles import rms_norm_gradients
from tiny import tiny_config
from unipool_jax.config.schema import Config, MeshConfig, ModelConfig
from unipool_jax.convert.layouts import make_layout
from unipool_jax.convert.weights import ConversionError, empty_weights
from unipool_jax.kernels.grouped_ffn import Bank
from unipool_jax.kernels.norms import post_norm, rms_norm
from unipool_jax.model.transformer import LayerInputs, Transformer, apply
from unipool_jax.moe.bank import Experts, pool_experts
from unipool_jax.moe.mixture import RouterWeights, Selection, dense_ffn, mixture, moe_ffn
from unipool_jax.moe.routing import Routing, RoutingStats
from unipool_jax.parallel.mesh import make_mesh
from unipool_jax.training.optimizer import decay_mask

pytestmark = pytest.mark.filterwarnings("ignore:NormRouter over")

PUBLISHED = [
    # L, H, standard deviation of TinyInit, first gains behind attention and feed-forward block
    (12, 768, 7.37e-3, 0.0817, 0.1247),
    (24, 1024, 4.51e-3, 0.0578, 0.0882),
    (36, 1024, 3.68e-3, 0.0472, 0.0720),
    (48, 1024, 3.19e-3, 0.0408, 0.0624),
    (24, 1536, 3.68e-3, 0.0578, 0.0882),
    (94, 12288, 6.58e-4, 0.0292, 0.0446),
]
DEPTHS = (4, 12, 48, 94)


@pytest.mark.parametrize(("layers", "width", "std", "attention", "ffn"), PUBLISHED)
def test_first_gains_and_weights(layers: int, width: int, std: float, attention: float, ffn: float) -> None:
    model = ModelConfig(num_layers=layers, hidden_size=width, norm="depth_scaled_sandwich", init="tiny")
    assert model.matrix_std == model.output_std == pytest.approx(std, rel=2e-3)
    assert model.post_norm_gain(model.post_norm_attention) == pytest.approx(attention, rel=2e-3)
    assert model.post_norm_gain(model.post_norm_ffn) == pytest.approx(ffn, rel=2e-3)
    assert dataclasses.replace(model, norm="sandwich").post_norm_gain(model.post_norm_ffn) == 1


def first_params(config: Config) -> Any:
    bias = jnp.zeros((config.pool.groups, config.layers_per_pool, config.experts_per_pool))
    init = jax.jit(
        lambda key: Transformer(config).init(key, jnp.zeros((1, 8), jnp.int32), LayerInputs(Selection(bias)))
    )
    return jax.device_get(init(jax.random.key(0))["params"])


def test_the_first_parameters_are_those_of_the_settings() -> None:
    """Every matrix but routers and gates has the standard deviation of TinyInit, the embedding its own."""
    words = ("model.norm=depth_scaled_sandwich", "model.init=tiny", "model.embedding_std=0.3", "model.hidden_size=32")
    around = ("moe.shared_experts=1", "moe.shared_expert_gate=true", "moe.dense_layers=1")
    config = tiny_config("unipool", *words, *around, "model.num_layers=2", "model.init_std=2")
    params, kinds = first_params(config), set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        kind = name.rpartition(".")[2]
        gains = {"attention_post_norm": 0.283 / math.sqrt(2), "ffn_post_norm": 0.432 / math.sqrt(2)}
        if kind in gains or kind in ("attention_norm", "ffn_norm", "final_norm", "scale"):
            np.testing.assert_allclose(leaf, gains.get(kind, 1), rtol=1e-6, err_msg=name)
            continue
        expected = {"embedding": 0.3, "router": 2.0, "sigmoid_gate": 2.0}.get(kind, 1 / math.sqrt(2 * 32 * 2))
        # Of n draws the standard deviation is off by a share of 1 / sqrt(2 n).
        assert leaf.std() == pytest.approx(expected, rel=4 / math.sqrt(2 * leaf.size)), name
        kinds.add(kind)
    assert kinds >= {"embedding", "output", "query", "key", "value", "router", "gate", "up", "down", "sigmoid_gate"}
    decays = decay_mask(params)
    assert not decays["pools"]["layers"]["ffn_post_norm"]
    assert not decays["dense"]["attention_post_norm"]


def test_the_default_embedding_of_tiny_weights_is_not_tiny() -> None:
    assert ModelConfig(init="tiny").table_std == 0.5
    assert ModelConfig().table_std == ModelConfig().init_std


def test_norm_and_its_gradients_match_numpy() -> None:
    """Rows of the size that blocks have at first, 1e-3, of the usual size, and a row of zeros, which has no output."""
    random = np.random.default_rng(0)
    x = random.normal(size=(5, 16)) * np.array([[1e-3], [1e-4], [1.0], [30.0], [0.0]])
    gain, upstream = random.uniform(0.1, 1, 16), random.normal(size=(5, 16))
    output, pullback = jax.vjp(
        functools.partial(rms_norm, epsilon=1e-8), jnp.asarray(x, jnp.float32), jnp.asarray(gain, jnp.float32)
    )
    expected, x_grad, gain_grad = rms_norm_gradients(x, gain, 1e-8, upstream)
    found = pullback(jnp.asarray(upstream, jnp.float32))
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[0], x_grad, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[1], gain_grad, rtol=1e-4, atol=1e-5)
    assert not output[4].any()


@pytest.mark.parametrize("layers", DEPTHS)
def test_an_epsilon_of_its_own_keeps_the_first_outputs_at_their_gain(layers: int) -> None:
    """The first output of a block has RMS (2 L)^(-3/2) sqrt(F / H) / 2: at 94 layers 3.8e-4, far below the root of 1e-5
    and four times that of 1e-8."""
    width, hidden, random = 64, 256, np.random.default_rng(layers)
    model = ModelConfig(num_layers=layers, hidden_size=width, norm="depth_scaled_sandwich", init="tiny")

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(0, model.matrix_std, shape), jnp.float32)

    bank = Bank(draw(1, width, hidden), draw(1, width, hidden), draw(1, hidden, width))
    raw_ND = dense_ffn(jnp.asarray(random.normal(size=(256, width)), jnp.float32), bank)
    gain = model.post_norm_gain(model.post_norm_ffn)

    def rms(epsilon: float) -> float:
        return float(jnp.sqrt(jnp.mean(jnp.square(post_norm(raw_ND, jnp.full(width, gain), epsilon)))))

    small = (2 * layers) ** -1.5 * math.sqrt(hidden / width) / 2
    assert float(jnp.sqrt(jnp.mean(jnp.square(raw_ND)))) == pytest.approx(small, rel=0.1)
    assert rms(model.post_norm_epsilon) == pytest.approx(gain, rel=0.01 if layers < 94 else 0.05)
    assert rms(1e-10) == pytest.approx(gain, rel=0.01)
    assert rms(1e-5) == pytest.approx(gain * small / math.sqrt(small**2 + 1e-5), rel=0.1)


@functools.cache
def stream_rms(layers: int, *words: str) -> float:
    """RMS of the residual stream behind the last layer of a fresh model."""
    config = tiny_config(
        *("dense", f"model.num_layers={layers}", "model.init=tiny", "model.hidden_size=128", "model.ffn_size=32"),
        *("model.vocab_size=512", "data.sequence_length=32", "model.compute_dtype=float32", "model.remat=none", *words),
        # The last norm returns x / sqrt(ms + 1), from which ms can be read. Inputs of blocks are smaller too, which
        # the norms behind them undo.
        *("model.norm_epsilon=1", "model.post_norm_epsilon=1e-20"),
    )
    tokens = np.random.default_rng(0).integers(0, 512, (2, 32), dtype=np.int32)
    inputs = LayerInputs(Selection(jnp.zeros((layers, 1, 1))))

    @jax.jit
    def share(key: jax.Array) -> jax.Array:
        params = Transformer(config).init(key, tokens[:1, :2], inputs)["params"]
        square = jnp.mean(jnp.square(apply(config, params, tokens, inputs).head.hidden_BSD), axis=-1)
        return jnp.mean(square / (1 - square))

    return math.sqrt(np.mean([float(share(jax.random.key(seed))) for seed in range(4)]))


@pytest.mark.parametrize("layers", [4, 48, *(pytest.param(n, marks=pytest.mark.slow) for n in (12, 94))])
def test_the_stream_of_a_fresh_model_does_not_grow_with_depth(layers: int) -> None:
    """Each branch adds a vector of RMS gamma: E[h_L^2] = 0.5^2 + 0.283^2 + 0.432^2, whatever L is."""
    law = math.sqrt(0.5**2 + 0.283**2 + 0.432**2)
    assert stream_rms(layers, "model.norm=depth_scaled_sandwich") == pytest.approx(law, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "expected"), [(12, 4.7), (48, 9.2), (94, 14.2)])
def test_the_stream_of_a_plain_sandwich_grows_with_depth(layers: int, expected: float) -> None:
    """Gains of 1 and measured values of the same law, sqrt(0.25 + 2 L) and what is correlated."""
    assert stream_rms(layers, "model.norm=sandwich") == pytest.approx(expected, rel=0.1)


def router_gradient(mode: Literal["norm_then_gate", "post", "none"], top_k: int, epsilon: float) -> float:
    """Norm of the router's gradient of a mixture's output, seen through a random direction for each token."""
    config = tiny_config("unipool", f"moe.top_k={top_k}", "model.compute_dtype=float32")
    model = dataclasses.replace(config.model, norm="sandwich", post_norm_experts=mode, post_norm_epsilon=epsilon)
    config = dataclasses.replace(config, model=model)
    random = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(0, 0.3, shape), jnp.float32)

    hidden, upstream, router = draw(4, 16, 16) / 0.3, draw(4, 16, 16), draw(8, 16)
    experts = Experts(Bank(draw(8, 16, 24), draw(8, 16, 24), draw(8, 24, 16)), None)
    gain = None if mode == "none" else jnp.ones(16)

    def seen(router_ED: jax.Array) -> jax.Array:
        weights = RouterWeights(router_ED, jnp.float32(1))
        output = mixture(config, hidden, weights, None, Selection(jnp.zeros(8)), experts, post_norm_D=gain)
        return jnp.sum(output.hidden_BSD * upstream)

    return float(jnp.linalg.norm(jax.jit(jax.grad(seen))(router)))


def test_a_norm_behind_the_gate_takes_the_gradient_from_the_router() -> None:
    """At one expert per token RMSNorm(g e) = RMSNorm(e); with two the ratio of their gates is left."""
    assert router_gradient("norm_then_gate", 1, 1e-8) > 1
    assert router_gradient("none", 1, 1e-8) > 1
    assert router_gradient("post", 1, 1e-12) < 1e-4
    assert router_gradient("norm_then_gate", 2, 1e-8) > 1
    assert router_gradient("post", 2, 1e-12) > 0.1


def test_over_a_mesh_whole_outputs_are_normalized() -> None:
    """The devices of a tensor group have parts of an output: a norm of each part would be another one."""
    config = tiny_config("unipool", "moe.top_k=2", "mesh.capacity_factor=4", "model.compute_dtype=float32")
    random = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(0, 0.3, shape), jnp.float32)

    hidden, bank, gates, gain = (
        draw(32, 16),
        Bank(draw(8, 16, 24), draw(8, 16, 24), draw(8, 24, 16)),
        draw(32, 2),
        draw(16),
    )
    chosen = np.argsort(random.normal(size=(32, 8)), axis=1)[:, :2].astype(np.int32)

    def seen(hidden: jax.Array, bank: Bank, gates: jax.Array, gain: jax.Array) -> tuple[jax.Array, jax.Array]:
        stats = RoutingStats(*(jnp.zeros(()) for _ in RoutingStats._fields))
        routing = Routing(jnp.asarray(chosen), gates, stats)
        output = moe_ffn(hidden, routing, pool_experts(config, bank), "xla", config.mesh, gain)[0]
        return jnp.sum(jnp.cos(jnp.arange(output.size).reshape(output.shape)) * output), output

    run, operands = jax.value_and_grad(seen, argnums=(0, 1, 2, 3), has_aux=True), (hidden, bank, gates, gain)
    alone = jax.jit(run)(*operands)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, expert=2, tensor=2), jax.devices()[:4])):
        together = jax.device_get(jax.jit(run)(*operands))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), together, jax.device_get(alone))
    expected = np.zeros((32, 16))
    weights = {name: np.asarray(w, np.float64) for name, w in zip(("gate", "up", "down"), bank, strict=True)}
    for token, x in enumerate(np.asarray(hidden, np.float64)):
        for expert, gate in zip(chosen[token], np.asarray(gates[token]), strict=True):
            expected[token] += gate * oracles.rms_norm(oracles.expert(x, weights, expert), np.asarray(gain), 1e-8)
    np.testing.assert_allclose(alone[0][1], expected, rtol=1e-4, atol=1e-5)


def test_what_has_no_norms_behind_blocks_refuses_them() -> None:
    config = tiny_config("unipool", "model.norm=sandwich")
    with pytest.raises(ConversionError, match=r"model\.norm=sandwich.*use layout=twin"):
        make_layout("megatron", config, empty_weights(config))
