"""Growth in depth: the depth law, maps of layers, gradients of unrolled layers, and the state after a growth."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from oracles import lvps_depths
from tiny import tiny_batch, tiny_config, tiny_state
from unipool_jax.config.growth_schedule import (
    at_depth,
    depth_shares,
    depths,
    layer_map,
    layers_at,
    saved_layers,
    stages,
    with_layers,
)
from unipool_jax.config.rules import problems
from unipool_jax.config.schema import Config, MeshConfig
from unipool_jax.data.pipeline import Batch
from unipool_jax.kernels.grouped_ffn import Carried
from unipool_jax.model.transformer import forward
from unipool_jax.parallel.mesh import make_mesh
from unipool_jax.training.flops import flops_per_token, flops_spent, share_spent
from unipool_jax.training.growing import first_stage, grown_state
from unipool_jax.training.growth_costs import cost_lines, stage_costs
from unipool_jax.training.growth_step import GrowthStep, unrolling
from unipool_jax.training.sharding import state_shardings
from unipool_jax.training.state import TrainState, state_shapes
from unipool_jax.training.step import MicroBatch, batch_gradients, make_train_step, micro_batch_loss, updated_state

GROWS = ("growth.layers=[1,2,4]", "growth.ends=[.2,.5,1]")
DEEP = ("model.num_layers=12", "growth.layers=[1,3,6,12]", "growth.ends=[.05,.1,.25,1]")
LAWS = ("lvps", "uniform", "sigmoid", "final", "stage")


def test_published_shares_of_depths() -> None:
    """The table of closed forms: P(D = N), P(D = L) and the mean depth, for L = 12 and 24."""
    config = tiny_config("unipool", *DEEP)
    deeper = tiny_config("unipool", "model.num_layers=24", "growth.layers=[3,6,12,24]", "growth.ends=[.05,.1,.25,1]")
    table = {
        (12, 1): (0.736, 0.0017, 1.77),
        (12, 3): (0.637, 0.0158, 4.23),
        (12, 6): (0.648, 0.0667, 7.14),
        (24, 3): (0.592, 0.0038, 5.15),
        (24, 6): (0.562, 0.0158, 8.69),
        (24, 12): (0.595, 0.0667, 14.46),
    }
    for (last, layers), (at_least, at_most, mean) in table.items():
        shares = depth_shares(config if last == 12 else deeper, layers)
        assert sum(shares.values()) == pytest.approx(1)
        assert (shares[layers], shares[last]) == pytest.approx((at_least, at_most), abs=6e-4)
        assert sum(depth * share for depth, share in shares.items()) == pytest.approx(mean, abs=6e-3)
    assert depth_shares(config, 12) == {12: 1.0}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("step", [1, 2])
def test_depths_follow_their_law(law: str, step: int) -> None:
    """Chi-square of 1e5 draws in each stage against the exact shares."""
    words = ("train.steps=100000", "train.microbatch_size=4", f"growth.depth_law={law}", f"growth.depth_step={step}")
    config = tiny_config("unipool", *DEEP, *words, "growth.ends=[.25,.5,.75,1]")
    for stage in stages(config):
        drawn = depths(config, stage.first, 25_000).reshape(-1)
        shares = depth_shares(config, stage.layers)
        found = np.array([np.sum(drawn == depth) for depth in shares])
        assert found.sum() == len(drawn)  # no other depth
        if len(shares) > 1:
            assert chisquare(found, np.array([*shares.values()]) * len(drawn)).pvalue > 1e-3
        else:
            assert set(drawn) == {12 if law == "final" else stage.layers}


def test_the_sampler_is_the_published_one() -> None:
    """Against the formula of the sampler, in plain NumPy and from other random numbers."""
    config = tiny_config("unipool", *DEEP)
    for layers in (1, 3, 6):
        drawn = lvps_depths(np.random.default_rng(0).uniform(1e-6, 1, 200_000), layers, 12)
        for depth, share in depth_shares(config, layers).items():
            assert np.mean(drawn == depth) == pytest.approx(share, abs=5e-3)


def test_depths_are_a_function_of_seed_and_step() -> None:
    config = tiny_config("unipool", *DEEP, "train.microbatch_size=2")
    drawn = depths(config, 0, 50)
    assert drawn.shape == (50, 4)
    for step in (0, 1, 2, 3, 7, 49):
        np.testing.assert_array_equal(depths(config, step)[0], drawn[step])
    np.testing.assert_array_equal(depths(config, 5, 20), drawn[5:25])
    assert (depths(tiny_config("unipool", *DEEP, "train.microbatch_size=2", "train.seed=7"), 0, 50) != drawn).any()
    # The micro-batches of a run are numbered through: one per step draws the same sequence.
    one = dataclasses.replace(config, train=dataclasses.replace(config.train, microbatch_size=8, steps=200))
    np.testing.assert_array_equal(depths(one, 0, 8).reshape(-1), drawn[:2].reshape(-1))


def test_maps_of_layers() -> None:
    assert layer_map("extend", 3, 6) == (0, 0, 1, 1, 2, 2)
    assert layer_map("stack", 3, 6) == (0, 1, 2, 0, 1, 2)
    assert layer_map("stack", 3, 8) == (0, 1, 2, 0, 1, 2, 1, 2)
    assert layer_map("extend", 4, 4) == layer_map("stack", 4, 4) == (0, 1, 2, 3)
    for few in range(1, 65):
        for many in range(few, 129):
            found = layer_map("extend", few, many)
            assert found == tuple(int(np.floor_divide(i * few, many)) for i in range(many))
            assert set(found) == set(range(few))
    # In floating point the published map is another at 14 to 18 layers; integers do not round.
    assert layer_map("extend", 14, 18) != tuple(int(i / (18 / 14)) for i in range(18))
    # Where one number divides the next, growing and then unrolling is unrolling.
    for few, more in ((1, 3), (3, 6), (6, 12)):
        for depth in range(more, 25):
            grown = layer_map("extend", few, more)
            assert tuple(grown[j] for j in layer_map("extend", more, depth)) == layer_map("extend", few, depth)


def test_stages_of_a_run() -> None:
    config = tiny_config("unipool", *DEEP, "train.steps=100")
    assert [tuple(stage) for stage in stages(config)] == [(1, 0, 5), (3, 5, 10), (6, 10, 25), (12, 25, 100)]
    assert [layers_at(config, t) for t in (0, 4, 5, 10, 24, 25, 99, 100)] == [1, 1, 3, 6, 6, 12, 12, 12]
    assert [saved_layers(config, t) for t in (0, 5, 6, 25, 26, 100)] == [1, 1, 3, 6, 12, 12]
    # An extension moves no stage.
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=150, earlier_steps=(100,)))
    assert [layers_at(longer, t) for t in (4, 5, 24, 25, 149)] == [1, 3, 6, 12, 12]


def test_experts_do_not_change_with_depth() -> None:
    """A shared pool has its full size at every depth; a layer with a pool of its own keeps that."""
    shared, own = tiny_config("unipool", *GROWS), tiny_config("vanilla", *GROWS)
    dense = tiny_config("dense", *GROWS)
    for depth in (1, 2, 3, 4):
        assert at_depth(shared, depth).total_experts == shared.total_experts == 8
        assert at_depth(shared, depth).pool.groups == 1
        assert (at_depth(own, depth).pool.groups, at_depth(own, depth).experts_per_pool) == (depth, 2)
        assert (at_depth(dense, depth).pool.groups, at_depth(dense, depth).total_experts) == (depth, depth)
    assert with_layers(shared, 4) == dataclasses.replace(shared, growth=type(shared.growth)())


def test_flops_spent_are_those_of_the_depths_drawn() -> None:
    config = tiny_config("vanilla", *GROWS, "train.microbatch_size=4")
    by_hand = 0.0
    for step in range(30):
        for depth in depths(config, step)[0].tolist():
            by_hand += 4 * 8 * flops_per_token(tiny_config("vanilla", f"model.num_layers={depth}"))
    assert flops_spent(config, 30) == pytest.approx(by_hand, rel=1e-12)
    assert flops_spent(config, 30) - flops_spent(config, 12) == pytest.approx(flops_spent(config, 30, 12))
    assert share_spent(config, 50, 25) == 1.0  # all layers are there
    whole = tiny_config("vanilla")
    assert flops_spent(whole, 30) == pytest.approx(30 * 64 * flops_per_token(whole))


def test_costs_of_stages_are_those_of_the_depths() -> None:
    """The published schedule in 12 layers spends 86.4 % of the blocks' FLOPs of a run with all layers."""
    config = tiny_config("unipool", *DEEP, "train.steps=20000")
    costs = stage_costs(config)
    assert [(cost.layers, cost.steps, cost.programs) for cost in costs] == [
        *((1, 1000, 12), (3, 1000, 10), (6, 3000, 7), (12, 15000, 1)),
    ]
    for cost in costs:
        assert cost.mean_depth == pytest.approx(cost.expected_depth, rel=0.05)
    depth = sum(cost.steps * cost.expected_depth for cost in costs) / 20_000
    assert depth / 12 == pytest.approx(0.864, abs=1e-3)
    assert sum(cost.flops for cost in costs) == pytest.approx(flops_spent(config, 20_000))
    table = "\n".join(cost_lines(config))
    assert "stage 2: 3 layers for 1000 steps" in table
    assert f"{share_spent(config, 20_000):.1%} of a run with all layers" in table


def grows(method: str, *words: str) -> Config:
    return tiny_config(method, *GROWS, "model.compute_dtype=float32", *words)


def stage_state(config: Config, layers: int) -> tuple[Config, TrainState]:
    """A state of a stage whose layers, moments and biases are all different."""
    stage = with_layers(config, layers)
    state = tiny_state(stage)
    keys = iter(range(1000))

    def random(leaf: jax.Array) -> jax.Array:
        noise = jax.random.normal(jax.random.key(next(keys)), leaf.shape)
        return leaf + 0.1 * jnp.abs(noise) if leaf.dtype == jnp.float32 else leaf

    opt_state = jax.tree.map(random, state.opt_state)
    biased = state.balance._replace(expert_bias_GNE=random(state.balance.expert_bias_GNE))
    return stage, state._replace(params=jax.tree.map(random, state.params), opt_state=opt_state, balance=biased)


def by_layer(tree: Any) -> list[dict[str, np.ndarray]]:
    """Parameters of each layer, its own pool among them, in order; a pool that all share is left out."""
    pools = tree["pools"]
    layers = [np.asarray(x).reshape(-1, *x.shape[2:]) for x in jax.tree.leaves(pools["layers"])]
    if pools["bank"]["gate"].shape[0] == len(layers[0]):
        layers += [np.asarray(x) for x in jax.tree.leaves(pools["bank"])]
    return [{str(i): x[layer] for i, x in enumerate(layers)} for layer in range(len(layers[0]))]


def logits(config: Config, state: TrainState, tokens: np.ndarray) -> np.ndarray:
    found, _ = jax.jit(forward, static_argnums=0)(config, state.params, tokens, state.balance.expert_bias_GNE)
    return np.asarray(found)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("method", ["unipool", pytest.param("vanilla", marks=SLOW), pytest.param("dense", marks=SLOW)])
def test_growth_preserves_the_unrolled_function(method: str) -> None:
    """The N' layers compute what the N did unrolled to as many: logits are equal to the bit."""
    config = grows(method)
    _, state = stage_state(config, 2)
    tokens = tiny_batch(config).inputs
    deep = unrolling(config, 2, 4)
    before = logits(deep.config, deep.unroll(state), tokens)
    grown = grown_state(config, state, 2, 4)
    np.testing.assert_array_equal(logits(deep.config, grown, tokens), before)


def deep_params(state: TrainState) -> Any:
    """First moments of the optimizer, which have the structure of the parameters."""
    (adam,) = [s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu")]
    return adam.mu


@pytest.mark.parametrize(
    ("method", "moments"), [("unipool", "copy"), ("unipool", "official"), ("unipool", "zero"), ("vanilla", "copy")]
)
def test_layers_and_moments_travel(method: str, moments: str) -> None:
    """Layer j is old layer floor(j N / N'), and so are its moments, or as the setting says; all else stays."""
    config = grows(method, f"growth.moments={moments}")
    _, state = stage_state(config, 2)
    old, old_moments = by_layer(state.params), by_layer(deep_params(state))
    rest = {name: np.asarray(state.params[name]) for name in ("embedding", "output", "final_norm")}
    bank, bank_moments = (np.asarray(tree["pools"]["bank"]["up"]) for tree in (state.params, deep_params(state)))
    bias = np.asarray(state.balance.expert_bias_GNE).reshape(2, -1)
    grown = grown_state(config, state, 2, 4)
    new, new_moments = by_layer(grown.params), by_layer(deep_params(grown))
    for layer, source in enumerate((0, 0, 1, 1)):
        for name, value in new[layer].items():
            np.testing.assert_array_equal(value, old[source][name])
            found = new_moments[layer][name]
            if moments == "copy":
                np.testing.assert_array_equal(found, old_moments[source][name])
            elif moments == "official" and layer < 2:
                np.testing.assert_array_equal(found, old_moments[layer][name])
            else:
                assert not found.any()
    np.testing.assert_array_equal(np.asarray(grown.balance.expert_bias_GNE).reshape(4, -1), bias[[0, 0, 1, 1]])
    for name, value in rest.items():
        np.testing.assert_array_equal(grown.params[name], value)
    if method == "unipool":
        np.testing.assert_array_equal(grown.params["pools"]["bank"]["up"], bank)
        np.testing.assert_array_equal(deep_params(grown)["pools"]["bank"]["up"], bank_moments)


def test_a_run_begins_with_the_first_layers_of_the_deep_one() -> None:
    """Initial weights are scaled for the final depth: they are those of the run that has all layers from the start."""
    config = tiny_config("vanilla", "growth.layers=[2,4]", "growth.ends=[.2,1]")
    whole = tiny_state(config)
    first = jax.jit(first_stage, static_argnums=0)(config, whole)
    for found, wanted in zip(by_layer(first.params), by_layer(whole.params), strict=False):
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            np.testing.assert_array_equal(value, wanted[name])
    for name in ("embedding", "output"):
        np.testing.assert_array_equal(first.params[name], whole.params[name])
    shapes = jax.tree.map(jnp.shape, state_shapes(with_layers(config, 2)))
    assert jax.tree.map(jnp.shape, first) == shapes


def whole_batch(config: Config) -> Any:
    return jax.tree.map(jnp.asarray, tiny_batch(config))


@pytest.mark.parametrize("method", ["unipool", pytest.param("vanilla", marks=SLOW)])
def test_gradients_are_sums_over_the_uses_of_a_layer(method: str) -> None:
    """One step at D = 3 against differentiating the unrolled loss; uses of the two layers are two and one."""
    config = grows(method, "growth.depth_law=final", "model.num_layers=3", "growth.layers=[2,3]", "growth.ends=[.5,1]")
    stage, state = stage_state(config, 2)
    batch = whole_batch(config)
    deep = unrolling(config, 2, 3)
    assert deep.sources == (0, 0, 1)
    found = jax.jit(lambda state: deep.fold(batch_gradients(deep.config, None, deep.unroll(state), batch)))(state)

    def loss(params: Any) -> jax.Array:
        seen = deep.unroll(state._replace(params=params))
        micro = MicroBatch(batch, seen.balance, state.step, None, jnp.sum(batch.weights))
        return micro_batch_loss(seen.params, Carried(None, None), deep.config, None, None, micro)[0][0]

    wanted = jax.jit(jax.grad(loss))(state.params)
    for name, (ours, theirs) in {
        jax.tree_util.keystr(path): pair
        for path, pair in zip(
            [path for path, _ in jax.tree_util.tree_leaves_with_path(wanted)],
            zip(jax.tree.leaves(found.params), jax.tree.leaves(wanted), strict=True),
            strict=True,
        )
    }.items():
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-7, err_msg=name)
    np.testing.assert_array_equal(found.metrics["uses_L"], [2, 1])
    tokens = config.tokens_per_step
    np.testing.assert_array_equal(np.sum(found.counts_GNE, axis=-1).reshape(-1), [2 * tokens, tokens])
    assert found.counts_GNE.shape == (stage.pool.groups, stage.layers_per_pool, stage.experts_per_pool)


def test_micro_batches_have_depths_of_their_own() -> None:
    """A step of two micro-batches at D = 2 and 1 is the mean of their gradients, each taken alone at its depth."""
    words = ("model.num_layers=2", "growth.layers=[1,2]", "growth.ends=[.5,1]", "growth.depth_law=uniform")
    config = tiny_config("vanilla_aux_free", *words, "model.compute_dtype=float32", "train.microbatch_size=4")
    stage, state = stage_state(config, 1)
    completed = next(step for step in range(25) if set(depths(config, step)[0]) == {1, 2})
    state, batch = state._replace(step=jnp.asarray(completed, jnp.int32)), whole_batch(config)
    alone = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=4))

    @jax.jit
    def by_hand(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        halves = []
        for part, depth in enumerate(depths(config, completed)[0].tolist()):
            deep = unrolling(alone, 1, depth)
            half = jax.tree.map(lambda rows, part=part: rows[4 * part :][:4], batch)
            halves.append(deep.fold(batch_gradients(deep.config, None, deep.unroll(state), half)))
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *(half.params for half in halves))
        found = halves[0]._replace(params=mean, counts_GNE=halves[0].counts_GNE + halves[1].counts_GNE)
        losses = [half.metrics["loss/lm"] for half in halves]
        return updated_state(stage, state, state.balance, found)[0], (losses[0] + losses[1]) / 2

    wanted, loss = by_hand(state, batch)
    step = GrowthStep(config, stage, None, completed)
    assert step.compiles
    found, metrics = step(jax.tree.map(jnp.copy, state), batch)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(metrics["uses_L"], [3])
    assert metrics["loss/lm"] == pytest.approx(float(loss), rel=1e-5)


def test_without_a_drawn_depth_the_step_is_that_of_the_plain_model() -> None:
    """Exact pool loss over two micro-batches at D = N, counts first: losses and state of `make_train_step`."""
    words = ("model.num_layers=2", "growth.layers=[1,2]", "growth.ends=[.5,1]", "growth.depth_law=stage")
    config = tiny_config("unipool", *words, "model.compute_dtype=float32", "train.microbatch_size=4")
    stage, state = stage_state(config, 1)
    batch = whole_batch(config)
    wanted, expected = make_train_step(stage)(jax.tree.map(jnp.copy, state), batch)
    found, metrics = GrowthStep(config, stage, None, 0)(state, batch)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    for name in expected:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, err_msg=name)


REFUSED = [
    ("unipool", "growth.ends=[.5,1]", "growth.ends=[0.5, 1.0]: needs growth.layers"),
    ("unipool", "growth.map=stack", "growth.map=stack: needs growth.layers"),
    ("unipool", "growth.layers=[1,2] growth.ends=[.5,1]", "ascend to model.num_layers=4"),
    ("unipool", "growth.layers=[4] growth.ends=[1]", "two or more numbers"),
    ("unipool", "growth.layers=[2,4] growth.ends=[.5]", "growth.ends=[0.5]: has 1 entries"),
    ("unipool", "growth.layers=[2,4] growth.ends=[.5,.9]", "must be fractions of train.steps that ascend to 1"),
    ("unipool", "growth.layers=[2,4] growth.ends=[.001,1]", "with train.steps=50 a stage has no step (0 to 0"),
    ("unipool", "growth.layers=[2,4] growth.ends=[.5,1] moe.dense_layers=1", "moe.dense_layers=1"),
    ("unipool", "growth.layers=[2,4] growth.ends=[.5,1] attention.kind=alternating attention.window=4", "alternating"),
    ("unipool", "growth.layers=[2,4] growth.ends=[.5,1] run.init_from=runs/a", "run.init_from=runs/a"),
    ("ring", "growth.layers=[2,4] growth.ends=[.5,1]", "pool.starts=ring"),
    ("unipool", "growth.layers=[2,4] growth.ends=[.5,1] optimizer.reuse_divisor=sqrt", "optimizer.reuse_divisor=sqrt"),
    ("unipool", "growth.layers=[2,4] growth.ends=[.5,1] loss.scope=layer", "loss.scope=layer"),
    ("unipool", "growth.layers=[2,4] growth.ends=[.5,1] pool.groups=2", "pool.groups=2: with growth.layers=[2, 4] and"),
    (
        "unipool",
        "growth.layers=[2,4] growth.ends=[.5,1] pool.groups=2 growth.depth_step=2 growth.map=stack",
        "growth.map=stack: takes layers to other pools of pool.groups=2",
    ),
    (
        "vanilla",
        "growth.layers=[2,4] growth.ends=[.5,1] mesh.expert_placement=measured",
        "mesh.expert_placement=measured",
    ),
]


@pytest.mark.parametrize(("method", "words", "problem"), REFUSED)
def test_runs_that_cannot_grow_are_refused(method: str, words: str, problem: str) -> None:
    found = problems(tiny_config(method, "model.vocab_size=257", *words.split()))
    assert any(problem in line for line in found), found


def test_several_pools_grow_where_layers_stay_in_theirs() -> None:
    """G = 2 with depths that it divides: the unrolled layers of a pool are copies of layers of that pool."""
    words = ("pool.groups=2", "growth.layers=[2,4,8]", "growth.ends=[.2,.5,1]", "growth.depth_step=2")
    config = tiny_config("unipool", "model.vocab_size=257", "model.num_layers=8", *words)
    assert not problems(config)
    for layers in (2, 4, 8):
        for depth in depth_shares(config, layers):
            assert depth % 2 == 0
            deep = unrolling(config, layers, depth)
            assert (deep.config.pool.groups, deep.config.total_experts) == (2, config.total_experts)
            assert [source * 2 // layers for source in deep.sources] == [place * 2 // depth for place in range(depth)]


@pytest.mark.parametrize(("end", "refused"), [(0.2, False), (0.3, True), (0.4, True)])
def test_a_lock_watches_only_when_all_layers_are_there(end: float, refused: bool) -> None:
    """The lock counts in the evaluations at steps 15, 20 and 25; the last growth is at step 10, 15 or 20 of 50."""
    lock = ("train.eval_every=5", "lock.lock_step=30", "lock.anneal_steps=5", "lock.count_lookback=3")
    words = ("growth.layers=[2,4]", f"growth.ends=[{end},1]", "lock.entropy_warmup_steps=5", "lock.entropy_target=2")
    config = tiny_config("unipool_lock", "model.vocab_size=257", *lock, *words)
    found = problems(config)
    assert bool(found) == refused, found
    assert all("from step 15 to the freeze at step 25, but the last growth is at step" in line for line in found)


@pytest.mark.parametrize("method", ["unipool", pytest.param("vanilla", marks=SLOW)])
def test_a_state_grows_over_eight_devices(method: str) -> None:
    """Every array lies where the mesh wants that of the deeper model, with the values of one device."""
    config = grows(method, "moe.experts_per_layer=8")
    mesh = make_mesh(MeshConfig(2, 2, 2, 1), jax.devices()[:8])
    stage, state = stage_state(config, 2)
    spread = jax.device_put(jax.device_get(state), state_shardings(stage, mesh, state))
    wanted, found = grown_state(config, state, 2, 4), grown_state(config, spread, 2, 4, mesh)
    places = state_shardings(config, mesh, found)
    for ours, theirs, place in zip(*map(jax.tree.leaves, (found, wanted, places)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.sharding.is_equivalent_to(place, ours.ndim)
