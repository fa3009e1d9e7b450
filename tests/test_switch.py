"""Switch Attention: two ranges of keys, hard gates with the gradient of soft ones, the penalty and its weight."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from tiny import tiny_batch, tiny_config, tiny_state
from unipool_jax.analysis.figures import png
from unipool_jax.analysis.switch_report import gates
from unipool_jax.config.files import FileError
from unipool_jax.config.schema import AttentionConfig, Config
from unipool_jax.convert.errors import ConversionError
from unipool_jax.convert.layouts import make_layout
from unipool_jax.convert.runs import as_numpy
from unipool_jax.kernels.causal import causal_attention, causal_attention_of_both
from unipool_jax.model.switch import Switched, disagreement, penalty, penalty_weight, switched, takes_full
from unipool_jax.model.transformer import forward
from unipool_jax.training.step import make_train_step
from unipool_jax.training.switching import switch_values

pytestmark = pytest.mark.filterwarnings("ignore:NormRouter over")

SWITCH = ("attention.kind=switch", "attention.window=3")


def operands(length: int) -> list[np.ndarray]:
    random = np.random.default_rng(length)
    return [random.normal(size=(1, length, heads, 8)) for heads in (4, 2, 2)]


def of_row(wide: list[np.ndarray], seen: np.ndarray) -> np.ndarray:
    query, key, value = (array[0] for array in wide)
    return oracles.product(query, key, value, seen)


@pytest.mark.parametrize(
    ("length", "window", "apart"),
    [(1, 1, False), (65, 3, True), (130, 64, False), (300, 65, True), (300, 200, True), (517, 258, False)],
)
def test_two_ranges_of_keys_are_one_softmax(length: int, window: int, apart: bool) -> None:
    """Values and gradients of both results, where the window is everything, where the rest is empty, and in between."""
    wide, random = operands(length), np.random.default_rng(1)
    segments = np.sort(random.integers(0, 3, (1, length)).astype(np.int32)) if apart else None
    upstream = random.normal(size=(2, *wide[0].shape))

    @jax.jit
    def both(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
        numbers = None if segments is None else jnp.asarray(segments)
        product = functools.partial(causal_attention_of_both, segments_BS=numbers, window=window)
        found, pullback = jax.vjp(product, query, key, value)
        return found, pullback((jnp.asarray(upstream[0], jnp.float32), jnp.asarray(upstream[1], jnp.float32)))

    found, gradients = both(*(jnp.asarray(array, jnp.float32) for array in wide))
    row = None if segments is None else segments[0]
    masks = oracles.visible(length, None, row), oracles.visible(length, window, row)
    query, key, value = (array[0] for array in wide)
    for mine, mask in zip(found, masks, strict=True):
        np.testing.assert_allclose(mine[0], of_row(wide, mask), rtol=1e-4, atol=1e-5)
    parts = [
        oracles.product_gradients(query, key, value, mask, up[0]) for mask, up in zip(masks, upstream, strict=True)
    ]
    for mine, to_all, to_window in zip(gradients, *parts, strict=True):
        np.testing.assert_allclose(mine[0], to_all + to_window, rtol=1e-4, atol=5e-5)


def test_bfloat16_is_merged_in_float32() -> None:
    narrow = [jnp.asarray(array, jnp.bfloat16) for array in operands(300)]
    wide = [np.asarray(array, np.float64) for array in narrow]
    product = functools.partial(causal_attention_of_both, segments_BS=None, window=65)
    found, window = jax.jit(product)(*narrow)
    assert found.dtype == window.dtype == jnp.bfloat16
    np.testing.assert_allclose(found[0].astype(jnp.float32), of_row(wide, oracles.visible(300)), rtol=0.03, atol=0.03)


def test_the_gradient_of_a_gate_is_the_closed_form() -> None:
    """dL/dz = s (1 - s) <dL/dO, O_F - O_S> + weight s / (L T), s the sigmoid, whichever way the gate is."""
    length, settings = 40, AttentionConfig(kind="switch", window=7, switch_weight=0.3)
    wide, random = operands(length), np.random.default_rng(2)
    logit, upstream = random.normal(size=(1, length)), random.normal(size=wide[0].shape)
    losses = random.uniform(0, 3, (1, length))
    three = tuple(jnp.asarray(array, jnp.float32) for array in wide)

    @jax.jit
    @jax.value_and_grad
    def loss(logit: jax.Array) -> jax.Array:
        position = jnp.arange(length)[None]
        mixed, found = switched(settings, causal_attention, logit, position, (*three, None))
        tokens = penalty(settings, found, jnp.asarray(losses), jnp.ones((1, length)))
        return jnp.sum(mixed * upstream) + tokens / length

    value, gradient = loss(jnp.asarray(logit, jnp.float32))
    to_all, to_window = (of_row(wide, oracles.visible(length, window)) for window in (None, 7))
    apart = ((to_all - to_window) ** 2).mean((1, 2))
    weight = 0.3 / (0.1 + losses[0] + 100 * apart)
    soft = 1 / (1 + np.exp(-logit[0]))
    passed = soft * (1 - soft) * (upstream[0] * (to_all - to_window)).sum((1, 2))
    np.testing.assert_allclose(gradient[0], passed + weight * soft / length, rtol=1e-4, atol=1e-5)
    full = (logit[0] > 0) & (np.arange(length) >= 7)
    mixed = np.where(full[:, None, None], to_all, to_window)
    expected = (mixed * upstream[0]).sum() + (weight * np.log1p(np.exp(logit[0]))).sum() / length
    assert float(value) == pytest.approx(expected, rel=1e-4)


def test_a_gate_is_free_only_behind_the_window_and_zero_is_not_full() -> None:
    settings = AttentionConfig(kind="switch", window=3)
    position = jnp.asarray([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    ones = jnp.ones(position.shape)
    assert takes_full(settings, ones, position)[0].tolist() == [False] * 3 + [True] * 2 + [False] * 3 + [True]
    assert not takes_full(settings, 0 * ones, position).any()
    assert takes_full(dataclasses.replace(settings, gate="full"), -ones, position).all()
    assert not takes_full(dataclasses.replace(settings, gate="window"), ones, position).any()


def test_the_weight_falls_with_loss_and_disagreement_and_is_bounded() -> None:
    settings = AttentionConfig(kind="switch", switch_weight=0.02)
    losses, apart = jnp.linspace(0, 5, 11)[:, None], jnp.linspace(0, 2, 7)[None]
    weight = np.asarray(penalty_weight(settings, losses, apart + 0 * losses))
    assert (np.diff(weight, axis=0) < 0).all()
    assert (np.diff(weight, axis=1) < 0).all()
    assert weight.max() == pytest.approx(0.02 / 0.1)
    fixed = dataclasses.replace(settings, switch_weighting="fixed")
    assert (penalty_weight(fixed, losses, apart + 0 * losses) == jnp.float32(0.02)).all()


@pytest.mark.parametrize("kind", ["mean", "sum", "relative"])
def test_a_model_cannot_pay_less_by_predicting_worse(kind: str) -> None:
    """Neither the loss nor the disagreement has a gradient from the penalty; the logit has."""
    settings = AttentionConfig(kind="switch", disagreement=kind)  # type: ignore[arg-type]
    random = np.random.default_rng(0)
    to_all, to_window = (jnp.asarray(random.normal(size=(1, 5, 4, 8)), jnp.float32) for _ in range(2))

    def paid(loss: jax.Array, logit: jax.Array, to_all: jax.Array, to_window: jax.Array) -> jax.Array:
        found = Switched(logit, logit > 0, disagreement(settings, to_all, to_window))
        return penalty(settings, found, loss, jnp.ones((1, 5)))

    ones = jnp.ones((1, 5))
    to_loss, to_logit, *to_results = jax.grad(paid, argnums=(0, 1, 2, 3))(ones, ones, to_all, to_window)
    assert (to_logit > 0).all()
    assert not to_loss.any()
    assert not any(gradient.any() for gradient in to_results)


def test_three_ways_to_disagree() -> None:
    random = np.random.default_rng(0)
    to_all, to_window = random.normal(size=(2, 1, 5, 4, 8)).astype(np.float32)
    apart = ((to_all - to_window) ** 2).sum((2, 3))
    norms = (to_all**2).sum((2, 3)) + (to_window**2).sum((2, 3))
    for name, expected in (("sum", apart), ("mean", apart / 32), ("relative", apart / norms)):
        settings = AttentionConfig(kind="switch", disagreement=name)  # type: ignore[arg-type]
        found = disagreement(settings, jnp.asarray(to_all), jnp.asarray(to_window))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    zeros = jnp.zeros((1, 5, 4, 8))
    relative = AttentionConfig(kind="switch", disagreement="relative")
    assert (disagreement(relative, zeros, zeros) == 0).all()


def without_router(params: Any) -> Any:
    """Parameters of the same model with another kind of attention."""
    layers = params["pools"]["layers"]
    attention = {name: array for name, array in layers["attention"].items() if name != "switch"}
    return params | {"pools": params["pools"] | {"layers": layers | {"attention": attention}}}


@pytest.mark.parametrize("kind", ["full", "window"])
def test_forced_gates_are_the_other_kinds_to_the_bit(kind: str) -> None:
    config = tiny_config("unipool", *SWITCH, f"attention.gate={kind}")
    window = ("attention.window=3",) if kind == "window" else ()
    other = tiny_config("unipool", f"attention.kind={kind}", *window)
    state, tokens = tiny_state(config), tiny_batch(config).inputs
    run = jax.jit(forward, static_argnums=0)
    bias = state.balance.expert_bias_GNE
    mine = run(config, state.params, tokens, bias)[0]
    theirs = run(other, without_router(state.params), tokens, bias)[0]
    np.testing.assert_array_equal(mine, theirs)
    # Zeros would never leave the window.
    assert float(np.abs(state.params["pools"]["layers"]["attention"]["switch"]).min()) > 0


def reported(config: Config, forward: oracles.Forward) -> dict[str, Any]:
    """What a step says of the gates, counted one by one."""
    layers, batch, length, window = 4, 8, 8, 3
    logits, full, apart = (
        np.array([entry[part] for entry in forward.switched]).reshape(layers, batch, length) for part in range(3)
    )
    targets = tiny_batch(config).targets
    losses = -np.take_along_axis(np.log(oracles.softmax(forward.logits)), targets[..., None], -1)[..., 0]
    weight = config.attention.switch_weight / (0.1 + losses + 100 * apart)
    position = np.arange(length)
    keys = np.where(full, position + 1, np.minimum(position + 1, window))
    return {
        "loss/switch": float((weight * np.log1p(np.exp(logits))).mean()),
        "switch/full": full[..., window:].mean((1, 2)),
        "switch/full_by_position": full[..., window:].mean((0, 1)),
        "switch/full_map": full[..., window:].mean(1),
        "switch/keys_read": keys.mean((1, 2)),
        "switch/disagreement": apart[..., window:].mean((1, 2)),
        "switch/weight": np.quantile(weight, (0.05, 0.25, 0.5, 0.75, 0.95)),
    }


@pytest.mark.parametrize(
    ("more", "sizes"),
    [((), (8, 4)), pytest.param(("moe.dense_layers=1",), (8,), marks=pytest.mark.slow)],
)
def test_a_step_pays_the_penalty_and_reports_the_gates(more: tuple[str, ...], sizes: tuple[int, ...]) -> None:
    """Against the model in NumPy, in one micro-batch and in two; every gate has a choice from position 3 on."""
    config = tiny_config("unipool", *SWITCH, "attention.switch_weight=0.5", "model.compute_dtype=float32", *more)
    state, batch = tiny_state(config), tiny_batch(config)
    expected = reported(config, oracles.Forward(config, state.params, batch.inputs))
    assert 0 < expected["switch/full"].mean() < 1
    found = {}
    for size in sizes:
        split = dataclasses.replace(config, train=dataclasses.replace(config.train, microbatch_size=size))
        metrics = jax.device_get(make_train_step(split)(tiny_state(config), batch)[1])
        found[size] = metrics
        values = switch_values(split, metrics)
        assert float(metrics["loss/switch"]) == pytest.approx(expected["loss/switch"], rel=1e-4)
        for name in ("full", "keys_read", "disagreement"):
            np.testing.assert_allclose(
                np.array(values[f"switch/{name}"]), expected[f"switch/{name}"], rtol=1e-3, err_msg=name
            )
        by_position, by_both = values["switch/full_by_position"], values["switch/full_map"]
        assert isinstance(by_position, list)
        assert isinstance(by_both, list)
        assert by_position[:3] == [None] * 3
        np.testing.assert_allclose(by_position[3:], expected["switch/full_by_position"], rtol=1e-6)
        np.testing.assert_allclose([row[3:] for row in by_both], expected["switch/full_map"], rtol=1e-6)
    weight = np.array(switch_values(config, found[8])["switch/weight"])
    np.testing.assert_allclose(weight, expected["switch/weight"], rtol=1e-3)
    norms = [float(metrics["grad_norm"]) for metrics in found.values()]
    assert norms == pytest.approx(norms[:1] * len(norms), rel=1e-5)
    assert switch_values(tiny_config("unipool"), found[8]) == {}


def test_the_report_has_a_map_of_gates() -> None:
    """Two layers and three parts, in the first of which no token has a choice; from the newest line."""
    config = tiny_config("unipool", *SWITCH, "model.num_layers=2")
    lines = [
        {"kind": "train", "step": step, "switch/full_map": [[None, share, 0.5], [None, 0.0, 0.2]]}
        for step, share in ((1, 1.0), (2, 0.25))
    ]
    (part,) = gates(config, lines)
    assert "Layer 0 attends to everything most often (37.5%), layer 1 least often (10.0%)" in part.words[1]
    assert part.figure is not None
    assert png(part.figure[1]).startswith(b"\x89PNG")
    assert gates(config, lines[:0]) == gates(tiny_config("unipool"), []) == []
    for damaged in ([[0.5, 0.5]], [1, 2], "x", [[0.5], [0.5, 1]]):
        with pytest.raises(FileError, match="switch/full_map"):
            gates(config, [{"kind": "train", "step": 3, "switch/full_map": damaged}])


def test_a_file_without_a_place_for_routers_is_refused() -> None:
    config = tiny_config("unipool", *SWITCH)
    state = tiny_state(config)
    with pytest.raises(ConversionError, match=r"layout=megatron: .*attention\.kind=switch"):
        make_layout("megatron", config, as_numpy(state.params, state.balance.expert_bias_GNE))


def test_a_penalty_of_forced_gates_is_nothing() -> None:
    ones = jnp.ones((1, 5))
    settings = AttentionConfig(kind="switch", gate="full")
    assert float(penalty(settings, Switched(ones, ones > 0, ones), ones, ones)) == 0
