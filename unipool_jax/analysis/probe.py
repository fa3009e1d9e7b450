"""Routing-randomization probe: how much worse is a model when one layer routes tokens to random experts?

For each layer of the deep half separately, the router's choice is replaced by k experts drawn uniformly without
replacement for each token; all other layers are unchanged (method M8.1; arXiv 2605.06665, table 1). A small
increase in loss means that the learned routing of that layer hardly mattered.

`probe` takes any `Measure`, which returns sums and weights of items (windows of text, questions of a task). Differences
are paired item by item, so that their standard errors exclude the variance that all conditions share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unipool_jax.analysis.observe import ForcedLayers, ObservedStep, make_observed_step
from unipool_jax.config.schema import Config
from unipool_jax.data.pipeline import Batch
from unipool_jax.training.state import BalanceState

MATCHED = 8
"""Candidates of the matched variant: the experts per layer of the published vanilla mixture (method M8.1)."""

CandidateSet = Literal["full_pool", "top_8"]
"""All experts that the layer sees, or the `MATCHED` ones that it uses most."""
GateRule = Literal["learned", "own"]


class Intervention(NamedTuple):
    """Random routing in one layer."""

    layer: int
    candidates_E: np.ndarray
    """Experts to draw from among those of the layer's pool, bool."""
    gates: GateRule
    """Gates of the drawn experts: those of the experts they replace, slot by slot, or their own scores."""
    draw: int = 0
    """Index of the random draw."""


class Items(NamedTuple):
    """A measurement, item by item: its value is `sum(sums) / sum(weights)`."""

    sums_I: np.ndarray
    """Summed loss (or any score) of each item, float64."""
    weights_I: np.ndarray
    """Tokens (or questions) of each item, float64."""


Measure = Callable[[Intervention | None], Items]
"""Measures the model without (None) or with an intervention; always the same items in the same order."""


class Difference(NamedTuple):
    """A paired difference of two measurements."""

    mean: float
    """Weighted mean over items: with intervention minus without."""
    standard_error: float | None
    """Over items; None for a single item."""


class Condition(NamedTuple):
    """Results of one set of candidates with one rule for gates."""

    candidates: CandidateSet
    gates: GateRule
    by_layer: list[Difference]
    """In the order of `Probe.layers`, averaged over draws."""
    average: Difference
    """Over layers; its standard error accounts for layers being measured on the same items."""


class Probe(NamedTuple):
    """Results of the probe."""

    learned: float
    """The measurement without intervention."""
    layers: list[int]
    """Probed layers, counted from 0."""
    draws: int
    conditions: list[Condition]
    items: int
    """Windows, or questions, over which the standard errors are."""


def deep_half(layers: int) -> list[int]:
    """Layers l >= L/2, counted from 0 (method M10.19)."""
    return [layer for layer in range(layers) if 2 * layer >= layers]


def paired_difference(sums_I: np.ndarray, base: Items) -> Difference:
    """Weighted mean of `sums - base.sums`, with the linearized standard error of a ratio of sums over items."""
    difference_I, weights_I = sums_I - base.sums_I, base.weights_I
    mean = float(difference_I.sum() / weights_I.sum())
    count = len(difference_I)
    if count < 2:
        return Difference(mean, None)
    residual_I = difference_I - mean * weights_I
    variance = float(np.square(residual_I).sum()) * count / (count - 1)
    return Difference(mean, variance**0.5 / float(weights_I.sum()))


def candidate_sets(
    counts_E: np.ndarray, top_k: int, visible_E: np.ndarray | None = None
) -> dict[CandidateSet, np.ndarray]:
    """Experts to draw from, bool `[E]`: all that the layer sees and, if these are more, the 8 that it uses most.

    Ties rank by id. With top_k above 8 there is no matched variant.

    Args:
      counts_E: routing counts of the layer on held-out text.
      top_k: experts to draw.
      visible_E: the experts that the layer sees, bool; None: all of its pool.
    """
    seen_E = np.ones(len(counts_E), bool) if visible_E is None else visible_E
    sets: dict[CandidateSet, np.ndarray] = {"full_pool": seen_E}
    if top_k <= MATCHED < seen_E.sum():
        busiest = np.argsort(np.where(seen_E, -counts_E.astype(np.int64), 1), kind="stable")[:MATCHED]
        sets["top_8"] = np.isin(np.arange(len(counts_E)), busiest)
    return sets


def probe(
    measure: Measure,
    counts_LE: np.ndarray,
    top_k: int,
    layers: Sequence[int],
    draws: int = 1,
    visible_LE: np.ndarray | None = None,
) -> Probe:
    """Randomize each of `layers` separately, for every set of candidates and every rule for gates.

    Args:
      measure: called once without intervention and once per layer, condition and draw.
      counts_LE: routing counts per layer and expert on held-out text, for the matched variant.
      top_k: experts per token.
      layers: layers to randomize, one at a time; see `deep_half`.
      draws: random draws to average over.
      visible_LE: with windows, the experts that each layer sees, bool. A layer that sees no more than 8 draws from all
        of them in both variants.
    """
    base = measure(None)
    rules: tuple[GateRule, ...] = ("learned", "own")
    sets = {
        layer: candidate_sets(counts_LE[layer], top_k, None if visible_LE is None else visible_LE[layer])
        for layer in layers
    }
    conditions = []
    for name in max(sets.values(), key=len):
        for gates in rules:
            sums_I = np.zeros((len(layers), len(base.sums_I)))
            for row, layer in enumerate(layers):
                candidates_E = sets[layer].get(name, sets[layer]["full_pool"])
                for draw in range(draws):
                    sums_I[row] += measure(Intervention(layer, candidates_E, gates, draw)).sums_I / draws
            by_layer = [paired_difference(row_I, base) for row_I in sums_I]
            conditions.append(Condition(name, gates, by_layer, paired_difference(sums_I.mean(axis=0), base)))
    return Probe(float(base.sums_I.sum() / base.weights_I.sum()), list(layers), draws, conditions, len(base.sums_I))


@functools.partial(jax.jit, static_argnums=(3, 4))
def random_choices(key: jax.Array, items_B: jax.Array, candidates_E: jax.Array, length: int, top_k: int) -> jax.Array:
    """`top_k` distinct candidates for each position, int32 `[B length, k]`, all ordered choices equally likely.

    The draw of an item depends only on `key` and the item's index, not on its batch.

    Args:
      key: of the layer and the draw.
      items_B: index of each item (window).
      candidates_E: experts to draw from, bool; at least `top_k`.
      length: S, positions of an item.
      top_k: experts to draw.
    """

    def of_item(item: jax.Array) -> jax.Array:
        noise_SE = jax.random.uniform(jax.random.fold_in(key, item), (length, candidates_E.shape[0]))
        return jax.lax.top_k(jnp.where(candidates_E, noise_SE, -1.0), top_k)[1].astype(jnp.int32)

    return jax.vmap(of_item)(items_B).reshape(-1, top_k)


def forced_choices(
    config: Config, intervention: Intervention, seed: int, items_B: np.ndarray, batch: Batch
) -> ForcedLayers:
    """The experts that `intervention` forces on a batch, whose rows are the items with these indices, int32."""
    layers, length, top_k = config.model.num_layers, batch.inputs.shape[1], config.moe.top_k
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), intervention.draw), intervention.layer)
    drawn_NK = random_choices(key, jnp.asarray(items_B), jnp.asarray(intervention.candidates_E), length, top_k)
    experts_LNK = jnp.full((layers, *drawn_NK.shape), -1, jnp.int32).at[intervention.layer].set(drawn_NK)
    return ForcedLayers(experts_LNK, jnp.asarray(intervention.gates == "own"))


def language_model_loss(
    config: Config,
    params: Any,
    balance: BalanceState,
    batches: Callable[[], Iterable[Batch]],
    seed: int = 0,
    step: ObservedStep | None = None,
) -> Measure:
    """The measure of loss in nats per token on text; items are windows.

    Args:
      config: the model.
      params: its parameters.
      balance: its balance state.
      batches: returns the same batches at each call, all of one shape.
      seed: of the random experts.
      step: from `make_observed_step`, if the caller already has one.
    """
    observed_step = step or make_observed_step(config)

    def measure(intervention: Intervention | None) -> Items:
        sums, weights = [], []
        for items_B, batch in _numbered(batches()):
            forced = None if intervention is None else forced_choices(config, intervention, seed, items_B, batch)
            loss_BS = observed_step(params, balance, jax.device_put(batch), forced).loss_BS
            text_B = batch.weights.sum(axis=1, dtype=np.float64)
            sums.append(np.asarray(loss_BS).sum(axis=1, dtype=np.float64)[text_B > 0])
            weights.append(text_B[text_B > 0])
        return Items(np.concatenate(sums), np.concatenate(weights))

    return measure


def _numbered(batches: Iterable[Batch]) -> Iterator[tuple[np.ndarray, Batch]]:
    """Batches with the indices of their rows, int32."""
    first = 0
    for batch in batches:
        yield np.arange(first, first + len(batch.inputs), dtype=np.int32), batch
        first += len(batch.inputs)
