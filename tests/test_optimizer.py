"""The optimizer against an independent NumPy AdamW and the published learning rates."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tiny import tiny_config
from unipool_jax.config.compose import compose_config
from unipool_jax.config.rules import validate
from unipool_jax.config.schema import ConfigError, OptimizerConfig
from unipool_jax.moe.placement import strided_placement
from unipool_jax.moe.visibility import exposure
from unipool_jax.training.optimizer import (
    clip_by_global_norm,
    decay_mask,
    make_optimizer,
    make_schedule,
    reuse_divisors,
    run_optimizer,
    warmup_steps,
)


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (0, 0.0),
        (1, 8.333e-7),
        (300, 2.5e-4),
        (600, 5e-4),
        (1000, 4.999497e-4),
        (2000, 4.993835e-4),
        (30_000, 2.785698e-4),
        (59_999, 5.0000e-5),
        (60_000, 5e-5),
        (70_000, 5e-5),
    ],
)
def test_schedule_has_the_published_values(t: int, expected: float) -> None:
    schedule = make_schedule(OptimizerConfig(), steps=60_000)
    assert float(schedule(t)) == pytest.approx(expected, rel=5e-5 if t == 1 else 2e-7, abs=1e-12)
    assert float(jax.jit(schedule)(jnp.int32(t))) == pytest.approx(expected, rel=5e-5 if t == 1 else 2e-7, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_schedule_scales_with_the_run(steps: int) -> None:
    config = OptimizerConfig()
    schedule = make_schedule(config, steps)
    warmup = warmup_steps(config, steps)
    assert warmup == max(1, round(0.01 * steps))
    assert float(schedule(0)) == 0.0
    assert float(schedule(warmup)) == pytest.approx(config.learning_rate)
    if steps > warmup:
        assert float(schedule(steps)) == pytest.approx(config.min_learning_rate)


def test_schedule_without_warmup_starts_at_the_peak() -> None:
    schedule = make_schedule(OptimizerConfig(warmup_fraction=0.0), steps=100)
    assert float(schedule(0)) == pytest.approx(5e-4)


def _parameters() -> dict:
    """Stacked the way the model stacks: [G, L/G, ...] per layer, so a gain has three dimensions."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "embedding": draw(7, 4),
        "layers": {
            "attention_norm": draw(1, 2, 4),
            "ffn_norm": draw(1, 2, 4),
            "attention": {"query": draw(1, 2, 4, 4)},
            "router": {"weight": draw(1, 2, 3, 4), "scale": draw(1, 2)},
        },
        "experts": {"gate": draw(1, 3, 4, 8)},
        "final_norm": draw(4),
    }


def test_only_gains_and_router_scales_escape_decay() -> None:
    mask = decay_mask(_parameters())
    assert mask == {
        "embedding": True,
        "layers": {
            "attention_norm": False,
            "ffn_norm": False,
            "attention": {"query": True},
            "router": {"weight": True, "scale": False},
        },
        "experts": {"gate": True},
        "final_norm": False,
    }


@pytest.mark.parametrize("norm", [0.5, 1.0, 30.0])
def test_clipping_follows_the_published_formula(norm: float) -> None:
    gradients = {"a": jnp.full((2, 2), norm / 4), "b": jnp.full((12,), norm / 4)}
    clip = clip_by_global_norm(1.0)
    clipped, _ = clip.update(gradients, clip.init(gradients))
    factor = min(1.0, 1.0 / (norm + 1e-6))
    for key, value in clipped.items():
        np.testing.assert_allclose(value, np.asarray(gradients[key]) * np.float32(factor), rtol=2e-7)
    if norm == 1.0:
        assert float(clipped["a"][0, 0]) < norm / 4  # 1 / (1 + 1e-6) is below 1: the constant acts


def _numpy_adamw(params: dict, gradients: list[dict], decays: dict, config: OptimizerConfig, steps: int) -> dict:
    """AdamW written from its formula in float64."""
    p = {k: v.astype(np.float64) for k, v in params.items()}
    m = {k: np.zeros_like(v) for k, v in p.items()}
    v = {k: np.zeros_like(x) for k, x in p.items()}
    warmup = max(1, round(config.warmup_fraction * steps))
    for t, gradient in enumerate(gradients):
        norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradient.values()))
        factor = min(1.0, config.clip_norm / (norm + 1e-6))
        cosine = 0.5 * (1 + math.cos(math.pi * (t - warmup) / (steps - warmup)))
        low, peak = config.min_learning_rate, config.learning_rate
        rate = peak * t / warmup if t <= warmup else low + (peak - low) * cosine
        for k in p:
            g = gradient[k].astype(np.float64) * factor
            m[k] = config.beta1 * m[k] + (1 - config.beta1) * g
            v[k] = config.beta2 * v[k] + (1 - config.beta2) * g * g
            m_hat = m[k] / (1 - config.beta1 ** (t + 1))
            v_hat = v[k] / (1 - config.beta2 ** (t + 1))
            step = m_hat / (np.sqrt(v_hat) + config.epsilon) + config.weight_decay * decays[k] * p[k]
            p[k] = p[k] - rate * step
    return p


def test_adamw_matches_an_independent_implementation() -> None:
    config = OptimizerConfig(learning_rate=3e-2, min_learning_rate=3e-3, warmup_fraction=0.2, weight_decay=0.1)
    steps, rng = 20, np.random.default_rng(1)
    leaves, structure = jax.tree.flatten(_parameters())
    decays = jax.tree.leaves(decay_mask(_parameters()))
    # Norms from well below to well above the clipping threshold.
    gradients = [
        [rng.normal(size=x.shape).astype(np.float32) * 10 ** rng.uniform(-3, 1) for x in leaves] for _ in range(steps)
    ]

    optimizer = make_optimizer(config, steps)
    params = _parameters()
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(jax.tree.unflatten(structure, gradient), state, params)
        params = optax.apply_updates(params, updates)

    named = [{str(i): g for i, g in enumerate(gradient)} for gradient in gradients]
    expected = _numpy_adamw(
        {str(i): np.asarray(x) for i, x in enumerate(leaves)},
        named,
        {str(i): d for i, d in enumerate(decays)},
        config,
        steps,
    )
    for i, leaf in enumerate(jax.tree.leaves(params)):
        np.testing.assert_allclose(leaf, expected[str(i)], rtol=2e-5, atol=2e-6)


def test_first_update_moves_moments_but_not_parameters() -> None:
    optimizer = make_optimizer(OptimizerConfig(), steps=60_000)
    params = _parameters()
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    assert all(float(jnp.abs(u).max()) == 0.0 for u in jax.tree.leaves(updates))
    moments = optax.tree_utils.tree_get(state, "mu")
    assert all(float(jnp.abs(m).min()) > 0.0 for m in jax.tree.leaves(moments))


STARTS = ("pool.starts=[0,2,4,6]", "pool.window=[4,4,4,3]")
"""Over a bank of eight."""
SEEN = {
    STARTS: [[2, 1, 2, 2, 2, 2, 2, 2]],
    ("pool.starts=runs", "pool.ends=1"): [[1, 1, 2, 2, 1, 1]],
    ("pool.groups=2",): [[2] * 4] * 2,
    (): [[4] * 8],
}


@pytest.mark.parametrize("words", SEEN)
def test_exposure_is_the_number_of_layers_that_see_an_expert(words: tuple[str, ...]) -> None:
    assert exposure(tiny_config("unipool", *words)).tolist() == SEEN[words]


def test_exposure_follows_experts_that_change_places() -> None:
    config = tiny_config("unipool", *STARTS, "mesh.expert=2", "mesh.expert_placement=strided")
    assert exposure(config)[0].tolist() == np.array(SEEN[STARTS][0])[strided_placement(8, 2)].tolist()


def test_after_a_lock_every_expert_has_one_layer() -> None:
    config = tiny_config("unipool", "lock.ownership=learned", "optimizer.reuse_divisor=linear")
    assert np.unique(np.array(reuse_divisors(config))).tolist() == [4]
    assert np.unique(np.array(reuse_divisors(config.after_lock()))).tolist() == [1]


def _tree(random: np.random.Generator) -> dict[str, Any]:
    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    layers = {"attention": {"query": draw(1, 4, 2, 2)}, "ffn_norm": draw(1, 4, 2)}
    bank = {"gate": draw(1, 8, 2, 3), "up": draw(1, 8, 2, 3), "down": draw(1, 8, 3, 2)}
    return {"embedding": draw(5, 2), "pools": {"layers": layers, "bank": bank}}


@pytest.mark.parametrize("decay", ["scaled", "compensated"])
@pytest.mark.parametrize(("divisor", "power"), [("sqrt", 0.5), ("linear", 1.0)])
def test_updates_of_reused_experts_are_divided(divisor: str, power: float, decay: str) -> None:
    """By u^p in every one of six steps, with or without their weight decay; all other updates are the plain ones."""
    words = (f"optimizer.reuse_divisor={divisor}", f"optimizer.reuse_decay={decay}")
    changed = ("optimizer.weight_decay=0.1", "optimizer.warmup_fraction=0", "optimizer.clip_norm=2")
    plain = tiny_config("unipool", *STARTS, *changed)
    config = tiny_config("unipool", *STARTS, *changed, *words)
    random = np.random.default_rng(2)
    params, usual, divided = _tree(random), run_optimizer(plain), run_optimizer(config)
    states = usual.init(params), divided.init(params)
    u = np.array(SEEN[STARTS][0], np.float64)[None, :, None, None]
    for step in range(6):
        gradients = _tree(random)
        update, first = usual.update(gradients, states[0], params)
        found, second = divided.update(gradients, states[1], params)
        states = first, second
        for name, matrix in params["pools"]["bank"].items():
            whole = np.asarray(update["pools"]["bank"][name], np.float64)
            rate = float(make_schedule(config.optimizer, config.train.lengths)(step))
            kept = -rate * 0.1 * np.asarray(matrix, np.float64) if decay == "compensated" else 0.0
            expected = (whole - kept) / u**power + kept
            np.testing.assert_allclose(found["pools"]["bank"][name], expected, rtol=2e-5, atol=1e-9)
        found["pools"].pop("bank"), update["pools"].pop("bank")
        jax.tree.map(np.testing.assert_array_equal, found, update)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("pool.groups=4 optimizer.reuse_divisor=sqrt", "optimizer.reuse_divisor=sqrt: no expert is seen by more"),
        ("pool.starts=runs pool.span=1 optimizer.reuse_divisor=linear", "optimizer.reuse_divisor=linear: no expert"),
        ("method=dense moe.experts_per_layer=1 optimizer.reuse_divisor=sqrt", "reuse_divisor=sqrt: no expert"),
        ("lock.ownership=random_from_start optimizer.reuse_divisor=sqrt", "reuse_divisor=sqrt: no expert"),
        ("optimizer.reuse_decay=compensated", "optimizer.reuse_decay=compensated: unused"),
    ],
)
def test_divisors_that_divide_nothing_are_refused(words: str, named: str) -> None:
    small = ["method=unipool", "model.num_layers=4", "moe.experts_per_layer=2", "train.eval_every=70"]
    with pytest.raises(ConfigError) as raised:
        validate(compose_config([*small, *words.split()]))
    assert named in str(raised.value)
