"""Windows over one bank: the published maps, and what a layer that sees part of a bank computes."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tiny import slow_among, tiny_batch, tiny_config, tiny_state
from unipool_jax.config.compose import compose_config
from unipool_jax.config.rules import validate
from unipool_jax.config.schema import Config, ConfigError
from unipool_jax.model.transformer import forward
from unipool_jax.moe.capacity import overflow, rows_per_device
from unipool_jax.moe.opening import open_experts
from unipool_jax.moe.placement import device_load, strided_placement
from unipool_jax.moe.scope import pool_scope, scoped_load, scoped_pool_loss
from unipool_jax.parallel.mesh import make_mesh
from unipool_jax.training.step import make_train_step

# Twelve layers and eight experts a layer. Starts in units of eight, widths, experts of the bank, and how many layers
# see an expert, of the designs as their sources describe them.
MAPS = {
    "neighbors share: ReXMoE and MoRE, r=2": (
        "pool.starts=wide_runs",
        ([0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10], [16] * 12, 96, {2}),
    ),
    "r=3": ("pool.starts=wide_runs pool.span=3", ([0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9], [24] * 12, 96, {3})),
    "ring": ("pool.starts=ring pool.span=3", (list(range(12)), [24] * 12, 96, {3})),
    "clamped, UniPool's own": (
        "pool.starts=sliding pool.span=3",
        ([0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [16, *[24] * 10, 16], 96, {2, 3}),
    ),
    "tied inner layers, g=4": (
        "pool.starts=runs pool.span=4 pool.ends=2",
        ([0, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 5], [8] * 12, 48, {1, 4}),
    ),
    "tied inner layers, g=2": (
        "pool.starts=runs pool.ends=2",
        ([0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7], [8] * 12, 64, {1, 2}),
    ),
    "tied inner layers, four times as wide": (
        "pool.starts=wide_runs pool.span=4 pool.ends=2",
        ([0, 1, 2, 2, 2, 2, 6, 6, 6, 6, 10, 11], [8, 8, *[32] * 8, 8, 8], 96, {1, 4}),
    ),
    "cyclic inner layers": (
        "pool.starts=cyclic pool.ends=2",
        ([0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 4, 5], [8] * 12, 48, {1, 4}),
    ),
    "marin's map of eleven layers": (
        "pool.starts=runs pool.span=4 pool.ends=2 model.num_layers=11",
        ([0, 1, 2, 2, 2, 2, 3, 3, 3, 4, 5], [8] * 11, 48, {1, 3, 4}),
    ),
    "marin's map of six layers": (
        "pool.starts=runs pool.ends=1 model.num_layers=6",
        ([0, 1, 1, 2, 2, 3], [8] * 6, 32, {1, 2}),
    ),
}


@pytest.mark.parametrize("name", MAPS)
def test_rules_give_the_published_maps(name: str) -> None:
    words, (starts, widths, experts, exposure) = MAPS[name]
    config = compose_config(["scale=182m", "method=unipool", *words.split()])
    windows = config.windows
    assert windows is not None
    assert [start / 8 for start in windows.starts] == starts
    assert list(windows.widths) == widths
    assert (windows.experts, config.total_experts) == (experts, experts)
    assert set(windows.exposure().tolist()) == exposure


def test_visible_experts_are_the_run_from_the_start_around_the_end_of_the_bank() -> None:
    windows = tiny_config("unipool", "pool.starts=[0,5,7,2]", "pool.window=[2,3,3,4]").windows
    assert windows is not None
    seen = [np.flatnonzero(row).tolist() for row in windows.visible()]
    assert seen == [[0, 1], [5, 6, 7], [0, 1, 7], [2, 3, 4, 5]]
    assert windows.slots().tolist()[2] == [1, 2, 4, 4, 4, 4, 4, 0]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("pool.window=4", "pool.window=4: needs pool.starts"),
        ("pool.starts=[0,2,4,6]", "pool.window=null"),
        ("pool.starts=[0,2,4] pool.window=4", "has 3 entries"),
        ("pool.starts=[0,2,4,6] pool.window=[4,4]", "has 2 entries"),
        ("pool.starts=[0,2,4,8] pool.window=2", "8 is beyond the bank of 8"),
        ("pool.starts=[0,0,4,4] pool.window=2", "no layer sees 4 of the 8 experts (2, 3, 6, 7)"),
        ("pool.starts=[0,2,4,6] pool.window=9", "wider than the bank"),
        ("pool.starts=[0,2,4,6] pool.window=2 moe.top_k=3", "moe.top_k=3: a layer sees 2 experts"),
        ("pool.starts=[0,2,4,6] pool.window=0", "pool.window=0: must be at least 1"),
        ("pool.starts=[0,2,-4,6] pool.window=2", "must be at least 0"),
        ("pool.starts=ring pool.experts=8", "pool.experts=8"),
        ("pool.starts=ring pool.fraction=0.5", "pool.fraction=0.5"),
        ("pool.starts=ring pool.ends=1", "pool.ends=1: unused"),
        ("pool.starts=runs pool.ends=3", "pool.ends=3: both ends"),
        ("pool.starts=ring pool.span=5", "pool.span=5"),
        ("pool.starts=ring pool.groups=2", "pool.groups=2"),
        ("pool.starts=circle", "choose one of runs, wide_runs, cyclic, ring, sliding"),
        ("pool.starts=3", "choose one of"),
        ("pool.starts=ring pool.window=wide", "expected a whole number"),
        ("pool.starts=ring lock.ownership=learned", "lock.ownership=learned"),
    ],
)
def test_maps_that_cannot_be_are_refused(words: str, named: str) -> None:
    small = ["method=unipool", "model.num_layers=4", "moe.experts_per_layer=2", "train.eval_every=70"]
    with pytest.raises(ConfigError) as raised:
        validate(compose_config([*small, *words.split()]))
    assert named in str(raised.value)


GROUPS = {1: "pool.starts=[0,0,0,0] pool.window=8", 2: "pool.starts=wide_runs", 4: "pool.starts=runs pool.span=1"}


GROUPED = itertools.product(GROUPS, ("pool", "switch"))


@pytest.mark.parametrize(
    "case", slow_among(GROUPED, [(1, "pool"), (1, "switch"), (2, "switch"), (4, "pool"), (4, "switch")]), ids=str
)
def test_windows_that_are_groups_train_as_groups_do(case: tuple[int, str]) -> None:
    """One step from the same weights: the same losses, choices and gradients, which are in Adam's first moments."""
    groups, balance = case
    method = {"pool": "vanilla_normrouter", "switch": "vanilla"}[balance]
    words = [f"loss.balance={balance}", "optimizer.clip_norm=1e6"]
    apart = tiny_config(method, f"pool.groups={groups}", *words)
    windows = tiny_config(method, "pool.groups=1", *GROUPS[groups].split(), *words)
    state, batch = tiny_state(apart), tiny_batch(apart)
    target = tiny_state(windows)
    same = jax.tree.map(lambda x, y: jnp.array(x.reshape(y.shape)), state.params, target.params)

    one, metrics = make_train_step(apart)(state, batch)
    other, found = make_train_step(windows)(target._replace(params=same), batch)
    for name in ("loss/lm", "loss/balance", "grad_norm"):
        np.testing.assert_allclose(found[name], metrics[name], rtol=2e-5)
    counts = np.asarray(found["counts_LE"])
    assert windows.windows is not None
    visible = windows.windows.visible()
    assert not counts[~visible].any()
    np.testing.assert_array_equal(counts[visible].reshape(4, -1), metrics["counts_LE"])
    theirs, ours = (optax.tree.get(state.opt_state, "mu") for state in (one, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.reshape(b.shape), b, rtol=1e-4, atol=1e-6), theirs, ours)


def test_gradient_of_a_tied_bank_is_the_sum_of_the_gradients_of_untied_ones() -> None:
    tied = tiny_config("unipool", "pool.starts=runs", "pool.ends=1")  # layers 1 and 2 share one of three banks
    untied = tiny_config("unipool", "pool.starts=runs", "pool.span=1")
    params, batch = tiny_state(tied).params, tiny_batch(tied)
    banks = np.array([0, 1, 1, 2])
    rows = (banks[:, None] * 2 + np.arange(2)).reshape(-1)
    copies = params | {"pools": params["pools"] | {"bank": {k: v[:, rows] for k, v in params["pools"]["bank"].items()}}}

    def loss(config: Config, params: Any) -> jax.Array:
        logits, _ = forward(config, params, batch.inputs, jnp.zeros((1, 4, config.total_experts)))
        return jnp.sum(jnp.square(logits)) / logits.size

    one = jax.grad(lambda p: loss(tied, p))(params)["pools"]["bank"]
    many = jax.grad(lambda p: loss(untied, p))(copies)["pools"]["bank"]
    for name in one:
        summed = np.zeros_like(one[name][0])
        np.add.at(summed, rows, np.asarray(many[name][0]))
        assert summed.any()
        np.testing.assert_allclose(one[name][0], summed, rtol=1e-4, atol=1e-7)


def test_router_rows_beyond_a_narrow_window_get_no_gradient_and_change_nothing() -> None:
    config = tiny_config("unipool", "pool.starts=[0,2,4,5]", "pool.window=[2,3,3,3]", "moe.top_k=2")
    params, batch = tiny_state(config).params, tiny_batch(config)

    def loss(params: Any) -> jax.Array:
        logits, stats = forward(config, params, batch.inputs, jnp.zeros((1, 4, 8)))
        return (
            jnp.mean(jnp.square(logits)) + jnp.sum(stats.score_sum_AE * jnp.arange(8)) + jnp.sum(stats.z_square_sum_A)
        )

    gradient = jax.grad(loss)(params)["pools"]["layers"]["mixture"]["router"]
    assert gradient.shape == (1, 4, 3, 16)
    assert not gradient[0, 0, 2].any()
    assert np.isfinite(gradient).all()
    assert all(gradient[0, layer].any() for layer in range(4))


SCOPED = [
    (words, scope)
    for words in ("pool.starts=ring", "pool.starts=wide_runs", "pool.starts=runs pool.ends=1", "pool.groups=2")
    for scope in ("layer", "component", "bank")
]


@pytest.mark.parametrize(("words", "scope"), [*SCOPED, ("pool.starts=sliding pool.span=3", "bank")])
@pytest.mark.parametrize("pressure", ["scope", "layer"])
def test_uniform_softmax_routing_costs_the_coefficient_in_every_scope(words: str, scope: str, pressure: str) -> None:
    """For each set of layers, or L of them together where the coefficient weighs layers."""
    config = tiny_config("shared_pool_aux", *words.split(), f"loss.scope={scope}", f"loss.pressure={pressure}")
    table = pool_scope(config)
    if table is None:  # the published loss
        assert config.windows is None
        return
    visible = table.weight_SM.shape[1]
    assert visible == config.total_experts
    groups, layers, experts = config.pool.groups, config.layers_per_pool, config.experts_per_pool
    seen = np.ones((4, experts)) if config.windows is None else config.windows.visible()
    tokens = 8
    uniform = (seen / seen.sum(1, keepdims=True)).reshape(groups, layers, 1, experts) * tokens
    stats = _stats(uniform)
    load = scoped_load(table, stats.counts_AE)
    np.testing.assert_allclose(load.sum(1), 1, rtol=1e-6)
    found = scoped_pool_loss(table, stats, load, tokens, 0.02)
    sets = len(table.mean_SL) if pressure == "scope" else 1
    assert float(found) == pytest.approx(0.02 * sets, rel=1e-5)
    assert (
        len(table.mean_SL)
        == {
            "layer": 4,
            "bank": 1,
            "component": {"pool.starts=ring": 1, "pool.starts=wide_runs": 2, "pool.starts=runs pool.ends=1": 3}.get(
                words, 2
            ),
        }[scope]
    )


def _stats(score_sum: np.ndarray) -> Any:
    from unipool_jax.moe.routing import RoutingStats

    shape = score_sum.shape
    sums = jnp.asarray(score_sum, jnp.float32)
    return RoutingStats(sums, sums, jnp.zeros(shape[:-1]), jnp.zeros(shape[:-1]), jnp.zeros((*shape[:2], 1), jnp.int32))


def test_the_scope_of_components_is_the_published_loss_over_pools() -> None:
    """The table, made for pools that need none, gives the loss without one."""
    from unipool_jax.moe.balance import load_fractions, pool_loss

    for groups in (1, 2, 4):
        config = tiny_config("unipool", f"pool.groups={groups}", "loss.pressure=layer")
        table = pool_scope(config)
        assert table is not None
        scores = np.random.default_rng(3).gamma(0.5, size=(groups, 4 // groups, 2, 8 // groups))
        stats = _stats(scores / scores.sum(axis=(2, 3), keepdims=True))  # every layer makes as many choices
        published = pool_loss(stats, load_fractions(stats.counts_AE), 16, 0.02)
        found = scoped_pool_loss(table, stats, scoped_load(table, stats.counts_AE), 16, 0.02)
        assert float(found) * groups == pytest.approx(float(published), rel=1e-5)


@pytest.mark.parametrize(
    "words",
    [
        "pool.starts=sliding pool.span=3",
        pytest.param("pool.starts=ring", marks=pytest.mark.slow),
        pytest.param("pool.starts=runs pool.ends=1", marks=pytest.mark.slow),
    ],
)
def test_exact_statistics_do_not_depend_on_the_micro_batch(words: str) -> None:
    whole = tiny_config("unipool", *words.split(), "loss.scope=bank")
    split = tiny_config("unipool", *words.split(), "loss.scope=bank", "train.microbatch_size=4")
    batch = tiny_batch(whole)
    one = make_train_step(whole)(tiny_state(whole), batch)[1]
    two = make_train_step(split)(tiny_state(split), batch)[1]
    for name in ("loss/lm", "loss/balance", "grad_norm"):
        np.testing.assert_allclose(one[name], two[name], rtol=1e-5)


def test_a_selection_bias_moves_towards_the_mean_of_the_experts_that_a_layer_sees() -> None:
    config = tiny_config("vanilla_aux_free", "pool.groups=1", "pool.starts=ring")
    state, metrics = make_train_step(config)(tiny_state(config), tiny_batch(config))
    counts = np.asarray(metrics["counts_LE"])
    assert config.windows is not None
    mean = counts.sum(1, keepdims=True) / 4
    seen = config.windows.visible()
    moved = np.asarray(state.balance.expert_bias_GNE)[0]
    np.testing.assert_allclose(moved[seen], (1e-3 * np.sign(mean - counts))[seen], rtol=1e-6)


def test_windows_open_between_two_steps() -> None:
    config = tiny_config("unipool", "pool.starts=[0,2,4,7]", "pool.window=[2,6,5,1]", "pool.opening=[0.2,0.6]")
    seen = config.visible
    assert seen is not None
    counts, drawn = [], []
    for completed in (0, 10, 15, 20, 24, 30, 49):  # 50 steps: from 10 to 30
        factor = open_experts(config, jnp.array(completed))
        assert factor is not None
        assert not np.asarray(factor[0])[~seen].any()
        counts.append(np.asarray(factor[0]).sum(1).tolist())
        drawn.append(np.asarray(factor[0, 1]).tolist())
    assert counts == [[2, 2, 2, 1], [2, 2, 2, 1], [2, 3, 2, 1], [2, 4, 3, 1], [2, 4, 4, 1], [2, 6, 5, 1], [2, 6, 5, 1]]
    assert drawn[0] != drawn[1]  # as many, others
    np.testing.assert_array_equal(open_experts(config, jnp.array(15)), open_experts(config, jnp.array(15)))

    step = make_train_step(config)
    metrics = step(tiny_state(config), tiny_batch(config))[1]
    used = np.asarray(metrics["counts_LE"])
    first = np.asarray(open_experts(config, jnp.array(0)))[0] > 0
    assert not used[~first].any()
    for layer in range(4):
        assert used[layer].sum() == 64


def test_windows_that_are_open_from_the_start_are_not_drawn() -> None:
    assert open_experts(tiny_config("unipool", "pool.starts=ring"), jnp.array(0)) is None


# Busiest over mean load of eight devices with consecutive experts, least, most and mean over twelve layers, when every
# layer routes evenly within its window.
LOADS = {
    "pool.starts=runs pool.span=1": (4, 8, 6.67),
    "pool.starts=wide_runs": (4, 6, 5.33),
    "pool.starts=wide_runs pool.span=3": (4, 4, 4),
    "pool.starts=wide_runs pool.span=4": (3, 3, 3),
    "pool.starts=wide_runs pool.span=6": (2, 2, 2),
    "pool.starts=wide_runs pool.span=12": (1, 1, 1),
    "pool.starts=ring pool.span=3": (4, 4, 4),
    "pool.starts=ring": (4, 6, 5.33),
    "pool.starts=sliding pool.span=3": (4, 6, 4.33),
    "pool.starts=runs pool.span=4 pool.ends=2": (4, 6, 5.67),
    "pool.starts=runs pool.ends=2": (8, 8, 8),
    "pool.starts=wide_runs pool.span=4 pool.ends=2": (3, 8, 4),
    "pool.starts=cyclic pool.ends=2": (4, 6, 5.67),
    "pool.starts=[0,16,16,32,32,48,48,64,64,80,80,0] pool.window=16": (4, 6, 5.33),
}


@pytest.mark.parametrize("words", LOADS)
def test_strided_experts_load_all_devices_alike(words: str) -> None:
    config = compose_config(["scale=182m", "method=unipool", *words.split()])
    visible = config.visible
    assert visible is not None
    even = visible / visible.sum(axis=1, keepdims=True)

    def busiest(order: np.ndarray) -> np.ndarray:
        return device_load(even, order, 8).max(axis=1) * 8

    np.testing.assert_allclose(busiest(strided_placement(config.total_experts, 8)), 1)
    found = busiest(np.arange(config.total_experts))
    assert (found.min(), found.max(), found.mean()) == pytest.approx(LOADS[words], abs=5e-3)


@pytest.mark.parametrize("words", LOADS)
def test_consecutive_experts_overflow_the_first_buffers_and_strided_ones_do_not(words: str) -> None:
    """Before a run has measured its loads a device has room for three times the mean."""
    even = ["mesh.expert=8", "mesh.data=1", "train.microbatch_size=8", "train.batch_size=8"]
    config = compose_config(["scale=182m", "method=unipool", *even, *words.split()])
    visible = config.visible
    assert visible is not None
    mesh = make_mesh(config.mesh, jax.devices()[:8])
    received = visible / visible.sum(axis=1, keepdims=True) * rows_per_device(config, mesh) * 8
    lost = [
        int(overflow(config, mesh, jnp.asarray(device_load(received, order, 8), jnp.int32)))
        for order in (np.arange(config.total_experts), strided_placement(config.total_experts, 8))
    ]
    assert (lost[0] > 0) == (LOADS[words][1] > 3)
    assert lost[1] == 0
