"""One training step: losses, accumulation, balance state, non-finite updates (method M4)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from tiny import METHODS, tiny_batch, tiny_config, tiny_state
from unipool_jax.config.schema import Config
from unipool_jax.data.pipeline import Batch
from unipool_jax.model.transformer import forward
from unipool_jax.moe.balance import load_fractions, pool_loss
from unipool_jax.training.optimizer import make_schedule
from unipool_jax.training.state import TrainState
from unipool_jax.training.step import make_eval_step, make_train_step


def _copy(state: TrainState) -> TrainState:
    """The step donates its state."""
    return jax.tree.map(jnp.copy, state)


def _step(config: Config, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
    return make_train_step(config)(_copy(state), batch)


def _accumulating(config: Config, microbatch_size: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, microbatch_size=microbatch_size))


@pytest.mark.parametrize("method", METHODS)
def test_losses_match_numpy_and_are_reported_apart(method: str) -> None:
    config = tiny_config(method, "loss.z_coefficient=0.01" if method == "unipool" else "loss.z_coefficient=0")
    state, batch = tiny_state(config), tiny_batch(config)
    forward = oracles.Forward(config, state.params, batch.inputs)
    _, metrics = _step(config, state, batch)

    lm = forward.lm_loss(batch.targets)
    balance: Any = 0.0
    if config.loss.balance == "switch":
        half = len(forward.scores[0]) // 2  # groups of four sequences out of eight
        balance = sum(
            np.mean([oracles.switch_loss(s[p], e[p], 1e-2) for p in (slice(half), slice(half, None))])
            for s, e in zip(forward.scores, forward.experts, strict=True)
        )
    elif config.loss.balance == "pool":
        balance = oracles.pool_loss(forward.scores, forward.experts, config.loss.pool_coefficient)
    assert float(metrics["loss/lm"]) == pytest.approx(lm, rel=1e-4)
    assert float(metrics["loss/balance"]) == pytest.approx(balance, rel=1e-4)
    assert float(metrics["loss/total"]) == pytest.approx(lm + balance + float(metrics["loss/z"]), rel=1e-4)
    if method == "unipool":
        assert float(metrics["loss/z"]) > 0
    if method != "dense":
        np.testing.assert_array_equal(metrics["counts_LE"], forward.counts())


_SLOW_METHODS = [pytest.param(name, marks=pytest.mark.slow) for name in ("shared_layer_aux", "vanilla_aux_free")]


@pytest.mark.parametrize("method", ["unipool", "vanilla", *_SLOW_METHODS])
def test_the_number_of_micro_batches_changes_nothing(method: str) -> None:
    config = tiny_config(method, "loss.z_coefficient=0.01")
    batch = tiny_batch(config)
    # Uneven weights: the mean must still be over all tokens of the batch.
    weights = batch.weights.copy()
    weights[:3, 2:] = 0
    batch = batch._replace(weights=weights)
    state = tiny_state(config)
    whole_state, whole = _step(config, state, batch)
    parts_state, parts = _step(_accumulating(config, 4), state, batch)
    for name in ("loss/lm", "loss/balance", "loss/z", "loss/total", "grad_norm"):
        assert float(parts[name]) == pytest.approx(float(whole[name]), rel=1e-5), name
    np.testing.assert_array_equal(parts["counts_LE"], whole["counts_LE"])
    # The first moment is (1 - beta1) x clipped gradient: gradients agree, leaf by leaf.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7),
        (parts_state.opt_state, parts_state.balance),
        (whole_state.opt_state, whole_state.balance),
    )


@pytest.mark.parametrize("words", ["", pytest.param("loss.scope=layer", marks=pytest.mark.slow)])
def test_the_pool_loss_of_balance_groups_is_the_mean_of_their_own(words: str) -> None:
    """From the whole batch to single sequences, in a micro-batch or over several: fractions and scores of a group."""
    config = tiny_config("unipool", "model.num_layers=2", "moe.top_k=2", *words.split())
    state, batch = tiny_state(config), tiny_batch(config)
    found = oracles.Forward(config, state.params, batch.inputs)
    sequences, length = batch.inputs.shape
    scores, experts = ([x.reshape(sequences, length, -1) for x in layers] for layers in (found.scores, found.experts))
    expected = {}
    for groups in (1, 2, 4, 8):
        runs = np.split(np.arange(sequences), groups)
        sets = [[layer] for layer in range(len(scores))] if words else [list(range(len(scores)))]
        expected[groups] = np.mean(
            [
                sum(
                    oracles.pool_loss(
                        [scores[layer][run].reshape(-1, scores[0].shape[-1]) for layer in layers],
                        [experts[layer][run].reshape(-1, 2) for layer in layers],
                        config.loss.pool_coefficient,
                    )
                    for layers in sets
                )
                for run in runs
            ]
        )
    assert expected[8] > 1.01 * expected[1]  # a few tokens are never as even as many
    micro_batches = {2: (8, 2), 8: (4,)} if words else {2: (8, 2)}
    for groups, sizes in micro_batches.items():
        grouped = dataclasses.replace(config, loss=dataclasses.replace(config.loss, balance_groups=groups))
        moments = []
        for size in sizes:
            after, metrics = _step(_accumulating(grouped, size), state, batch)
            assert float(metrics["loss/balance"]) == pytest.approx(expected[groups], rel=1e-4), (groups, size)
            moments.append(after.opt_state)
        for other in moments[1:]:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7), other, moments[0])


def test_previous_statistics_are_one_micro_batch_behind_and_start_empty() -> None:
    config = tiny_config("unipool", "loss.pool_statistics=previous", "optimizer.learning_rate=0", 
                         "optimizer.min_learning_rate=0")  # fmt: skip
    state = tiny_state(config)
    first, second = tiny_batch(config, 1), tiny_batch(config, 2)
    state, metrics = _step(config, state, first)
    assert float(metrics["loss/balance"]) == 0
    before = oracles.Forward(config, state.params, first.inputs)
    now = oracles.Forward(config, state.params, second.inputs)
    n_prev = before.counts().mean(0)
    tokens, layers, experts = second.inputs.size, 4, 8
    expected = 1e-2 * experts / (tokens**2 * layers) * sum((n_prev * s.sum(0)).sum() for s in now.scores)
    _, metrics = _step(config, state, second)
    assert float(metrics["loss/balance"]) == pytest.approx(expected, rel=1e-4)

    # Within a step the state moves from one micro-batch to the next.
    halves: Batch = jax.tree.map(lambda a, b: np.concatenate([a[:4], b[:4]]), first, second)
    _, metrics = _step(_accumulating(config, 4), tiny_state(config), halves)
    one = oracles.Forward(config, state.params, first.inputs[:4])
    two = oracles.Forward(config, state.params, second.inputs[:4])
    expected = oracles.pool_loss(two.scores, one.experts, 1e-2) / 2  # the first of the two micro-batches has none
    assert float(metrics["loss/balance"]) == pytest.approx(expected, rel=1e-4)


def test_balance_losses_give_experts_no_gradient() -> None:
    """With the language-model loss weighted away, only routers, what feeds them, and nothing in the bank, move."""
    config = tiny_config("unipool", "moe.top_k=2")
    batch = tiny_batch(config)
    state = tiny_state(config)

    def balance_only(params: Any) -> jax.Array:
        # One layer of routing: the last; earlier layers feed it through their experts.
        _, stats = forward(config, params, batch.inputs, state.balance.expert_bias_GNE)
        first = jax.tree.map(lambda x: x[:, :1], stats)
        return pool_loss(first, load_fractions(stats.counts_AE), batch.inputs.size, 1.0)

    grads = jax.grad(balance_only)(state.params)["pools"]
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads["bank"]))
    assert grads["layers"]["mixture"]["router"][0, 0].any()
    assert grads["layers"]["mixture"]["scale"][0, 0] > 0


def test_expert_bias_follows_the_counts_of_the_whole_step() -> None:
    config = _accumulating(tiny_config("vanilla_aux_free"), 4)
    state, batch = tiny_state(config), tiny_batch(config)
    new_state, metrics = _step(config, state, batch)
    counts = np.asarray(metrics["counts_LE"], np.float64)
    expected = 1e-3 * np.sign(counts.mean(1, keepdims=True) - counts)
    np.testing.assert_allclose(new_state.balance.expert_bias_GNE.reshape(4, 2), expected, rtol=1e-6)


def test_a_non_finite_step_leaves_everything_but_the_step_count() -> None:
    config = tiny_config("vanilla_aux_free")
    state, batch = tiny_state(config), tiny_batch(config)
    poisoned = batch._replace(weights=np.where(np.arange(8)[:, None] == 3, np.nan, batch.weights).astype(np.float32))
    new_state, metrics = _step(config, state, poisoned)
    assert not metrics["finite"]
    assert int(new_state.step) == int(state.step) + 1
    jax.tree.map(np.testing.assert_array_equal, new_state._replace(step=state.step), state)
    _, metrics = _step(config, state, batch)
    assert metrics["finite"]


def test_the_learning_rate_reported_is_that_of_the_update() -> None:
    """A skipped step makes no update, and the schedule goes on from the last one that was made."""
    config = tiny_config("unipool")
    step, batches = make_train_step(config), [tiny_batch(config, seed) for seed in range(3)]
    infinite = batches[0]._replace(weights=np.full_like(batches[0].weights, np.inf))

    def run(*batches: Batch) -> tuple[list[float], TrainState]:
        state, rates = tiny_state(config), []
        for batch in batches:
            state, metrics = step(state, batch)
            rates.append(float(metrics["learning_rate"]))
        return rates, state

    plain, expected = run(*batches)
    assert plain == [float(make_schedule(config.optimizer, config.train.steps)(count)) for count in range(3)]
    assert len(set(plain)) == 3
    skipping, state = run(batches[0], infinite, *batches[1:])
    assert skipping == [plain[0], plain[1], *plain[1:]]
    # The same parameters to the bit, so those were the rates in use.
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state.params, expected.params))


def test_a_step_is_traced_once_and_so_is_its_successor() -> None:
    config = tiny_config("unipool")
    step, state = make_train_step(config), tiny_state(config)
    for seed in range(3):
        state, _ = step(state, tiny_batch(config, seed))
    assert step._cache_size() == 1  # type: ignore[attr-defined]


def test_evaluation_sums_match_numpy_and_count_bytes() -> None:
    config = tiny_config("unipool")
    state, batch = tiny_state(config), tiny_batch(config)
    weights = batch.weights.copy()
    weights[2, 5:] = 0
    token_bytes = jnp.arange(64, dtype=jnp.int32) % 5
    sums = make_eval_step(config)(state.params, state.balance, batch._replace(weights=weights), token_bytes)
    log_probability = np.log(oracles.softmax(oracles.Forward(config, state.params, batch.inputs).logits))
    losses = -np.take_along_axis(log_probability, batch.targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(sums.loss_B, (losses * weights).sum(1), rtol=1e-4)
    np.testing.assert_array_equal(sums.tokens_B, weights.sum(1))
    np.testing.assert_array_equal(sums.bytes_B, (token_bytes[batch.targets] * (weights > 0)).sum(1))


def test_the_pool_coefficient_rises_from_zero() -> None:
    """With loss.pool_warmup_fraction=0.5 of 50 steps the loss of step s is s / 25 of the published one."""
    plain, risen = tiny_config("unipool"), tiny_config("unipool", "loss.pool_warmup_fraction=0.5")
    batch = tiny_batch(plain)
    whole = float(make_train_step(plain)(tiny_state(plain), batch)[1]["loss/balance"])
    step = make_train_step(risen)
    for completed, share in ((0, 0.0), (10, 0.4), (25, 1.0), (40, 1.0)):
        state = tiny_state(risen)._replace(step=jnp.array(completed, jnp.int32))
        assert float(step(state, batch)[1]["loss/balance"]) == pytest.approx(share * whole, rel=1e-5)
