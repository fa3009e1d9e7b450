"""Merges banks of trained experts: match experts on data, permute router rows, optionally fit the bank that is kept.

The procedure is that of marin (issue 8032): the kept experts stay what they are, and each dropped expert is replaced by
the kept one whose output is nearest on the inputs of the dropped one. Banks that are equal up to the order of their
experts merge exactly. Weights of matched experts are not averaged: hidden units of experts that were trained apart are
in no common order, so their average computes neither function.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np

from unipool_jax.config.schema import Config
from unipool_jax.convert.joining import banks_of, joined_weights, joins, read_experts, write_experts
from unipool_jax.convert.matching import costs, match
from unipool_jax.convert.prefit import Lesson, prefit
from unipool_jax.convert.requests import MergeRequest
from unipool_jax.convert.reservoirs import Sample, Samples, sample_inputs
from unipool_jax.convert.weights import Weights
from unipool_jax.data.pipeline import Batch
from unipool_jax.kernels.grouped_ffn import Bank


class BankErrors(NamedTuple):
    """How far the experts that a bank was merged into are from its own, on held-out inputs.

    Errors are the costs of `matching`, float64, NaN for an expert without inputs.
    """

    place_E: np.ndarray
    """Which of the kept experts takes the place of each, int64."""
    inputs_E: np.ndarray
    """Held-out inputs that errors are measured on, int64."""
    energy_E: np.ndarray
    """Weight of each expert in the error of the layers' output, float64."""
    identity_E: np.ndarray
    """If experts were paired in the order that they have."""
    matched_E: np.ndarray
    """Of the pairs, with the kept experts as they are."""
    fitted_E: np.ndarray | None
    """Of the pairs after prefit; None without."""

    def kinds(self) -> dict[str, np.ndarray]:
        """The errors that there are, by name."""
        found = {"identity": self.identity_E, "merged": self.matched_E}
        return found if self.fitted_E is None else found | {"prefit": self.fitted_E}

    def of_layers(self, errors_E: np.ndarray) -> float:
        """Squared error of the layers' outputs over their square, with one expert a token; NaN without inputs."""
        used_E = self.energy_E > 0
        if not used_E.any():
            return math.nan
        return float(errors_E[used_E] @ self.energy_E[used_E] / self.energy_E.sum())


class Merged(NamedTuple):
    """The result of a merge."""

    matched: Weights
    """With the kept experts as they were."""
    fitted: Weights | None
    """After prefit; None without."""
    errors: dict[tuple[int, int], BankErrors]
    """By bank of the source and the one that was kept for it; those of the kept ones are 0 until prefit."""


class _Group(NamedTuple):
    """Banks that become one; the first is kept."""

    banks: tuple[int, ...]
    experts: tuple[int, ...]
    """Where the merged bank lies in the target."""


def merge(config: Config, weights: Weights, target: Config, batches: Iterable[Batch], request: MergeRequest) -> Merged:
    """Merge a model of `config` into one of `target`.

    Args:
      config: of the source, on one device.
      weights: of the source.
      target: of the new model.
      batches: text that the model was trained on, of one shape.
      request: how.

    Raises:
      ConversionError: `target` cannot be had by joining banks of the source.
    """
    planned = joins(config, target)
    banks, new = banks_of(config, "the source"), banks_of(target, "the target")
    groups = [
        _Group((join.kept, *join.dropped), experts)
        for join, experts in zip(planned, new.experts, strict=True)
        if join.dropped
    ]
    own = {bank: read_experts(weights, banks.experts[bank]) for group in groups for bank in group.banks}
    samples = sample_inputs(config, weights, banks, own, batches, request.rows, request.seed)
    places = {
        bank: np.arange(len(banks.experts[bank]))
        if request.matching == "identity" or bank == group.banks[0]
        else match(own[bank], own[group.banks[0]], samples[bank].fit)
        for group in groups
        for bank in group.banks
    }
    matched = joined_weights(config, weights, target, places, planned)
    fitted = _fitted(config, matched, groups, own, samples, places, request) if request.prefit else None
    errors = {}
    for group in groups:
        merged = None if fitted is None else read_experts(fitted, group.experts)
        for bank in group.banks:
            pair = own[bank], own[group.banks[0]]
            errors[bank, group.banks[0]] = _errors(*pair, merged, places[bank], samples[bank].held_out)
    return Merged(matched, fitted, errors)


def _fitted(
    config: Config,
    matched: Weights,
    groups: list[_Group],
    own: dict[int, Bank],
    samples: dict[int, Samples],
    places: dict[int, np.ndarray],
    request: MergeRequest,
) -> Weights:
    """The merged model with its joined banks fitted, each on what all of its layers are given."""
    found = Weights(jax.tree.map(np.copy, matched.params), matched.expert_bias_GNE)
    for group in groups:
        lessons = [Lesson(own[bank], samples[bank].fit, places[bank]) for bank in group.banks]
        start = own[group.banks[0]]
        fitted = prefit(start, lessons, config.optimizer, request.prefit_rate, request.prefit, request.seed)
        write_experts(found, group.experts, fitted)
    return found


def _errors(own: Bank, kept: Bank, fitted: Bank | None, place_E: np.ndarray, sample: Sample) -> BankErrors:
    every = np.arange(len(place_E))
    cost_EE, energy_E = costs(own, kept, sample)
    return BankErrors(
        place_E=place_E,
        inputs_E=(sample.weights_ER > 0).sum(axis=1),
        energy_E=energy_E,
        identity_E=cost_EE[every, every],
        matched_E=cost_EE[every, place_E],
        fitted_E=None if fitted is None else costs(own, fitted, sample)[0][every, place_E],
    )
