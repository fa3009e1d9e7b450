"""Spikes are counted as the definition says, and a resumed count is that of one run."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from unipool_jax.training.spikes import Spikes


def shares(values: np.ndarray) -> tuple[float, int]:
    """Share of the steps after the first 50 above the median of the 50 before by 6 median absolute deviations."""
    found = 0
    for step in range(50, len(values)):
        before = values[step - 50 : step]
        middle = np.median(before)
        found += values[step] > middle + 6 * np.median(np.abs(before - middle))
    return found / (len(values) - 50), found


def test_shares_are_those_of_the_definition_across_a_resume() -> None:
    random = np.random.default_rng(0)
    losses = 3 + 0.1 * random.standard_t(2, size=400)
    norms = np.abs(random.standard_t(3, size=400))
    whole, half = Spikes(), Spikes()
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        if step == 170:
            half = Spikes(json.loads(json.dumps(half.document())))
        for spikes in (whole, half):
            spikes.add({"loss/lm": loss, "grad_norm": norm})
    expected, found = shares(losses)
    assert 0 < found < 40
    assert whole.shares() == half.shares() == {"spikes/loss": expected, "spikes/grad_norm": shares(norms)[0]}
    assert whole.document() == half.document()


def test_early_steps_and_falls_are_no_spikes_and_what_is_not_finite_is() -> None:
    spikes = Spikes({"step": 3})
    values = [*np.linspace(5, 4, 50), 1.0, math.nan, 4.0]
    assert spikes.shares() == {"spikes/loss": None, "spikes/grad_norm": None}
    for value in values:
        spikes.add({"loss/lm": value, "grad_norm": 1.0})
    assert spikes.shares() == {"spikes/loss": pytest.approx(1 / 3), "spikes/grad_norm": 0.0}
    before = spikes.document()["spikes"]["loss"]["before"]
    assert len(before) == 50
    assert all(map(math.isfinite, before))
