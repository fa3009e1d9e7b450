"""Merged models: exact where banks are equal, nearer than by number where they are not, refused where impossible."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles import expert, merging_costs, softmax
from runner import overrides
from test_convert import random_weights
from test_upcycle import logits, scaled
from tiny import tiny_batch, tiny_config
from unipool_jax.cli.main import execute
from unipool_jax.config.compose import Choices, compose_config
from unipool_jax.config.rules import validate
from unipool_jax.config.schema import Config
from unipool_jax.convert.errors import ConversionError
from unipool_jax.convert.inheritance import Origin
from unipool_jax.convert.joining import Join, banks_of, joins, merged_config
from unipool_jax.convert.matching import costs, match
from unipool_jax.convert.merge import Merged, merge
from unipool_jax.convert.requests import MergeRequest
from unipool_jax.convert.reservoirs import Reservoir, Sample, sample_inputs
from unipool_jax.convert.runs import write_run
from unipool_jax.convert.weights import Weights
from unipool_jax.data.corpus import open_corpus
from unipool_jax.data.identity import text_identity
from unipool_jax.kernels.grouped_ffn import Bank
from unipool_jax.training.lineage import read_lineage

pytestmark = [pytest.mark.filterwarnings("ignore:NormRouter over"), pytest.mark.usefixtures("steps_are_shared")]

PAIRS = "pool.groups=2"
INNER = ("pool.starts=runs", "pool.span=2", "pool.ends=1")


def merged(config: Config, weights: Weights, target: Config, **how: Any) -> Merged:
    request = MergeRequest(out="", **{"rows": 40, **how})
    return merge(config, weights, target, [tiny_batch(config, seed) for seed in range(4)], request)


ORDERS = {1: [2, 0, 3, 1], 3: [3, 2, 1, 0]}


def shuffled_pairs(config: Config) -> Weights:
    """Every other pool has the experts of the one before in another order; routers are different."""
    weights = scaled(config)
    for array in weights.params["pools"]["bank"].values():
        for pool, order in ORDERS.items():
            if pool < len(array):
                array[pool] = array[pool - 1][order]
    return weights


@pytest.mark.parametrize(
    ("method", "shared"),
    [
        (("vanilla",), (PAIRS,)),
        (("unipool", PAIRS, "pool.fraction=0.5"), ("pool.groups=1",)),
        (("vanilla_aux_free", "moe.top_k=2"), (PAIRS,)),
        (("vanilla_aux_free",), ("pool.starts=runs", "pool.span=2")),
    ],
    ids=str,
)
def test_equal_shuffled_banks_merge_exactly(method: tuple[str, ...], shared: tuple[str, ...]) -> None:
    config = tiny_config(*method, "moe.experts_per_layer=4")
    target = merged_config(config, Choices(shared))
    weights = shuffled_pairs(config)
    found = merged(config, weights, target)
    assert target.total_experts == config.total_experts / 2
    np.testing.assert_allclose(logits(target, found.matched), logits(config, weights), rtol=1e-5, atol=1e-5)
    assert all(errors.of_layers(errors.matched_E) < 1e-10 for errors in found.errors.values())
    if method == ("vanilla",):
        worse = merged(config, weights, target, matching="identity").matched
        assert np.abs(logits(target, worse) - logits(config, weights)).max() > 0.01


def test_costs_and_their_weight_in_a_layer() -> None:
    """An expert with fewer inputs than fit, one with twice as many, and padding that must not count."""
    random = np.random.default_rng(0)

    def bank() -> dict[str, np.ndarray]:
        shapes = {"gate": (3, 4, 5), "up": (3, 4, 5), "down": (3, 5, 4)}
        return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    own, other, shown = bank(), bank(), np.array([6, 2, 12])
    inputs = random.standard_normal((3, 6, 4)).astype(np.float32)
    weights = random.random((3, 6)).astype(np.float32)
    weights[1, 2:] = 0
    found, energy = costs(Bank(**_suffixed(own)), Bank(**_suffixed(other)), Sample(inputs, weights, shown))
    wanted = merging_costs(own, other, list(inputs), list(weights))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    output_squares = [(expert(inputs[e], own, e) ** 2).sum(axis=1) @ weights[e] for e in range(3)]
    np.testing.assert_allclose(energy, np.array(output_squares) * [1, 1, 2], rtol=1e-5)


def _suffixed(bank: dict[str, np.ndarray]) -> dict[str, Any]:
    return {"gate_EDF": bank["gate"], "up_EDF": bank["up"], "down_EFD": bank["down"]}


def test_an_expert_without_inputs_is_matched_on_those_of_the_others() -> None:
    random, order = np.random.default_rng(0), np.array([2, 0, 1])
    own = Bank(*(jnp.asarray(random.standard_normal(shape)) for shape in ((3, 4, 5), (3, 4, 5), (3, 5, 4))))
    other = Bank(*(array[np.argsort(order)] for array in own))
    weights = np.array([[1.0, 1], [0, 0], [0, 0]])
    sample = Sample(random.standard_normal((3, 2, 4)), weights, np.array([2, 0, 0]))
    assert match(own, other, sample).tolist() == order.tolist()
    assert np.isnan(costs(own, other, sample)[0][1:]).all()
    assert match(own, other, sample._replace(weights_ER=0 * weights)).tolist() == [0, 1, 2]


def test_a_reservoir_is_a_uniform_sample() -> None:
    """Every row of the 50 is kept 20 times in 100, give or take four standard deviations; no more than fit are."""
    kept = np.zeros(50)
    for seed in range(400):
        reservoir = Reservoir(10, 1, np.random.default_rng(seed))
        for start in range(0, 50, 7):
            rows = np.arange(start, min(start + 7, 50))
            reservoir.show(rows[:, None].astype(np.float32), rows + 1.0)
        rows_RD, weights_R = reservoir.padded()
        np.testing.assert_array_equal(rows_RD[:, 0] + 1, weights_R)
        kept[rows_RD[:, 0].astype(int)] += 1
    assert kept.sum() == 4000
    assert reservoir.shown == 50
    assert np.abs(kept - 80).max() < 4 * 8
    few = Reservoir(10, 1, np.random.default_rng(0))
    few.show(np.ones((3, 1), np.float32), np.ones(3))
    assert few.padded()[1].tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]


def test_samples_are_what_experts_are_given() -> None:
    """The router, applied to a sampled input, chooses the expert it is kept for, with the gate it is kept with."""
    config = tiny_config("vanilla", "moe.experts_per_layer=4", "moe.top_k=2", PAIRS, "pool.fraction=0.5")
    weights, banks = scaled(config), banks_of(config, "the source")
    batches = [tiny_batch(config, seed) for seed in range(4)]
    found = sample_inputs(config, weights, banks, [1], batches, 1000, 0)
    routers = weights.params["pools"]["layers"]["mixture"]["router"][1]
    rows = 0
    for sample in found[1]:
        for expert_index in range(4):
            used = sample.weights_ER[expert_index] > 0
            rows += used.sum()
            scores = softmax(sample.inputs_ERD[expert_index, used] @ routers.swapaxes(1, 2))
            # Layers 2 and 3 share the bank: one of their routers chose it.
            near = np.abs(scores[..., expert_index] ** 2 - sample.weights_ER[expert_index, used]) < 1e-5
            chosen = (scores > scores[..., expert_index, None]).sum(axis=-1) < 2
            assert (near & chosen).any(axis=0).all()
    assert rows == sum(sample.shown_E.sum() for sample in found[1]) == 2 * 2 * sum(b.inputs.size for b in batches)
    assert 0.6 < found[1].fit.shown_E.sum() / rows < 0.95


def test_matching_is_nearer_than_identity_and_prefit_nearer_still() -> None:
    """On held-out inputs, for banks that have most of their weights in common; prefit pays with the kept bank's own."""
    config = tiny_config("vanilla", "moe.experts_per_layer=4")
    weights, other = shuffled_pairs(config), random_weights(config, seed=1).params["pools"]["bank"]
    for name, array in weights.params["pools"]["bank"].items():
        array += 0.05 * other[name]
    target = merged_config(config, Choices((PAIRS,)))
    found = merged(config, weights, target, prefit=200, prefit_rate=3e-3)
    assert set(found.errors) == {(0, 0), (1, 0), (2, 2), (3, 2)}
    for (bank, kept), errors in found.errors.items():
        assert errors.fitted_E is not None
        before, after = errors.of_layers(errors.matched_E), errors.of_layers(errors.fitted_E)
        if bank == kept:
            assert before == 0 < after < 0.1
        else:
            assert after < 0.7 * before < 0.5 * errors.of_layers(errors.identity_E)
            assert errors.place_E.tolist() == ORDERS[bank]
    again = merged(config, weights, target, prefit=200, prefit_rate=3e-3)
    jax.tree.map(np.testing.assert_array_equal, again.fitted, found.fitted)


@pytest.mark.parametrize(
    ("source", "shared", "message"),
    [
        (("dense",), (), "is dense and has no experts"),
        (("unipool",), (), "all layers of the source share one bank"),
        (("vanilla", "model.norm=sandwich"), (PAIRS,), r"model\.norm=sandwich: experts are matched by"),
        (("vanilla",), ("pool.groups=4",), "no two of the 4 banks"),
        (("vanilla",), (PAIRS, "pool.experts=8"), "layer 0 sees 2 experts, and 4 in the target"),
        (("vanilla",), ("pool.starts=ring",), "layers 0 and 1 of the target see windows that overlap in part"),
        (("vanilla",), ("method=unipool",), r"moe\.router=norm: the source has softmax"),
        (
            ("vanilla", PAIRS, "pool.experts=4"),
            ("pool.starts=[0,2,2,2]",),
            "layers 0 and 1 share experts in the source",
        ),
        (("vanilla_aux_free",), (PAIRS, "loss.balance=none"), r"loss\.balance=none: the source has expert_bias"),
    ],
)
def test_what_cannot_be_merged_is_refused(source: tuple[str, ...], shared: tuple[str, ...], message: str) -> None:
    config = tiny_config(*source)
    with pytest.raises(ConversionError, match=message):
        joins(config, merged_config(config, Choices(shared)))


@pytest.mark.parametrize(
    ("shared", "of_layer"),
    [((), [0, 0, 0, 0]), ((PAIRS,), [0, 0, 1, 1]), (INNER, [0, 1, 1, 2]), (("pool.starts=[0,2,0,2]",), [0, 1, 0, 1])],
)
def test_layers_see_as_many_experts_as_before(shared: tuple[str, ...], of_layer: list[int]) -> None:
    config = tiny_config("vanilla")
    target = merged_config(config, Choices(shared))
    validate(dataclasses.replace(target, mode="describe"))
    banks = banks_of(target, "the target")
    assert list(banks.of_layer) == of_layer
    assert target.total_experts == 2 * len(set(of_layer))
    assert {len(experts) for experts in banks.experts} == {2}
    assert joins(merged_config(config, Choices((PAIRS,))), merged_config(config, Choices(()))) == [Join(0, (1,))]


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two layers with two experts each."""
    place = tmp_path_factory.mktemp("merge")
    settings = ["train.steps=2", "train.eval_batches=null", "data.document_mask=true"]
    config = compose_config(overrides(place, "method=vanilla", *settings))
    text = text_identity(open_corpus(config.data, config.model.vocab_size))
    write_run(place / "runs" / "parent", config, scaled(config), Origin(text=text))
    return place / "runs" / "parent"


def test_a_merged_run_on_the_command_line(parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, words = tmp_path / "merged", [str(parent), "tokens=400", "rows=20", "prefit=3"]
    command = ["convert", "merge", *words, f"out={out}"]
    assert execute(command) == 0
    said = capsys.readouterr().out
    assert "2 experts instead of 4, at step 0; merge.json has the errors of each" in said
    report = json.loads((out / "merge.json").read_text())
    assert report["experts"] == {"source": 4, "merged": 2}
    assert [(bank["layers"], bank["experts_of_layers"]) for bank in report["banks"]] == [([0], [0]), ([1], [0])]
    (one, two) = report["banks"][1]["experts"]
    assert {one["becomes"], two["becomes"]} == {0, 1}
    assert f"merged {report['loss']['merged']:.4f}, prefit {report['loss']['prefit']:.4f}" in said
    # The losses of the report are those of `unipool eval`.
    for run, name in ((parent, "source"), (out, "prefit")):
        assert execute(["eval", str(run), "splits=[valid]"]) == 0
        loss = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]["valid"]["loss"]
        assert loss == pytest.approx(report["loss"][name], abs=1e-6)
    (event,) = read_lineage(out)
    assert (event["event"], event["conversion"], event["parent"]) == ("converted", "merge", str(parent))
    with pytest.raises(ConversionError, match="already exists"):
        execute(command)


def test_merging_reads_the_text_of_the_run(parent: Path, tmp_path: Path) -> None:
    command = ["convert", "merge", str(parent), f"out={tmp_path / 'merged'}", "tokens=400", "rows=20"]
    text = parent.parents[1] / "text.jsonl"
    before = text.read_bytes()
    text.write_bytes(before.replace(b"router", b"retuor"))
    try:
        with pytest.raises(ConversionError, match="the run was trained on another text"):
            execute(command)
    finally:
        text.write_bytes(before)
    assert not list(tmp_path.iterdir())
