"""Which tokens an expert gets, against the choices themselves."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tiny import tiny_batch, tiny_config, tiny_state
from unipool_jax.analysis.expert_tokens import expert_tokens
from unipool_jax.analysis.observe import make_observed_step


@pytest.mark.parametrize(("method", "groups"), [("unipool", 1), ("unipool", 2), ("vanilla", 4)])
def test_tokens_of_every_expert_are_those_that_chose_it(method: str, groups: int) -> None:
    config = tiny_config(method, f"pool.groups={groups}", "moe.top_k=2", "moe.score_constant=one")
    state = tiny_state(config)
    batches = [tiny_batch(config, seed) for seed in range(2)]
    batches[1].weights[-1] = 0  # padding is routed too, and not counted
    experts = config.experts_per_pool
    expected_MLV = np.zeros((config.total_experts, 4, 64), np.int64)
    for batch in batches:
        chosen_LNK = jax.device_get(make_observed_step(config)(state.params, state.balance, batch, None)).experts_LNK
        for layer, chosen_NK in enumerate(chosen_LNK):
            first = layer // (4 // groups) * experts
            for token, weight, chosen in zip(batch.inputs.flat, batch.weights.flat, chosen_NK, strict=True):
                for expert in chosen if weight else ():
                    expected_MLV[first + expert, layer, token] += 1
    for expert, expected_LV in enumerate(expected_MLV):
        found = expert_tokens(config, state.params, state.balance, lambda: batches, expert)
        np.testing.assert_array_equal(found, expected_LV)
    assert expected_MLV.sum() == 4 * 2 * sum(batch.weights.sum() for batch in batches)
