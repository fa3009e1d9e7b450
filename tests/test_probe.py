"""The randomization probe: models where the choice cannot matter, cannot help, and must matter."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiny import tiny_batch, tiny_config, tiny_state
from unipool_jax.analysis.observe import ForcedLayers, make_observed_step, text_positions
from unipool_jax.analysis.probe import (
    Difference,
    Intervention,
    Items,
    Probe,
    candidate_sets,
    deep_half,
    forced_choices,
    language_model_loss,
    paired_difference,
    probe,
    random_choices,
)
from unipool_jax.data.pipeline import Batch
from unipool_jax.model.transformer import forward
from unipool_jax.moe.routing import Forced, replaced, route
from unipool_jax.parallel.head import cross_entropy
from unipool_jax.training.state import init_balance

FORWARD = jax.jit(forward, static_argnums=0)
ONE = "moe.score_constant=one"  # no need to estimate a constant for every number of experts


def test_nothing_forced_is_the_model_itself() -> None:
    config = tiny_config("vanilla_aux_free", "moe.top_k=2", "model.remat=moe")
    state, batch = tiny_state(config), tiny_batch(config)
    step = make_observed_step(config)
    seen = step(state.params, state.balance, batch, None)
    logits, stats = FORWARD(config, state.params, batch.inputs, state.balance.expert_bias_GNE)
    np.testing.assert_allclose(seen.loss_BS, cross_entropy(logits, batch.targets), atol=1e-5)
    counts = np.asarray(stats.counts_AE).sum(axis=2).reshape(config.model.num_layers, -1)
    found = [np.bincount(np.ravel(e), minlength=config.experts_per_pool) for e in np.asarray(seen.experts_LNK)]
    assert np.array_equal(found, counts)
    # Forcing what the model chose anyway changes nothing, with either rule for the gates.
    for own in (False, True):
        again = step(state.params, state.balance, batch, ForcedLayers(seen.experts_LNK, jnp.asarray(own)))
        np.testing.assert_allclose(again.loss_BS, seen.loss_BS, atol=1e-5)


def test_only_the_named_layer_is_replaced() -> None:
    config = tiny_config("unipool", "pool.groups=2", "moe.top_k=2", ONE)
    state, batch = tiny_state(config), tiny_batch(config)
    step = make_observed_step(config)
    before = np.asarray(step(state.params, state.balance, batch, None).experts_LNK)
    choice = Intervention(2, np.ones(config.experts_per_pool, bool), "learned")
    forced = forced_choices(config, choice, seed=0, items_B=np.arange(8), batch=batch)
    after = np.asarray(step(state.params, state.balance, batch, forced).experts_LNK)
    assert np.array_equal(after[:2], before[:2])
    assert np.array_equal(after[2], np.asarray(forced.experts_LNK)[2])
    assert not np.array_equal(after[2], before[2])


@pytest.mark.parametrize("method", ["unipool", "vanilla_aux_free"])
def test_gates_of_forced_experts_by_hand(method: str) -> None:
    config = tiny_config(method, "model.num_layers=1", "moe.experts_per_layer=4", "moe.top_k=2", ONE)
    router: Any = config.moe.router
    scores = jax.random.uniform(jax.random.key(1), (5, 4))
    routing = route(scores, scores, router=router, top_k=2)
    chosen = np.array([[3, 0], [1, 2], [-1, -1], [0, -1], [2, 1]], np.int32)
    for own in (False, True):
        found = replaced(routing, scores, Forced(jnp.asarray(chosen), jnp.asarray(own)), router)
        for token, slot in itertools.product(range(5), range(2)):
            expert = chosen[token, slot] if chosen[token, slot] >= 0 else int(routing.experts_NK[token, slot])
            assert int(found.experts_NK[token, slot]) == expert
            gate = float(routing.gates_NK[token, slot])
            if own and chosen[token, slot] >= 0:
                visited = np.asarray(found.experts_NK)[token]
                gate = float(scores[token, expert])
                if router == "sigmoid":
                    gate /= float(scores[token, visited[0]] + scores[token, visited[1]])
            assert float(found.gates_NK[token, slot]) == pytest.approx(gate, abs=1e-6)


def test_draws_are_even_without_replacement_and_independent_of_the_batch() -> None:
    key, candidates = jax.random.key(3), jnp.asarray([True, False, True, True, True, False])
    drawn = np.asarray(random_choices(key, jnp.arange(40), candidates, 100, 2))
    assert drawn.shape == (4000, 2)
    assert (drawn[:, 0] != drawn[:, 1]).all()
    pairs, counts = np.unique(drawn, axis=0, return_counts=True)
    assert pairs.tolist() == [list(p) for p in itertools.permutations([0, 2, 3, 4], 2)]
    # Multinomial with 12 equal cells of 333: standard deviation 17.5.
    assert np.abs(counts - 4000 / 12).max() < 5 * 17.5
    alone = np.asarray(random_choices(key, jnp.arange(7, 8), candidates, 100, 2))
    assert np.array_equal(alone, drawn[700:800])


def test_deep_half_and_candidates() -> None:
    assert deep_half(6) == [3, 4, 5]
    assert deep_half(5) == [3, 4]
    counts = np.array([5, 9, 9, 0, 1, 2, 3, 4, 6, 7, 5, 5])
    sets = candidate_sets(counts, top_k=1)
    assert sets["full_pool"].all()
    # 9 9 7 6 and the four fives and fours in order of id: experts 0, 10, 11 hold 5, expert 7 holds 4.
    assert np.flatnonzero(sets["top_8"]).tolist() == [0, 1, 2, 7, 8, 9, 10, 11]
    assert list(candidate_sets(counts[:8], top_k=1)) == ["full_pool"]
    assert list(candidate_sets(counts, top_k=9)) == ["full_pool"]


def test_candidates_are_what_the_layer_sees() -> None:
    counts, visible = np.zeros(12, int), np.arange(12) >= 2
    counts[11] = 5
    sets = candidate_sets(counts, top_k=1, visible_E=visible)
    assert np.flatnonzero(sets["full_pool"]).tolist() == list(range(2, 12))
    # Of experts without use those of low number come first, but none that is hidden.
    assert np.flatnonzero(sets["top_8"]).tolist() == [2, 3, 4, 5, 6, 7, 8, 11]
    assert list(candidate_sets(counts, 1, np.arange(12) >= 4)) == ["full_pool"]


def test_random_choices_stay_within_windows() -> None:
    """A layer of eight experts has no narrower set, and draws from all of them where others draw from their busiest."""
    visible = np.arange(20) < np.array([[4], [20], [8], [12]])
    asked: list[Intervention] = []

    def measure(intervention: Intervention | None) -> Items:
        asked.extend([] if intervention is None else [intervention])
        return Items(np.ones(3), np.ones(3))

    counts = np.tile(np.arange(20), (4, 1)) * visible
    found = probe(measure, counts, 1, [2, 3], visible_LE=visible)
    assert [c.candidates for c in found.conditions] == ["full_pool", "full_pool", "top_8", "top_8"]
    drawn = {
        layer: [np.flatnonzero(one.candidates_E).tolist() for one in asked if one.layer == layer] for layer in (2, 3)
    }
    assert drawn[2] == [list(range(8))] * 4
    assert drawn[3] == [list(range(12))] * 2 + [list(range(4, 12))] * 2
    assert [c.candidates for c in probe(measure, counts, 1, [0], visible_LE=visible).conditions] == ["full_pool"] * 2


def test_paired_differences_by_hand() -> None:
    base = Items(np.array([10.0, 20.0, 30.0]), np.array([10.0, 10.0, 10.0]))
    found = paired_difference(np.array([11.0, 23.0, 32.0]), base)
    # Differences per token 0.1, 0.3, 0.2: mean 0.2, standard deviation 0.1 over 3 items.
    assert found.mean == pytest.approx(0.2)
    assert found.standard_error == pytest.approx(0.1 / 3**0.5)
    one = Items(np.array([3.0]), np.array([4.0]))
    assert paired_difference(np.array([5.0]), one) == Difference(0.5, None)
    # What all settings share cancels, however large.
    noisy = Items(np.array([1e3, 5.0, 700.0]), np.ones(3))
    assert paired_difference(noisy.sums_I + 0.5, noisy).standard_error == pytest.approx(0.0, abs=1e-9)


def test_probe_averages_over_layers_and_draws() -> None:
    asked: list[Intervention | None] = []

    def measure(intervention: Intervention | None) -> Items:
        asked.append(intervention)
        worse = 0.0 if intervention is None else intervention.layer + 10 * intervention.draw
        return Items(np.array([4.0, 4.0]) + worse * np.array([1.0, 3.0]), np.array([2.0, 2.0]))

    found = probe(measure, np.ones((4, 16)), top_k=1, layers=[2, 3], draws=2)
    assert len(asked) == 1 + 2 * 2 * 2 * 2
    assert (found.learned, found.layers, found.draws) == (2.0, [2, 3], 2)
    assert [(c.candidates, c.gates) for c in found.conditions] == [
        ("full_pool", "learned"),
        ("full_pool", "own"),
        ("top_8", "learned"),
        ("top_8", "own"),
    ]
    for condition in found.conditions:
        assert [d.mean for d in condition.by_layer] == pytest.approx([7.0, 8.0])
        assert condition.average.mean == pytest.approx(7.5)
        # Items differ by 3.75 and 11.25 per unit of weight; both layers agree on that, so averaging does not help.
        assert condition.average.standard_error == pytest.approx(3.75)


CONFIG = tiny_config("unipool", "model.init_std=0.6", "moe.experts_per_layer=4", ONE)


def _batches(count: int = 6) -> list[Batch]:
    return [tiny_batch(CONFIG, seed) for seed in range(count)]


def _probed(params: Any, batches: list[Batch]) -> Probe:
    measure = language_model_loss(CONFIG, params, init_balance(CONFIG), lambda: batches)
    counts = np.ones((CONFIG.model.num_layers, CONFIG.experts_per_pool))
    return probe(measure, counts, CONFIG.moe.top_k, deep_half(CONFIG.model.num_layers))


def _own_words(params: Any, batches: list[Batch]) -> list[Batch]:
    """Targets drawn from the model's own predictions: by Gibbs' inequality no other distribution predicts better."""
    bias, drawn = init_balance(CONFIG).expert_bias_GNE, []
    for number, batch in enumerate(batches):
        logits, _ = FORWARD(CONFIG, params, batch.inputs, bias)
        targets = jax.random.categorical(jax.random.key(number), logits)
        drawn.append(batch._replace(targets=np.asarray(targets, np.int32)))
    return drawn


def test_experts_that_are_copies_of_each_other_do_not_matter() -> None:
    params = tiny_state(CONFIG).params
    bank = jax.tree.map(lambda x: jnp.broadcast_to(x[:, :1], x.shape), params["pools"]["bank"])
    params = params | {"pools": params["pools"] | {"bank": bank}}
    for condition in _probed(params, _own_words(params, _batches())).conditions:
        worst = max(abs(d.mean) for d in condition.by_layer)
        # With their own gates the drawn copies still differ: most have gate 0.
        assert worst < 1e-5 if condition.gates == "learned" else worst > 1e-3


def test_routers_that_know_nothing_about_the_text_lose_nothing() -> None:
    """An untrained model on random tokens: its choice is as good as any other."""
    quiet = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, init_std=0.05))
    for condition in _probed(tiny_state(quiet).params, _batches()).conditions:
        for difference in [*condition.by_layer, condition.average]:
            assert difference.standard_error is not None
            assert abs(difference.mean) < 4 * difference.standard_error + 1e-5
            assert abs(difference.mean) < 1e-3


def test_choices_that_matter_are_missed() -> None:
    """Text that only the learned choice predicts: every layer and condition gets worse, by many standard errors."""
    params = tiny_state(CONFIG).params
    found = _probed(params, _own_words(params, _batches()))
    assert len(found.conditions) == 4
    for condition in found.conditions:
        for difference in [*condition.by_layer, condition.average]:
            assert difference.standard_error is not None
            assert difference.mean > 5 * difference.standard_error > 0
        assert condition.average.mean > 0.05


def test_results_do_not_depend_on_the_batch_size_and_padding_counts_nowhere() -> None:
    params, whole = tiny_state(CONFIG).params, tiny_batch(CONFIG)
    whole.weights[-1, 3:] = 0
    padded = [
        whole.mapped(lambda a: a[:3]),
        whole.mapped(lambda a: a[3:6]),
        whole.mapped(lambda a: np.pad(a[6:], ((0, 1), (0, 0)))),
    ]
    choice = Intervention(3, np.ones(CONFIG.experts_per_pool, bool), "own")
    one, other = (
        language_model_loss(CONFIG, params, init_balance(CONFIG), partial(list, batches))(choice)
        for batches in ([whole], padded)
    )
    np.testing.assert_allclose(one.sums_I, other.sums_I, atol=1e-4)
    assert one.weights_I.tolist() == other.weights_I.tolist() == [8.0] * 7 + [3.0]
    assert text_positions(whole).sum() == 59
