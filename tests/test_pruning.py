"""Pruned models: cutting is masking, merged attention a sum, scores are NumPy's, and what cannot be is refused."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

import oracles
from test_convert import random_weights
from test_upcycle import scaled
from tiny import tiny_batch, tiny_config
from unipool_jax.config.chips import parse_topology
from unipool_jax.config.compose import Choices
from unipool_jax.config.rules import validate
from unipool_jax.config.schema import Config
from unipool_jax.convert.errors import ConversionError
from unipool_jax.convert.layered import Layered, layered, stacked
from unipool_jax.convert.walk import Walk
from unipool_jax.convert.weights import Weights, empty_weights
from unipool_jax.model.report import count_parameters
from unipool_jax.moe.routing import norm_constant
from unipool_jax.planner.work import count
from unipool_jax.pruning.choice import Choice, Group, choose, remaining_layers
from unipool_jax.pruning.command import with_full_layers
from unipool_jax.pruning.cut import cut, gain_factor, gain_ratio, merged_attention
from unipool_jax.pruning.orphans import find_orphans, hand_over
from unipool_jax.pruning.prune import prune
from unipool_jax.pruning.requests import PruneRequest
from unipool_jax.pruning.scores import Scores, at_random, by_magnitude, measured
from unipool_jax.pruning.target import pruned_config

pytestmark = [pytest.mark.filterwarnings("ignore:NormRouter over"), pytest.mark.usefixtures("steps_are_shared")]

AROUND = ("moe.shared_experts=1", "moe.dense_layers=1", "moe.depth_vectors=true", "pool.groups=1", "pool.experts=6")


def smaller(config: Config, *words: str) -> Config:
    return pruned_config(config, Choices(words))


def forward(config: Config, weights: Weights, seed: int = 0) -> oracles.Forward:
    tokens = tiny_batch(config, seed).inputs[:2]
    bias = weights.expert_bias_GNE if config.loss.balance == "expert_bias" else None
    return oracles.Forward(config, weights.params, tokens, bias)


def some_scores(config: Config, model: Layered, seed: int = 0) -> Scores:
    traffic = [np.ones(config.experts_per_pool) for _ in range(config.mixture_layers)]
    return at_random(by_magnitude(config, model, traffic), seed)


def chosen(config: Config, target: Config, model: Layered, layers: tuple[int, ...] | None = None) -> Choice:
    layers = tuple(range(config.model.num_layers)) if layers is None else layers
    return choose(config, target, some_scores(config, model), layers, merge=True)


@pytest.mark.parametrize(
    "method",
    [("dense",), ("vanilla_aux_free",), ("unipool", "pool.groups=2"), ("sliding",), ("unipool", *AROUND)],
    ids=" ".join,
)
def test_nothing_pruned_is_nothing_changed(method: tuple[str, ...]) -> None:
    config = tiny_config(*method)
    weights = random_weights(config)
    model = layered(config, weights)
    everything = chosen(config, config, model)
    found = stacked(config, cut(model, config, everything, "slnp"))
    jax.tree.map(np.testing.assert_array_equal, found, weights)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (("dense",), ("model.num_layers=3", "model.ffn_size=10")),
        (
            ("vanilla_aux_free", "model.norm=sandwich"),
            ("model.num_layers=2", "model.hidden_size=12", "model.num_kv_heads=1"),
        ),
        (("unipool", "pool.groups=2"), ("model.num_layers=2", "pool.experts=6")),
        (("sliding",), ("model.hidden_size=14", "model.ffn_size=20")),
        (("unipool", *AROUND), ("model.num_layers=3", "model.hidden_size=8", "model.ffn_size=5", "pool.experts=3")),
    ],
    ids=str,
)
def test_sizes_are_those_of_the_target(method: tuple[str, ...], words: tuple[str, ...]) -> None:
    """Of every array, of the report of parameters, and of what the planner counts."""
    config = tiny_config(*method)
    target = smaller(config, *words)
    validate(dataclasses.replace(target, mode="describe"))
    weights = random_weights(config)
    request = PruneRequest(out="", importance="magnitude")
    model = layered(config, weights)
    layers, _ = remaining_layers(config, target, sum)
    choice = chosen(config, target, model, layers)
    found = stacked(target, cut(model, config, choice, request.gains))
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), found, empty_weights(target))
    leaves = sum(leaf.size for leaf in jax.tree.leaves(found.params))
    counts = count_parameters(target)
    hidden_rows = (
        0 if target.windows is None else target.router_width * target.mixture_layers - sum(target.windows.widths)
    )
    assert counts["total"] == leaves - hidden_rows * target.model.hidden_size
    vectors = sum(counts.get(kind, 0) for kind in ("norms", "scales", "depth_vectors"))
    one = count(target, dict.fromkeys(("data", "fsdp", "expert", "tensor"), 1), parse_topology("v5p:1x1x1"))
    assert one.state_bytes == (leaves - vectors) * 3 * 4


def masked_channels(weights: Weights, channels: np.ndarray) -> Weights:
    """Zeros in whatever writes other channels to the residual stream, so that they are never anything else."""
    gone = np.setdiff1d(np.arange(weights.params["embedding"].shape[1]), channels)
    params = jax.tree.map(np.copy, weights.params)
    params["embedding"][:, gone] = 0
    layers = params["pools"]["layers"]
    layers["attention"]["output"][..., gone] = 0
    params["pools"]["bank"]["down"][..., gone] = 0
    return Weights(params, weights.expert_bias_GNE)


def test_masking_is_cutting() -> None:
    """Groups, neurons and channels at once.

    The mean of a norm runs over the channels that are left, which gains of `dimension` and the epsilon make up for.
    """
    config = tiny_config("unipool", "moe.top_k=2")
    target = smaller(config, "model.hidden_size=10", "model.num_kv_heads=1", "model.ffn_size=9")
    assert (target.model.num_heads, target.head_size) == (2, 4)
    weights = scaled(config)
    model = layered(config, weights)
    choice = chosen(config, target, model)
    masked = masked_channels(weights, choice.channels_D)
    layers, bank = masked.params["pools"]["layers"], masked.params["pools"]["bank"]
    for layer, groups in enumerate(choice.groups):
        gone = 1 - groups[0].place
        layers["attention"]["output"][0, layer, gone * 8 : gone * 8 + 8] = 0
    for expert, neurons in enumerate(choice.neurons[0]):
        bank["down"][0, expert, np.setdiff1d(np.arange(24), neurons)] = 0
    found = stacked(target, cut(model, config, choice, "dimension"))
    wide = dataclasses.replace(target.model, norm_epsilon=config.model.norm_epsilon * 16 / 10)
    wanted = forward(config, masked)
    np.testing.assert_allclose(
        forward(dataclasses.replace(target, model=wide), found).logits, wanted.logits, rtol=1e-4, atol=1e-5
    )
    # Without a factor, every output of a norm, and so every logit of the head's, is larger by sqrt(d / d').
    plain = oracles.rms_norm(wanted.hidden[0][..., choice.channels_D], np.ones(10), 0)
    masked_norm = oracles.rms_norm(wanted.hidden[0], np.ones(16), 0)[..., choice.channels_D]
    np.testing.assert_allclose(masked_norm / plain, np.sqrt(16 / 10), rtol=1e-6)


def test_gains_keep_their_length() -> None:
    gain = np.array([3.0, 0, 4, 12], np.float32)
    kept = np.array([0, 2])
    assert gain_factor(gain, kept, "slnp") == pytest.approx(13 / 5)
    assert gain_factor(gain, kept, "dimension") == pytest.approx(np.sqrt(2))
    assert gain_factor(gain, kept, "kept") == 1
    assert gain_factor(gain, np.array([1]), "slnp") == 1


def test_merged_attention_is_the_sum() -> None:
    """All groups of two layers behind one norm: what both add on the same input, each with its own gains."""
    config = tiny_config("unipool")
    model = layered(config, scaled(config))
    below, above = model.layers[1], model.layers[2]
    groups = [Group(layer, place) for layer in (1, 2) for place in range(2)]
    merged = merged_attention(config, model, groups, below)
    x = np.random.default_rng(0).standard_normal((8, 16))

    def attended(gain: np.ndarray, weights: Any, heads: int) -> np.ndarray:
        return oracles.attention(oracles.rms_norm(x, gain, 1e-5), weights, heads, heads // 2, config.model.rope_base)

    wanted = sum(attended(layer["attention_norm"], layer["attention"], 4) for layer in (below, above))
    np.testing.assert_allclose(attended(below["attention_norm"], merged, 8), wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gain_ratio(np.array([1.0, 1]), np.array([0.0, -2])), [1e3, -0.5])


def test_groups_of_removed_layers_compete() -> None:
    config = tiny_config("unipool")
    target = smaller(config, "model.num_layers=2")
    model = layered(config, scaled(config))
    scores = some_scores(config, model)._replace(groups_LG=np.array([[5.0, 1], [2, 6], [7, 0], [3, 4]]))
    assert choose(config, target, scores, (0, 3), merge=True).groups == [[(1, 1), (2, 0)], [(3, 0), (3, 1)]]
    assert choose(config, target, scores, (0, 3), merge=False).groups == [[(0, 0), (0, 1)], [(3, 0), (3, 1)]]


def test_experts_that_no_token_chooses_change_no_choice() -> None:
    """Scores of a token are multiplied by old norm over new norm, times new constant over old constant."""
    config = tiny_config("unipool", "moe.top_k=2", "pool.experts=12")
    weights = scaled(config)
    # With rows against a feature that all tokens share, some experts have negative logits throughout.
    weights.params["embedding"][:, 0] = 3
    rows = weights.params["pools"]["layers"]["mixture"]["router"]
    rows[..., [2, 5, 7, 11], 0] = -9
    weights.params["pools"]["layers"]["ffn_norm"][..., 0] = 1
    before = forward(config, weights)
    kept = np.flatnonzero(before.counts().sum(axis=0))
    assert 2 <= len(kept) < 12
    target = smaller(config, f"pool.experts={len(kept)}")
    model = layered(config, weights)
    counts = [row.astype(float) for row in before.counts()]
    choice = choose(config, target, some_scores(config, model)._replace(experts=counts), (0, 1, 2, 3), merge=True)
    assert choice.experts[0].tolist() == kept.tolist()
    found = stacked(target, cut(model, config, choice, "slnp"))
    # The first layer: later ones get other inputs, as the gates are others.
    after = forward(target, found)
    np.testing.assert_array_equal(kept[after.experts[0]], before.experts[0])
    own = jax.tree.map(lambda leaf: leaf[0, 0].astype(float), weights.params["pools"]["layers"])
    x = before.hidden[0]
    normed = oracles.rms_norm(x, own["attention_norm"], 1e-5)
    x = x + np.stack([oracles.attention(row, own["attention"], 4, 2, config.model.rope_base) for row in normed])
    logits = oracles.rms_norm(x, own["ffn_norm"], 1e-5).reshape(-1, 16) @ own["mixture"]["router"].T
    norms = np.linalg.norm(logits, axis=1) / np.linalg.norm(logits[:, kept], axis=1)
    factor = norms * norm_constant(len(kept), 2) / norm_constant(12, 2)
    np.testing.assert_allclose(after.scores[0], before.scores[0][:, kept] * factor[:, None], rtol=1e-5)


@pytest.fixture(scope="module")
def walked() -> tuple[Config, Weights, Walk]:
    config = tiny_config("unipool", "moe.top_k=2", "model.compute_dtype=float32", "model.norm=sandwich")
    weights = scaled(config)
    return config, weights, Walk(config, layered(config, weights))


def test_scores_are_those_of_numpy(walked: tuple[Config, Weights, Walk]) -> None:
    config, weights, walk = walked
    batches = [tiny_batch(config, seed) for seed in range(2)]
    found = measured(walk, batches)
    wanted = [oracles.Importances(config, weights.params, batch.inputs) for batch in batches]

    def total(name: str) -> np.ndarray:
        return np.sum([getattr(one, name) for one in wanted], axis=0)

    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3)
    close(found.layers_L, total("layers") / 2)
    close(found.channels_D, total("channels"))
    close(found.groups_LG, total("groups"))
    close(found.neurons[0], total("neurons").sum(axis=0))
    close(np.stack(found.experts), total("outputs"))
    np.testing.assert_array_equal(found.traffic, sum(one.counts() for one in wanted))


def test_padding_does_not_count(walked: tuple[Config, Weights, Walk]) -> None:
    """Attention is causal: what is behind the last token that counts changes nothing before it."""
    config, _, walk = walked
    batch = tiny_batch(config)
    part = batch._replace(weights=batch.weights * (np.arange(8) < 3))
    other = part._replace(inputs=np.where(np.arange(8) < 3, part.inputs, 7))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        measured(walk, [part]),
        measured(walk, [other]),
    )
    assert measured(walk, [part]).traffic[0].sum() == 8 * 3 * 2


def test_the_loss_without_layers(walked: tuple[Config, Weights, Walk]) -> None:
    config, weights, walk = walked
    batch = tiny_batch(config)
    target = smaller(config, "model.num_layers=2")
    model = layered(config, weights)
    shallow = stacked(target, model._replace(layers=[model.layers[0], model.layers[3]], biases=model.biases[:2]))
    for layers, kind, params in (((0, 1, 2, 3), config, weights.params), ((0, 3), target, shallow.params)):
        wanted = oracles.Forward(kind, params, batch.inputs).lm_loss(batch.targets)
        assert walk.loss([batch], layers) == pytest.approx(wanted, rel=1e-4)


def test_pruning_by_loss_takes_the_best_layer_each_time(walked: tuple[Config, Weights, Walk]) -> None:
    config, weights, walk = walked
    target = smaller(config, "model.num_layers=3", "pool.experts=5")
    batches = [tiny_batch(config)]
    found = prune(config, weights, target, batches, PruneRequest(out=""))
    (removal,) = found.removals
    assert removal.harms == {(1,): walk.loss(batches, (0, 2, 3)), (2,): walk.loss(batches, (0, 1, 3))}
    assert removal.layers == min(removal.harms, key=removal.harms.__getitem__)
    by_likeness = prune(config, weights, target, batches, PruneRequest(out="", layers="similarity"))
    assert by_likeness.removals[0].layers == (1 + int(np.argmin(by_likeness.scores.layers_L[1:3])),)
    drawn = [
        prune(config, weights, target, batches, PruneRequest(out="", importance="random", seed=s)) for s in (0, 0, 1)
    ]
    assert [len(one.choice.experts[0]) for one in drawn] == [5, 5, 5]
    jax.tree.map(np.testing.assert_array_equal, drawn[0].weights, drawn[1].weights)
    assert drawn[0].choice.channels_D.tolist() == list(range(16))
    assert any(a.tolist() != b.tolist() for a, b in zip(drawn[0].choice.experts, drawn[2].choice.experts, strict=True))


@pytest.mark.parametrize(
    ("method", "words", "groups", "removed"),
    [
        # By the sum of the layers that are left, the last candidate always goes.
        (("unipool",), ("model.num_layers=2",), 1, [(2,), (1,)]),
        (("vanilla",), ("model.num_layers=2",), 2, [(2,), (1,)]),
        (("vanilla", "pool.groups=2"), ("model.num_layers=2",), 2, [(2,), (1,)]),
        (("vanilla", "pool.groups=3", "model.num_layers=6"), ("model.num_layers=4",), 2, [(2, 3)]),
        (("unipool", *AROUND), ("model.num_layers=3",), 1, [(2,)]),
    ],
    ids=str,
)
def test_which_layers_may_go(
    method: tuple[str, ...], words: tuple[str, ...], groups: int, removed: list[tuple[int, ...]]
) -> None:
    config = tiny_config(*method)
    target = smaller(config, *words)
    kept, removals = remaining_layers(config, target, sum)
    assert target.pool.groups == groups
    assert [step.layers for step in removals] == removed
    assert {0, config.model.num_layers - 1} <= set(kept)
    assert target.experts_per_pool == config.experts_per_pool


def test_orphans_are_handed_to_the_layer_below() -> None:
    config = tiny_config("unipool", "pool.experts=4")
    target = smaller(config, "model.num_layers=2", "pool.experts=3")
    model = layered(config, random_weights(config))
    traffic = [np.array(row) for row in ([8.0, 1, 0, 9], [0.0, 20, 0, 9], [1.0, 5, 0, 9], [4.0, 0, 0, 9])]
    scores = some_scores(config, model)._replace(traffic=traffic, experts=[np.array([3.0, 3, 2, 1])] * 4)
    choice = choose(config, target, scores, (0, 3), merge=True)
    (orphan,) = find_orphans(config, traffic, choice)
    assert (orphan.expert, orphan.giver, orphan.taker, orphan.tokens) == (1, 1, 0, 26)
    assert orphan.share == pytest.approx(25 / 26)
    given = hand_over(config, model, [orphan])
    before, after = (found.layers[0]["mixture"]["router"] for found in (model, given))
    np.testing.assert_array_equal(np.delete(after, 1, axis=0), np.delete(before, 1, axis=0))
    # The same logit for the same normed input without gains.
    x = np.random.default_rng(0).standard_normal(16)
    giver = model.layers[1]
    wanted = (x * giver["ffn_norm"]) @ giver["mixture"]["router"][1]
    assert (x * model.layers[0]["ffn_norm"]) @ after[1] == pytest.approx(wanted, rel=1e-3)


def test_kinds_of_attention_go_with_their_layers() -> None:
    config = tiny_config("unipool", "attention.kind=alternating", "attention.window=2", "attention.full_layers=[0,2]")
    target = smaller(config, "model.num_layers=2")
    assert with_full_layers(config, target, (0, 3)).attention.full_layers == (0,)
    assert with_full_layers(config, target, (1, 2)).sees_all == (False, True)


@pytest.mark.parametrize(
    ("source", "words", "message"),
    [
        ((), (), "as large as the source"),
        ((), ("model.num_layers=5",), "model.num_layers=5: the source has 4"),
        ((), ("model.hidden_size=8", "model.rope_base=7"), r"model\.rope_base=7\.0: the source has"),
        ((), ("moe.router=softmax", "model.num_layers=3"), "moe.router=softmax"),
        ((), ("model.num_heads=3", "model.num_layers=3"), "heads go in groups of 2"),
        (("pool.starts=ring",), ("model.num_layers=3",), "see windows of a bank"),
        (("pool.groups=2",), ("model.num_layers=3", "pool.experts=7"), "multiple of"),
    ],
    ids=str,
)
def test_what_cannot_be_pruned_is_refused(source: tuple[str, ...], words: tuple[str, ...], message: str) -> None:
    config = tiny_config("unipool", *source)
    with pytest.raises(ConversionError, match=message):
        smaller(config, *words)


def test_no_layer_may_go() -> None:
    config = tiny_config("unipool")
    target = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=1))
    with pytest.raises(ConversionError, match="no layer may go"):
        remaining_layers(config, target, sum)
